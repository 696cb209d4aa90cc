// Rotary positions on all heads of a token in one pass: forward, from the fused q, k and v into separate tensors;
// backward, from their gradients into the fused one. A thread keeps one part of the head size and goes from head to head,
// so that it reads its angles once a token.

#include "../common/vec.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 256;

// Threads (x, y) of a block: x along half of the head size, y over the heads of a token.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) rope(const triaxis_rope_args a) {
  const int64_t half = a.head_size / 2;
  const float sign = a.back ? -1.0f : 1.0f;  // the gradient rotates back
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x) {
    for (int64_t i = int64_t(threadIdx.x) * kSize; i < half; i += int64_t(blockDim.x) * kSize) {
      float cos[kSize], sin[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        cos[j] = a.cos[token * half + i + j];
        sin[j] = a.sin[token * half + i + j] * sign;
      }
#pragma unroll
      for (int g = 0; g < 3; ++g) {
        const triaxis_heads& group = a.groups[g];
        for (int64_t head = threadIdx.y; head < group.heads; head += blockDim.y) {
          const T* const in = static_cast<const T*>(group.in) + token * group.in_token_stride + head * group.in_head_stride;
          T* const out = static_cast<T*>(group.out) + token * group.out_token_stride + head * group.out_head_stride;
          auto first = load<kSize>(in + i);
          auto second = load<kSize>(in + half + i);
          if (group.rotate) {
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
              const float x = to_float(first.at[j]), y = to_float(second.at[j]);
              first.at[j] = from_float<T>(x * cos[j] - y * sin[j]);
              second.at[j] = from_float<T>(y * cos[j] + x * sin[j]);
            }
          }
          store(out + i, first);
          store(out + half + i, second);
        }
      }
    }
  }
}

template <typename T>
bool by_vector(const triaxis_rope_args& a) {
  bool all = a.head_size / 2 % Vec<T>::size == 0;
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
