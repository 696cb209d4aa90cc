// Quantization to FP8, row-major, transposed, or both from one read; and transposition of FP8.
//
// A block takes a tile of 128 × 128, the size of a scaling block, and keeps it in registers: a thread has 8 × 8 elements, and
// converts them to fp32 for the maxima and again for each output, because fp32 would take twice the registers of bf16. Maxima are reduced along rows by shuffles and along columns through shared memory. The transpose goes through shared
// memory, where a thread writes 8 bytes and reads 16.

#include "../common/fp8.cuh"
#include "../common/reduce.cuh"

namespace triaxis {
namespace {

constexpr int kTile = 128;
constexpr int kThreads = 256;              // × 8 × 8 elements are a tile
constexpr int kSize = 8;                   // elements of a load: 16 bytes of bf16
constexpr int kAcross = kTile / kSize;     // threads along a row
constexpr int kDown = kThreads / kAcross;  // threads along a column
constexpr int kPasses = kTile / kDown;     // adjacent rows of a thread

// Blocks that a multiprocessor must have room for: they leave 128, 80 or 64 registers a thread, as many as no instance spills
// with. The elements take 64 registers in fp32, else 32, and 1 × 128 blocks need the maxima of 8 rows and 8 columns.
template <typename T, triaxis_scaling kScaling>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : std::is_same_v<T, __half> || kScaling == TRIAXIS_BLOCK_1X128 ? 3 : 4;

__device__ __forceinline__ float max_across(float x) {
#pragma unroll
  for (int offset = kAcross / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Where shared memory keeps rows 8 · unit to 8 · unit + 7 of a column of the tile. Units are permuted from column to
// column (a swizzle): without it the adjacent threads of a row would all write to one bank.
__device__ __forceinline__ int transposed_at(int column, int unit) {
  return column * kTile + (unit ^ column / kSize) * kPasses;
}

// A thread's part of a tile: kPasses rows from `row` on, kSize columns from `column` on. Columns are a multiple of kSize.
struct Place {
  int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  int64_t row0 = int64_t(blockIdx.y) * kTile, column0 = int64_t(blockIdx.x) * kTile;
  int64_t row = row0 + down * kPasses, column = column0 + across * kSize;
};

// The bits of the largest |x| of a thread's part of a tile.
template <typename T>
__device__ __forceinline__ int max_of_tile(const Packed<T, kSize> (&x)[kPasses]) {
  int maximum = 0;
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) maximum = max_magnitude(maximum, x[p][j]);
  }
  return maximum;
}

// The scale of the tensor: as given, or of the largest |x|, as scale_from_amax in engine/ops/quantize.py.
template <__nv_fp8_interpretation_t kType>
__device__ __forceinline__ float tensor_scale(const triaxis_quantize_args& a) {
  if (a.scale != nullptr) return *a.scale;
  const float amax = *a.amax, scale = amax > 0.0f ? max_value(kType) / amax : 1.0f;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.scale_inv = 1.0f / scale;
  return scale;
}

// The scales of 1 × 128 blocks of the transpose: one for each column of the tile, from the maxima of each thread's rows.
template <__nv_fp8_interpretation_t kType, bool kPowerOfTwo>
__device__ __forceinline__ void scale_columns(
    const Place& at, const Vec<float, kSize>& column_max, float (&maxima)[kDown][kTile], float (&scales)[kTile],
    float* scale_inv, int64_t scale_inv_stride, int64_t columns) {
  store(&maxima[at.down][at.across * kSize], column_max);
  __syncthreads();
  if (threadIdx.x < kTile) {
    float largest = 0.0f;
#pragma unroll
    for (int d = 0; d < kDown; ++d) largest = fmaxf(largest, maxima[d][threadIdx.x]);
    const Scale scale = scale_from_amax<kType, kPowerOfTwo>(largest);
    scales[threadIdx.x] = scale.scale;
    if (at.column0 + threadIdx.x < columns)
      scale_inv[blockIdx.y * scale_inv_stride + at.column0 + threadIdx.x] = scale.inv;
  }
  __syncthreads();
}

// Stores the transpose of the tile; `bytes` are the columns of this thread. Sizes are multiples of 16.
__device__ __forceinline__ void store_transposed(
    const Place& at, const Vec<uint8_t, kPasses> (&bytes)[kSize], uint8_t (&tile)[kTile * kTile], uint8_t* out, int64_t rows,
    int64_t columns) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) store(tile + transposed_at(at.across * kSize + j, at.down), bytes[j]);
  __syncthreads();
  // 16 bytes, two units, of a row of the transpose at a time.
  constexpr int kPiece = 16, kPieces = kTile / kPiece;
  for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
    const int column = i / kPieces, piece = i % kPieces;
    const int64_t to_row = at.column0 + column, to_column = at.row0 + piece * kPiece;
    if (to_row >= columns || to_column >= rows) continue;
    Vec<Vec<uint8_t, kPasses>, 2> both;
    both.at[0] = load<kPasses>(tile + transposed_at(column, 2 * piece));
    both.at[1] = load<kPasses>(tile + transposed_at(column, 2 * piece + 1));
    *reinterpret_cast<decltype(both)*>(out + to_row * rows + to_column) = both;
  }
}

// `zero` is 0, for Packed::forget.
template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling, bool kPowerOfTwo>
__global__ void __launch_bounds__(kThreads, (kBlocks<T, kScaling>)) quantize(const triaxis_quantize_args a, uint32_t zero) {
  __shared__ __align__(32) float maxima[kDown][kTile];
  __shared__ __align__(32) float column_scales[kTile];
  __shared__ __align__(16) uint8_t tile_bytes[kTile * kTile];
  const Place at;
  const bool inside = at.column < a.columns;

  // The tile, zeros outside the matrix; all loads are issued before the first use.
  Packed<T, kSize> x[kPasses];
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    x[p] = {};
    if (inside && at.row + p < a.rows)
      x[p] = Packed<T, kSize>::load(static_cast<const T*>(a.x) + (at.row + p) * a.stride + at.column);
  }

  // This thread's maxima of |x|: of each of its rows, of each of its columns, of all.
  float row_max[kPasses], amax = 0.0f;
  Vec<float, kSize> column_max = {};
  if (kScaling == TRIAXIS_TENSORWISE) {
    if (a.scale != nullptr && a.amax != nullptr) raise_amax(a.amax, max_of_tile(x));
  } else {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      row_max[p] = 0.0f;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float magnitude = fabsf(x[p][j]);
        row_max[p] = fmaxf(row_max[p], magnitude);
        column_max.at[j] = fmaxf(column_max.at[j], magnitude);
      }
      amax = fmaxf(amax, row_max[p]);
      x[p].forget(zero);
    }
  }
  if (kScaling == TRIAXIS_BLOCK_1X128 && a.transposed != nullptr)
    scale_columns<kType, kPowerOfTwo>(
        at, column_max, maxima, column_scales, a.transposed_scale_inv, a.transposed_scale_inv_stride, a.columns);
  // One scale for the tile: that of the tensor, or of the 128 × 128 block from the maximum over the thread block.
  Scale tile{};
  if (kScaling == TRIAXIS_TENSORWISE) tile.scale = tensor_scale<kType>(a);
  if (kScaling == TRIAXIS_BLOCK_128X128) {
    amax = warp_max(amax);
    if (threadIdx.x % kWarp == 0) maxima[0][threadIdx.x / kWarp] = amax;
    __syncthreads();
    amax = 0.0f;
    for (int w = 0; w < kThreads / kWarp; ++w) amax = fmaxf(amax, maxima[0][w]);
    tile = scale_from_amax<kType, kPowerOfTwo>(amax);
    if (threadIdx.x == 0) {
      if (a.scale_inv != nullptr) a.scale_inv[blockIdx.y * a.scale_inv_stride + blockIdx.x] = tile.inv;
      if (a.transposed_scale_inv != nullptr)
        a.transposed_scale_inv[blockIdx.x * a.transposed_scale_inv_stride + blockIdx.y] = tile.inv;
    }
  }

  // Row-major output, 8 bytes a thread and row; 1 × 128 blocks get their scale from a shuffle along the row.
  if (a.row_major != nullptr) {
    Scale of_rows[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      of_rows[p] = tile;
      if (kScaling == TRIAXIS_BLOCK_1X128) of_rows[p] = scale_from_amax<kType, kPowerOfTwo>(max_across(row_max[p]));
    }
    if (kScaling == TRIAXIS_BLOCK_1X128 && at.across == 0) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p)
        if (at.row + p < a.rows) a.scale_inv[blockIdx.x * a.scale_inv_stride + at.row + p] = of_rows[p].inv;
    }
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      if (!inside || at.row + p >= a.rows) continue;
      Vec<uint16_t, kSize / 2> pairs;
#pragma unroll
      for (int j = 0; j < kSize; j += 2)
        pairs.at[j / 2] = to_fp8<kType>(x[p][j] * of_rows[p].scale, x[p][j + 1] * of_rows[p].scale);
      uint8_t* const to = static_cast<uint8_t*>(a.row_major) + (at.row + p) * a.columns + at.column;
      store(reinterpret_cast<uint16_t*>(to), pairs);
    }
  }
  if (a.transposed == nullptr) return;

  // Transposed output: the columns of this thread, a pair of rows from one conversion.
#pragma unroll
  for (int p = 0; p < kPasses; ++p) x[p].forget(zero);
  Vec<float, kSize> scales;
  if (kScaling == TRIAXIS_BLOCK_1X128) scales = load<kSize>(column_scales + at.across * kSize);
  Vec<uint8_t, kPasses> bytes[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const float scale = kScaling == TRIAXIS_BLOCK_1X128 ? scales.at[j] : tile.scale;
    Vec<uint16_t, kPasses / 2> pairs;
#pragma unroll
    for (int p = 0; p < kPasses; p += 2) pairs.at[p / 2] = to_fp8<kType>(x[p][j] * scale, x[p + 1][j] * scale);
    bytes[j] = *reinterpret_cast<Vec<uint8_t, kPasses>*>(&pairs);
  }
  store_transposed(at, bytes, tile_bytes, static_cast<uint8_t*>(a.transposed), a.rows, a.columns);
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
  __shared__ __align__(32) float maxima[kDown][kTile];
  __shared__ __align__(32) float column_scales[kTile];
  __shared__ __align__(16) uint8_t tile_bytes[kTile * kTile];
  const Place at;
  const bool inside = at.column < a.columns && at.row < a.rows;  // all or none of a thread's 8 × 8 elements
  Packed<T, kSize> x[kPasses];
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    x[p] = {};
    if (inside) x[p] = Packed<T, kSize>::load(static_cast<const T*>(a.x) + (at.row + p) * a.columns + at.column);
  }

  Vec<uint8_t, kPasses> bytes[kSize];
  if constexpr (kScaling == TRIAXIS_TENSORWISE) {
    static_assert(kSize == 8 && kPasses == 8);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {  // of the 8 × 8 bytes
      const int word = quarter % 2, down = quarter / 2 * 4;
      uint32_t columns[4];
      transpose_bytes(x[down].words[word], x[down + 1].words[word], x[down + 2].words[word], x[down + 3].words[word], columns);
#pragma unroll
      for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(&bytes[4 * word + j])[quarter / 2] = columns[j];
    }
  } else {
    float of_row[kPasses];
    Vec<float, kSize> column_max = {};
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      of_row[p] = inside ? a.scale_inv[blockIdx.x * a.rows + at.row + p] : 0.0f;
#pragma unroll
      for (int j = 0; j < kSize; ++j) column_max.at[j] = fmaxf(column_max.at[j], fabsf(x[p][j] * of_row[p]));
      x[p].forget(zero);
    }
    scale_columns<kType, true>(at, column_max, maxima, column_scales, a.transposed_scale_inv, a.columns, a.columns);
    const Vec<float, kSize> scales = load<kSize>(column_scales + at.across * kSize);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      Vec<uint16_t, kPasses / 2> pairs;
#pragma unroll
      for (int p = 0; p < kPasses; p += 2)
        pairs.at[p / 2] = to_fp8<kType>(x[p][j] * of_row[p] * scales.at[j], x[p + 1][j] * of_row[p + 1] * scales.at[j]);
      bytes[j] = *reinterpret_cast<Vec<uint8_t, kPasses>*>(&pairs);
    }
  }
  store_transposed(at, bytes, tile_bytes, static_cast<uint8_t*>(a.transposed), a.rows, a.columns);
}

bool valid(const triaxis_transpose_fp8_args& a) {
  return (a.dtype == TRIAXIS_E4M3 || a.dtype == TRIAXIS_E5M2) && a.rows >= 0 && a.columns >= 0 && a.rows % 16 == 0 &&
         a.columns % 16 == 0 && a.rows <= 65535ll * kTile &&  // the largest gridDim.y
         reinterpret_cast<uintptr_t>(a.x) % kSize == 0 && reinterpret_cast<uintptr_t>(a.transposed) % 16 == 0 &&
         (a.scaling == TRIAXIS_TENSORWISE ||
          (a.scaling == TRIAXIS_BLOCK_1X128 && a.scale_inv != nullptr && a.transposed_scale_inv != nullptr));
}

bool valid(const triaxis_quantize_args& a) {
  return floating(a.dtype) && (a.out_dtype == TRIAXIS_E4M3 || a.out_dtype == TRIAXIS_E5M2) && a.rows >= 0 &&
         a.columns >= 0 && a.columns % 16 == 0 && (a.transposed == nullptr || a.rows % 16 == 0) &&
         a.rows <= 65535ll * kTile &&  // the largest gridDim.y
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
    constexpr int64_t bytes = kSize * sizeof(T);
    if (reinterpret_cast<uintptr_t>(a.x) % bytes != 0 || a.stride % kSize != 0) return kInvalidArgument;
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
