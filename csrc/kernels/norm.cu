// RMSNorm and LayerNorm, forward and backward (include/triaxis.h says what they compute).
//
// Tuned kernels hold a row in registers, 16 bytes a thread and access, so that memory is read and written once: a block
// (or, for short rows, a warp) takes a row, asks for all of it before it uses any, and goes on with the next one that is
// its. The backward asks for its next row while it works on this one, and sums its share of the weight's gradient in
// registers; a second kernel adds the blocks' shares in a fixed order. Rows of odd sizes, without alignment, or longer
// than the registers take the general kernels, an element at a time.

#include "../common/fp8.cuh"
#include "../common/reduce.cuh"
#include "../common/vec.cuh"

namespace triaxis {
namespace {

struct Plan {
  int vectors = 0;  // 16-byte vectors of a thread; 0: the general kernels
  dim3 block;
  int grid = 1;
};

template <typename T>
__device__ __forceinline__ const T* row_of(const void* matrix, int64_t row, int64_t stride) {
  return static_cast<const T*>(matrix) + row * stride;
}

constexpr int kMostThreads = 512;  // of a tuned kernel: with more, its row would not fit in their registers

template <typename T, bool kCentered, int kVectors, bool kFp8>
__global__ void __launch_bounds__(kMostThreads) norm_forward(const triaxis_norm_forward_args a) {
  constexpr int kSize = Vec<T>::size;
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const int row_vectors = int(a.columns / kSize);
  const float columns = float(a.columns);
  float top = 0.0f;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += int64_t(gridDim.x) * blockDim.y) {
    Vec<T> x[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v < row_vectors) x[i] = load_vec(row_of<T>(a.x, row, a.x_stride) + v * kSize);
    }
    if (a.residual != nullptr) {
      Vec<T> residual[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (v < row_vectors) residual[i] = load_vec(row_of<T>(a.residual, row, a.residual_stride) + v * kSize);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (v >= row_vectors) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) x[i].at[j] = from_float<T>(to_float(x[i].at[j]) + to_float(residual[i].at[j]));
        store(static_cast<T*>(a.sum) + row * a.columns + v * kSize, x[i]);
      }
    }
    float mean = 0.0f, total = 0.0f;
    if (kCentered) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (int(threadIdx.x + i * blockDim.x) >= row_vectors) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) total += to_float(x[i].at[j]);
      }
      mean = row_sum(total) / columns;
      total = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (int(threadIdx.x + i * blockDim.x) >= row_vectors) continue;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float centered = to_float(x[i].at[j]) - mean;
        total += centered * centered;
      }
    }
    const float rstd = rsqrtf(row_sum(total) / columns + a.eps);
    if (threadIdx.x == 0) {
      a.rstd[row] = rstd;
      if (kCentered) a.mean[row] = mean;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      const bool inside = v < row_vectors;
      Vec<T> y = {};
      if (inside) {
        const Vec<T> weight = load_vec(static_cast<const T*>(a.weight) + v * kSize);
        Vec<T> bias = {};
        if (kCentered && a.bias != nullptr) bias = load_vec(static_cast<const T*>(a.bias) + v * kSize);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float normalized = (to_float(x[i].at[j]) - mean) * rstd;
          y.at[j] = from_float<T>(normalized * to_float(weight.at[j]) + to_float(bias.at[j]));
        }
        if (!kFp8) store(static_cast<T*>(a.y) + row * a.columns + v * kSize, y);
      }
      if (kFp8) store_fp8(a.fp8, y, row, a.columns, int64_t(v) * kSize, inside, top);
    }
  }
  if (kFp8) store_amax(a.fp8, top);
}

template <typename T, bool kCentered>
__global__ void __launch_bounds__(256) norm_forward_general(const triaxis_norm_forward_args a) {
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const float columns = float(a.columns);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = row_of<T>(a.x, row, a.x_stride);
    float mean = 0.0f, total = 0.0f;
    if (a.residual != nullptr) {
      T* const sum = static_cast<T*>(a.sum) + row * a.columns;
      const T* const residual = row_of<T>(a.residual, row, a.residual_stride);
      for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x)
        sum[c] = from_float<T>(to_float(x[c]) + to_float(residual[c]));
      x = sum;  // what a thread reads from here on, it wrote itself
    }
    if (kCentered) {
      for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) total += to_float(x[c]);
      mean = row_sum(total) / columns;
      total = 0.0f;
    }
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float centered = to_float(x[c]) - mean;
      total += centered * centered;
    }
    const float rstd = rsqrtf(row_sum(total) / columns + a.eps);
    if (threadIdx.x == 0) {
      a.rstd[row] = rstd;
      if (kCentered) a.mean[row] = mean;
    }
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float weight = to_float(static_cast<const T*>(a.weight)[c]);
      const float bias = kCentered && a.bias != nullptr ? to_float(static_cast<const T*>(a.bias)[c]) : 0.0f;
      static_cast<T*>(a.y)[row * a.columns + c] = from_float<T>((to_float(x[c]) - mean) * rstd * weight + bias);
    }
  }
}

// x̂ of one element.
template <bool kCentered>
__device__ __forceinline__ float normalized(float x, float mean, float rstd) {
  return (kCentered ? x - mean : x) * rstd;
}

// What a row's backward needs from memory, asked for before it is used.
template <typename T, int kVectors>
struct BackwardRow {
  Vec<T> grad_y[kVectors], x[kVectors];
  float mean, rstd;

  __device__ __forceinline__ void load(const triaxis_norm_backward_args& a, int64_t row, int row_vectors) {
    if (row >= a.rows) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v >= row_vectors) continue;
      grad_y[i] = load_vec(row_of<T>(a.grad_y, row, a.grad_y_stride) + v * Vec<T>::size);
      x[i] = load_vec(row_of<T>(a.x, row, a.x_stride) + v * Vec<T>::size);
    }
    rstd = a.rstd[row];
    mean = a.mean != nullptr ? a.mean[row] : 0.0f;
  }
};

template <typename T, bool kCentered, int kVectors>
__global__ void __launch_bounds__(kMostThreads) norm_backward(const triaxis_norm_backward_args a) {
  constexpr int kSize = Vec<T>::size;
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const int row_vectors = int(a.columns / kSize);
  const float columns = float(a.columns);
  const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, step = int64_t(gridDim.x) * blockDim.y;

  Vec<T> weight[kVectors];
  float grad_weight[kVectors][kSize] = {}, grad_bias[kVectors][kSize] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = threadIdx.x + i * blockDim.x;
    if (v >= row_vectors) continue;
    weight[i] = load_vec(static_cast<const T*>(a.weight) + v * kSize);
  }
  BackwardRow<T, kVectors> now, next;
  next.load(a, first, row_vectors);
  for (int64_t row = first; row < a.rows; row += step) {
    now = next;
    next.load(a, row + step, row_vectors);
    float along = 0.0f, total = 0.0f;  // sums of dx̂·x̂ and of dx̂
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (int(threadIdx.x + i * blockDim.x) >= row_vectors) continue;
      keep_packed(weight[i]);
      keep_packed(now.grad_y[i]);
      keep_packed(now.x[i]);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float w = to_float(weight[i].at[j]), dy = to_float(now.grad_y[i].at[j]);
        const float x = normalized<kCentered>(to_float(now.x[i].at[j]), now.mean, now.rstd);
        along += dy * w * x;
        if (kCentered) total += dy * w, grad_bias[i][j] += dy;
        grad_weight[i][j] += dy * x;
      }
    }
    Vec<T> grad_sum[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {  // on its way while the sums are
      const int v = threadIdx.x + i * blockDim.x;
      if (v < row_vectors && a.grad_sum != nullptr)
        grad_sum[i] = load_vec(row_of<T>(a.grad_sum, row, a.grad_sum_stride) + v * kSize);
    }
    along = row_sum(along) / columns;
    if (kCentered) total = row_sum(total) / columns;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int v = threadIdx.x + i * blockDim.x;
      if (v >= row_vectors) continue;
      keep_packed(now.grad_y[i]);
      keep_packed(now.x[i]);
      Vec<T> grad_x;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float x = normalized<kCentered>(to_float(now.x[i].at[j]), now.mean, now.rstd);
        float dx = (to_float(now.grad_y[i].at[j]) * to_float(weight[i].at[j]) - total - x * along) * now.rstd;
        if (a.grad_sum != nullptr) dx += to_float(grad_sum[i].at[j]);
        grad_x.at[j] = from_float<T>(dx);
      }
      store(static_cast<T*>(a.grad_x) + row * a.columns + v * kSize, grad_x);
    }
  }
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

template <typename T, bool kCentered>
__global__ void __launch_bounds__(256) norm_backward_input_general(const triaxis_norm_backward_args a) {
  __shared__ float buffers[2][kWarp];
  RowSum row_sum(buffers);
  const float columns = float(a.columns);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* const grad_y = row_of<T>(a.grad_y, row, a.grad_y_stride);
    const T* const x = row_of<T>(a.x, row, a.x_stride);
    const float mean = kCentered ? a.mean[row] : 0.0f, rstd = a.rstd[row];
    const auto weight_at = [&](int64_t c) { return to_float(static_cast<const T*>(a.weight)[c]); };
    const auto normalized_at = [&](int64_t c) { return normalized<kCentered>(to_float(x[c]), mean, rstd); };
    float along = 0.0f, total = 0.0f;
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      const float dx = to_float(grad_y[c]) * weight_at(c);
      along += dx * normalized_at(c);
      if (kCentered) total += dx;
    }
    along = row_sum(along) / columns;
    if (kCentered) total = row_sum(total) / columns;
    for (int64_t c = threadIdx.x; c < a.columns; c += blockDim.x) {
      float dx = (to_float(grad_y[c]) * weight_at(c) - total - normalized_at(c) * along) * rstd;
      if (a.grad_sum != nullptr) dx += to_float(row_of<T>(a.grad_sum, row, a.grad_sum_stride)[c]);
      static_cast<T*>(a.grad_x)[row * a.columns + c] = from_float<T>(dx);
    }
  }
}

constexpr int kLanes = 8;  // rows that a block of the two kernels below takes at a time

// Shares of the weight's gradients: block (x, y) takes 32 columns and every gridDim.y-th group of rows.
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

// Adds up the shares [parts, columns] of the workspace: blockIdx.y 0 for the weight, 1 for the bias.
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
  *to = total;
}

// Threads for rows of so many 16-byte vectors, `each` of them a thread; short rows share a block.
dim3 block_for(int64_t row_vectors, int each) {
  const int threads = int(ceil_div(ceil_div(row_vectors, each), kWarp)) * kWarp;
  return dim3(threads, threads == kWarp ? 4 : 1);
}

template <typename T, bool kCentered, int kVectors>
int start_forward(const triaxis_norm_forward_args& a, dim3 block, void* stream) {
  const auto kernel = a.fp8.values ? norm_forward<T, kCentered, kVectors, true> : norm_forward<T, kCentered, kVectors, false>;
  const int grid = persistent_grid(kernel, block.x * block.y, ceil_div(a.rows, block.y));
  return LAUNCH(kernel, dim3(grid), block, 0, stream, a);
}

template <typename T, bool kCentered>
int forward(const triaxis_norm_forward_args& a, void* stream) {
  const int64_t vectors = a.columns / Vec<T>::size;
  const bool tuned = a.columns % Vec<T>::size == 0 && vectors <= 4 * kMostThreads && aligned<T>(a.x, a.x_stride) &&
                     aligned<T>(a.residual, a.residual_stride) && aligned<T>(a.weight, 0) && aligned<T>(a.bias, 0) &&
                     aligned<T>(a.y, 0) && aligned<T>(a.sum, 0);
  if (a.fp8.values != nullptr && !(tuned && valid_output(a.fp8, a.columns))) return kInvalidArgument;
  if (!tuned) {
    const auto kernel = norm_forward_general<T, kCentered>;
    return LAUNCH(kernel, dim3(persistent_grid(kernel, 256, a.rows)), dim3(256), 0, stream, a);
  }
  if (vectors <= 128) return start_forward<T, kCentered, 1>(a, block_for(vectors, 1), stream);
  if (vectors <= 640) return start_forward<T, kCentered, 2>(a, block_for(vectors, 2), stream);
  return start_forward<T, kCentered, 4>(a, block_for(vectors, 4), stream);
}

template <typename T, bool kCentered>
Plan backward_plan(const triaxis_norm_backward_args& a) {
  const int64_t vectors = a.columns / Vec<T>::size;
  const bool tuned = a.columns % Vec<T>::size == 0 && vectors <= 2 * kMostThreads && aligned<T>(a.grad_y, a.grad_y_stride) &&
                     aligned<T>(a.grad_sum, a.grad_sum_stride) && aligned<T>(a.x, a.x_stride) &&
                     aligned<T>(a.weight, 0) && aligned<T>(a.grad_x, 0);
  Plan plan;
  if (tuned) {
    plan.vectors = vectors <= 128 ? 1 : 2;
    plan.block = block_for(vectors, plan.vectors);
    const auto kernel = plan.vectors == 1 ? norm_backward<T, kCentered, 1> : norm_backward<T, kCentered, 2>;
    plan.grid = persistent_grid(kernel, plan.block.x * plan.block.y, ceil_div(a.rows, plan.block.y));
  } else {
    plan.grid = int(ceil_div(a.rows, 1024) < 64 ? ceil_div(a.rows, 1024) : 64);
    if (plan.grid == 0) plan.grid = 1;
  }
  return plan;
}

// Shares of the weight's gradient that the workspace has room for.
int64_t parts_of(const Plan& plan) { return int64_t(plan.grid) * (plan.vectors == 0 ? 1 : plan.block.y); }

template <typename T, bool kCentered>
int backward(const triaxis_norm_backward_args& a, void* stream) {
  const Plan plan = backward_plan<T, kCentered>(a);
  const unsigned column_blocks = unsigned(ceil_div(a.columns, kWarp));
  int status = 0;
  if (plan.vectors == 0) {
    const auto kernel = norm_backward_input_general<T, kCentered>;
    status = LAUNCH(kernel, dim3(persistent_grid(kernel, 256, a.rows)), dim3(256), 0, stream, a);
    if (status != 0) return status;
    const auto weights = norm_backward_weight_general<T, kCentered>;
    status = LAUNCH(weights, dim3(column_blocks, plan.grid), dim3(kWarp, kLanes), 0, stream, a);
  } else {
    const auto kernel = plan.vectors == 1 ? norm_backward<T, kCentered, 1> : norm_backward<T, kCentered, 2>;
    status = LAUNCH(kernel, dim3(plan.grid), plan.block, 0, stream, a);
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
