// What the operators of this folder share: checks of arguments, results, streams, registration.
//
// Operators use torch by its stable ABI, so that one binary serves every torch from 2.11 on; no other folder sees torch.
// They check arguments, allocate results and find the stream. Gradients and fake tensors are Python's (engine/ops).
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../include/triaxis.h"

namespace triaxis_bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline triaxis_dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return TRIAXIS_F32;
    case ScalarType::BFloat16: return TRIAXIS_BF16;
    case ScalarType::Half: return TRIAXIS_F16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline triaxis_scaling scaling_of(const std::string& name) {
  if (name == "tensorwise") return TRIAXIS_TENSORWISE;
  if (name == "block_1x128") return TRIAXIS_BLOCK_1X128;
  STD_TORCH_CHECK(name == "block_128x128", "scaling is 'tensorwise', 'block_1x128' or 'block_128x128', not '", name, "'");
  return TRIAXIS_BLOCK_128X128;
}

inline void check_matrix(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1), name,
                  ": expected the shape of the other matrices, [", like.size(0), ", ", like.size(1), "]");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected the dtype of the other matrices");
}

inline void check_vector(const Tensor& x, int64_t size, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.is_contiguous(), name, ": expected a dense vector of ", size);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wrong dtype");
}

inline void check_status(int status, const char* name) {
  STD_TORCH_CHECK(status == 0, name, ": ", triaxis_error_string(status));
}

// The same matrix with the elements of a row adjacent.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

inline int64_t row_stride(const Tensor& x) { return x.size(0) <= 1 ? x.size(1) : x.stride(0); }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

// The elements of an fp32 tensor; null if it has none.
inline float* floats(const Tensor& x) { return x.numel() == 0 ? nullptr : static_cast<float*>(x.data_ptr()); }

inline float* one_float(const OptionalTensor& x, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->numel() == 1 && x->scalar_type() == ScalarType::Float, name, ": expected one fp32 element");
  return static_cast<float*>(x->data_ptr());
}

// The output of a fused operator in E4M3.
struct Fp8Result {
  Tensor values, scale_inv;  // scale_inv is empty if tensorwise
  triaxis_fp8_output output{};

  Fp8Result(const Tensor& like, int64_t rows, int64_t columns, const std::string& scaling, const OptionalTensor& scale,
            const OptionalTensor& amax)
      : values(empty(like, {rows, columns}, ScalarType::Float8_e4m3fn)),
        scale_inv(scaling == "block_1x128" ? empty(like, {(columns + 127) / 128, rows}, ScalarType::Float)
                                           : empty(like, {0}, ScalarType::Float)) {
    STD_TORCH_CHECK(columns % 16 == 0, "[", rows, ", ", columns, "]: FP8 takes multiples of 16");
    STD_TORCH_CHECK(scaling == "block_1x128" || (scaling == "tensorwise" && scale.has_value()),
                    "scaling is 'block_1x128', or 'tensorwise' with a scale");
    output.values = values.data_ptr();
    output.scale = one_float(scale, "scale");
    output.amax = one_float(amax, "amax");
    output.scale_inv = floats(scale_inv);
    output.scale_inv_stride = rows;
    output.scaling = scaling_of(scaling);
  }
};

// A gradient [rows, columns] in FP8, row-major and transposed, that a fused backward computes: E5M2 if tensorwise, else E4M3.
struct Fp8Gradient {
  Tensor values, transposed, scale_inv, transposed_scale_inv;  // the last two are empty if tensorwise
  triaxis_quantize_args output{};

  Fp8Gradient(const Tensor& like, int64_t rows, int64_t columns, const std::string& scaling, const OptionalTensor& scale,
              const OptionalTensor& amax)
      : values(empty(like, {rows, columns}, dtype(scaling))),
        transposed(empty(like, {columns, rows}, dtype(scaling))),
        scale_inv(new_scale_inv(like, rows, columns, scaling)),
        transposed_scale_inv(new_scale_inv(like, columns, rows, scaling)) {
    STD_TORCH_CHECK(rows % 16 == 0 && columns % 16 == 0, "[", rows, ", ", columns, "]: FP8 takes multiples of 16");
    STD_TORCH_CHECK(scaling == "block_1x128" || (scaling == "tensorwise" && scale.has_value()),
                    "scaling is 'block_1x128', or 'tensorwise' with a scale");
    output.row_major = values.data_ptr();
    output.transposed = transposed.data_ptr();
    output.scale = one_float(scale, "scale");
    output.amax = one_float(amax, "amax");
    output.scale_inv = floats(scale_inv);
    output.transposed_scale_inv = floats(transposed_scale_inv);
    output.rows = rows;
    output.columns = columns;
    output.scale_inv_stride = rows;
    output.transposed_scale_inv_stride = columns;
    output.scaling = scaling_of(scaling);
    output.power_of_two = true;
  }

 private:
  static ScalarType dtype(const std::string& scaling) {
    return scaling == "tensorwise" ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
  }
  static Tensor new_scale_inv(const Tensor& like, int64_t rows, int64_t columns, const std::string& scaling) {
    if (scaling == "tensorwise") return empty(like, {0}, ScalarType::Float);
    return empty(like, {(columns + 127) / 128, rows}, ScalarType::Float);
  }
};

// Makes the device of a tensor current for as long as this lives, and holds its stream.
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

// An operator: its schema, and its implementation for CUDA (with TRIAXIS_EMULATED: for CPU) tensors.
struct Operator {
  const char* schema;
  void (*implementation)(StableIValue*, uint64_t, uint64_t);  // null: declared only
};

// The implementation of an operator that calls kernels: without nvcc there are none.
#if defined(TRIAXIS_CUDA) || defined(TRIAXIS_EMULATED)
#define TRIAXIS_KERNEL(function) TORCH_BOX(&function)
#else
#define TRIAXIS_KERNEL(function) (static_cast<void>(sizeof(&function)), nullptr)
#endif

template <size_t kCount>
void declare(torch::stable::detail::StableLibrary& library, const Operator (&operators)[kCount]) {
  for (const Operator& op : operators) library.def(op.schema);
}

template <size_t kCount>
void implement(torch::stable::detail::StableLibrary& library, const Operator (&operators)[kCount]) {
  for (const Operator& op : operators)
    if (op.implementation != nullptr)
      library.impl(std::string(op.schema, std::strchr(op.schema, '(')).c_str(), op.implementation);
}

// Registers an array of operators when the library is loaded. The emulated library is loaded next to the installed one,
// which has declared them.
#ifdef TRIAXIS_EMULATED
#define TRIAXIS_REGISTER(operators) \
  STABLE_TORCH_LIBRARY_IMPL(triaxis, CPU, library) { triaxis_bind::implement(library, operators); }
#else
#define TRIAXIS_REGISTER(operators)                                                             \
  STABLE_TORCH_LIBRARY_FRAGMENT(triaxis, library) { triaxis_bind::declare(library, operators); } \
  STABLE_TORCH_LIBRARY_IMPL(triaxis, CUDA, library) { triaxis_bind::implement(library, operators); }
#endif

}  // namespace triaxis_bind
