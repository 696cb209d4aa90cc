// Sums and maxima over the threads of a warp or of a block, in an order that is always the same.
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

// Sums over threadIdx.x, one after another in one kernel; every thread gets the result. The block is either one row of
// threads, or rows of one warp each that need no barrier. Two buffers taken in turn make one barrier a sum enough:
// whoever writes a buffer again has passed the barrier that all reach after reading it.
class RowSum {
 public:
  __device__ __forceinline__ explicit RowSum(float (&buffers)[2][kWarp]) : buffers_(buffers) {}

  __device__ __forceinline__ float operator()(float x) {
    x = warp_sum(x);
    if (blockDim.x == kWarp) return x;
    float* const buffer = buffers_[turn_];
    turn_ ^= 1;
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    if (lane == 0) buffer[threadIdx.x / kWarp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? buffer[lane] : 0.0f);
  }

 private:
  float (&buffers_)[2][kWarp];
  int turn_ = 0;
};

}  // namespace triaxis
