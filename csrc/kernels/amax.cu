// The largest |x| of a tensor, for its FP8 scale, where no operator takes it while it writes the tensor: one read of memory.

#include "../common/fp8.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of 16 bytes that a thread loads before the first use: 64 KB a multiprocessor with 4 blocks

// `vectors` of 16 bytes from `x` on, and the elements behind them up to `size`.
template <typename T>
__global__ void __launch_bounds__(kThreads) amax(const T* x, int64_t vectors, int64_t size, float* out) {
  constexpr int kSize = Packed<T>::size;
  int maximum = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads * kVectors;
  for (int64_t first = int64_t(blockIdx.x) * kThreads * kVectors + threadIdx.x; first < vectors; first += step) {
    Packed<T> loaded[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      loaded[i] = {};
      if (first + i * kThreads < vectors) loaded[i] = Packed<T>::load(x + (first + i * kThreads) * kSize);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) maximum = max_magnitude(maximum, loaded[i][j]);
    }
  }
  for (int64_t i = vectors * kSize + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += int64_t(gridDim.x) * kThreads)
    maximum = max_magnitude(maximum, to_float(x[i]));
  // One atomic a block: all blocks end at the same time.
  __shared__ int of_block;
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  maximum = warp_max(maximum);
  if (threadIdx.x % kWarp == 0) atomicMax(&of_block, maximum);
  __syncthreads();
  if (threadIdx.x == 0) raise_to(out, of_block);
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_amax(const void* x, int64_t size, triaxis_dtype dtype, float* out, void* stream) {
  if (!floating(dtype) || size < 0 || out == nullptr) return kInvalidArgument;
  if (size == 0) return 0;
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t vectors = aligned<T>(x, 0) ? size / Packed<T>::size : 0;
    const int64_t work = ceil_div(vectors > 0 ? vectors : size, kThreads * kVectors);
    const auto kernel = amax<T>;
    return LAUNCH(kernel, dim3(persistent_grid(kernel, kThreads, work)), dim3(kThreads), 0, stream,
                  static_cast<const T*>(x), vectors, size, out);
  });
}
