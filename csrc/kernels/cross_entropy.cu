// Cross-entropy in place: the first kernel reads the logits for each row's log-sum-exp and the logit of its label, the
// second overwrites them with their gradient. In between, ranks that share the vocabulary exchange these two numbers a row.
// That is two reads and one write of the logits, the minimum for rows that are too long for a block to keep.

#include "../common/reduce.cuh"
#include "../common/vec.cuh"

#include <cfloat>

namespace triaxis {
namespace {

constexpr int kThreads = 512;  // × 8 elements: a row of 32,000 bf16 logits takes 8 iterations

// Online softmax: the maximum of the elements so far, and the sum of exp(x − maximum).
struct Running {
  float max, sum;
};
#define kEmpty (Running{-FLT_MAX, 0.0f})  // not −∞, because −∞ − −∞ is NaN

__device__ __forceinline__ Running merge(Running a, Running b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max)};
}

__device__ __forceinline__ Running warp_merge(Running x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Running other{__shfl_xor_sync(0xffffffffu, x.max, offset), __shfl_xor_sync(0xffffffffu, x.sum, offset)};
    x = merge(x, other);
  }
  return x;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) cross_entropy_statistics(const triaxis_cross_entropy_args a) {
  __shared__ Running parts[kWarp];
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* const logits = static_cast<const T*>(a.logits) + row * a.columns;
    // Each thread: its vectors of the row, with one rescaling for each vector that raises the maximum.
    Running mine = kEmpty;
#pragma unroll 4  // loads in flight together
    for (int64_t c = int64_t(threadIdx.x) * kSize; c < a.columns; c += int64_t(kThreads) * kSize) {
      const auto piece = load<kSize>(logits + c);
      float max = to_float(piece.at[0]), sum = 0.0f;
#pragma unroll
      for (int j = 1; j < kSize; ++j) max = fmaxf(max, to_float(piece.at[j]));
      if (max > mine.max) {
        mine.sum *= __expf(mine.max - max);
        mine.max = max;
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum += __expf(to_float(piece.at[j]) - mine.max);
      mine.sum += sum;
    }
    // Merge over each warp, then over the warps; the first thread writes z and the logit of the label, if it is held here.
    mine = warp_merge(mine);
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) parts[threadIdx.x / kWarp] = mine;
    __syncthreads();
    if (threadIdx.x < kWarp) {
      mine = warp_merge(lane < kThreads / kWarp ? parts[lane] : kEmpty);
      if (lane == 0) {
        const int64_t label = a.labels[row] - a.first_label;
        a.z[row] = mine.max + logf(mine.sum);
        a.at_label[row] = label >= 0 && label < a.columns ? to_float(logits[label]) : 0.0f;
      }
    }
    __syncthreads();  // before the next row overwrites the parts
  }
}

// d logit = scale · (softmax · (1 + 2 · z_loss · z) − [it is the label's]).
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

// A block a row; more rows than that loop.
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
