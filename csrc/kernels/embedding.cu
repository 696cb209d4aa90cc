// The gradient of an embedding, added to the rows that the tokens name: a block a token. The first of equal tokens adds up
// the gradients of all of them, in their order, so that results repeat bitwise without a sort and without atomics.

#include "../common/vec.cuh"

namespace triaxis {
namespace {

constexpr int kThreads = 512;
constexpr int kWindow = 8192;  // tokens that are compared before their gradients are read: a bit of shared memory each

// Whether any thread of the block passes true.
__device__ __forceinline__ bool any_of_block(bool x) {
  __shared__ int any;
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (x) any = 1;  // all write the same
  __syncthreads();
  return any != 0;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) embedding_backward(const triaxis_embedding_backward_args a) {
  __shared__ uint32_t equal[kWindow / kWarp];  // bit j of word i: token 32 i + j of the window is that of this block
  constexpr int kPart = kSize < 4 ? kSize : 4;
  const int64_t mine = blockIdx.x, token = a.tokens[mine];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (token < 0 || token >= a.rows) return;

  bool earlier = false;
  for (int64_t i = threadIdx.x; i < mine; i += kThreads) earlier |= a.tokens[i] == token;
  if (any_of_block(earlier)) return;

  float* const out = a.out + token * a.columns;
  for (int64_t start = mine; start < a.count; start += kWindow) {
    const int64_t count = a.count - start < kWindow ? a.count - start : kWindow;
    const int words = int(ceil_div(count, kWarp));
    for (int i = warp; i < words; i += kThreads / kWarp) {
      const int64_t at = start + i * kWarp + lane;
      const uint32_t bits = __ballot_sync(0xffffffffu, at < a.count && a.tokens[at] == token);
      if (lane == 0) equal[i] = bits;
    }
    __syncthreads();
    for (int64_t c = int64_t(threadIdx.x) * kSize; c < a.columns; c += int64_t(kThreads) * kSize) {
      float sum[kSize] = {};
      for (int i = 0; i < words; ++i) {
        for (uint32_t bits = equal[i]; bits != 0; bits &= bits - 1) {
          const int64_t at = start + i * kWarp + __ffs(int(bits)) - 1;
          const auto piece = load<kSize>(static_cast<const T*>(a.grad) + at * a.grad_stride + c);
#pragma unroll
          for (int j = 0; j < kSize; ++j) sum[j] += to_float(piece.at[j]);
        }
      }
#pragma unroll
      for (int k = 0; k < kSize; k += kPart) {
        auto total = load<kPart>(out + c + k);
#pragma unroll
        for (int j = 0; j < kPart; ++j) total.at[j] += sum[k + j];
        store(out + c + k, total);
      }
    }
    __syncthreads();  // before the next window overwrites the bits
  }
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_embedding_backward(const triaxis_embedding_backward_args* args, void* stream) {
  const triaxis_embedding_backward_args& a = *args;
  if (!floating(a.dtype) || a.count < 0 || a.count > INT32_MAX || a.rows < 0 || a.columns < 0) return kInvalidArgument;
  if (a.count == 0 || a.columns == 0) return 0;
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool by_vector = aligned<T>(a.grad, a.grad_stride) && a.columns % Vec<T>::size == 0 && aligned<float>(a.out, 0);
    const auto kernel = by_vector ? embedding_backward<T, Vec<T>::size> : embedding_backward<T, 1>;
    return LAUNCH(kernel, dim3(unsigned(a.count)), dim3(kThreads), 0, stream, a);
  });
}
