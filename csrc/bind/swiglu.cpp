// SwiGLU, forward and backward; each also with its result in FP8.

#include "operator.h"

namespace {

using namespace triaxis_bind;

// Dense rows of `gate_up`, checked.
Tensor gate_up_of(const Tensor& gate_up) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected a matrix of an even width");
  return with_dense_rows(gate_up);
}

triaxis_swiglu_args args_of(const Tensor& gate_up) {
  triaxis_swiglu_args a{};
  a.gate_up = gate_up.data_ptr();
  a.rows = gate_up.size(0);
  a.columns = gate_up.size(1) / 2;
  a.gate_up_stride = row_stride(gate_up);
  a.dtype = dtype_of(gate_up, "gate_up");
  return a;
}

Tensor swiglu_forward_amax(Tensor gate_up, OptionalTensor amax) {
  gate_up = gate_up_of(gate_up);
  Tensor out = empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2}, gate_up.scalar_type());
  triaxis_swiglu_args a = args_of(gate_up);
  a.out = out.data_ptr();
  a.fp8.amax = one_float(amax, "amax");
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_forward(&a, device.stream), "swiglu_forward");
  return out;
}

// Without an amax an operator changes no argument: TorchInductor compiles it.
Tensor swiglu_forward(Tensor gate_up) { return swiglu_forward_amax(gate_up, {}); }

// -> values of the output, their transpose, which is empty if not requested, and scale_inv
std::tuple<Tensor, Tensor, Tensor> swiglu_forward_fp8(
    Tensor gate_up, std::string scaling, OptionalTensor scale, OptionalTensor amax, bool transposed) {
  gate_up = gate_up_of(gate_up);
  const Fp8Result out(gate_up, gate_up.size(0), gate_up.size(1) / 2, scaling, scale, amax);
  triaxis_swiglu_args a = args_of(gate_up);
  const OnDevice device(gate_up);
  if (!transposed) {
    a.fp8 = out.output;
    check_status(triaxis_swiglu_forward(&a, device.stream), "swiglu_forward_fp8");
    return {out.values, empty(gate_up, {0}, ScalarType::Float8_e4m3fn), out.scale_inv};
  }
  STD_TORCH_CHECK(scaling == "tensorwise" && a.rows % 16 == 0,
                  "transposed: expected scaling 'tensorwise' and rows that are a multiple of 16");
  Tensor values_t = empty(gate_up, {a.columns, a.rows}, ScalarType::Float8_e4m3fn);
  triaxis_quantize_args both{};
  both.row_major = out.values.data_ptr();
  both.transposed = values_t.data_ptr();
  both.scale = out.output.scale;
  both.amax = out.output.amax;
  both.rows = a.rows;
  both.columns = a.columns;
  both.scaling = out.output.scaling;
  check_status(triaxis_swiglu_forward_fp8(&a, &both, device.stream), "swiglu_forward_fp8");
  return {out.values, values_t, out.scale_inv};
}

// Arguments of the backward, checked; the tensors are replaced by such with dense rows.
triaxis_swiglu_args backward_args(Tensor& grad_out, Tensor& gate_up) {
  gate_up = gate_up_of(gate_up);
  STD_TORCH_CHECK(grad_out.dim() == 2 && grad_out.size(0) == gate_up.size(0) && 2 * grad_out.size(1) == gate_up.size(1),
                  "grad_out: expected half the width of gate_up");
  STD_TORCH_CHECK(grad_out.scalar_type() == gate_up.scalar_type(), "grad_out: expected the dtype of gate_up");
  grad_out = with_dense_rows(grad_out);
  triaxis_swiglu_args a = args_of(gate_up);
  a.grad_out = grad_out.data_ptr();
  a.grad_out_stride = row_stride(grad_out);
  return a;
}

Tensor swiglu_backward_amax(Tensor grad_out, Tensor gate_up, OptionalTensor amax) {
  triaxis_swiglu_args a = backward_args(grad_out, gate_up);
  Tensor out = empty(gate_up, {gate_up.size(0), gate_up.size(1)}, gate_up.scalar_type());
  a.out = out.data_ptr();
  a.fp8.amax = one_float(amax, "amax");
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_backward(&a, device.stream), "swiglu_backward");
  return out;
}

Tensor swiglu_backward(Tensor grad_out, Tensor gate_up) { return swiglu_backward_amax(grad_out, gate_up, {}); }

// -> values, their transpose, scale_inv of each; of the gradient of gate_up
std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward_fp8(
    Tensor grad_out, Tensor gate_up, std::string scaling, OptionalTensor scale, OptionalTensor amax) {
  const triaxis_swiglu_args a = backward_args(grad_out, gate_up);
  const Fp8Gradient out(gate_up, gate_up.size(0), gate_up.size(1), scaling, scale, amax);
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_backward_fp8(&a, &out.output, device.stream), "swiglu_backward_fp8");
  return {out.values, out.transposed, out.scale_inv, out.transposed_scale_inv};
}

const Operator kOperators[] = {
    {"swiglu_forward(Tensor gate_up) -> Tensor", TRIAXIS_KERNEL(swiglu_forward)},
    {"swiglu_forward_amax(Tensor gate_up, Tensor(a!)? amax) -> Tensor", TRIAXIS_KERNEL(swiglu_forward_amax)},
    {"swiglu_forward_fp8(Tensor gate_up, str scaling, Tensor? scale, Tensor(a!)? amax, bool transposed=False) -> "
     "(Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(swiglu_forward_fp8)},
    {"swiglu_backward(Tensor grad_out, Tensor gate_up) -> Tensor", TRIAXIS_KERNEL(swiglu_backward)},
    {"swiglu_backward_amax(Tensor grad_out, Tensor gate_up, Tensor(a!)? amax) -> Tensor", TRIAXIS_KERNEL(swiglu_backward_amax)},
    {"swiglu_backward_fp8(Tensor grad_out, Tensor gate_up, str scaling, Tensor? scale, Tensor(a!)? amax) -> "
     "(Tensor, Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(swiglu_backward_fp8)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
