// The kernels as operators of torch, by its stable ABI: one binary for every torch from 2.11 on, and the only file that
// sees torch. Checks arguments, allocates results, finds the stream. Gradients and shapes under the compiler are
// Python's (engine/ops).
//
// Compiled with TRIAXIS_EMULATED, it registers the same functions for CPU tensors, over kernels that run on the host.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "../include/triaxis.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

triaxis_dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return TRIAXIS_F32;
    case ScalarType::BFloat16: return TRIAXIS_BF16;
    case ScalarType::Half: return TRIAXIS_F16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

// The same matrix with the elements of a row side by side.
Tensor with_dense_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

int64_t row_stride(const Tensor& x) { return x.size(0) <= 1 ? x.size(1) : x.stride(0); }

void check_matrix(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1), name,
                  ": expected the shape of the other matrices, [", like.size(0), ", ", like.size(1), "]");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected the dtype of the other matrices");
}

void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.is_contiguous(), name, ": expected a dense vector of ", size);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wrong dtype");
}

const void* pointer(const OptionalTensor& x) { return x.has_value() ? x->data_ptr() : nullptr; }

// The device of a tensor made current for as long as this lives, and its stream.
#ifdef TRIAXIS_EMULATED
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {
    using GetStream = AOTITorchError (*)(int32_t, void**);
    static const auto get_stream = [] {  // by name: linking to it would tie this library to a torch with CUDA
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<GetStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA streams");
    STD_TORCH_CHECK(get_stream(x.get_device_index(), &stream) == 0, "no stream on the device of the arguments");
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

void check_status(int status, const char* name) {
  STD_TORCH_CHECK(status == 0, name, ": ", triaxis_error_string(status));
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

const float* one_float(const OptionalTensor& x, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->numel() == 1 && x->scalar_type() == ScalarType::Float, name, ": expected one fp32 element");
  return static_cast<const float*>(x->data_ptr());
}

triaxis_scaling scaling_of(const std::string& name) {
  STD_TORCH_CHECK(name == "tensorwise" || name == "block_1x128" || name == "block_128x128", "scaling is 'tensorwise', 'block_1x128' or 'block_128x128'");
  return name == "tensorwise" ? TRIAXIS_TENSORWISE : name == "block_1x128" ? TRIAXIS_BLOCK_1X128 : TRIAXIS_BLOCK_128X128;
}

// How the result of an operator is quantized to E4M3, and where to.
struct Fp8Result {
  Tensor values, scale_inv;
  triaxis_fp8_output output{};

  Fp8Result(const Tensor& like, int64_t rows, int64_t columns, const std::string& scaling, const OptionalTensor& scale,
            const OptionalTensor& amax, bool power_of_two)
      : values(empty(like, {rows, columns}, ScalarType::Float8_e4m3fn)),
        scale_inv(scaling == "block_1x128" ? empty(like, {(columns + 127) / 128, rows}, ScalarType::Float)
                                 : empty(like, {0}, ScalarType::Float)) {
    STD_TORCH_CHECK(columns % 16 == 0, "[", rows, ", ", columns, "]: FP8 takes multiples of 16");
    STD_TORCH_CHECK(scaling == "block_1x128" || (scaling == "tensorwise" && scale.has_value()),
                    "scaling is 'block_1x128', or 'tensorwise' with a scale");
    output.values = values.data_ptr();
    output.scale = one_float(scale, "scale");
    output.amax = const_cast<float*>(one_float(amax, "amax"));
    output.scale_inv = scaling == "block_1x128" ? static_cast<float*>(scale_inv.data_ptr()) : nullptr;
    output.scale_inv_stride = rows;
    output.scaling = scaling_of(scaling);
    output.power_of_two = power_of_two;
  }
};

// What a norm leaves beside its output: the sum (empty without a residual), mean (empty unless centered), 1 / deviation.
struct NormResult {
  Tensor sum, mean, rstd;
};

NormResult run_norm(
    Tensor x, OptionalTensor residual, const Tensor& weight, const OptionalTensor& bias, double eps, bool centered, void* y, const triaxis_fp8_output& fp8) {
  const int64_t rows = x.size(0), columns = x.size(1);
  check_vector(weight, columns, x.scalar_type(), "weight");
  if (bias) check_vector(*bias, columns, x.scalar_type(), "bias");
  if (residual) check_matrix(*residual, x, "residual");
  STD_TORCH_CHECK(centered || !bias, "bias: only a centered norm has one");
  x = with_dense_rows(x);
  if (residual) residual = with_dense_rows(*residual);

  NormResult result{residual ? empty(x, {rows, columns}, x.scalar_type()) : empty(x, {0}, x.scalar_type()),
                    empty(x, {centered ? rows : 0}, ScalarType::Float), empty(x, {rows}, ScalarType::Float)};
  triaxis_norm_forward_args a{};
  a.x = x.data_ptr();
  a.residual = pointer(residual);
  a.weight = weight.data_ptr();
  a.bias = pointer(bias);
  a.y = y;
  a.sum = residual ? result.sum.data_ptr() : nullptr;
  a.mean = centered ? static_cast<float*>(result.mean.data_ptr()) : nullptr;
  a.rstd = static_cast<float*>(result.rstd.data_ptr());
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
    Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps, bool centered) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
  Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  const auto [sum, mean, rstd] =
      run_norm(x, residual, weight, bias, eps, centered, y.data_ptr(), {});
  return {y, sum, mean, rstd};
}

// -> the output in E4M3 and its scale_inv (empty if tensorwise), and what norm_forward leaves
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_forward_fp8(
    Tensor x, OptionalTensor residual, Tensor weight, OptionalTensor bias, double eps, bool centered, std::string scaling, OptionalTensor scale, OptionalTensor amax,
    bool power_of_two) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
  const Fp8Result y(x, x.size(0), x.size(1), scaling, scale, amax, power_of_two);
  const auto [sum, mean, rstd] =
      run_norm(x, residual, weight, bias, eps, centered, nullptr, y.output);
  return {y.values, y.scale_inv, sum, mean, rstd};
}

// -> gradients of x, the weight (fp32) and the bias (fp32, empty unless centered)
std::tuple<Tensor, Tensor, Tensor> norm_backward(
    Tensor grad_y, OptionalTensor grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool centered) {
  STD_TORCH_CHECK(grad_y.dim() == 2, "grad_y: expected a matrix");
  const int64_t rows = grad_y.size(0), columns = grad_y.size(1);
  check_matrix(x, grad_y, "x");
  if (grad_sum) check_matrix(*grad_sum, grad_y, "grad_sum");
  check_vector(weight, columns, grad_y.scalar_type(), "weight");
  check_vector(rstd, rows, ScalarType::Float, "rstd");
  check_vector(mean, centered ? rows : 0, ScalarType::Float, "mean");
  grad_y = with_dense_rows(grad_y);
  x = with_dense_rows(x);
  if (grad_sum) grad_sum = with_dense_rows(*grad_sum);

  Tensor grad_x = empty(grad_y, {rows, columns}, grad_y.scalar_type());
  Tensor grad_weight = empty(grad_y, {columns}, ScalarType::Float);
  Tensor grad_bias = empty(grad_y, {centered ? columns : 0}, ScalarType::Float);
  triaxis_norm_backward_args a{};
  a.grad_y = grad_y.data_ptr();
  a.grad_sum = pointer(grad_sum);
  a.x = x.data_ptr();
  a.weight = weight.data_ptr();
  a.mean = centered ? static_cast<const float*>(mean.data_ptr()) : nullptr;
  a.rstd = static_cast<const float*>(rstd.data_ptr());
  a.grad_x = grad_x.data_ptr();
  a.grad_weight = static_cast<float*>(grad_weight.data_ptr());
  a.grad_bias = centered ? static_cast<float*>(grad_bias.data_ptr()) : nullptr;
  a.rows = rows;
  a.columns = columns;
  a.grad_y_stride = row_stride(grad_y);
  a.grad_sum_stride = grad_sum ? row_stride(*grad_sum) : 0;
  a.x_stride = row_stride(x);
  a.dtype = dtype_of(grad_y, "grad_y");
  a.centered = centered;
  const OnDevice device(grad_y);
  Tensor workspace = empty(grad_y, {triaxis_norm_backward_workspace(&a)}, ScalarType::Float);
  a.workspace = static_cast<float*>(workspace.data_ptr());
  check_status(triaxis_norm_backward(&a, device.stream), "norm_backward");
  return {grad_x, grad_weight, grad_bias};
}

triaxis_swiglu_args swiglu_args(const Tensor& gate_up, const Tensor& out) {
  triaxis_swiglu_args a{};
  a.gate_up = gate_up.data_ptr();
  a.out = out.data_ptr();
  a.rows = gate_up.size(0);
  a.columns = gate_up.size(1) / 2;
  a.gate_up_stride = row_stride(gate_up);
  a.dtype = dtype_of(gate_up, "gate_up");
  return a;
}

Tensor swiglu_forward(Tensor gate_up) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected a matrix of an even width");
  gate_up = with_dense_rows(gate_up);
  Tensor out = empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2}, gate_up.scalar_type());
  const triaxis_swiglu_args a = swiglu_args(gate_up, out);
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_forward(&a, device.stream), "swiglu_forward");
  return out;
}

// -> the output in E4M3 and its scale_inv (empty if tensorwise)
std::tuple<Tensor, Tensor> swiglu_forward_fp8(
    Tensor gate_up, std::string scaling, OptionalTensor scale, OptionalTensor amax, bool power_of_two) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected a matrix of an even width");
  gate_up = with_dense_rows(gate_up);
  const Fp8Result out(gate_up, gate_up.size(0), gate_up.size(1) / 2, scaling, scale, amax, power_of_two);
  triaxis_swiglu_args a = swiglu_args(gate_up, out.values);
  a.fp8 = out.output;
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_forward(&a, device.stream), "swiglu_forward_fp8");
  return {out.values, out.scale_inv};
}

Tensor swiglu_backward(Tensor grad_out, Tensor gate_up) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up: expected a matrix of an even width");
  STD_TORCH_CHECK(grad_out.dim() == 2 && grad_out.size(0) == gate_up.size(0) && 2 * grad_out.size(1) == gate_up.size(1),
                  "grad_out: expected half the width of gate_up");
  STD_TORCH_CHECK(grad_out.scalar_type() == gate_up.scalar_type(), "grad_out: expected the dtype of gate_up");
  gate_up = with_dense_rows(gate_up);
  grad_out = with_dense_rows(grad_out);
  Tensor out = empty(gate_up, {gate_up.size(0), gate_up.size(1)}, gate_up.scalar_type());
  triaxis_swiglu_args a = swiglu_args(gate_up, out);
  a.grad_out = grad_out.data_ptr();
  a.grad_out_stride = row_stride(grad_out);
  const OnDevice device(gate_up);
  check_status(triaxis_swiglu_backward(&a, device.stream), "swiglu_backward");
  return out;
}

// Heads [t, n, d] with the elements of a head side by side.
Tensor with_dense_heads(const Tensor& x) { return x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

// `count` heads of `in` from `in_first` on go to those of `out` from `out_first` on.
triaxis_heads heads(const Tensor& in, int64_t in_first, const Tensor& out, int64_t out_first, int64_t count, bool rotate) {
  const auto at = [](const Tensor& x, int64_t head, size_t size) {
    return static_cast<char*>(x.data_ptr()) + head * x.stride(1) * int64_t(size);
  };
  const size_t size = in.element_size();
  return {at(in, in_first, size), at(out, out_first, size), count, in.stride(0), in.stride(1), out.stride(0),
          out.stride(1), rotate};
}

triaxis_rope_args rope_args(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "rope: expected heads [t, n, d] of an even size");
  for (const Tensor& table : {cos, sin}) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == x.size(0) && table.size(1) == x.size(2) / 2 &&
                        table.is_contiguous() && table.scalar_type() == ScalarType::Float,
                    "rope: expected dense tables fp32 [t, d/2]");
  }
  triaxis_rope_args a{};
  a.cos = static_cast<const float*>(cos.data_ptr());
  a.sin = static_cast<const float*>(sin.data_ptr());
  a.tokens = x.size(0);
  a.head_size = x.size(2);
  a.back = back;
  a.dtype = dtype_of(x, "rope");
  return a;
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool back) {
  triaxis_rope_args a = rope_args(x, cos, sin, back);
  x = with_dense_heads(x);
  Tensor out = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  a.groups[0] = heads(x, 0, out, 0, x.size(1), true);
  const OnDevice device(x);
  check_status(triaxis_rope(&a, device.stream), "rope");
  return out;
}

// qkv [t, n + 2 n_kv, d] -> rotated q [t, n, d] and k [t, n_kv, d]
std::tuple<Tensor, Tensor> rope_qk(Tensor qkv, Tensor cos, Tensor sin, int64_t kv_heads) {
  triaxis_rope_args a = rope_args(qkv, cos, sin, false);
  const int64_t tokens = qkv.size(0), size = qkv.size(2), q_heads = qkv.size(1) - 2 * kv_heads;
  STD_TORCH_CHECK(kv_heads >= 0 && q_heads >= 0, "rope_qk: more key and value heads than heads");
  qkv = with_dense_heads(qkv);
  Tensor q = empty(qkv, {tokens, q_heads, size}, qkv.scalar_type());
  Tensor k = empty(qkv, {tokens, kv_heads, size}, qkv.scalar_type());
  a.groups[0] = heads(qkv, 0, q, 0, q_heads, true);
  a.groups[1] = heads(qkv, q_heads, k, 0, kv_heads, true);
  const OnDevice device(qkv);
  check_status(triaxis_rope(&a, device.stream), "rope_qk");
  return {q, k};
}

// The gradient of qkv, from those of rotated q and k and of v.
Tensor rope_qk_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) {
  triaxis_rope_args a = rope_args(grad_q, cos, sin, true);
  for (const Tensor& other : {grad_k, grad_v}) {
    STD_TORCH_CHECK(other.dim() == 3 && other.size(0) == grad_q.size(0) && other.size(1) == grad_k.size(1) &&
                        other.size(2) == grad_q.size(2) && other.scalar_type() == grad_q.scalar_type(),
                    "rope_qk_backward: gradients of different shapes or dtypes");
  }
  grad_q = with_dense_heads(grad_q);
  grad_k = with_dense_heads(grad_k);
  grad_v = with_dense_heads(grad_v);
  const int64_t q_heads = grad_q.size(1), kv_heads = grad_k.size(1);
  Tensor out = empty(grad_q, {grad_q.size(0), q_heads + 2 * kv_heads, grad_q.size(2)}, grad_q.scalar_type());
  a.groups[0] = heads(grad_q, 0, out, 0, q_heads, true);
  a.groups[1] = heads(grad_k, 0, out, q_heads, kv_heads, true);
  a.groups[2] = heads(grad_v, 0, out, q_heads + kv_heads, kv_heads, false);
  const OnDevice device(grad_q);
  check_status(triaxis_rope(&a, device.stream), "rope_qk_backward");
  return out;
}

triaxis_cross_entropy_args cross_entropy_args(const Tensor& logits, const Tensor& labels, int64_t first_label) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits: expected a dense matrix");
  check_vector(labels, logits.size(0), ScalarType::Long, "labels");
  triaxis_cross_entropy_args a{};
  a.logits = logits.data_ptr();
  a.labels = static_cast<const int64_t*>(labels.data_ptr());
  a.rows = logits.size(0);
  a.columns = logits.size(1);
  a.first_label = first_label;
  a.dtype = dtype_of(logits, "logits");
  return a;
}

std::tuple<Tensor, Tensor> cross_entropy_statistics(Tensor logits, Tensor labels, int64_t first_label) {
  triaxis_cross_entropy_args a = cross_entropy_args(logits, labels, first_label);
  Tensor z = empty(logits, {a.rows}, ScalarType::Float), at_label = empty(logits, {a.rows}, ScalarType::Float);
  a.z = static_cast<float*>(z.data_ptr());
  a.at_label = static_cast<float*>(at_label.data_ptr());
  const OnDevice device(logits);
  check_status(triaxis_cross_entropy_statistics(&a, device.stream), "cross_entropy_statistics");
  return {z, at_label};
}

void cross_entropy_gradient_(
    Tensor logits, Tensor labels, Tensor z, Tensor scale, int64_t first_label, double z_loss) {
  triaxis_cross_entropy_args a = cross_entropy_args(logits, labels, first_label);
  check_vector(z, a.rows, ScalarType::Float, "z");
  check_vector(scale, a.rows, ScalarType::Float, "scale");
  a.z = static_cast<float*>(z.data_ptr());
  a.scale = static_cast<const float*>(scale.data_ptr());
  a.z_loss = static_cast<float>(z_loss);
  const OnDevice device(logits);
  check_status(triaxis_cross_entropy_gradient(&a, device.stream), "cross_entropy_gradient_");
}

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
  a.master = static_cast<float*>(master.data_ptr());
  a.grad = static_cast<const float*>(grad.data_ptr());
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

Tensor square_sum(Tensor x) {
  check_vector(x, x.numel(), ScalarType::Float, "x");
  Tensor out = empty(x, {}, ScalarType::Float), workspace = empty(x, {TRIAXIS_SQUARE_SUM_WORKSPACE}, ScalarType::Float);
  const OnDevice device(x);
  check_status(triaxis_square_sum(static_cast<const float*>(x.data_ptr()), x.numel(), static_cast<float*>(out.data_ptr()),
                                  static_cast<float*>(workspace.data_ptr()), device.stream), "square_sum");
  return out;
}

// -> the FP8 matrix and its transpose (empty if not requested), and scale_inv of both (empty if tensorwise)
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(
    Tensor x, ScalarType dtype, std::string scaling, bool row_major, bool transposed, OptionalTensor scale, OptionalTensor amax,
    bool power_of_two) {
  STD_TORCH_CHECK(x.dim() == 2, "quantize: expected a matrix");
  STD_TORCH_CHECK(dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2,
                  "quantize: expected float8_e4m3fn or float8_e5m2");
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(columns % 16 == 0 && (!transposed || rows % 16 == 0), "quantize: [", rows, ", ", columns,
                  "]: FP8 takes multiples of 16");
  triaxis_quantize_args a{};
  a.scaling = scaling_of(scaling);
  STD_TORCH_CHECK(a.scaling != TRIAXIS_TENSORWISE || scale.has_value(), "quantize: scaling 'tensorwise' needs a scale");
  x = with_dense_rows(x);
  const auto blocks = [](int64_t size) { return (size + 127) / 128; };
  const auto padded = [](int64_t size) { return (size + 3) / 4 * 4; };  // as cuBLASLt wants the blocks along K
  const auto scales = [&](bool wanted, int64_t outer, int64_t inner) {
    if (!wanted || a.scaling == TRIAXIS_TENSORWISE) return empty(x, {0}, ScalarType::Float);
    if (a.scaling == TRIAXIS_BLOCK_1X128) return empty(x, {blocks(inner), outer}, ScalarType::Float);
    return torch::stable::new_zeros(x, {blocks(outer), padded(blocks(inner))}, ScalarType::Float);
  };
  Tensor row_result = row_major ? empty(x, {rows, columns}, dtype) : empty(x, {0}, dtype);
  Tensor transposed_result = transposed ? empty(x, {columns, rows}, dtype) : empty(x, {0}, dtype);
  Tensor scale_inv = scales(row_major, rows, columns), transposed_scale_inv = scales(transposed, columns, rows);
  const auto floats = [](const Tensor& t) { return t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr; };
  a.x = x.data_ptr();
  a.row_major = row_major ? row_result.data_ptr() : nullptr;
  a.transposed = transposed ? transposed_result.data_ptr() : nullptr;
  a.scale = one_float(scale, "scale");
  a.amax = const_cast<float*>(one_float(amax, "amax"));
  a.scale_inv = floats(scale_inv);
  a.transposed_scale_inv = floats(transposed_scale_inv);
  a.rows = rows;
  a.columns = columns;
  a.stride = row_stride(x);
  a.scale_inv_stride = scale_inv.dim() == 2 ? scale_inv.size(1) : 0;
  a.transposed_scale_inv_stride = transposed_scale_inv.dim() == 2 ? transposed_scale_inv.size(1) : 0;
  a.dtype = dtype_of(x, "x");
  a.out_dtype = dtype == ScalarType::Float8_e4m3fn ? TRIAXIS_E4M3 : TRIAXIS_E5M2;
  a.power_of_two = power_of_two;
  const OnDevice device(x);
  check_status(triaxis_quantize(&a, device.stream), "quantize");
  return {row_result, transposed_result, scale_inv, transposed_scale_inv};
}

// Checks and pointers that the FP8 products share.
triaxis_fp8_matmul_args fp8_product(
    const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& a_scale_inv, const Tensor& b_scale_inv,
    const std::string& a_scaling, const std::string& b_scaling) {
  const auto fp8 = [](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(0) % 16 == 0 && x.size(1) % 16 == 0, name,
                    ": expected a dense matrix whose sizes are multiples of 16");
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2, name,
                    ": expected float8_e4m3fn or float8_e5m2");
    return dtype == ScalarType::Float8_e4m3fn ? TRIAXIS_E4M3 : TRIAXIS_E5M2;
  };
  triaxis_fp8_matmul_args x{};
  x.a_dtype = fp8(a, "a");
  x.b_dtype = fp8(b, "b");
  STD_TORCH_CHECK(a.size(1) == b.size(1), "a and b: expected rows of one length");
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(0) && out.is_contiguous(), "out: wrong shape");
  x.a = a.data_ptr();
  x.b = b.data_ptr();
  x.a_scale_inv = static_cast<const float*>(a_scale_inv.data_ptr());
  x.b_scale_inv = static_cast<const float*>(b_scale_inv.data_ptr());
  x.out = out.data_ptr();
  x.m = a.size(0);
  x.n = b.size(0);
  x.k = a.size(1);
  x.out_dtype = dtype_of(out, "out");
  x.a_scaling = scaling_of(a_scaling);
  x.b_scaling = scaling_of(b_scaling);
  return x;
}

#ifndef TRIAXIS_EMULATED
void run_cublaslt(triaxis_fp8_matmul_args x, const Tensor& a) {
  for (const void* matrix : {x.a, x.b, static_cast<const void*>(x.out)})  // what it assumes when it chooses
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(matrix) % 256 == 0, "expected matrices that start at 256 bytes");
  x.workspace_bytes = 32 << 20;  // what NVIDIA recommends for Hopper
  Tensor workspace = empty(a, {int64_t(x.workspace_bytes)}, ScalarType::Byte);
  x.workspace = workspace.data_ptr();
  const OnDevice device(a);
  check_status(triaxis_fp8_matmul(&x, a.get_device_index(), device.stream), "fp8_matmul");
}

Tensor fp8_matmul(
    Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling,
    ScalarType dtype, bool fast) {
  Tensor out = empty(a, {a.size(0), b.size(0)}, dtype);
  triaxis_fp8_matmul_args x = fp8_product(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling);
  x.fast = fast;
  run_cublaslt(x, a);
  return out;
}

void fp8_matmul_add_(
    Tensor out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling) {
  triaxis_fp8_matmul_args x = fp8_product(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling);
  x.accumulate = true;
  run_cublaslt(x, a);
}
#endif

void run_sm90(const triaxis_fp8_matmul_args& x, const Tensor& a, const Tensor& a_scale_inv, const Tensor& b_scale_inv) {
  STD_TORCH_CHECK(x.a_dtype == TRIAXIS_E4M3 && x.b_dtype == TRIAXIS_E4M3, "a and b: expected float8_e4m3fn");
  STD_TORCH_CHECK(x.a_scaling == TRIAXIS_BLOCK_1X128 && x.b_scaling != TRIAXIS_TENSORWISE,
                  "expected scalings 'block_1x128' and 'block_1x128' or 'block_128x128'");
  const int64_t blocks = (x.k + 127) / 128;
  const auto check = [](const Tensor& scales, int64_t rows, int64_t columns, const char* name) {
    STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == columns && scales.is_contiguous() &&
                        scales.scalar_type() == ScalarType::Float,
                    name, ": expected dense float32 [", rows, ", ", columns, "]");
  };
  check(a_scale_inv, blocks, x.m, "a_scale_inv");
  if (x.b_scaling == TRIAXIS_BLOCK_1X128) check(b_scale_inv, blocks, x.n, "b_scale_inv");
  if (x.b_scaling == TRIAXIS_BLOCK_128X128) check(b_scale_inv, (x.n + 127) / 128, (blocks + 3) / 4 * 4, "b_scale_inv");
  const OnDevice device(a);
  check_status(triaxis_fp8_matmul_sm90(&x, a.get_device_index(), device.stream), "fp8_matmul_sm90");
}

Tensor fp8_matmul_sm90(
    Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype: expected float32 or bfloat16");
  Tensor out = empty(a, {a.size(0), b.size(0)}, dtype);
  run_sm90(fp8_product(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling), a, a_scale_inv, b_scale_inv);
  return out;
}

void fp8_matmul_sm90_add_(
    Tensor out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out: expected float32");
  triaxis_fp8_matmul_args x = fp8_product(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling);
  x.accumulate = true;
  run_sm90(x, a, a_scale_inv, b_scale_inv);
}

[[maybe_unused]] void register_kernels(torch::stable::detail::StableLibrary& library) {
  library.impl("norm_forward", TORCH_BOX(&norm_forward));
  library.impl("norm_forward_fp8", TORCH_BOX(&norm_forward_fp8));
  library.impl("norm_backward", TORCH_BOX(&norm_backward));
  library.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  library.impl("swiglu_forward_fp8", TORCH_BOX(&swiglu_forward_fp8));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("rope_qk", TORCH_BOX(&rope_qk));
  library.impl("rope_qk_backward", TORCH_BOX(&rope_qk_backward));
  library.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  library.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  library.impl("adamw_", TORCH_BOX(&adamw_));
  library.impl("square_sum", TORCH_BOX(&square_sum));
  library.impl("quantize", TORCH_BOX(&quantize));
  library.impl("fp8_matmul_sm90", TORCH_BOX(&fp8_matmul_sm90));
  library.impl("fp8_matmul_sm90_add_", TORCH_BOX(&fp8_matmul_sm90_add_));
}

}  // namespace

#ifdef TRIAXIS_EMULATED
STABLE_TORCH_LIBRARY_IMPL(triaxis, CPU, library) { register_kernels(library); }
#else
STABLE_TORCH_LIBRARY(triaxis, library) {
  library.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "norm_forward_fp8(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered, "
      "str scaling, Tensor? scale, Tensor(a!)? amax, bool power_of_two) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
      "bool centered) -> (Tensor, Tensor, Tensor)");
  library.def("swiglu_forward(Tensor gate_up) -> Tensor");
  library.def(
      "swiglu_forward_fp8(Tensor gate_up, str scaling, Tensor? scale, Tensor(a!)? amax, bool power_of_two) -> "
      "(Tensor, Tensor)");
  library.def("swiglu_backward(Tensor grad_out, Tensor gate_up) -> Tensor");
  library.def("rope(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor");
  library.def("rope_qk(Tensor qkv, Tensor cos, Tensor sin, int kv_heads) -> (Tensor, Tensor)");
  library.def("rope_qk_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) -> Tensor");
  library.def("cross_entropy_statistics(Tensor logits, Tensor labels, int first_label) -> (Tensor, Tensor)");
  library.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor z, Tensor scale, int first_label, "
      "float z_loss) -> ()");
  library.def(
      "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? param, "
      "Tensor step, Tensor? grad_scale, Tensor? skip, float lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> ()");
  library.def("square_sum(Tensor x) -> Tensor");
  library.def(
      "quantize(Tensor x, ScalarType dtype, str scaling, bool row_major, bool transposed, Tensor? scale, Tensor(a!)? amax, "
      "bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "fp8_matmul(Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, str a_scaling, str b_scaling, "
      "ScalarType dtype, bool fast) -> Tensor");
  library.def(
      "fp8_matmul_add_(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, str a_scaling, "
      "str b_scaling) -> ()");
  library.def(
      "fp8_matmul_sm90(Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, str a_scaling, str b_scaling, "
      "ScalarType dtype) -> Tensor");
  library.def(
      "fp8_matmul_sm90_add_(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, str a_scaling, "
      "str b_scaling) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(triaxis, CUDA, library) {
  library.impl("fp8_matmul", TORCH_BOX(&fp8_matmul));
  library.impl("fp8_matmul_add_", TORCH_BOX(&fp8_matmul_add_));
#ifdef TRIAXIS_CUDA
  register_kernels(library);
#endif
}

// What was built, for people.
extern "C" __attribute__((visibility("default"))) const char* triaxis_build() { return TRIAXIS_BUILD; }
#endif
