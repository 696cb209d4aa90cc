// Hopper's asynchronous units: barriers that count bytes (mbarrier), copies of boxes of a matrix to shared memory (TMA),
// and the matmuls of a warpgroup (wgmma). Each in PTX, and in plain C++ that moves the same data for the emulation.
//
// Source: PTX ISA 8.0, sections on mbarrier, cp.async.bulk.tensor and wgmma. The instructions exist only for sm_90a: a
// kernel compiled for another target returns at once (kCompiledFor), and the host refuses other GPUs.
#pragma once

#include "../common/vec.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace triaxis {
namespace hopper {

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kCompiledFor = false;
#else
constexpr bool kCompiledFor = true;
#endif

constexpr int kWarpgroup = 128;   // threads that issue a wgmma together
constexpr int kSwizzle = 128;     // bytes of a row of a swizzled box
constexpr int kSwizzleRows = 8;   // the swizzle repeats after these rows, 1024 bytes, to which boxes are aligned
constexpr int kMmaM = 64, kMmaN = 128, kMmaK = 32;  // the shape of one wgmma; k is 32 bytes of FP8
constexpr int kFragment = kMmaM * kMmaN / kWarpgroup;  // accumulators of a thread

// Where a swizzled box keeps byte `at` of the unswizzled one: units of 16 bytes are permuted within a row, by the row, so
// that neither a row nor a column of units has bank conflicts.
__host__ __device__ constexpr uint32_t swizzled(uint32_t at) { return at ^ ((at / kSwizzle % kSwizzleRows) * 16); }

// Row and column of a thread's accumulator i; `thread` is its place in the warpgroup.
__host__ __device__ constexpr int fragment_row(int thread, int i) {
  return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8;
}
__host__ __device__ constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// wgmma's descriptor of a matrix at `address` in shared memory, swizzled, 128 bytes a row: its start and the distance
// between groups of 8 rows in units of 16 bytes, and the kind of swizzle. With this swizzle the other distance is ignored.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint64_t distance = kSwizzle * kSwizzleRows / 16, swizzle_128 = 1;
  return (address & 0x3ffff) / 16 | uint64_t(1) << 16 | distance << 32 | swizzle_128 << 62;
}

// The same matrix from `bytes` further along its rows.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

#ifdef __CUDACC__

using TensorMap = CUtensorMap;

struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes barriers that this thread initialized visible to TMA; a __syncthreads() makes them visible to the block.
__device__ __forceinline__ void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and extends the phase until `bytes` more have been copied.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over. A new barrier is in phase 0; of parity 1 the phase before counts as over.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n\t.reg .pred over;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, over;\n\t}"
        : "=r"(over)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (over == 0);
}

// Starts a TMA copy of the map's box at (row, column) to `to`, with zeros outside the matrix; its bytes count for the
// barrier, whole box or not.
__device__ __forceinline__ void copy(const TensorMap& map, void* to, Barrier& barrier, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// Reads shared memory that TMA has filled. It needs a fence_reads() before the memory is given back to TMA.
template <int kSize>
__device__ __forceinline__ Vec<float, kSize> read_copied(const float* from) {
  return load<kSize>(from);
}

// Orders what this thread has read from shared memory before later copies of TMA to the same place. A barrier does not: it
// orders the thread's accesses with those of other threads, while TMA accesses memory in another way (the async proxy) and
// may overwrite what a load that was issued before the arrival has not yet read. Every thread that has read needs it, and
// then the warp is synchronized, before one lane arrives.
__device__ __forceinline__ void fence_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving accesses to the accumulators across this point.
__device__ __forceinline__ void pin(float (&d)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Before the first wgmma that writes `d`.
__device__ __forceinline__ void begin_mma(float (&d)[kFragment]) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// One wgmma: d = a · bᵀ, or += with `add`, for a [64, 32] and b [128, 32] in E4M3; asynchronous until wait_mma().
__device__ __forceinline__ void mma(float (&d)[kFragment], uint64_t a, uint64_t b, bool add) {
#define TRIAXIS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
  asm volatile(
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %66, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, add, 1, 1;\n\t}"
      : TRIAXIS_8(0), TRIAXIS_8(8), TRIAXIS_8(16), TRIAXIS_8(24), TRIAXIS_8(32), TRIAXIS_8(40), TRIAXIS_8(48), TRIAXIS_8(56)
      : "l"(a), "l"(b), "r"(int(add)));
#undef TRIAXIS_8
}

__device__ __forceinline__ void commit_mma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until the wgmmas are done: `d` may be read, and their operands overwritten.
__device__ __forceinline__ void wait_mma(float (&d)[kFragment]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(d);
}

// The tensor map (TMA's view) of a row-major matrix of bytes, whose boxes are swizzled, or of floats. Its rows start at
// multiples of 16 bytes, and a row of a box is a multiple of 16 bytes. The encoder is the driver's, found at run time.
template <typename T>
int make_tensor_map(TensorMap& map, const T* data, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 4);
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (encode == nullptr) return TRIAXIS_NO_TENSOR_MAP;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {columns * sizeof(T)};
  const cuuint32_t box[] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult failed = encode(
      &map, sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, const_cast<T*>(data), sizes,
      strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      sizeof(T) == 1 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return failed == CUDA_SUCCESS ? 0 : TRIAXIS_NO_TENSOR_MAP;
}

#else

// The emulation stops a kernel, and says why, at what a GPU refuses (an illegal instruction, a tensor map that the driver
// does not make) and at what goes wrong on a GPU only sometimes (memory given back to TMA without fence_reads()).

struct TensorMap {
  const unsigned char* data;
  int64_t rows, columns;
  int bytes, box_rows, box_columns;
};

struct alignas(8) Barrier {
  int arrivals, missing, missing_bytes;
  bool copied;  // TMA copies count for it: who waits for it reads what TMA has written
  uint32_t phase;

  void complete() {
    if (missing != 0 || missing_bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};

constexpr uint32_t kSharedStart = 128;  // where shared memory starts: aligned to no more than CUDA promises

inline uint32_t shared_address(const void* p) {
  return kSharedStart + uint32_t(static_cast<const unsigned char*>(p) - emulation::state().shared.data());
}

inline unsigned char at_shared_address(uint32_t address) { return emulation::state().shared[address - kSharedStart]; }

inline void init(Barrier& barrier, int arrivals) { barrier = {arrivals, arrivals, 0, false, 0}; }
inline void fence_init() {}

// One lane arrives for its warp: all lanes must have passed the waits for copies that it has passed, and have fenced what
// they read behind them. Lanes may be ahead.
inline void require_fenced_reads() {
  const int copies = emulation::state().current->copies;
  for (const auto* lane : emulation::lanes_of_warp()) {
    if (lane->copies < copies)
      emulation::fail("a lane arrives at a barrier for its warp before all lanes are there: __syncwarp() is missing");
    if (lane->fenced < copies)
      emulation::fail("a lane arrives at a barrier after reads of memory that TMA filled, and fence_reads() is missing");
  }
}

inline void arrive(Barrier& barrier) {
  require_fenced_reads();
  --barrier.missing;
  barrier.complete();
}

inline void arrive_expecting(Barrier& barrier, int bytes) {
  barrier.missing_bytes += bytes;
  barrier.copied = true;
  arrive(barrier);
}

inline void wait(Barrier& barrier, uint32_t parity) {
  emulation::wait_until([&] { return barrier.phase % 2 != parity; });
  emulation::state().current->copies += barrier.copied;  // it will read, also by loads that are not read_copied()
}

template <int kSize>
Vec<float, kSize> read_copied(const float* from) {
  auto& self = *emulation::state().current;
  self.fenced = std::min(self.fenced, self.copies - 1);
  return load<kSize>(from);
}

inline void fence_reads() { emulation::state().current->fenced = emulation::state().current->copies; }

inline void require_rules_of_copy(const TensorMap& map, void* to, Barrier& barrier, int column) {
  const uint32_t address = shared_address(to), alignment = map.bytes == 1 ? kSwizzle * kSwizzleRows : 128;
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (int64_t(column) * map.bytes % 16 != 0)
    emulation::fail("TMA copies from column " + text(column) + ", " + text(int64_t(column) * map.bytes) +
                    " bytes into a row: not a multiple of 16 bytes");
  if (address % alignment != 0)
    emulation::fail("TMA copies to address " + text(address) + " of shared memory: not a multiple of " + text(alignment));
  if (address - kSharedStart + uint64_t(map.box_rows) * map.box_columns * map.bytes > emulation::state().shared.size())
    emulation::fail("TMA copies beyond the end of shared memory");
  if (shared_address(&barrier) % 8 != 0) emulation::fail("a barrier at an address that is not a multiple of 8");
}

inline void copy(const TensorMap& map, void* to, Barrier& barrier, int row, int column) {
  require_rules_of_copy(map, to, barrier, column);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const uint32_t at = uint32_t(r * map.box_columns + c) * map.bytes;
      unsigned char* const byte = static_cast<unsigned char*>(to) + (map.bytes == 1 ? swizzled(at) : at);
      const bool inside = row + r < map.rows && column + c < map.columns;
      if (inside) std::memcpy(byte, map.data + ((row + r) * map.columns + column + c) * map.bytes, map.bytes);
      if (!inside) std::memset(byte, 0, map.bytes);
    }
  }
  barrier.missing_bytes -= map.box_rows * map.box_columns * map.bytes;
  barrier.complete();
}

template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void claim_registers() {}
inline void begin_mma(float (&)[kFragment]) {}
inline void commit_mma() {}
inline void wait_mma(float (&)[kFragment]) {}

// Element (row, k) of the matrix of a descriptor.
inline float operand(uint64_t descriptor, int row, int k) {
  static const std::vector<float> numbers = [] {
    std::vector<float> all(256);
    for (int i = 0; i < 256; ++i) all[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t(i), __NV_E4M3)));
    return all;
  }();
  const uint32_t start = (descriptor & 0x3fff) * 16, distance = (descriptor >> 32 & 0x3fff) * 16;
  const uint32_t at = start + row / kSwizzleRows * distance + row % kSwizzleRows * kSwizzle + k;
  return numbers[at_shared_address(descriptor >> 62 == 1 ? swizzled(at) : at)];
}

inline void mma(float (&d)[kFragment], uint64_t a, uint64_t b, bool add) {
  const int thread = threadIdx.x % kWarpgroup;
  float row[2][kMmaK], column[kMmaK];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kMmaK; ++k) row[half][k] = operand(a, fragment_row(thread, 2 * half), k);
  for (int i = 0; i < kFragment; i += i % 2 == 0 ? 1 : 3) {  // elements i and i + 2 share a column
    for (int k = 0; k < kMmaK; ++k) column[k] = operand(b, fragment_column(thread, i), k);
    for (int half = 0; half < 2; ++half) {
      float sum = add ? d[i + 2 * half] : 0.0f;
      for (int k = 0; k < kMmaK; ++k) sum += row[half][k] * column[k];
      d[i + 2 * half] = sum;
    }
  }
}

// What cuTensorMapEncodeTiled requires of the maps that make_tensor_map() asks for.
inline void require_rules_of_map(const TensorMap& map) {
  const int64_t row = map.columns * map.bytes, box_row = int64_t(map.box_columns) * map.bytes;
  const auto require = [&](bool kept, const char* rule) {
    if (!kept)
      throw std::runtime_error(
          "no tensor map of " + std::to_string(map.rows) + " × " + std::to_string(map.columns) + " elements of " +
          std::to_string(map.bytes) + " bytes in boxes of " + std::to_string(map.box_rows) + " × " +
          std::to_string(map.box_columns) + ": " + rule);
  };
  require(reinterpret_cast<uintptr_t>(map.data) % 16 == 0, "the matrix must start at a multiple of 16 bytes");
  require(map.rows > 0 && map.columns > 0 && map.rows <= 1ll << 32 && map.columns <= 1ll << 32, "1 to 2^32 elements");
  require(row % 16 == 0 && row < 1ll << 40, "rows must be multiples of 16 bytes, and less than 2^40");
  require(map.box_rows > 0 && map.box_columns > 0 && map.box_rows <= 256 && map.box_columns <= 256,
          "a box has 1 to 256 elements along each dimension");
  require(box_row % 16 == 0, "a row of a box must be a multiple of 16 bytes");
  require(map.bytes != 1 || box_row <= kSwizzle, "a row of a swizzled box has at most 128 bytes");
}

template <typename T>
int make_tensor_map(TensorMap& map, const T* data, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  map = {reinterpret_cast<const unsigned char*>(data), rows, columns, int(sizeof(T)), box_rows, box_columns};
  require_rules_of_map(map);
  return 0;
}

#endif

}  // namespace hopper
}  // namespace triaxis
