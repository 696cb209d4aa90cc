// RMSNorm and LayerNorm, forward and backward (include/triaxis.h says what they compute).
//
// The tuned kernels keep a row in registers, in vectors of 16 bytes, so that memory is read and written once. A block (for
// short rows a warp) takes a row, issues all its loads before the first use, and continues with its next row. The backward
// prefetches the next row while it computes this one, and accumulates its share of the weight gradient in registers; a
// second kernel adds these shares in a fixed order. Rows whose size or alignment rules out vectors, or that are longer than
// the registers, take the general kernels, which access one element at a time.

#include "../common/fp8.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace triaxis {
namespace {

constexpr int kMaxThreads = 512;  // of a tuned kernel: leaves 128 registers a thread, which its largest instances need
constexpr int kGeneralThreads = 256;

// Which kernels a backward takes, and how it launches them.
struct Plan {
  void (*kernel)(const triaxis_norm_backward_args, uint32_t) = nullptr;  // the tuned one; null: the general kernels
  dim3 block;
  int grid = 1;
};

template <typename T>
__device__ __forceinline__ const T* row_of(const void* matrix, int64_t row, int64_t stride) {
  return static_cast<const T*>(matrix) + row * stride;
}

// x̂ of one element.
template <bool kCentered>
__device__ __forceinline__ float normalized(float x, float mean, float rstd) {
  return (kCentered ? x - mean : x) * rstd;
}

template <typename T, bool kCentered, int kVectors, Output kOutput>
__global__ void __launch_bounds__(kMaxThreads) norm_forward(const triaxis_norm_forward_args a) {
  constexpr int kSize = Vec<T>::size;
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const int row_vectors = int(a.columns / kSize);
  const float share = 1.0f / float(a.columns);  // of a column in a mean
  const float scale = kOutput == Output::kTensorwise ? *a.fp8.scale : 0.0f;
  int amax = 0;  // bits, of this thread's outputs
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += int64_t(gridDim.x) * blockDim.y) {
    // Load the row, then the residual; add, round, and store the sum.
    Packed<T> x[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v < row_vectors) x[i] = Packed<T>::load(row_of<T>(a.x, row, a.x_stride) + v * kSize);
    }
    if (a.residual != nullptr) {
      Packed<T> residual[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (v < row_vectors) residual[i] = Packed<T>::load(row_of<T>(a.residual, row, a.residual_stride) + v * kSize);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (v >= row_vectors) continue;
#pragma unroll
        for (int j = 0; j < kSize; j += 2) x[i].set_pair(j / 2, x[i][j] + residual[i][j], x[i][j + 1] + residual[i][j + 1]);
        x[i].store(static_cast<T*>(a.sum) + row * a.columns + v * kSize);
      }
    }
    // Statistics in two passes over the registers: the mean, then the mean square around it.
    float mean = 0.0f, total = 0.0f;
    if (kCentered) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (int(threadIdx.x + i * blockDim.x) >= row_vectors) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) total += x[i][j];
      }
      mean = row_sum(total) * share;
      total = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (int(threadIdx.x + i * blockDim.x) >= row_vectors) continue;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float deviation = kCentered ? x[i][j] - mean : x[i][j];
        total += deviation * deviation;
      }
    }
    const float rstd = rsqrtf(row_sum(total) * share + a.eps);
    if (threadIdx.x == 0) {
      a.rstd[row] = rstd;
      if (kCentered) a.mean[row] = mean;
    }
    // Normalize, apply weight and bias, round once; for FP8, quantize the rounded value.
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      const bool inside = v < row_vectors;
      Packed<T> y = {};
      if (inside) {
        const Packed<T> weight = Packed<T>::load(static_cast<const T*>(a.weight) + v * kSize);
        Packed<T> bias = {};
        if (kCentered && a.bias != nullptr) bias = Packed<T>::load(static_cast<const T*>(a.bias) + v * kSize);
        const auto result = [&](int j) {
          const float scaled = normalized<kCentered>(x[i][j], mean, rstd) * weight[j];
          return kCentered ? scaled + bias[j] : scaled;
        };
#pragma unroll
        for (int j = 0; j < kSize; j += 2) y.set_pair(j / 2, result(j), result(j + 1));
        if (kOutput == Output::kPlain) y.store(static_cast<T*>(a.y) + row * a.columns + v * kSize);
      }
      if constexpr (kOutput != Output::kPlain) {
        store_fp8<kOutput>(a.fp8, scale, y, row, a.columns, int64_t(v) * kSize, inside, amax);
      } else if (a.fp8.amax != nullptr) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) amax = max_magnitude(amax, y[j]);
      }
    }
  }
  if (kOutput != Output::kBlocks) raise_amax(a.fp8.amax, amax);
}

// The same steps, an element at a time.
template <typename T, bool kCentered>
__global__ void __launch_bounds__(kGeneralThreads) norm_forward_general(const triaxis_norm_forward_args a) {
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const float share = 1.0f / float(a.columns);
  int amax = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = row_of<T>(a.x, row, a.x_stride);
    float mean = 0.0f, total = 0.0f;
    if (a.residual != nullptr) {
      T* const sum = static_cast<T*>(a.sum) + row * a.columns;
      const T* const residual = row_of<T>(a.residual, row, a.residual_stride);
      for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x)
        sum[c] = from_float<T>(to_float(x[c]) + to_float(residual[c]));
      x = sum;  // a thread reads only the elements that it wrote
    }
    if (kCentered) {
      for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) total += to_float(x[c]);
      mean = row_sum(total) * share;
      total = 0.0f;
    }
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float deviation = to_float(x[c]) - mean;
      total += deviation * deviation;
    }
    const float rstd = rsqrtf(row_sum(total) * share + a.eps);
    if (threadIdx.x == 0) {
      a.rstd[row] = rstd;
      if (kCentered) a.mean[row] = mean;
    }
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float weight = to_float(static_cast<const T*>(a.weight)[c]);
      const float bias = kCentered && a.bias != nullptr ? to_float(static_cast<const T*>(a.bias)[c]) : 0.0f;
      const T y = from_float<T>((to_float(x[c]) - mean) * rstd * weight + bias);
      static_cast<T*>(a.y)[row * a.columns + c] = y;
      amax = max_magnitude(amax, to_float(y));
    }
  }
  raise_amax(a.fp8.amax, amax);
}

// A thread's vectors of one row. Threads beyond the end of the row get its last vector: so only the weight, which is zero
// there, and stores have to ask where a row ends.
template <typename T, int kVectors>
struct Row {
  Packed<T> at[kVectors];

  __device__ __forceinline__ void load(const void* matrix, int64_t row, int64_t stride, int row_vectors) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x, inside = v < row_vectors ? v : row_vectors - 1;
      at[i] = Packed<T>::load(row_of<T>(matrix, row, stride) + inside * Packed<T>::size);
    }
  }

  __device__ __forceinline__ void forget(uint32_t zero) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) at[i].forget(zero);
  }
};

// The inputs of a row's backward.
template <typename T, bool kCentered, int kVectors>
struct BackwardRow {
  Row<T, kVectors> grad_y, x;
  float mean = 0.0f, rstd;

  __device__ __forceinline__ void load(const triaxis_norm_backward_args& a, int row, int row_vectors) {
    if (row >= a.rows) return;
    grad_y.load(a.grad_y, row, a.grad_y_stride, row_vectors);
    x.load(a.x, row, a.x_stride, row_vectors);
    rstd = a.rstd[row];
    if (kCentered) mean = a.mean[row];
  }
};

// Blocks of kMaxThreads that a multiprocessor must have room for. Two leave 64 registers a thread, enough for one vector: 32
// warps hide more of the time that loads and sums take than the 16 of two vectors.
constexpr int backward_blocks(int vectors) { return vectors == 1 ? 2 : 1; }

// With dx̂ = dy · weight and means over the row: dx = (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂)) · rstd, without mean(dx̂) for
// RMSNorm; d weight = Σ dy · x̂ and d bias = Σ dy over the rows. `kGradSum`: the residual stream has a gradient to add. `zero`
// is 0, for Packed::forget.
template <typename T, bool kCentered, bool kGradSum, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, backward_blocks(kVectors))
    norm_backward(const triaxis_norm_backward_args a, uint32_t zero) {
  constexpr int kSize = Vec<T>::size;
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const int row_vectors = int(a.columns / kSize);
  const float share = 1.0f / float(a.columns);  // of a column in a mean; not in the loop, where a division costs a tenth
  const int rows = int(a.rows), first = blockIdx.x * blockDim.y + threadIdx.y, step = gridDim.x * blockDim.y;

  // For all rows of this thread: the weight at its columns, and the sums of their gradients.
  Row<T, kVectors> weight;
  float grad_weight[kVectors][kSize] = {}, grad_bias[kVectors][kSize] = {};
  weight.load(a.weight, 0, 0, row_vectors);
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (int(threadIdx.x + i * blockDim.x) >= row_vectors) weight.at[i] = {};
  BackwardRow<T, kCentered, kVectors> now, next;
  next.load(a, first, row_vectors);
#pragma unroll 1
  for (int row = first; row < rows; row += step) {
    // Prefetch the next row; sum dx̂ · x̂ and dx̂ over this one, and add to the weight gradients.
    now = next;
    next.load(a, row + step, row_vectors);
    float dot = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float w = weight.at[i][j], dy = now.grad_y.at[i][j];
        const float x = normalized<kCentered>(now.x.at[i][j], now.mean, now.rstd);
        dot += dy * w * x;
        if (kCentered) total += dy * w, grad_bias[i][j] += dy;
        grad_weight[i][j] += dy * x;
      }
    }
    Row<T, kVectors> grad_sum;  // loaded while the block reduces
    if (kGradSum) grad_sum.load(a.grad_sum, row, a.grad_sum_stride, row_vectors);
    dot = row_sum(dot) * share;
    if (kCentered) total = row_sum(total) * share;
    // The gradient of x, with that of the residual stream added before it is rounded. The floats of RMSNorm's row stay in
    // registers over the sum; LayerNorm, which has a bias, converts them again.
    if (kCentered) weight.forget(zero), now.grad_y.forget(zero), now.x.forget(zero);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      Vec<T> grad_x;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float x = normalized<kCentered>(now.x.at[i][j], now.mean, now.rstd);
        float dx = (now.grad_y.at[i][j] * weight.at[i][j] - total - x * dot) * now.rstd;
        if (kGradSum) dx += grad_sum.at[i][j];
        grad_x.at[j] = from_float<T>(dx);
      }
      if (v < row_vectors) store(static_cast<T*>(a.grad_x) + int64_t(row) * a.columns + v * kSize, grad_x);
    }
  }
  // This thread's share of the weight gradients, one of gridDim.x · blockDim.y.
  const int64_t parts = step, part = first;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v >= row_vectors) continue;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      a.workspace[part * a.columns + v * kSize + j] = grad_weight[i][j];
      if (kCentered) a.workspace[(parts + part) * a.columns + v * kSize + j] = grad_bias[i][j];
    }
  }
}

// The gradient of x, an element at a time.
template <typename T, bool kCentered>
__global__ void __launch_bounds__(kGeneralThreads) norm_backward_input_general(const triaxis_norm_backward_args a) {
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const float columns = float(a.columns);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* const grad_y = row_of<T>(a.grad_y, row, a.grad_y_stride);
    const T* const x = row_of<T>(a.x, row, a.x_stride);
    const float mean = kCentered ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    const auto weight_at = [&](int64_t c) { return to_float(static_cast<const T*>(a.weight)[c]); };
    const auto normalized_at = [&](int64_t c) { return normalized<kCentered>(to_float(x[c]), mean, rstd); };
    float dot = 0.0f, total = 0.0f;
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float dx = to_float(grad_y[c]) * weight_at(c);
      dot += dx * normalized_at(c);
      if (kCentered) total += dx;
    }
    dot = row_sum(dot) / columns;
    if (kCentered) total = row_sum(total) / columns;
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      float dx = (to_float(grad_y[c]) * weight_at(c) - total - normalized_at(c) * dot) * rstd;
      if (a.grad_sum != nullptr) dx += to_float(row_of<T>(a.grad_sum, row, a.grad_sum_stride)[c]);
      static_cast<T*>(a.grad_x)[row * a.columns + c] = from_float<T>(dx);
    }
  }
}

constexpr int kLanes = 8;  // rows that a block of the next two kernels takes at a time: one for each of its warps

// Shares of the weight gradients: block (x, y) takes 32 columns, and every gridDim.y-th group of kLanes rows.
template <typename T, bool kCentered>
__global__ void __launch_bounds__(kWarp* kLanes) norm_backward_weight_general(const triaxis_norm_backward_args a) {
  __shared__ float shares[2][kLanes][kWarp];
  const int64_t c = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  float grad_weight = 0.0f, grad_bias = 0.0f;
  if (c < a.columns) {
    for (int64_t row = int64_t(blockIdx.y) * kLanes + threadIdx.y; row < a.rows; row += int64_t(gridDim.y) * kLanes) {
      const float mean = kCentered ? a.mean[row] : 0.0f;
      const float dy = to_float(row_of<T>(a.grad_y, row, a.grad_y_stride)[c]);
      grad_weight += dy * normalized<kCentered>(to_float(row_of<T>(a.x, row, a.x_stride)[c]), mean, a.rstd[row]);
      grad_bias += dy;
    }
  }
  shares[0][threadIdx.y][threadIdx.x] = grad_weight;
  shares[1][threadIdx.y][threadIdx.x] = grad_bias;
  __syncthreads();
  const int which = threadIdx.y;  // 0 sums the weight's, 1 the bias'
  if (which > 1 || c >= a.columns || (which == 1 && !kCentered)) return;
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += shares[which][lane][threadIdx.x];
  a.workspace[(which * int64_t(gridDim.y) + blockIdx.y) * a.columns + c] = total;
}

// Adds the shares [parts, columns] in the workspace, in order, and then their sum to the gradient if `accumulate`;
// blockIdx.y is 0 for the weight, 1 for the bias.
__global__ void __launch_bounds__(kWarp* kLanes) norm_backward_finish(const triaxis_norm_backward_args a, int64_t parts) {
  __shared__ float shares[kLanes][kWarp];
  const int64_t c = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  const float* const from = a.workspace + blockIdx.y * parts * a.columns;
  float total = 0.0f;
  if (c < a.columns) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += kLanes) total += from[part * a.columns + c];
  }
  shares[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || c >= a.columns) return;
  float* const to = (blockIdx.y == 0 ? a.grad_weight : a.grad_bias) + c;
  total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += shares[lane][threadIdx.x];
  *to = a.accumulate ? *to + total : total;
}

// A block for rows of `row_vectors` vectors, `each` of them a thread. Four rows of one warp share a block: of blocks of 32
// threads a multiprocessor holds 32, which are half of its 64 warps.
dim3 block_for(int64_t row_vectors, int each) {
  const int threads = int(ceil_div(ceil_div(row_vectors, each), kWarp)) * kWarp;
  return dim3(threads, threads == kWarp ? 4 : 1);
}

template <typename T, bool kCentered, int kVectors>
int launch_forward(const triaxis_norm_forward_args& a, dim3 block, void* stream) {
  const Output output = output_of(a.fp8);
  const auto kernel = output == Output::kPlain        ? norm_forward<T, kCentered, kVectors, Output::kPlain>
                      : output == Output::kTensorwise ? norm_forward<T, kCentered, kVectors, Output::kTensorwise>
                                                      : norm_forward<T, kCentered, kVectors, Output::kBlocks>;
  const int grid = persistent_grid(kernel, block.x * block.y, ceil_div(a.rows, block.y));
  return LAUNCH(kernel, dim3(grid), block, 0, stream, a);
}

template <typename T, bool kCentered>
int forward(const triaxis_norm_forward_args& a, void* stream) {
  const int64_t vectors = a.columns / Vec<T>::size;
  const bool tuned = a.columns % Vec<T>::size == 0 && vectors <= 4 * kMaxThreads && aligned<T>(a.x, a.x_stride) &&
                     aligned<T>(a.residual, a.residual_stride) && aligned<T>(a.weight, 0) && aligned<T>(a.bias, 0) &&
                     aligned<T>(a.y, 0) && aligned<T>(a.sum, 0);
  if (a.fp8.values != nullptr && !(tuned && valid_output(a.fp8, a.columns))) return kInvalidArgument;
  if (!tuned) {
    const auto kernel = norm_forward_general<T, kCentered>;
    return LAUNCH(kernel, dim3(persistent_grid(kernel, kGeneralThreads, a.rows)), dim3(kGeneralThreads), 0, stream, a);
  }
  // The fewest vectors a thread that keep blocks small (4 warps for hidden sizes to 1024 in bf16, 10 to 5120): several
  // blocks then share a multiprocessor, and some load while others wait for the sum of their row.
  if (vectors <= 128) return launch_forward<T, kCentered, 1>(a, block_for(vectors, 1), stream);
  if (vectors <= 640) return launch_forward<T, kCentered, 2>(a, block_for(vectors, 2), stream);
  return launch_forward<T, kCentered, 4>(a, block_for(vectors, 4), stream);
}

template <typename T, bool kCentered, int kVectors>
Plan tuned_backward_plan(const triaxis_norm_backward_args& a) {
  Plan plan;
  plan.kernel =
      a.grad_sum ? norm_backward<T, kCentered, true, kVectors> : norm_backward<T, kCentered, false, kVectors>;
  plan.block = block_for(a.columns / Vec<T>::size, kVectors);
  plan.grid = persistent_grid(plan.kernel, plan.block.x * plan.block.y, ceil_div(a.rows, plan.block.y));
  return plan;
}

template <typename T, bool kCentered>
Plan backward_plan(const triaxis_norm_backward_args& a) {
  const int64_t vectors = a.columns / Vec<T>::size;
  const bool tuned = a.columns % Vec<T>::size == 0 && vectors <= 2 * kMaxThreads && aligned<T>(a.grad_y, a.grad_y_stride) &&
                     aligned<T>(a.grad_sum, a.grad_sum_stride) && aligned<T>(a.x, a.x_stride) &&
                     aligned<T>(a.weight, 0) && aligned<T>(a.grad_x, 0) && a.rows <= 1 << 30;  // counted in an int
  if (tuned && vectors <= kMaxThreads) return tuned_backward_plan<T, kCentered, 1>(a);
  if (tuned) return tuned_backward_plan<T, kCentered, 2>(a);  // no more: two rows, the weight and its gradient are in registers
  // A share for every 1024 rows, at most 64 of them: they bound the workspace and what the last kernel has to add.
  Plan plan;
  plan.grid = int(ceil_div(a.rows, 1024) < 64 ? ceil_div(a.rows, 1024) : 64);
  if (plan.grid == 0) plan.grid = 1;
  return plan;
}

// Shares of the weight gradients in the workspace.
int64_t parts_of(const Plan& plan) { return int64_t(plan.grid) * (plan.kernel == nullptr ? 1 : plan.block.y); }

template <typename T, bool kCentered>
int backward(const triaxis_norm_backward_args& a, void* stream) {
  const Plan plan = backward_plan<T, kCentered>(a);
  const unsigned column_blocks = unsigned(ceil_div(a.columns, kWarp));
  int status = 0;
  if (plan.kernel == nullptr) {
    const auto kernel = norm_backward_input_general<T, kCentered>;
    status = LAUNCH(kernel, dim3(persistent_grid(kernel, kGeneralThreads, a.rows)), dim3(kGeneralThreads), 0, stream, a);
    if (status != 0) return status;
    const auto weights = norm_backward_weight_general<T, kCentered>;
    status = LAUNCH(weights, dim3(column_blocks, plan.grid), dim3(kWarp, kLanes), 0, stream, a);
  } else {
    const auto kernel = plan.kernel;
    status = LAUNCH(kernel, dim3(plan.grid), plan.block, 0, stream, a, 0u);
  }
  if (status != 0) return status;
  const dim3 grid(column_blocks, kCentered ? 2 : 1);
  return LAUNCH(norm_backward_finish, grid, dim3(kWarp, kLanes), 0, stream, a, parts_of(plan));
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_norm_forward(const triaxis_norm_forward_args* args, void* stream) {
  const triaxis_norm_forward_args& a = *args;
  if (!floating(a.dtype) || a.rows < 0 || a.columns < 0) return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return a.centered ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
  });
}

extern "C" int64_t triaxis_norm_backward_workspace(const triaxis_norm_backward_args* args) {
  const triaxis_norm_backward_args& a = *args;
  const Plan plan = with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return a.centered ? backward_plan<T, true>(a) : backward_plan<T, false>(a);
  });
  return parts_of(plan) * a.columns * (a.centered ? 2 : 1);
}

extern "C" int triaxis_norm_backward(const triaxis_norm_backward_args* args, void* stream) {
  const triaxis_norm_backward_args& a = *args;
  if (!floating(a.dtype) || a.rows < 0 || a.columns < 0) return kInvalidArgument;
  if (a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    return a.centered ? backward<T, true>(a, stream) : backward<T, false>(a, stream);
  });
}
