// Cross-entropy on logits that stay where they are: one pass reads them for each row's log-sum-exp and its label's
// logit, a second one turns them into their gradient. Between the two, ranks that share the vocabulary exchange the two
// numbers of a row. Three passes over memory are the least that logits of this size allow: a row is too long to keep.

#include "../common/reduce.cuh"
#include "../common/vec.cuh"

#include <cfloat>

namespace triaxis {
namespace {

constexpr int kThreads = 512;

// A maximum and the sum of exp(x − maximum), of the elements seen so far.
struct Running {
  float top, sum;
};
#define kNothing (Running{-FLT_MAX, 0.0f})  // not −∞, whose difference from itself is no number

__device__ __forceinline__ Running merged(Running a, Running b) {
  const float top = fmaxf(a.top, b.top);
  return {top, a.sum * __expf(a.top - top) + b.sum * __expf(b.top - top)};
}

__device__ __forceinline__ Running warp_merged(Running x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Running other{__shfl_xor_sync(0xffffffffu, x.top, offset), __shfl_xor_sync(0xffffffffu, x.sum, offset)};
    x = merged(x, other);
  }
  return x;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) cross_entropy_statistics(const triaxis_cross_entropy_args a) {
  __shared__ Running parts[kWarp];
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* const logits = static_cast<const T*>(a.logits) + row * a.columns;
    Running mine = kNothing;
#pragma unroll 4
    for (int64_t c = int64_t(threadIdx.x) * kSize; c < a.columns; c += int64_t(kThreads) * kSize) {
      const auto piece = load<kSize>(logits + c);
      float top = to_float(piece.at[0]), sum = 0.0f;
#pragma unroll
      for (int j = 1; j < kSize; ++j) top = fmaxf(top, to_float(piece.at[j]));
      if (top > mine.top) {
        mine.sum *= __expf(mine.top - top);
        mine.top = top;
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum += __expf(to_float(piece.at[j]) - mine.top);
      mine.sum += sum;
    }
    mine = warp_merged(mine);
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) parts[threadIdx.x / kWarp] = mine;
    __syncthreads();
    if (threadIdx.x < kWarp) {
      mine = warp_merged(lane < kThreads / kWarp ? parts[lane] : kNothing);
      if (lane == 0) {
        const int64_t label = a.labels[row] - a.first_label;
        a.z[row] = mine.top + logf(mine.sum);
        a.at_label[row] = label >= 0 && label < a.columns ? to_float(logits[label]) : 0.0f;
      }
    }
    __syncthreads();  // the parts have been read
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) cross_entropy_gradient(const triaxis_cross_entropy_args a) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    T* const logits = static_cast<T*>(a.logits) + row * a.columns;
    const float z = a.z[row], scale = a.scale[row], slope = scale * (1.0f + 2.0f * a.z_loss * z);
    const int64_t label = a.labels[row] - a.first_label;
    for (int64_t c = int64_t(threadIdx.x) * kSize; c < a.columns; c += int64_t(kThreads) * kSize) {
      auto piece = load<kSize>(logits + c);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        float gradient = __expf(to_float(piece.at[j]) - z) * slope;
        if (c + j == label) gradient -= scale;
        piece.at[j] = from_float<T>(gradient);
      }
      store(logits + c, piece);
    }
  }
}

bool valid(const triaxis_cross_entropy_args& a) { return floating(a.dtype) && a.rows >= 0 && a.columns >= 0; }

template <typename T>
bool by_vector(const triaxis_cross_entropy_args& a) { return aligned<T>(a.logits, a.columns); }

dim3 grid_for(const triaxis_cross_entropy_args& a) { return dim3(unsigned(a.rows < (1 << 20) ? a.rows : (1 << 20))); }

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_cross_entropy_statistics(const triaxis_cross_entropy_args* args, void* stream) {
  const triaxis_cross_entropy_args& a = *args;
  if (!valid(a) || a.columns == 0) return kInvalidArgument;
  if (a.rows == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = by_vector<T>(a) ? cross_entropy_statistics<T, Vec<T>::size> : cross_entropy_statistics<T, 1>;
    return LAUNCH(kernel, grid_for(a), dim3(kThreads), 0, stream, a);
  });
}

extern "C" int triaxis_cross_entropy_gradient(const triaxis_cross_entropy_args* args, void* stream) {
  const triaxis_cross_entropy_args& a = *args;
  if (!valid(a)) return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = by_vector<T>(a) ? cross_entropy_gradient<T, Vec<T>::size> : cross_entropy_gradient<T, 1>;
    return LAUNCH(kernel, grid_for(a), dim3(kThreads), 0, stream, a);
  });
}
