// Floats to FP8, row by row, transposed, or both from one reading.
//
// A block takes a tile of 128 × 128, the square of a scaling block, and keeps it in registers: a thread has 8 × 8 elements.
// Maxima go along rows by shuffles and down columns through shared memory. The transposed bytes turn in shared memory,
// eight at a time, and leave sixteen at a time.

#include "../common/fp8.cuh"
#include "../common/reduce.cuh"

namespace triaxis {
namespace {

constexpr int kTile = 128, kThreads = 256;
constexpr int kSize = 8;                          // elements that a thread reads at once
constexpr int kAcross = kTile / kSize;            // threads of a row
constexpr int kDown = kThreads / kAcross;         // threads of a column
constexpr int kPasses = kTile / kDown;            // rows of a thread, one below the other

__device__ __forceinline__ float max_across(float x) {
#pragma unroll
  for (int offset = kAcross / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Where the transposed tile keeps rows 8 · unit … of a column of the tile: units change places from column to column, or
// threads side by side would all meet in one bank.
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

  Vec<T, kSize> x[kPasses] = {};
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int64_t row = row0 + down * kPasses + p;
    if (inside && row < a.rows) x[p] = load<kSize>(static_cast<const T*>(a.x) + row * a.stride + column);
  }

  float row_max[kPasses], column_max[kSize] = {}, top = 0.0f;
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    row_max[p] = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float size = fabsf(to_float(x[p].at[j]));
      row_max[p] = fmaxf(row_max[p], size);
      column_max[j] = fmaxf(column_max[j], size);
    }
    top = fmaxf(top, row_max[p]);
  }
  if (kScaling == TRIAXIS_BLOCK_1X128 && a.transposed != nullptr) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) maxima[down][across * kSize + j] = column_max[j];
    __syncthreads();
    if (threadIdx.x < kTile) {
      float most = 0.0f;
      for (int d = 0; d < kDown; ++d) most = fmaxf(most, maxima[d][threadIdx.x]);
      column_scale[threadIdx.x] = scale_for<kType>(most, a.power_of_two);
      if (column0 + threadIdx.x < a.columns)
        a.transposed_scale_inv[blockIdx.y * a.transposed_scale_inv_stride + column0 + threadIdx.x] = column_scale[threadIdx.x].back;
    }
    __syncthreads();
  }
  Scale square{};
  if (kScaling == TRIAXIS_TENSORWISE) square.to = *a.scale;
  if (kScaling == TRIAXIS_BLOCK_128X128 || (kScaling == TRIAXIS_TENSORWISE && a.amax != nullptr)) {
    top = warp_max(top);
    if (threadIdx.x % kWarp == 0) maxima[0][threadIdx.x / kWarp] = top;
    __syncthreads();
    top = 0.0f;
    for (int w = 0; w < kThreads / kWarp; ++w) top = fmaxf(top, maxima[0][w]);
    if (kScaling == TRIAXIS_BLOCK_128X128) square = scale_for<kType>(top, a.power_of_two);
    if (threadIdx.x == 0) {
      if (kScaling == TRIAXIS_TENSORWISE) {
        raise_to(a.amax, top);
      } else {
        if (a.scale_inv != nullptr) a.scale_inv[blockIdx.y * a.scale_inv_stride + blockIdx.x] = square.back;
        if (a.transposed_scale_inv != nullptr) a.transposed_scale_inv[blockIdx.x * a.transposed_scale_inv_stride + blockIdx.y] = square.back;
      }
    }
  }

#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int64_t row = row0 + down * kPasses + p;
    Scale along = square;
    if (kScaling == TRIAXIS_BLOCK_1X128) along = scale_for<kType>(max_across(row_max[p]), a.power_of_two);
    if (a.row_major != nullptr && inside && row < a.rows) {
      Vec<uint8_t, kSize> bytes;
#pragma unroll
      for (int j = 0; j < kSize; ++j) bytes.at[j] = to_fp8<kType>(to_float(x[p].at[j]) * along.to);
      store(static_cast<uint8_t*>(a.row_major) + row * a.columns + column, bytes);
      if (kScaling == TRIAXIS_BLOCK_1X128 && across == 0) a.scale_inv[blockIdx.x * a.scale_inv_stride + row] = along.back;
    }
  }
  if (a.transposed == nullptr) return;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const int at = across * kSize + j;
    const float to = kScaling == TRIAXIS_BLOCK_1X128 ? column_scale[at].to : square.to;
    Vec<uint8_t, kPasses> bytes;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) bytes.at[p] = to_fp8<kType>(to_float(x[p].at[j]) * to);
    store(transposed + transposed_at(at, down), bytes);
  }
  __syncthreads();
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
int start(const triaxis_quantize_args& a, void* stream) {
  const auto kernel = a.scaling == TRIAXIS_TENSORWISE ? quantize<T, kType, TRIAXIS_TENSORWISE>
                      : a.scaling == TRIAXIS_BLOCK_1X128 ? quantize<T, kType, TRIAXIS_BLOCK_1X128>
                                                  : quantize<T, kType, TRIAXIS_BLOCK_128X128>;
  const dim3 grid(unsigned(ceil_div(a.columns, kTile)), unsigned(ceil_div(a.rows, kTile)));
  return LAUNCH(kernel, grid, dim3(kThreads), 0, stream, a);
}

bool valid(const triaxis_quantize_args& a) {
  return floating(a.dtype) && (a.out_dtype == TRIAXIS_E4M3 || a.out_dtype == TRIAXIS_E5M2) && a.rows >= 0 &&
         a.columns >= 0 && a.columns % 16 == 0 && (a.transposed == nullptr || a.rows % 16 == 0) && a.rows <= 65535ll * kTile &&
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
    return a.out_dtype == TRIAXIS_E4M3 ? start<T, __NV_E4M3>(a, stream) : start<T, __NV_E5M2>(a, stream);
  });
}
