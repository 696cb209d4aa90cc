// Quantization to FP8, row-major, transposed, or both from one read; and transposition of FP8.
//
// A block takes a tile, a thread 8 × 8 of its elements.

#include "../common/tile.cuh"

namespace triaxis {
namespace {

constexpr int kRows = 8;
constexpr int kThreads = kTileThreads<kRows>;

// Blocks that a multiprocessor must have room for: they leave 128, 80 or 64 registers a thread, as many as no instance spills
// with. The elements take 64 registers in fp32, else 32, and 1 × 128 blocks need the maxima of 8 rows and 8 columns.
template <typename T, triaxis_scaling kScaling>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : std::is_same_v<T, __half> || kScaling == TRIAXIS_BLOCK_1X128 ? 3 : 4;

// The scale of the tensor: as given, or of the largest |x|, as scale_from_amax in engine/ops/quantize.py.
template <__nv_fp8_interpretation_t kType>
__device__ __forceinline__ float tensor_scale(const triaxis_quantize_args& a) {
  if (a.scale != nullptr) return *a.scale;
  const float amax = *a.amax, scale = amax > 0.0f ? max_value(kType) / fmaxf(amax, kMinAmax) : 1.0f;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.scale_inv = 1.0f / scale;
  return scale;
}

// `zero` is 0, for Packed::forget.
template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling, bool kPowerOfTwo>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kScaling>)) quantize(const triaxis_quantize_args a, uint32_t zero) {
  __shared__ TileMemory<kRows> memory;
  const Place<kRows> at(blockIdx.y, blockIdx.x * kTile, int(a.columns));
  Packed<T, kTileColumns> x[kRows];  // zeros outside the matrix; all loads are issued before the first use
#pragma unroll
  for (int p = 0; p < kRows; ++p) {
    x[p] = {};
    if (at.inside && at.row + p < a.rows)
      x[p] = Packed<T, kTileColumns>::load(static_cast<const T*>(a.x) + (at.row + p) * a.stride + at.column);
  }
  const float scale = kScaling == TRIAXIS_TENSORWISE ? tensor_scale<kType>(a) : 0.0f;
  quantize_tile<T, kType, kScaling, kPowerOfTwo>(at, x, a, scale, memory, zero);
}

template <typename T, __nv_fp8_interpretation_t kType>
int launch(const triaxis_quantize_args& a, void* stream) {
  const bool rows = a.scaling == TRIAXIS_BLOCK_1X128;
  const auto kernel = a.scaling == TRIAXIS_TENSORWISE ? quantize<T, kType, TRIAXIS_TENSORWISE, false>
                      : a.power_of_two ? (rows ? quantize<T, kType, TRIAXIS_BLOCK_1X128, true>
                                               : quantize<T, kType, TRIAXIS_BLOCK_128X128, true>)
                                       : (rows ? quantize<T, kType, TRIAXIS_BLOCK_1X128, false>
                                               : quantize<T, kType, TRIAXIS_BLOCK_128X128, false>);
  const dim3 grid(unsigned(ceil_div(a.columns, kTile)), unsigned(ceil_div(a.rows, kTile)));
  return LAUNCH(kernel, grid, dim3(kThreads), 0, stream, a, 0u);
}

// The columns of 4 rows of 4 bytes.
__device__ __forceinline__ void transpose_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t (&columns)[4]) {
  const uint32_t ab01 = __byte_perm(a, b, 0x5140), ab23 = __byte_perm(a, b, 0x7362);  // 0x5140: a0 b0 a1 b1
  const uint32_t cd01 = __byte_perm(c, d, 0x5140), cd23 = __byte_perm(c, d, 0x7362);
  columns[0] = __byte_perm(ab01, cd01, 0x5410);  // a0 b0 c0 d0
  columns[1] = __byte_perm(ab01, cd01, 0x7632);
  columns[2] = __byte_perm(ab23, cd23, 0x5410);
  columns[3] = __byte_perm(ab23, cd23, 0x7632);
}

// `zero` is 0, for Packed::forget.
template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling>
__global__ void __launch_bounds__(kThreads, kScaling == TRIAXIS_TENSORWISE ? 4 : 3)
    transpose_fp8(const triaxis_transpose_fp8_args a, uint32_t zero) {
  __shared__ TileMemory<kRows> memory;
  const Place<kRows> at(blockIdx.y, blockIdx.x * kTile, int(a.columns));
  const bool inside = at.inside && at.row < a.rows;  // all or none of a thread's 8 × 8 elements
  Packed<T, kTileColumns> x[kRows];
#pragma unroll
  for (int p = 0; p < kRows; ++p) {
    x[p] = {};
    if (inside) x[p] = Packed<T, kTileColumns>::load(static_cast<const T*>(a.x) + (at.row + p) * a.columns + at.column);
  }

  Vec<uint8_t, kRows> bytes[kTileColumns];
  if constexpr (kScaling == TRIAXIS_TENSORWISE) {
    static_assert(kTileColumns == 8 && kRows == 8);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {  // of the 8 × 8 bytes
      const int word = quarter % 2, down = quarter / 2 * 4;
      uint32_t columns[4];
      transpose_bytes(x[down].words[word], x[down + 1].words[word], x[down + 2].words[word], x[down + 3].words[word], columns);
#pragma unroll
      for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(&bytes[4 * word + j])[quarter / 2] = columns[j];
    }
  } else {
    float of_row[kRows];
    Vec<float, kTileColumns> column_max = {};
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      of_row[p] = inside ? a.scale_inv[blockIdx.x * a.rows + at.row + p] : 0.0f;
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) column_max.at[j] = fmaxf(column_max.at[j], fabsf(x[p][j] * of_row[p]));
      x[p].forget(zero);
    }
    scale_columns<kType, true>(at, column_max, memory, a.transposed_scale_inv, a.columns);
    const Vec<float, kTileColumns> scales = load<kTileColumns>(memory.column_scales + at.across * kTileColumns);
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
      Vec<uint16_t, kRows / 2> pairs;
#pragma unroll
      for (int p = 0; p < kRows; p += 2)
        pairs.at[p / 2] = to_fp8<kType>(x[p][j] * of_row[p] * scales.at[j], x[p + 1][j] * of_row[p + 1] * scales.at[j]);
      bytes[j] = *reinterpret_cast<Vec<uint8_t, kRows>*>(&pairs);
    }
  }
  store_transposed(at, bytes, memory, static_cast<uint8_t*>(a.transposed), a.rows);
}

bool valid(const triaxis_transpose_fp8_args& a) {
  return (a.dtype == TRIAXIS_E4M3 || a.dtype == TRIAXIS_E5M2) && valid_tiles(a.rows, a.columns) && a.rows % 16 == 0 &&
         a.columns % 16 == 0 &&
         reinterpret_cast<uintptr_t>(a.x) % kTileColumns == 0 && reinterpret_cast<uintptr_t>(a.transposed) % 16 == 0 &&
         (a.scaling == TRIAXIS_TENSORWISE ||
          (a.scaling == TRIAXIS_BLOCK_1X128 && a.scale_inv != nullptr && a.transposed_scale_inv != nullptr));
}

bool valid(const triaxis_quantize_args& a) {
  return floating(a.dtype) && (a.out_dtype == TRIAXIS_E4M3 || a.out_dtype == TRIAXIS_E5M2) &&
         valid_tiles(a.rows, a.columns) && a.columns % 16 == 0 && (a.transposed == nullptr || a.rows % 16 == 0) &&
         (a.scaling != TRIAXIS_TENSORWISE || a.scale != nullptr || (a.amax != nullptr && a.scale_inv != nullptr));
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_quantize(const triaxis_quantize_args* args, void* stream) {
  const triaxis_quantize_args& a = *args;
  if (!valid(a)) return kInvalidArgument;
  if (a.rows == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t bytes = kTileColumns * sizeof(T);
    if (reinterpret_cast<uintptr_t>(a.x) % bytes != 0 || a.stride % kTileColumns != 0) return kInvalidArgument;
    return a.out_dtype == TRIAXIS_E4M3 ? launch<T, __NV_E4M3>(a, stream) : launch<T, __NV_E5M2>(a, stream);
  });
}

extern "C" int triaxis_transpose_fp8(const triaxis_transpose_fp8_args* args, void* stream) {
  const triaxis_transpose_fp8_args& a = *args;
  if (a.rows == 0 || a.columns == 0) return 0;
  if (!valid(a)) return kInvalidArgument;
  const bool e4m3 = a.dtype == TRIAXIS_E4M3;
  const auto kernel = a.scaling == TRIAXIS_TENSORWISE  // moves bytes, whatever they stand for
                          ? transpose_fp8<__nv_fp8_e4m3, __NV_E4M3, TRIAXIS_TENSORWISE>
                      : e4m3 ? transpose_fp8<__nv_fp8_e4m3, __NV_E4M3, TRIAXIS_BLOCK_1X128>
                             : transpose_fp8<__nv_fp8_e5m2, __NV_E5M2, TRIAXIS_BLOCK_1X128>;
  const dim3 grid(unsigned(ceil_div(a.columns, kTile)), unsigned(ceil_div(a.rows, kTile)));
  return LAUNCH(kernel, grid, dim3(kThreads), 0, stream, a, 0u);
}
