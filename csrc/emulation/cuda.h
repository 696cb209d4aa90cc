// Runs an unmodified kernel file on the host: a fiber for every CUDA thread, one block at a time.
//
// Warps run in a random order, drawn from a seed, each as far as it can before the next one: with almost any seed this
// order exposes a missing barrier, which round-robin would hide. A deadlock (a warp that waits for a lane that never comes,
// a barrier that not all threads reach) raises, and so does what is against the rules of TMA (gemm/hopper.cuh). Shared memory
// declared in a kernel is a static variable, which keeps the values of the last block; dynamic shared memory is filled with
// 0xCD.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <vector_types.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulation::launch((grid), (block), (shared_bytes), [=] { (kernel)(__VA_ARGS__); }))
#define DYNAMIC_SHARED(name) unsigned char* const name = emulation::state().shared.data()

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

enum class Wait { none, warp, block, event, done };

struct Fiber {
  static constexpr size_t stack_bytes = 64 * 1024;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  ucontext_t entry{};
  jmp_buf resume{};
  bool entered = false, polling = false;
  int copies = 0, fenced = 0;  // waits for TMA copies that it has passed, and how many of them its last fence covers
  Wait wait = Wait::none;
  uint3 index{};
};

struct Warp {
  uint32_t arrived = 0;
  uint64_t sent[32], received[32];
};

struct State {
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused by later launches
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::function<void()> kernel;
  jmp_buf scheduler{};
  Fiber* current = nullptr;
  int current_index = 0;
  int threads = 0;
  bool progress = false;  // since the last round a fiber did more than poll an event
  std::string failure;    // why a thread stopped the kernel
  std::mt19937_64 random{0};
  std::mutex one_launch;
  uint64_t launches = 0;  // of kernels, since the library was loaded
};

State& state();
void seed(uint64_t value);
void wait(Wait reason);
void wait_until(const std::function<bool()>& happened);  // polls for an event that other threads of the block cause
void fail(const std::string& reason);                    // stops the kernel from within a thread: the launch raises
std::vector<const Fiber*> lanes_of_warp();               // those of the current thread's warp, itself included
int launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel);
uint64_t exchange(uint32_t mask, uint64_t value, int source_lane);

template <typename T>
T shuffle(uint32_t mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return state().current_index % 32; }

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::Wait::block); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulation::exchange(mask, 0, emulation::lane()); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int lane = emulation::lane();
  return emulation::shuffle(mask, value, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32) {
  const int lane = emulation::lane(), source = lane ^ distance;
  return emulation::shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32) {
  const int lane = emulation::lane(), source = lane + distance;
  return emulation::shuffle(mask, value, source / width == lane / width ? source : lane);
}

inline uint32_t __ballot_sync(uint32_t mask, bool x) {
  uint32_t bits = uint32_t(x) << emulation::lane();
  for (int distance = 1; distance < 32; distance *= 2) bits |= __shfl_xor_sync(mask, bits, distance);
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

// Fibers switch only where they wait, so these are atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}

// Four of the eight bytes of `low` and `high`, chosen by the digits of `selector`.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
