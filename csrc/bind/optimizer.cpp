// The optimizer's pass over a flat shard: AdamW, and the sum of squares for the gradient norm.

#include "operator.h"

namespace {

using namespace triaxis_bind;

void adamw_(
    Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, OptionalTensor param, Tensor step,
    OptionalTensor grad_scale, OptionalTensor skip, double lr, double beta1, double beta2, double eps,
    double weight_decay) {
  const int64_t size = master.numel();
  check_vector(master, size, ScalarType::Float, "master");
  check_vector(grad, size, ScalarType::Float, "grad");
  check_vector(exp_avg, size, exp_avg.scalar_type(), "exp_avg");
  check_vector(exp_avg_sq, size, exp_avg.scalar_type(), "exp_avg_sq");
  if (param) check_vector(*param, size, param->scalar_type(), "param");
  triaxis_adamw_args a{};
  a.master = floats(master);
  a.grad = floats(grad);
  a.exp_avg = exp_avg.data_ptr();
  a.exp_avg_sq = exp_avg_sq.data_ptr();
  a.param = param ? param->data_ptr() : nullptr;
  a.grad_scale = one_float(grad_scale, "grad_scale");
  a.skip = one_float(skip, "skip");
  a.step = one_float(step, "step");
  a.size = size;
  a.lr = static_cast<float>(lr);
  a.beta1 = static_cast<float>(beta1);
  a.beta2 = static_cast<float>(beta2);
  a.eps = static_cast<float>(eps);
  a.weight_decay = static_cast<float>(weight_decay);
  a.moment_dtype = dtype_of(exp_avg, "exp_avg");
  a.param_dtype = param ? dtype_of(*param, "param") : TRIAXIS_F32;
  const OnDevice device(master);
  check_status(triaxis_adamw(&a, device.stream), "adamw_");
}

// At least one piece: without tensors, PyTorch finds no implementation.
Tensor square_sum(std::vector<Tensor> pieces) {
  std::vector<const float*> starts;
  std::vector<int64_t> sizes;
  for (const Tensor& piece : pieces) {
    check_vector(piece, piece.numel(), ScalarType::Float, "pieces");
    starts.push_back(floats(piece));
    sizes.push_back(piece.numel());
  }
  const int64_t count = int64_t(pieces.size());
  Tensor out = empty(pieces[0], {}, ScalarType::Float);
  Tensor workspace = empty(pieces[0], {triaxis_square_sum_workspace(count)}, ScalarType::Float);
  const OnDevice device(pieces[0]);
  check_status(
      triaxis_square_sum(starts.data(), sizes.data(), count, floats(out), floats(workspace), device.stream), "square_sum");
  return out;
}

const Operator kOperators[] = {
    {"adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? param, Tensor step, "
     "Tensor? grad_scale, Tensor? skip, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
     TRIAXIS_KERNEL(adamw_)},
    {"square_sum(Tensor[] pieces) -> Tensor", TRIAXIS_KERNEL(square_sum)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
