// Quantization of a tile of 128 × 128, the size of a scaling block, that a thread block holds in registers: row-major,
// transposed, or both. `quantize` reads the tile; fused kernels compute it.
//
// A thread has kRows × 8 elements, packed in the dtype of the tensor and converted to fp32 for the maxima and again for each
// output, because fp32 would take twice the registers of bf16. Maxima are reduced along rows by shuffles and along columns
// through shared memory. The transpose goes through shared memory, where a thread writes kRows bytes and reads 16.
#pragma once

#include "fp8.cuh"

namespace triaxis {

constexpr int kTile = 128;
constexpr int kTileColumns = 8;                    // of a thread: 16 bytes of bf16
constexpr int kAcross = kTile / kTileColumns;      // threads along a row
template <int kRows>
constexpr int kDown = kTile / kRows;               // threads along a column
template <int kRows>
constexpr int kTileThreads = kAcross * kDown<kRows>;

__device__ __forceinline__ float max_across(float x) {
#pragma unroll
  for (int offset = kAcross / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// A thread's part of a tile: kRows adjacent rows from `row` on, 8 columns from `column` on. Tiles begin at multiples of 128
// rows and at `column0`, and columns end before `end`, a multiple of 8 columns away. There are fewer than 2^31 of each.
template <int kRows>
struct Place {
  __device__ __forceinline__ Place(int tile_row, int column0, int end)
      : tile_row(tile_row), column0(column0), end(end), row(int64_t(tile_row) * kTile + down * kRows),
        column(column0 + across * kTileColumns), inside(column < end) {}

  int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  int tile_row, column0, end;
  int64_t row, column;
  bool inside;
};

template <int kRows>
struct TileMemory {
  alignas(32) float maxima[kDown<kRows>][kTile];
  alignas(32) float column_scales[kTile];
  alignas(16) uint8_t bytes[kTile * kTile];
};

// Where shared memory keeps the element (row, column) of the tile's transpose. Units of 8 rows are permuted from column to
// column (a swizzle): without it the adjacent threads of a row would all write to one bank.
__device__ __forceinline__ int transposed_at(int column, int row) {
  return column * kTile + (row / 8 ^ column / 8) * 8 + row % 8;
}

// The bits of the largest |x| of a thread's part of a tile.
template <typename T, int kRows>
__device__ __forceinline__ int max_of_tile(const Packed<T, kTileColumns> (&x)[kRows]) {
  int maximum = 0;
#pragma unroll
  for (int p = 0; p < kRows; ++p) {
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) maximum = max_magnitude(maximum, x[p][j]);
  }
  return maximum;
}

// The scales of 1 × 128 blocks of the transpose: one for each column of the tile, from the maxima of each thread's rows.
template <__nv_fp8_interpretation_t kType, bool kPowerOfTwo, int kRows>
__device__ __forceinline__ void scale_columns(
    const Place<kRows>& at, const Vec<float, kTileColumns>& column_max, TileMemory<kRows>& memory, float* scale_inv,
    int64_t scale_inv_stride) {
  store(&memory.maxima[at.down][at.across * kTileColumns], column_max);
  __syncthreads();
  if (threadIdx.x < kTile) {
    float largest = 0.0f;
#pragma unroll
    for (int d = 0; d < kDown<kRows>; ++d) largest = fmaxf(largest, memory.maxima[d][threadIdx.x]);
    const Scale scale = scale_from_amax<kType, kPowerOfTwo>(largest);
    memory.column_scales[threadIdx.x] = scale.scale;
    if (at.column0 + threadIdx.x < at.end) scale_inv[at.tile_row * scale_inv_stride + at.column0 + threadIdx.x] = scale.inv;
  }
  __syncthreads();
}

// Stores the transpose of the tile; `bytes` are the columns of this thread. The number of rows is a multiple of 16.
template <int kRows>
__device__ __forceinline__ void store_transposed(
    const Place<kRows>& at, const Vec<uint8_t, kRows> (&bytes)[kTileColumns], TileMemory<kRows>& memory, uint8_t* out,
    int64_t rows) {
#pragma unroll
  for (int j = 0; j < kTileColumns; ++j)
    store(memory.bytes + transposed_at(at.across * kTileColumns + j, at.down * kRows), bytes[j]);
  __syncthreads();
  // 16 bytes, two units of 8, of a row of the transpose at a time.
  constexpr int kPiece = 16, kPieces = kTile / kPiece;
#pragma unroll
  for (int n = 0; n < kTile * kPieces / kTileThreads<kRows>; ++n) {
    const int i = n * kTileThreads<kRows> + threadIdx.x, column = i / kPieces, row = i % kPieces * kPiece;
    const int64_t to_row = at.column0 + column, to_column = at.tile_row * kTile + row;
    if (to_row >= at.end || to_column >= rows) continue;
    Vec<Vec<uint8_t, 8>, 2> both;
    both.at[0] = load<8>(memory.bytes + transposed_at(column, row));
    both.at[1] = load<8>(memory.bytes + transposed_at(column, row + 8));
    *reinterpret_cast<decltype(both)*>(out + to_row * rows + to_column) = both;
  }
}

// Quantizes the tile `x`, which has zeros outside the matrix, to the outputs of `a`. `tensor_scale`: for one scale, what x is
// multiplied by. `zero` is 0, for Packed::forget.
template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling, bool kPowerOfTwo, int kRows>
__device__ __forceinline__ void quantize_tile(
    const Place<kRows>& at, Packed<T, kTileColumns> (&x)[kRows], const triaxis_quantize_args& a, float tensor_scale,
    TileMemory<kRows>& memory, uint32_t zero) {
  // This thread's maxima of |x|: of each of its rows, of each of its columns, of all.
  float row_max[kRows], amax = 0.0f;
  Vec<float, kTileColumns> column_max = {};
  if (kScaling == TRIAXIS_TENSORWISE) {
    if (a.scale != nullptr && a.amax != nullptr) raise_amax(a.amax, max_of_tile(x));
  } else {
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      row_max[p] = 0.0f;
#pragma unroll
      for (int j = 0; j < kTileColumns; ++j) {
        const float magnitude = fabsf(x[p][j]);
        row_max[p] = fmaxf(row_max[p], magnitude);
        column_max.at[j] = fmaxf(column_max.at[j], magnitude);
      }
      amax = fmaxf(amax, row_max[p]);
      x[p].forget(zero);
    }
  }
  if (kScaling == TRIAXIS_BLOCK_1X128 && a.transposed != nullptr)
    scale_columns<kType, kPowerOfTwo>(at, column_max, memory, a.transposed_scale_inv, a.transposed_scale_inv_stride);
  // One scale for the tile: that of the tensor, or of the 128 × 128 block from the maximum over the thread block.
  Scale tile{tensor_scale, 0.0f};
  if (kScaling == TRIAXIS_BLOCK_128X128) {
    amax = warp_max(amax);
    if (threadIdx.x % kWarp == 0) memory.maxima[0][threadIdx.x / kWarp] = amax;
    __syncthreads();
    amax = 0.0f;
    for (int w = 0; w < kTileThreads<kRows> / kWarp; ++w) amax = fmaxf(amax, memory.maxima[0][w]);
    tile = scale_from_amax<kType, kPowerOfTwo>(amax);
    if (threadIdx.x == 0) {
      if (a.scale_inv != nullptr) a.scale_inv[at.tile_row * a.scale_inv_stride + at.column0 / kTile] = tile.inv;
      if (a.transposed_scale_inv != nullptr)
        a.transposed_scale_inv[at.column0 / kTile * a.transposed_scale_inv_stride + at.tile_row] = tile.inv;
    }
  }

  // Row-major output, 8 bytes a thread and row; 1 × 128 blocks get their scale from a shuffle along the row.
  if (a.row_major != nullptr) {
    Scale of_rows[kRows];
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      of_rows[p] = tile;
      if (kScaling == TRIAXIS_BLOCK_1X128) of_rows[p] = scale_from_amax<kType, kPowerOfTwo>(max_across(row_max[p]));
    }
    if (kScaling == TRIAXIS_BLOCK_1X128 && at.across == 0) {
#pragma unroll
      for (int p = 0; p < kRows; ++p)
        if (at.row + p < a.rows) a.scale_inv[at.column0 / kTile * a.scale_inv_stride + at.row + p] = of_rows[p].inv;
    }
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      if (!at.inside || at.row + p >= a.rows) continue;
      Vec<uint16_t, kTileColumns / 2> pairs;
#pragma unroll
      for (int j = 0; j < kTileColumns; j += 2)
        pairs.at[j / 2] = to_fp8<kType>(x[p][j] * of_rows[p].scale, x[p][j + 1] * of_rows[p].scale);
      uint8_t* const to = static_cast<uint8_t*>(a.row_major) + (at.row + p) * a.columns + at.column;
      store(reinterpret_cast<uint16_t*>(to), pairs);
    }
  }
  if (a.transposed == nullptr) return;

  // Transposed output: the columns of this thread, a pair of rows from one conversion.
#pragma unroll
  for (int p = 0; p < kRows; ++p) x[p].forget(zero);
  Vec<float, kTileColumns> scales;
  if (kScaling == TRIAXIS_BLOCK_1X128) scales = load<kTileColumns>(memory.column_scales + at.across * kTileColumns);
  Vec<uint8_t, kRows> bytes[kTileColumns];
#pragma unroll
  for (int j = 0; j < kTileColumns; ++j) {
    const float scale = kScaling == TRIAXIS_BLOCK_1X128 ? scales.at[j] : tile.scale;
    Vec<uint16_t, kRows / 2> pairs;
#pragma unroll
    for (int p = 0; p < kRows; p += 2) pairs.at[p / 2] = to_fp8<kType>(x[p][j] * scale, x[p + 1][j] * scale);
    bytes[j] = *reinterpret_cast<Vec<uint8_t, kRows>*>(&pairs);
  }
  store_transposed(at, bytes, memory, static_cast<uint8_t*>(a.transposed), a.rows);
}

// Whether tiles can be counted: the largest gridDim.y, and Place.
inline bool valid_tiles(int64_t rows, int64_t columns) {
  return rows >= 0 && columns >= 0 && rows <= 65535ll * kTile && columns < (1ll << 31) - kTile;
}

// Whether `out` is how fused kernels quantize what they compute: row-major and transposed, with a given scale or with blocks
// of 1 × 128.
inline bool valid_both(const triaxis_quantize_args& out) {
  return valid_tiles(out.rows, out.columns) && out.rows % 16 == 0 && out.columns % 16 == 0 &&
         out.row_major != nullptr && out.transposed != nullptr &&
         (out.scaling == TRIAXIS_TENSORWISE
              ? out.scale != nullptr
              : out.scaling == TRIAXIS_BLOCK_1X128 && out.scale_inv != nullptr && out.transposed_scale_inv != nullptr);
}

}  // namespace triaxis
