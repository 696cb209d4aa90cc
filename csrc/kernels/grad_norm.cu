// Sum of squares of flat fp32 tensors: each block writes one number for all of them, and a second kernel adds these in a
// fixed order.

#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 512;
constexpr int kPieces = 240;     // tensors of a launch: their pointers and sizes fit into 4 KB of arguments
constexpr int kMaxBlocks = 1024;  // of a launch, each with a number in the workspace

struct Pieces {
  const float* at[kPieces];
  int64_t size[kPieces];
  int count;
};

// This thread's share of Σ x²: with kSize 4, `x` is aligned to 16 bytes.
template <int kSize>
__device__ __forceinline__ float share(const float* x, int64_t size) {
  const int64_t whole = size / kSize, step = int64_t(gridDim.x) * kThreads;
  float sums[kSize] = {};  // several chains of additions
#pragma unroll 4  // loads in flight together
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < whole; i += step) {
    const auto v = load<kSize>(x + kSize * i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums[j] += v.at[j] * v.at[j];
  }
  float total = 0.0f;  // plus an element after the last whole vector
#pragma unroll
  for (int j = 0; j < kSize; ++j) total += sums[j];
  const int64_t last = whole * kSize + threadIdx.x;
  if (blockIdx.x == 0 && last < size) total += x[last] * x[last];
  return total;
}

__global__ void __launch_bounds__(kThreads) square_sums(const __grid_constant__ Pieces pieces, float* out) {
  __shared__ float buffers[2][kWarp];
  float total = 0.0f;
#pragma unroll 1
  for (int i = 0; i < pieces.count; ++i) {
    const float* const x = pieces.at[i];
    total += reinterpret_cast<uintptr_t>(x) % 16 == 0 ? share<4>(x, pieces.size[i]) : share<1>(x, pieces.size[i]);
  }
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

extern "C" int64_t triaxis_square_sum_workspace(int64_t count) { return ceil_div(count, kPieces) * kMaxBlocks; }

extern "C" int triaxis_square_sum(
    const float* const* pieces, const int64_t* sizes, int64_t count, float* out, float* workspace, void* stream) {
  int parts = 0;
  for (int64_t first = 0; first < count; first += kPieces) {
    Pieces some{};
    int64_t work = 0;
    for (; some.count < kPieces && first + some.count < count; ++some.count) {
      some.at[some.count] = pieces[first + some.count];
      some.size[some.count] = sizes[first + some.count];
      work += ceil_div(sizes[first + some.count], kThreads * 4);
    }
    int grid = persistent_grid(square_sums, kThreads, work);
    if (grid > kMaxBlocks) grid = kMaxBlocks;
    const int status = LAUNCH(square_sums, dim3(grid), dim3(kThreads), 0, stream, some, workspace + parts);
    if (status != 0) return status;
    parts += grid;
  }
  return LAUNCH(add_up, dim3(1), dim3(kThreads), 0, stream, workspace, parts, out);
}
