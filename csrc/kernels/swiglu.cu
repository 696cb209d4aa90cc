// SwiGLU, forward and backward. A thread keeps its columns and goes from row to row, so that no index needs a division; what
// writes a transpose in FP8 too takes a tile instead: the forward to one scale, and the backward, of both gradients.

#include "../common/tile.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 128;  // × 8 elements: wastes little of the last block for the usual feed-forward sizes

// Within 2 ulp of the division; 0 instead of numbers below 2^-126.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

struct Gradients {
  float gate, up;
};

// With s = sigmoid(gate): d gate = d · up · s · (1 + gate · (1 − s)) and d up = d · gate · s. The fused multiply-add is
// written out, so that every kernel computes the same bits.
__device__ __forceinline__ Gradients gradients(float gate, float up, float grad) {
  const float s = sigmoid(gate);
  return {grad * up * s * fmaf(gate, 1.0f - s, 1.0f), grad * gate * s};
}

template <typename T>
__device__ __forceinline__ T* at(const void* matrix, int64_t row, int64_t stride, int64_t column) {
  return static_cast<T*>(const_cast<void*>(matrix)) + row * stride + column;
}

template <typename T, int kSize, Output kOutput>
__global__ void __launch_bounds__(kThreads) swiglu_forward(const triaxis_swiglu_args a) {
  const int64_t column = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  const bool inside = column < a.columns;  // threads outside stay: the FP8 output shuffles over whole warps
  const float scale = kOutput == Output::kTensorwise ? *a.fp8.scale : 0.0f;
  int amax = 0;  // bits
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    Vec<T, kSize> out = {};
    if (inside) {
      const auto gate = load<kSize>(at<T>(a.gate_up, row, a.gate_up_stride, column));
      const auto up = load<kSize>(at<T>(a.gate_up, row, a.gate_up_stride, a.columns + column));
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.at[j] = from_float<T>(swiglu(to_float(gate.at[j]), to_float(up.at[j])));
      if (kOutput == Output::kPlain) store(at<T>(a.out, row, a.columns, column), out);
    }
    if constexpr (kOutput != Output::kPlain) {
      store_fp8<kOutput>(a.fp8, scale, out, row, a.columns, column, inside, amax);
    } else if (a.fp8.amax != nullptr) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) amax = max_magnitude(amax, to_float(out.at[j]));
    }
  }
  if (kOutput != Output::kBlocks) raise_amax(a.fp8.amax, amax);
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) swiglu_backward(const triaxis_swiglu_args a) {
  const int64_t column = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  const bool inside = column < a.columns;  // threads outside stay, for the maximum of a warp
  int amax = 0;                            // bits
  for (int64_t row = blockIdx.y; inside && row < a.rows; row += gridDim.y) {
    const auto gate = load<kSize>(at<T>(a.gate_up, row, a.gate_up_stride, column));
    const auto up = load<kSize>(at<T>(a.gate_up, row, a.gate_up_stride, a.columns + column));
    const auto grad = load<kSize>(at<T>(a.grad_out, row, a.grad_out_stride, column));
    Vec<T, kSize> grad_gate, grad_up;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const Gradients found = gradients(to_float(gate.at[j]), to_float(up.at[j]), to_float(grad.at[j]));
      grad_gate.at[j] = from_float<T>(found.gate);
      grad_up.at[j] = from_float<T>(found.up);
      if (a.fp8.amax != nullptr)
        amax = max_magnitude(max_magnitude(amax, to_float(grad_gate.at[j])), to_float(grad_up.at[j]));
    }
    store(at<T>(a.out, row, 2 * a.columns, column), grad_gate);
    store(at<T>(a.out, row, 2 * a.columns, a.columns + column), grad_up);
  }
  raise_amax(a.fp8.amax, amax);
}

constexpr int kRows = 4;  // of a thread: its 8 columns of both gradients take 32 registers in bf16

// The forward to E4M3 with one scale, row-major and transposed. `zero` is 0, for Packed::forget.
template <typename T>
__global__ void __launch_bounds__(kTileThreads<kRows>, sizeof(T) == 4 ? 1 : 2)
    swiglu_forward_fp8(const triaxis_swiglu_args a, const triaxis_quantize_args out, uint32_t zero) {
  __shared__ TileMemory<kRows> memory;
  const Place<kRows> at_tile(blockIdx.y, blockIdx.x * kTile, int(a.columns));
  Packed<T, kTileColumns> x[kRows];  // zeros outside the matrix
#pragma unroll
  for (int p = 0; p < kRows; ++p) {
    const int64_t row = at_tile.row + p;
    Packed<T, kTileColumns> gate{}, up{};
    if (at_tile.inside && row < a.rows) {
      gate = Packed<T, kTileColumns>::load(at<T>(a.gate_up, row, a.gate_up_stride, at_tile.column));
      up = Packed<T, kTileColumns>::load(at<T>(a.gate_up, row, a.gate_up_stride, a.columns + at_tile.column));
    }
#pragma unroll
    for (int i = 0; i < kTileColumns / 2; ++i)
      x[p].set_pair(i, swiglu(gate[2 * i], up[2 * i]), swiglu(gate[2 * i + 1], up[2 * i + 1]));
    x[p].forget(zero);
  }
  quantize_tile<T, __NV_E4M3, TRIAXIS_TENSORWISE, true>(at_tile, x, out, *out.scale, memory, zero);
}

// The backward with both gradients in FP8. `zero` is 0, for Packed::forget.
template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling>
__global__ void __launch_bounds__(kTileThreads<kRows>, sizeof(T) == 4 ? 1 : 2)
    swiglu_backward_fp8(const triaxis_swiglu_args a, const triaxis_quantize_args out, uint32_t zero) {
  __shared__ TileMemory<kRows> memory;
  const int columns = int(a.columns), column0 = blockIdx.x * kTile;
  const Place<kRows> of_gate(blockIdx.y, column0, columns), of_up(blockIdx.y, columns + column0, 2 * columns);
  Packed<T, kTileColumns> grad_gate[kRows], grad_up[kRows];  // zeros outside the matrix
#pragma unroll
  for (int p = 0; p < kRows; ++p) {
    const int row = of_gate.row + p;
    Packed<T, kTileColumns> gate{}, up{}, grad{};
    if (of_gate.inside && row < a.rows) {
      gate = Packed<T, kTileColumns>::load(at<T>(a.gate_up, row, a.gate_up_stride, of_gate.column));
      up = Packed<T, kTileColumns>::load(at<T>(a.gate_up, row, a.gate_up_stride, of_up.column));
      grad = Packed<T, kTileColumns>::load(at<T>(a.grad_out, row, a.grad_out_stride, of_gate.column));
    }
#pragma unroll
    for (int i = 0; i < kTileColumns / 2; ++i) {
      const Gradients low = gradients(gate[2 * i], up[2 * i], grad[2 * i]);
      const Gradients high = gradients(gate[2 * i + 1], up[2 * i + 1], grad[2 * i + 1]);
      grad_gate[p].set_pair(i, low.gate, high.gate);
      grad_up[p].set_pair(i, low.up, high.up);
    }
    grad_gate[p].forget(zero);
    grad_up[p].forget(zero);
  }
  const float scale = kScaling == TRIAXIS_TENSORWISE ? *out.scale : 0.0f;
  quantize_tile<T, kType, kScaling, true>(of_gate, grad_gate, out, scale, memory, zero);
  __syncthreads();  // all have read the shared memory
  quantize_tile<T, kType, kScaling, true>(of_up, grad_up, out, scale, memory, zero);
}

dim3 grid_for(const triaxis_swiglu_args& a, int size) {
  const int64_t across = ceil_div(a.columns, int64_t(kThreads) * size);
  const int64_t down = ceil_div(8192, across);  // 8192 blocks are some waves on any GPU; each takes several rows of a batch
  return dim3(unsigned(across), unsigned(a.rows < down ? a.rows : down));
}

dim3 tiles_of(const triaxis_swiglu_args& a) {
  return dim3(unsigned(ceil_div(a.columns, kTile)), unsigned(ceil_div(a.rows, kTile)));
}

template <typename T>
bool by_vector(const triaxis_swiglu_args& a, bool backward) {
  return a.columns % Vec<T>::size == 0 && aligned<T>(a.gate_up, a.gate_up_stride) && aligned<T>(a.out, 0) &&
         (!backward || aligned<T>(a.grad_out, a.grad_out_stride));
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_swiglu_forward(const triaxis_swiglu_args* args, void* stream) {
  const triaxis_swiglu_args& a = *args;
  if (!floating(a.dtype) || a.rows < 0 || a.columns < 0) return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int size = by_vector<T>(a, false) ? Vec<T>::size : 1;
    const Output output = output_of(a.fp8);
    if (output != Output::kPlain && (size == 1 || !valid_output(a.fp8, a.columns))) return kInvalidArgument;
    const auto kernel = output == Output::kTensorwise ? swiglu_forward<T, Vec<T>::size, Output::kTensorwise>
                        : output == Output::kBlocks   ? swiglu_forward<T, Vec<T>::size, Output::kBlocks>
                        : size == 1                   ? swiglu_forward<T, 1, Output::kPlain>
                                                      : swiglu_forward<T, Vec<T>::size, Output::kPlain>;
    return LAUNCH(kernel, grid_for(a, size), dim3(kThreads), 0, stream, a);
  });
}

extern "C" int triaxis_swiglu_forward_fp8(const triaxis_swiglu_args* args, const triaxis_quantize_args* out, void* stream) {
  const triaxis_swiglu_args& a = *args;
  if (!floating(a.dtype) || !valid_both(*out) || out->scaling != TRIAXIS_TENSORWISE || out->rows != a.rows ||
      out->columns != a.columns)
    return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (!by_vector<T>(a, false)) return kInvalidArgument;
    return LAUNCH(swiglu_forward_fp8<T>, tiles_of(a), dim3(kTileThreads<kRows>), 0, stream, a, *out, 0u);
  });
}

extern "C" int triaxis_swiglu_backward(const triaxis_swiglu_args* args, void* stream) {
  const triaxis_swiglu_args& a = *args;
  if (!floating(a.dtype) || a.rows < 0 || a.columns < 0) return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int size = by_vector<T>(a, true) ? Vec<T>::size : 1;
    const auto kernel = size == 1 ? swiglu_backward<T, 1> : swiglu_backward<T, Vec<T>::size>;
    return LAUNCH(kernel, grid_for(a, size), dim3(kThreads), 0, stream, a);
  });
}

extern "C" int triaxis_swiglu_backward_fp8(const triaxis_swiglu_args* args, const triaxis_quantize_args* out, void* stream) {
  const triaxis_swiglu_args& a = *args;
  const bool blocks = out->scaling == TRIAXIS_BLOCK_1X128;
  if (!floating(a.dtype) || !valid_both(*out) || out->rows != a.rows || out->columns != 2 * a.columns ||
      a.columns % (blocks ? kTile : kTileColumns) != 0)  // a block has elements of one of the gradients
    return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (!by_vector<T>(a, true)) return kInvalidArgument;
    const auto kernel = blocks ? swiglu_backward_fp8<T, __NV_E4M3, TRIAXIS_BLOCK_1X128>
                               : swiglu_backward_fp8<T, __NV_E5M2, TRIAXIS_TENSORWISE>;
    return LAUNCH(kernel, tiles_of(a), dim3(kTileThreads<kRows>), 0, stream, a, *out, 0u);
  });
}
