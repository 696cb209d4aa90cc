// The gradient of an embedding.

#include "operator.h"

namespace {

using namespace triaxis_bind;

void embedding_backward_(Tensor out, Tensor tokens, Tensor grad) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Float,
                  "out: expected a dense float32 matrix");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(1) == out.size(1), "grad: expected rows of ", out.size(1));
  check_vector(tokens, grad.size(0), ScalarType::Long, "tokens");
  grad = with_dense_rows(grad);
  triaxis_embedding_backward_args a{};
  a.tokens = static_cast<const int64_t*>(tokens.data_ptr());
  a.grad = grad.data_ptr();
  a.out = floats(out);
  a.count = grad.size(0);
  a.rows = out.size(0);
  a.columns = out.size(1);
  a.grad_stride = row_stride(grad);
  a.dtype = dtype_of(grad, "grad");
  const OnDevice device(grad);
  check_status(triaxis_embedding_backward(&a, device.stream), "embedding_backward_");
}

const Operator kOperators[] = {
    {"embedding_backward_(Tensor(a!) out, Tensor tokens, Tensor grad) -> ()", TRIAXIS_KERNEL(embedding_backward_)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
