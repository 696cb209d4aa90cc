// Quantization to FP8, transposition of FP8, and FP8 matmuls: by cuBLASLt, and by the kernel for Hopper.

#include "operator.h"

namespace {

using namespace triaxis_bind;

triaxis_dtype fp8_dtype(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2, name,
                  ": expected float8_e4m3fn or float8_e5m2");
  return dtype == ScalarType::Float8_e4m3fn ? TRIAXIS_E4M3 : TRIAXIS_E5M2;
}

int64_t blocks(int64_t size) { return (size + 127) / 128; }

// Columns of scale_inv for 128 × 128 blocks: cuBLASLt reads it in groups of 4 along K.
int64_t padded_blocks(int64_t size) { return (blocks(size) + 3) / 4 * 4; }

// scale_inv for a matrix [rows, columns]; empty if tensorwise. 128 × 128 blocks have zeros in the padding.
Tensor new_scale_inv(const Tensor& like, int64_t rows, int64_t columns, triaxis_scaling scaling) {
  if (scaling == TRIAXIS_TENSORWISE) return empty(like, {0}, ScalarType::Float);
  if (scaling == TRIAXIS_BLOCK_1X128) return empty(like, {blocks(columns), rows}, ScalarType::Float);
  return torch::stable::new_zeros(like, {blocks(rows), padded_blocks(columns)}, ScalarType::Float);
}

void amax_(Tensor amax, Tensor x) {
  x = torch::stable::contiguous(x);
  const OnDevice device(x);
  check_status(triaxis_amax(x.data_ptr(), x.numel(), dtype_of(x, "x"), one_float(amax, "amax"), device.stream), "amax_");
}

// -> values, their transpose, scale_inv of each; empty if not requested. One scale: scale_inv only if it is not given, of both.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(
    Tensor x, ScalarType dtype, std::string scaling, bool row_major, bool transposed, OptionalTensor scale,
    OptionalTensor amax, bool power_of_two) {
  STD_TORCH_CHECK(x.dim() == 2, "quantize: expected a matrix");
  const int64_t rows = x.size(0), columns = x.size(1);
  triaxis_quantize_args a{};
  a.out_dtype = fp8_dtype(dtype, "quantize");
  STD_TORCH_CHECK(columns % 16 == 0 && (!transposed || rows % 16 == 0), "quantize: [", rows, ", ", columns,
                  "]: FP8 takes multiples of 16");
  a.scaling = scaling_of(scaling);
  const bool from_amax = a.scaling == TRIAXIS_TENSORWISE && !scale.has_value();
  STD_TORCH_CHECK(!from_amax || amax.has_value(), "quantize: scaling 'tensorwise' needs a scale, or the amax of x");
  x = with_dense_rows(x);
  Tensor values = row_major ? empty(x, {rows, columns}, dtype) : empty(x, {0}, dtype);
  Tensor values_t = transposed ? empty(x, {columns, rows}, dtype) : empty(x, {0}, dtype);
  Tensor scale_inv = from_amax   ? empty(x, {1}, ScalarType::Float)
                     : row_major ? new_scale_inv(x, rows, columns, a.scaling)
                                 : empty(x, {0}, ScalarType::Float);
  Tensor scale_inv_t = transposed ? new_scale_inv(x, columns, rows, a.scaling) : empty(x, {0}, ScalarType::Float);
  a.x = x.data_ptr();
  a.row_major = row_major ? values.data_ptr() : nullptr;
  a.transposed = transposed ? values_t.data_ptr() : nullptr;
  a.scale = one_float(scale, "scale");
  a.amax = one_float(amax, "amax");
  a.scale_inv = floats(scale_inv);
  a.transposed_scale_inv = floats(scale_inv_t);
  a.rows = rows;
  a.columns = columns;
  a.stride = row_stride(x);
  a.scale_inv_stride = scale_inv.dim() == 2 ? scale_inv.size(1) : 0;
  a.transposed_scale_inv_stride = scale_inv_t.dim() == 2 ? scale_inv_t.size(1) : 0;
  a.dtype = dtype_of(x, "x");
  a.power_of_two = power_of_two;
  const OnDevice device(x);
  check_status(triaxis_quantize(&a, device.stream), "quantize");
  return {values, values_t, scale_inv, scale_inv_t};
}

// -> the transpose, and its scale_inv; empty if tensorwise
std::tuple<Tensor, Tensor> transpose_fp8(Tensor values, Tensor scale_inv, std::string scaling) {
  STD_TORCH_CHECK(values.dim() == 2 && values.is_contiguous(), "values: expected a dense matrix");
  const int64_t rows = values.size(0), columns = values.size(1);
  STD_TORCH_CHECK(rows % 16 == 0 && columns % 16 == 0, "values: [", rows, ", ", columns, "]: FP8 takes multiples of 16");
  if (reinterpret_cast<uintptr_t>(values.data_ptr()) % 8 != 0) values = torch::stable::clone(values);  // of the kernel's loads
  triaxis_transpose_fp8_args a{};
  a.dtype = fp8_dtype(values.scalar_type(), "values");
  a.scaling = scaling_of(scaling);
  STD_TORCH_CHECK(a.scaling != TRIAXIS_BLOCK_128X128, "scaling is 'tensorwise' or 'block_1x128', not '", scaling, "'");
  if (a.scaling == TRIAXIS_BLOCK_1X128)
    STD_TORCH_CHECK(scale_inv.dim() == 2 && scale_inv.size(0) == blocks(columns) && scale_inv.size(1) == rows &&
                        scale_inv.is_contiguous() && scale_inv.scalar_type() == ScalarType::Float,
                    "scale_inv: expected dense float32 [", blocks(columns), ", ", rows, "]");
  Tensor transposed = empty(values, {columns, rows}, values.scalar_type());
  Tensor transposed_scale_inv = new_scale_inv(values, columns, rows, a.scaling);
  a.x = values.data_ptr();
  a.transposed = transposed.data_ptr();
  a.scale_inv = floats(scale_inv);
  a.transposed_scale_inv = floats(transposed_scale_inv);
  a.rows = rows;
  a.columns = columns;
  const OnDevice device(values);
  check_status(triaxis_transpose_fp8(&a, device.stream), "transpose_fp8");
  return {transposed, transposed_scale_inv};
}

// Checks and pointers that the matmuls share.
triaxis_fp8_matmul_args matmul_args(
    const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& a_scale_inv, const Tensor& b_scale_inv,
    const std::string& a_scaling, const std::string& b_scaling) {
  const auto operand = [](const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(0) % 16 == 0 && x.size(1) % 16 == 0, name,
                    ": expected a dense matrix whose sizes are multiples of 16");
    return fp8_dtype(x.scalar_type(), name);
  };
  triaxis_fp8_matmul_args x{};
  x.a_dtype = operand(a, "a");
  x.b_dtype = operand(b, "b");
  STD_TORCH_CHECK(a.size(1) == b.size(1), "a and b: expected rows of one length");
  STD_TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(0) && out.is_contiguous(), "out: wrong shape");
  x.a = a.data_ptr();
  x.b = b.data_ptr();
  x.a_scale_inv = floats(a_scale_inv);
  x.b_scale_inv = floats(b_scale_inv);
  x.out = out.data_ptr();
  x.m = a.size(0);
  x.n = b.size(0);
  x.k = a.size(1);
  x.out_dtype = dtype_of(out, "out");
  x.a_scaling = scaling_of(a_scaling);
  x.b_scaling = scaling_of(b_scaling);
  return x;
}

void run_sm90(const triaxis_fp8_matmul_args& x, const Tensor& a, const Tensor& a_scale_inv, const Tensor& b_scale_inv) {
  STD_TORCH_CHECK(x.a_dtype == TRIAXIS_E4M3 && x.b_dtype == TRIAXIS_E4M3, "a and b: expected float8_e4m3fn");
  STD_TORCH_CHECK(x.a_scaling == TRIAXIS_BLOCK_1X128 && x.b_scaling != TRIAXIS_TENSORWISE,
                  "expected scalings 'block_1x128' and 'block_1x128' or 'block_128x128'");
  const auto check = [](const Tensor& scale_inv, int64_t rows, int64_t columns, const char* name) {
    STD_TORCH_CHECK(scale_inv.dim() == 2 && scale_inv.size(0) == rows && scale_inv.size(1) == columns &&
                        scale_inv.is_contiguous() && scale_inv.scalar_type() == ScalarType::Float,
                    name, ": expected dense float32 [", rows, ", ", columns, "]");
  };
  check(a_scale_inv, blocks(x.k), x.m, "a_scale_inv");
  if (x.b_scaling == TRIAXIS_BLOCK_1X128) check(b_scale_inv, blocks(x.k), x.n, "b_scale_inv");
  if (x.b_scaling == TRIAXIS_BLOCK_128X128) check(b_scale_inv, blocks(x.n), padded_blocks(x.k), "b_scale_inv");
  const auto aligned = [](const void* memory, const char* name) {  // TMA takes no other
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % 16 == 0, name,
                    ": expected memory that starts at a multiple of 16 bytes");
  };
  aligned(x.a, "a"), aligned(x.b, "b"), aligned(x.out, "out");
  aligned(x.a_scale_inv, "a_scale_inv"), aligned(x.b_scale_inv, "b_scale_inv");
  const OnDevice device(a);
  check_status(triaxis_fp8_matmul_sm90(&x, a.get_device_index(), device.stream), "fp8_matmul_sm90");
}

Tensor fp8_matmul_sm90(
    Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling,
    ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype: expected float32 or bfloat16");
  Tensor out = empty(a, {a.size(0), b.size(0)}, dtype);
  run_sm90(matmul_args(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling), a, a_scale_inv, b_scale_inv);
  return out;
}

void fp8_matmul_sm90_add_(
    Tensor out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out: expected float32");
  triaxis_fp8_matmul_args x = matmul_args(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling);
  x.accumulate = true;
  run_sm90(x, a, a_scale_inv, b_scale_inv);
}

#define OPERANDS "Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, str a_scaling, str b_scaling"

const Operator kOperators[] = {
    {"amax_(Tensor(a!) amax, Tensor x) -> ()", TRIAXIS_KERNEL(amax_)},
    {"quantize(Tensor x, ScalarType dtype, str scaling, bool row_major, bool transposed, Tensor? scale, Tensor(a!)? amax, "
     "bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)",
     TRIAXIS_KERNEL(quantize)},
    {"transpose_fp8(Tensor values, Tensor scale_inv, str scaling) -> (Tensor, Tensor)", TRIAXIS_KERNEL(transpose_fp8)},
    {"fp8_matmul_sm90(" OPERANDS ", ScalarType dtype) -> Tensor", TRIAXIS_KERNEL(fp8_matmul_sm90)},
    {"fp8_matmul_sm90_add_(Tensor(a!) out, " OPERANDS ") -> ()", TRIAXIS_KERNEL(fp8_matmul_sm90_add_)},
};

#ifndef TRIAXIS_EMULATED  // cuBLASLt runs on a GPU alone, and needs no nvcc
void run_cublaslt(triaxis_fp8_matmul_args x, const Tensor& a) {
  for (const void* matrix : {x.a, x.b, static_cast<const void*>(x.out)})  // cuBLASLt's heuristic assumes it
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(matrix) % 256 == 0, "expected matrices that start at 256 bytes");
  x.workspace_bytes = 32 << 20;  // NVIDIA's recommendation for Hopper
  Tensor workspace = empty(a, {int64_t(x.workspace_bytes)}, ScalarType::Byte);
  x.workspace = workspace.data_ptr();
  const OnDevice device(a);
  check_status(triaxis_fp8_matmul(&x, a.get_device_index(), device.stream), "fp8_matmul");
}

Tensor fp8_matmul(
    Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling,
    ScalarType dtype, bool fast) {
  Tensor out = empty(a, {a.size(0), b.size(0)}, dtype);
  triaxis_fp8_matmul_args x = matmul_args(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling);
  x.fast = fast;
  run_cublaslt(x, a);
  return out;
}

void fp8_matmul_add_(
    Tensor out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, std::string a_scaling, std::string b_scaling,
    bool accumulate) {
  triaxis_fp8_matmul_args x = matmul_args(out, a, b, a_scale_inv, b_scale_inv, a_scaling, b_scaling);
  x.accumulate = accumulate;
  run_cublaslt(x, a);
}

const Operator kCublasLtOperators[] = {
    {"fp8_matmul(" OPERANDS ", ScalarType dtype, bool fast) -> Tensor", TORCH_BOX(&fp8_matmul)},
    {"fp8_matmul_add_(Tensor(a!) out, " OPERANDS ", bool accumulate=True) -> ()", TORCH_BOX(&fp8_matmul_add_)},
};
#endif

}  // namespace

TRIAXIS_REGISTER(kOperators)
#ifndef TRIAXIS_EMULATED
TRIAXIS_REGISTER(kCublasLtOperators)
#endif
