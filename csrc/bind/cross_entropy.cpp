// Cross-entropy over a part of the vocabulary, in two operators with room for an exchange between ranks.

#include "operator.h"

namespace {

using namespace triaxis_bind;

triaxis_cross_entropy_args args_of(const Tensor& logits, const Tensor& labels, int64_t first_label) {
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

// -> z and the logit of the label, each [rows]
std::tuple<Tensor, Tensor> cross_entropy_statistics(Tensor logits, Tensor labels, int64_t first_label) {
  triaxis_cross_entropy_args a = args_of(logits, labels, first_label);
  Tensor z = empty(logits, {a.rows}, ScalarType::Float), at_label = empty(logits, {a.rows}, ScalarType::Float);
  a.z = floats(z);
  a.at_label = floats(at_label);
  const OnDevice device(logits);
  check_status(triaxis_cross_entropy_statistics(&a, device.stream), "cross_entropy_statistics");
  return {z, at_label};
}

void cross_entropy_gradient_(Tensor logits, Tensor labels, Tensor z, Tensor scale, int64_t first_label, double z_loss) {
  triaxis_cross_entropy_args a = args_of(logits, labels, first_label);
  check_vector(z, a.rows, ScalarType::Float, "z");
  check_vector(scale, a.rows, ScalarType::Float, "scale");
  a.z = floats(z);
  a.scale = floats(scale);
  a.z_loss = static_cast<float>(z_loss);
  const OnDevice device(logits);
  check_status(triaxis_cross_entropy_gradient(&a, device.stream), "cross_entropy_gradient_");
}

const Operator kOperators[] = {
    {"cross_entropy_statistics(Tensor logits, Tensor labels, int first_label) -> (Tensor, Tensor)",
     TRIAXIS_KERNEL(cross_entropy_statistics)},
    {"cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor z, Tensor scale, int first_label, float z_loss) "
     "-> ()",
     TRIAXIS_KERNEL(cross_entropy_gradient_)},
};

}  // namespace

TRIAXIS_REGISTER(kOperators)
