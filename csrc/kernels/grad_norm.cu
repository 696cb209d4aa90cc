// Sum of squares of a flat fp32 tensor: each block writes one number, and a second kernel adds these in a fixed order.

#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 512;

template <int kSize>
__global__ void __launch_bounds__(kThreads) square_sums(const float* x, int64_t size, float* out) {
  __shared__ float buffers[2][kWarp];
  const int64_t whole = size / kSize, step = int64_t(gridDim.x) * kThreads;
  float sums[kSize] = {};  // several chains of additions
#pragma unroll 4  // loads in flight together
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < whole; i += step) {
    const auto v = load<kSize>(x + kSize * i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums[j] += v.at[j] * v.at[j];
  }
  float total = 0.0f;  // this thread's, plus an element after the last whole vector
#pragma unroll
  for (int j = 0; j < kSize; ++j) total += sums[j];
  const int64_t last = whole * kSize + threadIdx.x;
  if (blockIdx.x == 0 && last < size) total += x[last] * x[last];
  total = RowSum(buffers)(total);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) add_up(const float* parts, int count, float* out) {
  __shared__ float buffers[2][kWarp];
  float total = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) total += parts[i];
  total = RowSum(buffers)(total);
  if (threadIdx.x == 0) *out = total;
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_square_sum(const float* x, int64_t size, float* out, float* workspace, void* stream) {
  if (size < 0) return kInvalidArgument;
  const auto kernel = aligned<float>(x, 0) ? square_sums<4> : square_sums<1>;
  int grid = persistent_grid(kernel, kThreads, ceil_div(size, kThreads * 4));
  if (grid > TRIAXIS_SQUARE_SUM_WORKSPACE) grid = TRIAXIS_SQUARE_SUM_WORKSPACE;
  const int status = LAUNCH(kernel, dim3(grid), dim3(kThreads), 0, stream, x, size, workspace);
  if (status != 0) return status;
  return LAUNCH(add_up, dim3(1), dim3(kThreads), 0, stream, workspace, grid, out);
}
