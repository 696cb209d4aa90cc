/* The C interface of the kernels: raw pointers, sizes, a stream, a status; no torch.
 *
 * Matrices are row-major [rows, columns]; a stride is the distance between rows in elements, and the elements of a row
 * are adjacent. Functions launch work on `stream` and return 0, or an error that triaxis_error_string describes. Sizes may
 * be 0 unless a comment says otherwise.
 */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { TRIAXIS_F32, TRIAXIS_BF16, TRIAXIS_F16, TRIAXIS_E4M3, TRIAXIS_E5M2 } triaxis_dtype;

enum {
  TRIAXIS_NO_CUBLASLT = 900, /* errors up to here are those of the CUDA runtime */
  TRIAXIS_OLD_CUBLASLT,
  TRIAXIS_NO_ALGORITHM,
  TRIAXIS_NOT_HOPPER,
  TRIAXIS_NO_TENSOR_MAP,
  TRIAXIS_CUBLASLT_STATUS = 1000 /* plus a status of cuBLAS */
};

#define TRIAXIS_PUBLIC __attribute__((visibility("default"))) /* Python calls it */

TRIAXIS_PUBLIC const char* triaxis_error_string(int status);

/* What shares a scale: a tensor, 1 × 128 elements of a row, or a block of 128 × 128. */
typedef enum { TRIAXIS_TENSORWISE, TRIAXIS_BLOCK_1X128, TRIAXIS_BLOCK_128X128 } triaxis_scaling;

/* How a fused operator quantizes its output to E4M3: as triaxis_quantize would quantize the rounded output, with
 * TRIAXIS_TENSORWISE and a scale, or with TRIAXIS_BLOCK_1X128 and scales that are powers of two. Columns are a multiple of 16.
 *
 * `amax`, if not null, is raised to the largest |output|; not with TRIAXIS_BLOCK_1X128. Like the maxima of all operators it is
 * NaN if an element is.
 */
typedef struct {
  void* values; /* [rows, columns], contiguous; null: the output is not quantized, and only `amax` matters */
  const float* scale;
  float *amax, *scale_inv; /* scale_inv [blocks of a row, rows] */
  int64_t scale_inv_stride;
  triaxis_scaling scaling;
} triaxis_fp8_output;

/* Normalization over the columns. RMSNorm: x̂ = x / sqrt(mean(x²) + eps); LayerNorm (`centered`): x̂ = (x − mean) /
 * sqrt(variance + eps). Statistics are fp32. y = x̂ · weight + bias, rounded once.
 *
 * With a `residual`, x + residual is rounded once, written to `sum`, and the rounded value is normalized.
 */
typedef struct {
  const void *x, *residual, *weight, *bias; /* residual and bias may be null; all in `dtype` */
  void *y, *sum;                            /* contiguous; sum only with a residual */
  float *mean, *rstd;                       /* [rows]; mean only when centered */
  int64_t rows, columns, x_stride, residual_stride;
  float eps;
  triaxis_dtype dtype; /* F32, BF16 or F16 */
  int centered;
  triaxis_fp8_output fp8; /* values instead of y; for at most 2048 vectors of 16 bytes in a row, all of them aligned */
} triaxis_norm_forward_args;

int triaxis_norm_forward(const triaxis_norm_forward_args* args, void* stream);

/* Gradients of the above. `x` is what was normalized: the input, or its sum with the residual. `grad_sum` is the gradient
 * that reaches this sum from the residual stream, and is added to grad_x. Weight gradients are fp32, reduced in a fixed
 * order; with `accumulate` they are added to what grad_weight and grad_bias hold.
 */
typedef struct {
  const void *grad_y, *grad_sum, *x, *weight; /* grad_sum may be null */
  const float *mean, *rstd;
  void* grad_x;                   /* contiguous */
  float *grad_weight, *grad_bias; /* [columns]; grad_bias only when centered */
  float* workspace;               /* triaxis_norm_backward_workspace() floats */
  int64_t rows, columns, grad_y_stride, grad_sum_stride, x_stride;
  triaxis_dtype dtype;
  int centered, accumulate;
} triaxis_norm_backward_args;

int64_t triaxis_norm_backward_workspace(const triaxis_norm_backward_args* args);
int triaxis_norm_backward(const triaxis_norm_backward_args* args, void* stream);

/* SwiGLU: out = silu(gate) · up, for gate_up [rows, 2 columns] with the gate in the first half of a row. */
typedef struct {
  const void *gate_up, *grad_out; /* grad_out [rows, columns] in the backward */
  void* out;                      /* forward [rows, columns]; backward [rows, 2 columns]; contiguous */
  int64_t rows, columns, gate_up_stride, grad_out_stride;
  triaxis_dtype dtype;
  triaxis_fp8_output fp8; /* values only in the forward, instead of out, for aligned rows; amax also without values */
} triaxis_swiglu_args;

int triaxis_swiglu_forward(const triaxis_swiglu_args* args, void* stream);
int triaxis_swiglu_backward(const triaxis_swiglu_args* args, void* stream);

/* Rotary positions: element i of a head rotates with element i + head_size / 2, by the angle of its token. Several groups
 * of heads, in different tensors, in one pass.
 */
typedef struct {
  const void* in;
  void* out;
  int64_t heads, in_token_stride, in_head_stride, out_token_stride, out_head_stride;
  int rotate; /* 0 copies */
} triaxis_heads;

typedef struct {
  triaxis_heads groups[3]; /* of 0 heads where unused */
  const float *cos, *sin;  /* [tokens, head_size / 2], contiguous */
  int64_t tokens, head_size;
  int back;    /* rotate back: the gradient */
  float* amax; /* may be null; raised to the largest |element| of what is written */
  triaxis_dtype dtype;
} triaxis_rope_args;

int triaxis_rope(const triaxis_rope_args* args, void* stream);

/* Cross-entropy over a part of the vocabulary, in two steps; between them, ranks exchange what the first found.
 *
 * _statistics: of each row of logits [rows, columns], z = log Σ exp(logit), and the logit of the label if this part
 * holds it (else 0). _gradient: overwrites the logits with the gradient of (z − logit of the label + z_loss · z²)
 * with respect to each logit, times `scale`; here z is that of the whole vocabulary.
 */
typedef struct {
  void* logits; /* contiguous */
  const int64_t* labels;
  float *z, *at_label; /* [rows] */
  const float* scale;  /* [rows], in _gradient */
  int64_t rows, columns, first_label;
  float z_loss;
  triaxis_dtype dtype;
} triaxis_cross_entropy_args;

int triaxis_cross_entropy_statistics(const triaxis_cross_entropy_args* args, void* stream);
int triaxis_cross_entropy_gradient(const triaxis_cross_entropy_args* args, void* stream);

/* Adds grad [count, columns] to the rows of `out` [rows, columns] that `tokens` name, equal tokens in their order: repeats
 * bitwise. Tokens outside of [0, rows) add nothing.
 */
typedef struct {
  const int64_t* tokens; /* [count] */
  const void* grad;
  float* out;
  int64_t count, rows, columns, grad_stride;
  triaxis_dtype dtype; /* of `grad` */
} triaxis_embedding_backward_args;

int triaxis_embedding_backward(const triaxis_embedding_backward_args* args, void* stream);

/* One AdamW update of flat tensors, with decoupled weight decay and bias correction. The gradient is divided by
 * *grad_scale; if *skip is not 0, nothing changes. `param`, in `param_dtype`, gets the rounded master weight; may be null.
 */
typedef struct {
  float* master;
  const float* grad;
  void *exp_avg, *exp_avg_sq; /* F32 or BF16 */
  void* param;
  const float *grad_scale, *skip, *step; /* on the device, one element; the first two may be null; step counts from 1 */
  int64_t size;
  float lr, beta1, beta2, eps, weight_decay;
  triaxis_dtype moment_dtype, param_dtype;
} triaxis_adamw_args;

int triaxis_adamw(const triaxis_adamw_args* args, void* stream);

/* Σ x² over `count` pieces of `sizes[i]` elements, in fp32 and a fixed order; not finite if an element is not. */
int64_t triaxis_square_sum_workspace(int64_t count); /* floats */
int triaxis_square_sum(
    const float* const* pieces, const int64_t* sizes, int64_t count, float* out, float* workspace, void* stream);

/* Raises *amax to the largest |x|; to NaN if an element is. */
int triaxis_amax(const void* x, int64_t size, triaxis_dtype dtype, float* amax, void* stream);

/* Quantizes x [rows, columns] to FP8: to `row_major` [rows, columns], `transposed` [columns, rows], or both; null: not.
 *
 * TRIAXIS_TENSORWISE multiplies by *scale and raises *amax (if not null) to the largest |x|. Where `scale` is null, *amax is
 * the largest |x| already: the scale is the largest FP8 value divided by it, or 1 if it is 0 or NaN, and its reciprocal goes
 * to scale_inv [1]. The others compute the scales of blocks and write `scale_inv`, what FP8 values are multiplied by to
 * dequantize: TRIAXIS_BLOCK_1X128 along the rows of each output, as [blocks of a row, rows]; TRIAXIS_BLOCK_128X128 as [block
 * rows, block columns]. Their strides are between rows of scale_inv. Columns, and rows for `transposed`, are multiples of 16.
 */
typedef struct {
  const void* x;
  void *row_major, *transposed;
  const float* scale;
  float *amax, *scale_inv, *transposed_scale_inv;
  int64_t rows, columns, stride, scale_inv_stride, transposed_scale_inv_stride;
  triaxis_dtype dtype, out_dtype; /* F32, BF16 or F16; E4M3 or E5M2 */
  triaxis_scaling scaling;
  int power_of_two;
} triaxis_quantize_args;

int triaxis_quantize(const triaxis_quantize_args* args, void* stream);

/* SwiGLU forward to E4M3, row-major and transposed, as triaxis_quantize would quantize `out` of triaxis_swiglu_forward; only
 * TRIAXIS_TENSORWISE with a given scale. Rows and columns are multiples of 16; the rows of gate_up are aligned to 16 bytes.
 */
int triaxis_swiglu_forward_fp8(const triaxis_swiglu_args* args, const triaxis_quantize_args* out, void* stream);

/* Backward passes that quantize the gradient [rows, columns] they compute, instead of writing it: to `row_major` and
 * `transposed`, as triaxis_quantize would quantize the gradient rounded to the dtype of the arguments. E5M2 for
 * TRIAXIS_TENSORWISE with a given scale; E4M3 for TRIAXIS_BLOCK_1X128, whose scales are powers of two. `x`, `stride` and the
 * dtypes of `out` do not matter. Rows and columns are multiples of 16; all rows of the arguments are aligned to 16 bytes.
 *
 * SwiGLU: columns are 2 args->columns, and with blocks args->columns is a multiple of 128.
 * Rotary positions: columns are the heads of all groups times head_size, a power of two from 16 to 128; `out` of the groups does
 * not matter.
 */
int triaxis_swiglu_backward_fp8(const triaxis_swiglu_args* args, const triaxis_quantize_args* out, void* stream);
int triaxis_rope_fp8(const triaxis_rope_args* args, const triaxis_quantize_args* out, void* stream);

/* Transposes x [rows, columns] in FP8, both sizes multiples of 16, contiguous, x aligned to 8 bytes and `transposed` to 16.
 *
 * TRIAXIS_TENSORWISE moves bytes. TRIAXIS_BLOCK_1X128 multiplies by `scale_inv` [blocks of a row, rows] and quantizes the
 * result again, in blocks along the rows of the transpose, as triaxis_quantize with power_of_two: from powers of two to powers
 * of two, so that only numbers which become subnormal are rounded.
 */
typedef struct {
  const void* x;
  void* transposed;
  const float* scale_inv;
  float* transposed_scale_inv; /* [blocks of a column, columns] */
  int64_t rows, columns;
  triaxis_dtype dtype; /* E4M3 or E5M2 */
  triaxis_scaling scaling;
} triaxis_transpose_fp8_args;

int triaxis_transpose_fp8(const triaxis_transpose_fp8_args* args, void* stream);

/* FP8 matmul: out [m, n] = a [m, k] · bᵀ for b [n, k], both contiguous, with scale_inv as triaxis_quantize writes it; fp32
 * accumulation. `accumulate` adds to `out`. Sizes are multiples of 16, pointers of 16 bytes. `fast` accumulates in fewer
 * bits.
 */
typedef struct {
  const void *a, *b;
  const float *a_scale_inv, *b_scale_inv;
  void *out, *workspace;
  uint64_t workspace_bytes;
  int64_t m, n, k;
  triaxis_dtype a_dtype, b_dtype, out_dtype;
  triaxis_scaling a_scaling, b_scaling;
  int accumulate, fast;
} triaxis_fp8_matmul_args;

int triaxis_fp8_matmul(const triaxis_fp8_matmul_args* args, int device, void* stream);

/* Algorithms of triaxis_fp8_matmul. Its first call with other sizes, dtypes or scalings makes a plan, whose algorithm is the
 * first of cuBLASLt's heuristic. The key of a plan is TRIAXIS_FP8_PLAN_SIZE numbers: device, m, n, k, dtypes of a, b and
 * out, scalings of a and b, fast. An algorithm is TRIAXIS_FP8_ALGORITHM_BYTES, which may be kept for the same version of
 * cuBLASLt and the same kind of GPU.
 *
 * _plans writes the keys of at most `most` plans and returns how many there are. _algorithms writes at most `most` that can
 * run, as the heuristic orders them. _use_algorithm replaces the algorithm of a plan, if cuBLASLt finds that it can run. The
 * plan's device is the current one.
 */
#define TRIAXIS_FP8_PLAN_SIZE 10
#define TRIAXIS_FP8_ALGORITHM_BYTES 64
TRIAXIS_PUBLIC uint64_t triaxis_cublaslt_version(void); /* 0: it cannot be loaded */
TRIAXIS_PUBLIC int triaxis_fp8_plans(int64_t* keys, int most);
TRIAXIS_PUBLIC int triaxis_fp8_algorithms(const int64_t* key, int most, void* algorithms, int* found);
TRIAXIS_PUBLIC int triaxis_fp8_use_algorithm(const int64_t* key, const void* algorithm);

/* The same by a kernel of this library, for GPUs of compute capability 9.0: E4M3 matrices, `a` in TRIAXIS_BLOCK_1X128 and
 * `b` in TRIAXIS_BLOCK_1X128 or TRIAXIS_BLOCK_128X128; `out` bf16, or fp32, which it can accumulate into; k > 0. The
 * tensor cores sum 128 elements along k; these sums are added in fp32 registers. It needs no workspace.
 */
int triaxis_fp8_matmul_sm90(const triaxis_fp8_matmul_args* args, int device, void* stream);

#ifdef __cplusplus
}
#endif
