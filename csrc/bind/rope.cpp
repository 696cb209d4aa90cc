// Rotary positions on heads [t, n, d], or on the queries and keys of a fused q, k and v.

#include "operator.h"

namespace {

using namespace triaxis_bind;

// The same heads with the elements of a head adjacent.
Tensor with_dense_heads(const Tensor& x) { return x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

// `count` heads of `in` from `in_first` on, to those of `out` from `out_first` on.
triaxis_heads heads(const Tensor& in, int64_t in_first, const Tensor& out, int64_t out_first, int64_t count, bool rotate) {
  const int64_t bytes = int64_t(in.element_size());
  const auto at = [bytes](const Tensor& x, int64_t head) {
    return static_cast<char*>(x.data_ptr()) + head * x.stride(1) * bytes;
  };
  return {at(in, in_first), at(out, out_first), count,         in.stride(0), in.stride(1),
          out.stride(0),    out.stride(1),      rotate};
}

triaxis_rope_args args_of(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "rope: expected heads [t, n, d] of an even size");
  for (const Tensor& table : {cos, sin}) {
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == x.size(0) && table.size(1) == x.size(2) / 2 &&
                        table.is_contiguous() && table.scalar_type() == ScalarType::Float,
                    "rope: expected dense tables fp32 [t, d/2]");
  }
  triaxis_rope_args a{};
  a.cos = floats(cos);
  a.sin = floats(sin);
  a.tokens = x.size(0);
  a.head_size = x.size(2);
  a.back = back;
  a.dtype = dtype_of(x, "rope");
  return a;
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool back) {
  triaxis_rope_args a = args_of(x, cos, sin, back);
  x = with_dense_heads(x);
  Tensor out = empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  a.groups[0] = heads(x, 0, out, 0, x.size(1), true);
  const OnDevice device(x);
  check_status(triaxis_rope(&a, device.stream), "rope");
  return out;
}

// qkv [t, n + 2 n_kv, d] -> rotated q [t, n, d] and k [t, n_kv, d]
std::tuple<Tensor, Tensor> rope_qk(Tensor qkv, Tensor cos, Tensor sin, int64_t kv_heads) {
  triaxis_rope_args a = args_of(qkv, cos, sin, false);
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

// Arguments of the backward but for its groups, checked. The gradients are replaced by such with dense heads.
triaxis_rope_args backward_args(Tensor& grad_q, Tensor& grad_k, Tensor& grad_v, const Tensor& cos, const Tensor& sin) {
  triaxis_rope_args a = args_of(grad_q, cos, sin, true);
  for (const Tensor& other : {grad_k, grad_v}) {
    STD_TORCH_CHECK(other.dim() == 3 && other.size(0) == grad_q.size(0) && other.size(1) == grad_k.size(1) &&
                        other.size(2) == grad_q.size(2) && other.scalar_type() == grad_q.scalar_type(),
                    "rope_qk_backward: gradients of different shapes or dtypes");
  }
  for (Tensor* grad : {&grad_q, &grad_k, &grad_v}) *grad = with_dense_heads(*grad);
  return a;
}

// The gradient of qkv, from those of rotated q and k and of v.
Tensor rope_qk_backward_amax(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, OptionalTensor amax) {
  triaxis_rope_args a = backward_args(grad_q, grad_k, grad_v, cos, sin);
  const int64_t q_heads = grad_q.size(1), kv_heads = grad_k.size(1);
  Tensor out = empty(grad_q, {grad_q.size(0), q_heads + 2 * kv_heads, grad_q.size(2)}, grad_q.scalar_type());
  a.groups[0] = heads(grad_q, 0, out, 0, q_heads, true);
  a.groups[1] = heads(grad_k, 0, out, q_heads, kv_heads, true);
  a.groups[2] = heads(grad_v, 0, out, q_heads + kv_heads, kv_heads, false);
  a.amax = one_float(amax, "amax");
  const OnDevice device(grad_q);
  check_status(triaxis_rope(&a, device.stream), "rope_qk_backward");
  return out;
}

// Without an amax an operator changes no argument: TorchInductor compiles it.
Tensor rope_qk_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) {
  return rope_qk_backward_amax(grad_q, grad_k, grad_v, cos, sin, {});
}

// -> values [t, (n + 2 n_kv) d], their transpose, scale_inv of each; of the gradient of qkv
std::tuple<Tensor, Tensor, Tensor, Tensor> rope_qk_backward_fp8(
    Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, std::string scaling, OptionalTensor scale,
    OptionalTensor amax) {
  triaxis_rope_args a = backward_args(grad_q, grad_k, grad_v, cos, sin);
  const int64_t q_heads = grad_q.size(1), kv_heads = grad_k.size(1);
  const Fp8Gradient out(grad_q, grad_q.size(0), (q_heads + 2 * kv_heads) * grad_q.size(2), scaling, scale, amax);
  a.groups[0] = heads(grad_q, 0, grad_q, 0, q_heads, true);
  a.groups[1] = heads(grad_k, 0, grad_k, 0, kv_heads, true);
  a.groups[2] = heads(grad_v, 0, grad_v, 0, kv_heads, false);
  const OnDevice device(grad_q);
  check_status(triaxis_rope_fp8(&a, &out.output, device.stream), "rope_qk_backward_fp8");
  return {out.values, out.transposed, out.scale_inv, out.transposed_scale_inv};
}

const Operator kOperators[] = {
    {"rope(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", TRIAXIS_KERNEL(rope)},
    {"rope_qk(Tensor qkv, Tensor cos, Tensor sin, int kv_heads) -> (Tensor, Tensor)", TRIAXIS_KERNEL(rope_qk)},
    {"rope_qk_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin) -> Tensor",
     TRIAXIS_KERNEL(rope_qk_backward)},
    {"rope_qk_backward_amax(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, Tensor(a!)? amax) -> Tensor",
     TRIAXIS_KERNEL(rope_qk_backward_amax)},
    {"rope_qk_backward_fp8(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor cos, Tensor sin, str scaling, Tensor? scale, "
     "Tensor(a!)? amax) -> (Tensor, Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(rope_qk_backward_fp8)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
