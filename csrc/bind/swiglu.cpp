// SwiGLU, forward (also with its output in FP8) and backward.

#include "operator.h"

namespace {

using namespace triaxis_bind;

// Dense rows of `gate_up`, checked.
Tensor gate_up_of(const Tensor& gate_up) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected a matrix of an even width");
  return with_dense_rows(gate_up);
}

triaxis_swiglu_args args_of(const Tensor& gate_up, const Tensor& out) {
  triaxis_swiglu_args a{};
  a.gate_up = gate_up.data_ptr();
  a.out = out.data_ptr();
  a.rows = gate_up.size(0);
  a.columns = gate_up.size(1) / 2;
  a.gate_up_stride = row_stride(gate_up);
  a.dtype = dtype_of(gate_up, "gate_up");
  return a;
}

Tensor swiglu_forward(Tensor gate_up, OptionalTensor amax) {
  gate_up = gate_up_of(gate_up);
  Tensor out = empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2}, gate_up.scalar_type());
  triaxis_swiglu_args a = args_of(gate_up, out);
  a.fp8.amax = one_float(amax, "amax");
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_forward(&a, device.stream), "swiglu_forward");
  return out;
}

// -> values and scale_inv of the output
std::tuple<Tensor, Tensor> swiglu_forward_fp8(
    Tensor gate_up, std::string scaling, OptionalTensor scale, OptionalTensor amax) {
  gate_up = gate_up_of(gate_up);
  const Fp8Result out(gate_up, gate_up.size(0), gate_up.size(1) / 2, scaling, scale, amax);
  triaxis_swiglu_args a = args_of(gate_up, out.values);
  a.fp8 = out.output;
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_forward(&a, device.stream), "swiglu_forward_fp8");
  return {out.values, out.scale_inv};
}

Tensor swiglu_backward(Tensor grad_out, Tensor gate_up) {
  gate_up = gate_up_of(gate_up);
  STD_TORCH_CHECK(grad_out.dim() == 2 && grad_out.size(0) == gate_up.size(0) && 2 * grad_out.size(1) == gate_up.size(1),
                  "grad_out: expected half the width of gate_up");
  STD_TORCH_CHECK(grad_out.scalar_type() == gate_up.scalar_type(), "grad_out: expected the dtype of gate_up");
  grad_out = with_dense_rows(grad_out);
  Tensor out = empty(gate_up, {gate_up.size(0), gate_up.size(1)}, gate_up.scalar_type());
  triaxis_swiglu_args a = args_of(gate_up, out);
  a.grad_out = grad_out.data_ptr();
  a.grad_out_stride = row_stride(grad_out);
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_backward(&a, device.stream), "swiglu_backward");
  return out;
}

const Operator kOperators[] = {
    {"swiglu_forward(Tensor gate_up, Tensor(a!)? amax=None) -> Tensor", TRIAXIS_KERNEL(swiglu_forward)},
    {"swiglu_forward_fp8(Tensor gate_up, str scaling, Tensor? scale, Tensor(a!)? amax) -> (Tensor, Tensor)",
     TRIAXIS_KERNEL(swiglu_forward_fp8)},
    {"swiglu_backward(Tensor grad_out, Tensor gate_up) -> Tensor", TRIAXIS_KERNEL(swiglu_backward)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
