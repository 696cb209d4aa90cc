// Compiles if csrc/gemm/cublaslt_fp8.cpp says of cuBLASLt what NVIDIA's header says.

#include <cublasLt.h>

#include <type_traits>

#include "../../csrc/gemm/cublaslt_fp8.cpp"

static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t) && sizeof(Algorithm) == TRIAXIS_FP8_ALGORITHM_BYTES);
static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(Heuristic, algorithm) == offsetof(cublasLtMatmulHeuristicResult_t, algo));
static_assert(offsetof(Heuristic, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(Heuristic, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));

template <typename Ours, typename Theirs>
constexpr bool same(Ours ours, Theirs theirs) {
  return int(ours) == int(theirs);
}
static_assert(same(kCompute32F, CUBLAS_COMPUTE_32F) && same(kTranspose, CUBLAS_OP_T));
static_assert(same(kMaxWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES));
static_assert(same(kTransA, CUBLASLT_MATMUL_DESC_TRANSA) && same(kFastAccumulation, CUBLASLT_MATMUL_DESC_FAST_ACCUM));
static_assert(same(kAScale, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) && same(kBScale, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER));
static_assert(same(kF32, CUDA_R_32F) && same(kF16, CUDA_R_16F) && same(kBF16, CUDA_R_16BF));
static_assert(same(kE4M3, CUDA_R_8F_E4M3) && same(kE5M2, CUDA_R_8F_E5M2));
#if CUBLAS_VER_MAJOR * 10000 + CUBLAS_VER_MINOR * 100 >= kBlockScalesSince || CUBLAS_VER_MAJOR >= 13
static_assert(same(kAScaleMode, CUBLASLT_MATMUL_DESC_A_SCALE_MODE) && same(kBScaleMode, CUBLASLT_MATMUL_DESC_B_SCALE_MODE));
static_assert(same(kScalar, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F));
static_assert(same(k1x128, CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F));
static_assert(same(k128x128, CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F));
#endif

// An opaque pointer is a void*, an enum an int; what they point to is laid out alike, as checked above.
template <typename T>
struct Plain {
  using type = std::conditional_t<std::is_enum_v<T>, int, std::conditional_t<std::is_pointer_v<T>, void*, T>>;
};
template <typename Ours, typename Theirs>
struct Alike;
template <typename R, typename... A, typename S, typename... B>
struct Alike<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = sizeof...(A) == sizeof...(B) && std::is_same_v<typename Plain<R>::type, typename Plain<S>::type> &&
                                (std::is_same_v<typename Plain<A>::type, typename Plain<B>::type> && ...);
};
#define CHECK(ours, theirs) static_assert(Alike<decltype(Library::ours), decltype(&theirs)>::value, #theirs)
CHECK(create, cublasLtCreate);
CHECK(version, cublasLtGetVersion);
CHECK(descriptor_create, cublasLtMatmulDescCreate);
CHECK(descriptor_set, cublasLtMatmulDescSetAttribute);
CHECK(layout_create, cublasLtMatrixLayoutCreate);
CHECK(preference_create, cublasLtMatmulPreferenceCreate);
CHECK(preference_set, cublasLtMatmulPreferenceSetAttribute);
CHECK(heuristic, cublasLtMatmulAlgoGetHeuristic);
CHECK(check, cublasLtMatmulAlgoCheck);
CHECK(matmul, cublasLtMatmul);
