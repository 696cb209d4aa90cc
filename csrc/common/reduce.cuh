// Sums and maxima over a warp or a block, always in the same order: results repeat bitwise.
#pragma once

#include "device.cuh"

namespace triaxis {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

__device__ __forceinline__ int warp_max(int x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// Sums over threadIdx.x, any number of them in one kernel; every thread gets the result. The block is one row of threads,
// or several rows of one warp each, which need no barrier. Two buffers used alternately make one barrier a sum enough:
// before a thread writes a buffer again it has passed the barrier of the sum between, which all reach after reading it.
class RowSum {
 public:
  __device__ __forceinline__ explicit RowSum(float (&buffers)[2][kWarp]) : buffers_(buffers) {}

  __device__ __forceinline__ float operator()(float x) {
    x = warp_sum(x);
    if (blockDim.x == kWarp) return x;
    float* const buffer = buffers_[next_];
    next_ ^= 1;
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    if (lane == 0) buffer[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? buffer[lane] : 0.0f);
  }

 private:
  float (&buffers_)[2][kWarp];
  int next_ = 0;
};

}  // namespace triaxis
