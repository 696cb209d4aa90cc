// RMSNorm and LayerNorm, alone or of the sum with a residual; the forward also with its output in FP8.

#include "operator.h"

namespace {

using namespace triaxis_bind;

// What the forward returns in addition to y: the sum (empty without a residual), the mean (empty unless centered), 1 / deviation.
struct Statistics {
  Tensor sum, mean, rstd;
};

// `y` or `fp8.values` is where the output goes.
Statistics run_forward(
    Tensor x, OptionalTensor residual, const Tensor& weight, const OptionalTensor& bias, double eps, bool centered, void* y,
    const triaxis_fp8_output& fp8) {
  const int64_t rows = x.size(0), columns = x.size(1);
  check_vector(weight, columns, x.scalar_type(), "weight");
  if (bias) check_vector(*bias, columns, x.scalar_type(), "bias");
  if (residual) check_matrix(*residual, x, "residual");
  STD_TORCH_CHECK(centered || !bias, "bias: only a centered norm has one");
  x = with_dense_rows(x);
  if (residual) residual = with_dense_rows(*residual);

  Statistics result{residual ? empty(x, {rows, columns}, x.scalar_type()) : empty(x, {0}, x.scalar_type()),
                    empty(x, {centered ? rows : 0}, ScalarType::Float), empty(x, {rows}, ScalarType::Float)};
  triaxis_norm_forward_args a{};
  a.x = x.data_ptr();
  a.residual = residual ? residual->data_ptr() : nullptr;
  a.weight = weight.data_ptr();
  a.bias = bias ? bias->data_ptr() : nullptr;
  a.y = y;
  a.sum = residual ? result.sum.data_ptr() : nullptr;
  a.mean = floats(result.mean);
  a.rstd = floats(result.rstd);
  a.rows = rows;
  a.columns = columns;
  a.x_stride = row_stride(x);
  a.residual_stride = residual ? row_stride(*residual) : 0;
  a.eps = static_cast<float>(eps);
  a.dtype = dtype_of(x, "x");
  a.centered = centered;
  a.fp8 = fp8;
  const OnDevice device(x);
  check_status(triaxis_norm_forward(&a, device.stream), "norm_forward");
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
    Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps, bool centered, OptionalTensor amax) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
  Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  triaxis_fp8_output output{};
  output.amax = one_float(amax, "amax");
  const auto [sum, mean, rstd] = run_forward(x, residual, weight, bias, eps, centered, y.data_ptr(), output);
  return {y, sum, mean, rstd};
}

// -> values and scale_inv of the output, then what norm_forward returns in addition to y
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_forward_fp8(
    Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps, bool centered, std::string scaling,
    OptionalTensor scale, OptionalTensor amax) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
  const Fp8Result y(x, x.size(0), x.size(1), scaling, scale, amax);
  const auto [sum, mean, rstd] = run_forward(x, residual, weight, bias, eps, centered, nullptr, y.output);
  return {y.values, y.scale_inv, sum, mean, rstd};
}

// `x` is what was normalized. -> gradients of x, the weight (fp32) and the bias (fp32, empty unless centered). The last two
// are written to `grad_weight` and `grad_bias` where given, or added to them if `accumulate`, and those returned are empty.
std::tuple<Tensor, Tensor, Tensor> norm_backward(
    Tensor grad_y, OptionalTensor grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool centered, bool accumulate,
    OptionalTensor grad_weight, OptionalTensor grad_bias) {
  STD_TORCH_CHECK(grad_y.dim() == 2, "grad_y: expected a matrix");
  const int64_t rows = grad_y.size(0), columns = grad_y.size(1);
  check_matrix(x, grad_y, "x");
  if (grad_sum) check_matrix(*grad_sum, grad_y, "grad_sum");
  check_vector(weight, columns, grad_y.scalar_type(), "weight");
  check_vector(rstd, rows, ScalarType::Float, "rstd");
  check_vector(mean, centered ? rows : 0, ScalarType::Float, "mean");
  const bool given = grad_weight.has_value();
  if (given) check_vector(*grad_weight, columns, ScalarType::Float, "grad_weight");
  if (grad_bias) check_vector(*grad_bias, columns, ScalarType::Float, "grad_bias");
  STD_TORCH_CHECK(grad_bias.has_value() == (given && centered), "grad_bias: a centered norm has one, given with grad_weight");
  STD_TORCH_CHECK(given || !accumulate, "accumulate: there is no grad_weight to add to");
  grad_y = with_dense_rows(grad_y);
  x = with_dense_rows(x);
  if (grad_sum) grad_sum = with_dense_rows(*grad_sum);

  Tensor grad_x = empty(grad_y, {rows, columns}, grad_y.scalar_type());
  Tensor new_weight = empty(grad_y, {given ? 0 : columns}, ScalarType::Float);
  Tensor new_bias = empty(grad_y, {given || !centered ? 0 : columns}, ScalarType::Float);
  triaxis_norm_backward_args a{};
  a.grad_y = grad_y.data_ptr();
  a.grad_sum = grad_sum ? grad_sum->data_ptr() : nullptr;
  a.x = x.data_ptr();
  a.weight = weight.data_ptr();
  a.mean = floats(mean);
  a.rstd = floats(rstd);
  a.grad_x = grad_x.data_ptr();
  a.grad_weight = floats(given ? *grad_weight : new_weight);
  a.grad_bias = floats(grad_bias ? *grad_bias : new_bias);
  a.rows = rows;
  a.columns = columns;
  a.grad_y_stride = row_stride(grad_y);
  a.grad_sum_stride = grad_sum ? row_stride(*grad_sum) : 0;
  a.x_stride = row_stride(x);
  a.dtype = dtype_of(grad_y, "grad_y");
  a.centered = centered;
  a.accumulate = accumulate;
  const OnDevice device(grad_y);
  Tensor workspace = empty(grad_y, {triaxis_norm_backward_workspace(&a)}, ScalarType::Float);
  a.workspace = floats(workspace);
  check_status(triaxis_norm_backward(&a, device.stream), "norm_backward");
  return {grad_x, new_weight, new_bias};
}

const Operator kOperators[] = {
    {"norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered, Tensor(a!)? amax=None) "
     "-> (Tensor, Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(norm_forward)},
    {"norm_forward_fp8(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered, str scaling, "
     "Tensor? scale, Tensor(a!)? amax) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(norm_forward_fp8)},
    {"norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool centered, "
     "bool accumulate=False, Tensor(a!)? grad_weight=None, Tensor(b!)? grad_bias=None) -> (Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(norm_backward)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
