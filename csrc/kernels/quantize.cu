// Quantization to FP8, row-major, transposed, or both from one read.
//
// A block takes a tile of 128 × 128, the size of a scaling block, and keeps it in registers: a thread has 8 × 8 elements.
// Maxima are reduced along rows by shuffles and along columns through shared memory. The transpose goes through shared
// memory, where a thread writes 8 bytes and reads 16.

#include "../common/fp8.cuh"
#include "../common/reduce.cuh"

namespace triaxis {
namespace {

constexpr int kTile = 128;
constexpr int kThreads = 256;              // × 8 × 8 elements are a tile, whose bf16 take 32 registers of a thread
constexpr int kSize = 8;                   // elements of a load: 16 bytes of bf16
constexpr int kAcross = kTile / kSize;     // threads along a row
constexpr int kDown = kThreads / kAcross;  // threads along a column
constexpr int kPasses = kTile / kDown;     // adjacent rows of a thread

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

template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling>
__global__ void __launch_bounds__(kThreads) quantize(const triaxis_quantize_args a) {
  __shared__ float maxima[kDown][kTile];
  __shared__ Scale column_scale[kTile];
  __shared__ __align__(16) uint8_t transposed[kTile * kTile];
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t row0 = int64_t(blockIdx.y) * kTile, column0 = int64_t(blockIdx.x) * kTile;
  const int64_t column = column0 + across * kSize;
  const bool inside = column < a.columns;  // columns are a multiple of kSize

  // The tile, zeros outside the matrix; all loads are issued before the first use.
  Vec<T, kSize> x[kPasses] = {};
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int64_t row = row0 + down * kPasses + p;
    if (inside && row < a.rows) x[p] = load<kSize>(static_cast<const T*>(a.x) + row * a.stride + column);
  }

  // This thread's maxima of |x|: of each of its rows, of each of its columns, of all.
  float row_max[kPasses], column_max[kSize] = {}, amax = 0.0f;
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    row_max[p] = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float magnitude = fabsf(to_float(x[p].at[j]));
      row_max[p] = fmaxf(row_max[p], magnitude);
      column_max[j] = fmaxf(column_max[j], magnitude);
    }
    amax = fmaxf(amax, row_max[p]);
  }
  // 1 × 128 blocks of the transpose: the scale of each column of the tile.
  if (kScaling == TRIAXIS_BLOCK_1X128 && a.transposed != nullptr) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) maxima[down][across * kSize + j] = column_max[j];
    __syncthreads();
    if (threadIdx.x < kTile) {
      float largest = 0.0f;
      for (int d = 0; d < kDown; ++d) largest = fmaxf(largest, maxima[d][threadIdx.x]);
      column_scale[threadIdx.x] = scale_from_amax<kType>(largest, a.power_of_two);
      if (column0 + threadIdx.x < a.columns)
        a.transposed_scale_inv[blockIdx.y * a.transposed_scale_inv_stride + column0 + threadIdx.x] =
            column_scale[threadIdx.x].inv;
    }
    __syncthreads();
  }
  // One scale for the tile: that of the tensor, or of the 128 × 128 block from the maximum over the thread block.
  Scale tile{};
  if (kScaling == TRIAXIS_TENSORWISE) tile.scale = *a.scale;
  if (kScaling == TRIAXIS_BLOCK_128X128 || (kScaling == TRIAXIS_TENSORWISE && a.amax != nullptr)) {
    amax = warp_max(amax);
    if (threadIdx.x % kWarp == 0) maxima[0][threadIdx.x / kWarp] = amax;
    __syncthreads();
    amax = 0.0f;
    for (int w = 0; w < kThreads / kWarp; ++w) amax = fmaxf(amax, maxima[0][w]);
    if (kScaling == TRIAXIS_BLOCK_128X128) tile = scale_from_amax<kType>(amax, a.power_of_two);
    if (threadIdx.x == 0) {
      if (kScaling == TRIAXIS_TENSORWISE) {
        atomic_max(a.amax, amax);
      } else {
        if (a.scale_inv != nullptr) a.scale_inv[blockIdx.y * a.scale_inv_stride + blockIdx.x] = tile.inv;
        if (a.transposed_scale_inv != nullptr)
          a.transposed_scale_inv[blockIdx.x * a.transposed_scale_inv_stride + blockIdx.y] = tile.inv;
      }
    }
  }

  // Row-major output, 8 bytes a thread and row; 1 × 128 blocks get their scale from a shuffle along the row.
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int64_t row = row0 + down * kPasses + p;
    Scale of_row = tile;
    if (kScaling == TRIAXIS_BLOCK_1X128) of_row = scale_from_amax<kType>(max_across(row_max[p]), a.power_of_two);
    if (a.row_major != nullptr && inside && row < a.rows) {
      Vec<uint8_t, kSize> bytes;
#pragma unroll
      for (int j = 0; j < kSize; ++j) bytes.at[j] = to_fp8<kType>(to_float(x[p].at[j]) * of_row.scale);
      store(static_cast<uint8_t*>(a.row_major) + row * a.columns + column, bytes);
      if (kScaling == TRIAXIS_BLOCK_1X128 && across == 0) a.scale_inv[blockIdx.x * a.scale_inv_stride + row] = of_row.inv;
    }
  }
  if (a.transposed == nullptr) return;

  // Transposed output: each thread puts the 8 bytes of each of its columns into shared memory …
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const int at = across * kSize + j;
    const float scale = kScaling == TRIAXIS_BLOCK_1X128 ? column_scale[at].scale : tile.scale;
    Vec<uint8_t, kPasses> bytes;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) bytes.at[p] = to_fp8<kType>(to_float(x[p].at[j]) * scale);
    store(transposed + transposed_at(at, down), bytes);
  }
  __syncthreads();
  // … and stores 16 bytes, two units, of a row of the transpose at a time; its sizes are multiples of 16.
  constexpr int kPiece = 16, kPieces = kTile / kPiece;
  for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
    const int at = i / kPieces, piece = i % kPieces;
    const int64_t to_row = column0 + at, to_column = row0 + piece * kPiece;
    if (to_row >= a.columns || to_column >= a.rows) continue;
    Vec<Vec<uint8_t, kPasses>, 2> bytes;
    bytes.at[0] = load<kPasses>(transposed + transposed_at(at, 2 * piece));
    bytes.at[1] = load<kPasses>(transposed + transposed_at(at, 2 * piece + 1));
    *reinterpret_cast<decltype(bytes)*>(static_cast<uint8_t*>(a.transposed) + to_row * a.rows + to_column) = bytes;
  }
}

template <typename T, __nv_fp8_interpretation_t kType>
int launch(const triaxis_quantize_args& a, void* stream) {
  const auto kernel = a.scaling == TRIAXIS_TENSORWISE ? quantize<T, kType, TRIAXIS_TENSORWISE>
                      : a.scaling == TRIAXIS_BLOCK_1X128 ? quantize<T, kType, TRIAXIS_BLOCK_1X128>
                                                  : quantize<T, kType, TRIAXIS_BLOCK_128X128>;
  const dim3 grid(unsigned(ceil_div(a.columns, kTile)), unsigned(ceil_div(a.rows, kTile)));
  return LAUNCH(kernel, grid, dim3(kThreads), 0, stream, a);
}

bool valid(const triaxis_quantize_args& a) {
  return floating(a.dtype) && (a.out_dtype == TRIAXIS_E4M3 || a.out_dtype == TRIAXIS_E5M2) && a.rows >= 0 &&
         a.columns >= 0 && a.columns % 16 == 0 && (a.transposed == nullptr || a.rows % 16 == 0) &&
         a.rows <= 65535ll * kTile &&  // the largest gridDim.y
         (a.scaling != TRIAXIS_TENSORWISE || a.scale != nullptr);
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
