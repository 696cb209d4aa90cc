// SwiGLU, forward and backward. A thread keeps its columns and goes from row to row, so that no index needs a division.

#include "../common/fp8.cuh"
#include "../common/vec.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 128;  // × 8 elements: wastes little of the last block for the usual feed-forward sizes

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

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
      for (int j = 0; j < kSize; ++j) {
        const float g = to_float(gate.at[j]);
        out.at[j] = from_float<T>(g * sigmoid(g) * to_float(up.at[j]));
      }
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

// With s = sigmoid(gate): d gate = d · up · s · (1 + gate · (1 − s)) and d up = d · gate · s.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) swiglu_backward(const triaxis_swiglu_args a) {
  const int64_t column = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (column >= a.columns) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const auto gate = load<kSize>(at<T>(a.gate_up, row, a.gate_up_stride, column));
    const auto up = load<kSize>(at<T>(a.gate_up, row, a.gate_up_stride, a.columns + column));
    const auto grad = load<kSize>(at<T>(a.grad_out, row, a.grad_out_stride, column));
    Vec<T, kSize> grad_gate, grad_up;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float g = to_float(gate.at[j]), u = to_float(up.at[j]), d = to_float(grad.at[j]), s = sigmoid(g);
      grad_gate.at[j] = from_float<T>(d * u * s * (1.0f + g * (1.0f - s)));
      grad_up.at[j] = from_float<T>(d * g * s);
    }
    store(at<T>(a.out, row, 2 * a.columns, column), grad_gate);
    store(at<T>(a.out, row, 2 * a.columns, a.columns + column), grad_up);
  }
}

dim3 grid_for(const triaxis_swiglu_args& a, int size) {
  const int64_t across = ceil_div(a.columns, int64_t(kThreads) * size);
  const int64_t down = ceil_div(8192, across);  // 8192 blocks are some waves on any GPU; each takes several rows of a batch
  return dim3(unsigned(across), unsigned(a.rows < down ? a.rows : down));
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
