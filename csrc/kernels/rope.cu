// Rotary positions on all heads of a token in one pass: forward, from the fused q, k and v into separate tensors;
// backward, from their gradients into the fused one. A thread keeps one part of the head size and goes from head to head,
// so that it reads its angles once a token. The backward to FP8 goes from tile to tile instead: it quantizes the transpose too.

#include "../common/tile.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 256, kGroups = 3;

// x · cos + y · sin. The fused multiply-add is written out, so that every kernel computes the same bits.
__device__ __forceinline__ float rotated(float x, float y, float cos, float sin) { return fmaf(x, cos, y * sin); }

// Rotates two parts of a head that lie half a head apart, with `sign` −1 back.
template <typename T, int kSize>
__device__ __forceinline__ void rotate(
    Packed<T, kSize>& x, Packed<T, kSize>& y, const Vec<float, kSize>& cos, const Vec<float, kSize>& sin, float sign) {
  if constexpr (kSize == 1) {
    const float first = rotated(x[0], y[0], cos.at[0], -sign * sin.at[0]);
    y.only = from_float<T>(rotated(y[0], x[0], cos.at[0], sign * sin.at[0]));
    x.only = from_float<T>(first);
  } else {
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
      const float x0 = x[j], x1 = x[j + 1], y0 = y[j], y1 = y[j + 1], s0 = sign * sin.at[j], s1 = sign * sin.at[j + 1];
      x.set_pair(j / 2, rotated(x0, y0, cos.at[j], -s0), rotated(x1, y1, cos.at[j + 1], -s1));
      y.set_pair(j / 2, rotated(y0, x0, cos.at[j], s0), rotated(y1, x1, cos.at[j + 1], s1));
    }
  }
}

// Threads (x, y) of a block: x along half of the head size, y over the heads of a token.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) rope(const triaxis_rope_args a) {
  const int64_t half = a.head_size / 2;
  const float sign = a.back ? -1.0f : 1.0f;  // the gradient rotates back
  int64_t most_heads = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) most_heads = a.groups[g].heads > most_heads ? a.groups[g].heads : most_heads;
  int amax = 0;  // bits
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    for (int64_t i = int64_t(threadIdx.x) * kSize; i < half; i += int64_t(blockDim.x) * kSize) {
      const auto cos = load<kSize>(a.cos + token * half + i), sin = load<kSize>(a.sin + token * half + i);
      for (int64_t head = threadIdx.y; head < most_heads; head += blockDim.y) {
        Packed<T, kSize> first[kGroups], second[kGroups];  // of one head of each group; loaded before the first use
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const triaxis_heads& group = a.groups[g];
          if (head >= group.heads) continue;
          const T* const in = static_cast<const T*>(group.in) + token * group.in_token_stride + head * group.in_head_stride;
          first[g] = Packed<T, kSize>::load(in + i);
          second[g] = Packed<T, kSize>::load(in + half + i);
        }
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const triaxis_heads& group = a.groups[g];
          if (head >= group.heads) continue;
          if (group.rotate) rotate(first[g], second[g], cos, sin, sign);
          if (a.amax != nullptr) {
#pragma unroll
            for (int j = 0; j < kSize; ++j) amax = max_magnitude(max_magnitude(amax, first[g][j]), second[g][j]);
          }
          T* const out = static_cast<T*>(group.out) + token * group.out_token_stride + head * group.out_head_stride;
          first[g].store(out + i);
          second[g].store(out + half + i);
        }
      }
    }
  }
  raise_amax(a.amax, amax);
}

constexpr int kRows = 4;   // of a thread
constexpr int kTiles = 4;  // of a block, side by side: from the second on the angles come from the L1 cache

// The gradient in FP8: rows are tokens, columns those of all heads, group after group. `zero` is 0, for Packed::forget.
template <typename T, __nv_fp8_interpretation_t kType, triaxis_scaling kScaling>
__global__ void __launch_bounds__(kTileThreads<kRows>, sizeof(T) == 4 ? 1 : 2)
    rope_fp8(const triaxis_rope_args a, const triaxis_quantize_args out, int log_head_size, uint32_t zero) {
  __shared__ TileMemory<kRows> memory;
  const float scale = kScaling == TRIAXIS_TENSORWISE ? *out.scale : 0.0f;
  const int head_size = 1 << log_head_size, half = head_size / 2;
  const int columns = int(out.columns);
  for (int n = 0; n < kTiles; ++n) {
    const Place<kRows> at(blockIdx.y, (blockIdx.x * kTiles + n) * kTile, columns);
    if (at.column0 >= columns) break;
    // This thread's head, and where its 8 columns lie in it: a rotation pairs them with those of the lane half a head away.
    const int column = int(at.column), in_head = column & (head_size - 1), i = in_head & (half - 1), away = half / kTileColumns;
    const bool in_second = in_head >= half;
    int head = column >> log_head_size;
    triaxis_heads group = a.groups[0];
#pragma unroll
    for (int g = 1; g < kGroups; ++g) {
      if (head < group.heads) continue;
      head -= int(group.heads);
      group = a.groups[g];
    }
    const T* const in = static_cast<const T*>(group.in) + head * group.in_head_stride + in_head;
    const float sign = (a.back != 0) == in_second ? -1.0f : 1.0f;

    Packed<T, kTileColumns> x[kRows];  // zeros outside the matrix; all loads are issued before the first use
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      x[p] = {};
      if (at.inside && at.row + p < out.rows) x[p] = Packed<T, kTileColumns>::load(in + (at.row + p) * group.in_token_stride);
    }
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      Packed<T, kTileColumns> partner;
#pragma unroll
      for (int w = 0; w < x[p].num_words; ++w) partner.words[w] = __shfl_xor_sync(0xffffffffu, x[p].words[w], away);
      if (!group.rotate || !at.inside || at.row + p >= out.rows) continue;
      const auto cos = load<kTileColumns>(a.cos + (at.row + p) * half + i);
      const auto sin = load<kTileColumns>(a.sin + (at.row + p) * half + i);
#pragma unroll
      for (int j = 0; j < kTileColumns; j += 2)
        x[p].set_pair(j / 2, rotated(x[p][j], partner[j], cos.at[j], sign * sin.at[j]),
                      rotated(x[p][j + 1], partner[j + 1], cos.at[j + 1], sign * sin.at[j + 1]));
      x[p].forget(zero);
    }
    __syncthreads();  // all have read the shared memory of the last tile
    quantize_tile<T, kType, kScaling, true>(at, x, out, scale, memory, zero);
  }
}

template <typename T>
bool by_vector(const triaxis_rope_args& a) {
  bool all = a.head_size / 2 % Vec<T>::size == 0 && reinterpret_cast<uintptr_t>(a.cos) % alignof(Vec<float, Vec<T>::size>) == 0 &&
             reinterpret_cast<uintptr_t>(a.sin) % alignof(Vec<float, Vec<T>::size>) == 0;
  for (const triaxis_heads& group : a.groups)
    all = all && (group.heads == 0 ||
                  (aligned<T>(group.in, group.in_token_stride) && aligned<T>(group.in, group.in_head_stride) &&
                   aligned<T>(group.out, group.out_token_stride) && aligned<T>(group.out, group.out_head_stride)));
  return all;
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_rope(const triaxis_rope_args* args, void* stream) {
  const triaxis_rope_args& a = *args;
  if (!floating(a.dtype) || a.tokens < 0 || a.head_size < 0 || a.head_size % 2 != 0) return kInvalidArgument;
  if (a.tokens == 0 || a.head_size == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int size = by_vector<T>(a) ? Vec<T>::size : 1;
    const auto kernel = size == 1 ? rope<T, 1> : rope<T, Vec<T>::size>;
    const int64_t pieces = ceil_div(a.head_size / 2, size);
    int across = 1;
    while (across < pieces && across < kWarp) across *= 2;
    const dim3 block(across, kThreads / across);
    const unsigned grid = unsigned(a.tokens < 65536 ? a.tokens : 65536);  // a block a token; more tokens loop
    return LAUNCH(kernel, dim3(grid), block, 0, stream, a);
  });
}

extern "C" int triaxis_rope_fp8(const triaxis_rope_args* args, const triaxis_quantize_args* out, void* stream) {
  const triaxis_rope_args& a = *args;
  int64_t heads = 0;
  for (const triaxis_heads& group : a.groups) heads += group.heads;
  int log_head_size = 4;
  while (log_head_size < 7 && 1 << log_head_size < a.head_size) ++log_head_size;
  if (!floating(a.dtype) || !valid_both(*out) || a.head_size != 1 << log_head_size || out->rows != a.tokens ||
      out->columns != heads * a.head_size)
    return kInvalidArgument;
  if (a.tokens == 0 || heads == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (!by_vector<T>(a)) return kInvalidArgument;
    const auto kernel = out->scaling == TRIAXIS_BLOCK_1X128 ? rope_fp8<T, __NV_E4M3, TRIAXIS_BLOCK_1X128>
                                                            : rope_fp8<T, __NV_E5M2, TRIAXIS_TENSORWISE>;
    const dim3 grid(unsigned(ceil_div(out->columns, kTile * kTiles)), unsigned(ceil_div(a.tokens, kTile)));
    return LAUNCH(kernel, grid, dim3(kTileThreads<kRows>), 0, stream, a, *out, log_head_size, 0u);
  });
}
