// What every kernel file includes: CUDA under nvcc; under a C++ compiler, the emulation that runs it on the host.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), int(cudaGetLastError()))
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "../emulation/cuda.h"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../include/triaxis.h"

namespace triaxis {

constexpr int kWarp = 32;
constexpr int kInvalidArgument = 1;  // cudaErrorInvalidValue

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a persistent grid, each of which loops over its share of `work` items: as many as are resident at once, and
// never more than there are items.
template <typename Kernel>
int persistent_grid(Kernel kernel, int threads, int64_t work) {
#ifdef __CUDACC__
  int device = 0, processors = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  const int64_t resident = int64_t(processors) * (blocks > 0 ? blocks : 1);
#else
  (void)kernel, (void)threads;
  const int64_t resident = 3;  // so few that tests see blocks loop
#endif
  return int(work < resident ? (work > 0 ? work : 1) : resident);
}

}  // namespace triaxis
