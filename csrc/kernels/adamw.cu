// One AdamW update of a flat shard in one pass: reads gradient, master weight and both moments, writes all but the gradient
// and the rounded parameter; with fp32 moments and a bf16 parameter 30 bytes a parameter.

#include "../common/vec.cuh"

#include <algorithm>
#include <iterator>

namespace triaxis {
namespace {

constexpr int kThreads = 256;

template <typename M, typename P, int kSize>
__global__ void __launch_bounds__(kThreads) adamw(const triaxis_adamw_args a) {
  if (a.skip != nullptr && *a.skip != 0.0f) return;
  // What all elements share; scale, skip and step stay on the device, so that the host never waits for them.
  const float scale = a.grad_scale == nullptr ? 1.0f : 1.0f / *a.grad_scale;
  const float correction1 = 1.0f - powf(a.beta1, *a.step), correction2 = rsqrtf(1.0f - powf(a.beta2, *a.step));
  const float step_size = a.lr / correction1, keep = 1.0f - a.lr * a.weight_decay;
  M *const exp_avg = static_cast<M*>(a.exp_avg), *const exp_avg_sq = static_cast<M*>(a.exp_avg_sq);
  P* const param = static_cast<P*>(a.param);

  // Moments are computed in fp32 and rounded to their dtype when stored; the weight decay is decoupled.
  const auto update = [&](float& w, float g, M& first, M& second) {
    g *= scale;
    const float m = a.beta1 * to_float(first) + (1.0f - a.beta1) * g;
    const float v = a.beta2 * to_float(second) + (1.0f - a.beta2) * g * g;
    w = w * keep - step_size * m / (sqrtf(v) * correction2 + a.eps);
    first = from_float<M>(m);
    second = from_float<M>(v);
  };
  // Whole vectors, then (in the first block) the elements after the last of them.
  const int64_t whole = a.size / kSize, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < whole; i += step) {
    auto w = load<kSize>(a.master + kSize * i);
    const auto g = load<kSize>(a.grad + kSize * i);
    auto m = load<kSize>(exp_avg + kSize * i), v = load<kSize>(exp_avg_sq + kSize * i);
    Vec<P, kSize> p;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      update(w.at[j], g.at[j], m.at[j], v.at[j]);
      p.at[j] = from_float<P>(w.at[j]);
    }
    store(a.master + kSize * i, w);
    store(exp_avg + kSize * i, m);
    store(exp_avg_sq + kSize * i, v);
    if (param != nullptr) store(param + kSize * i, p);
  }
  const int64_t last = whole * kSize + threadIdx.x;
  if (blockIdx.x == 0 && last < a.size) {
    update(a.master[last], a.grad[last], exp_avg[last], exp_avg_sq[last]);
    if (param != nullptr) param[last] = from_float<P>(a.master[last]);
  }
}

}  // namespace
}  // namespace triaxis

using namespace triaxis;

extern "C" int triaxis_adamw(const triaxis_adamw_args* args, void* stream) {
  const triaxis_adamw_args& a = *args;
  const bool moments = a.moment_dtype == TRIAXIS_F32 || a.moment_dtype == TRIAXIS_BF16;
  if (!moments || !floating(a.param_dtype) || a.size < 0) return kInvalidArgument;
  if (a.size == 0) return 0;
  const void* const pointers[] = {a.master, a.grad, a.exp_avg, a.exp_avg_sq, a.param};
  const bool by_four = std::all_of(std::begin(pointers), std::end(pointers),
                                   [](const void* p) { return aligned<float>(p, 0); });
  return with_dtype(a.param_dtype, [&](auto type) {
    using P = decltype(type);
    using Kernel = void (*)(const triaxis_adamw_args);
    const bool wide = a.moment_dtype == TRIAXIS_F32;
    const Kernel kernel = by_four ? (wide ? adamw<float, P, 4> : adamw<__nv_bfloat16, P, 4>)
                                  : (wide ? adamw<float, P, 1> : adamw<__nv_bfloat16, P, 1>);
    const int grid = persistent_grid(kernel, kThreads, ceil_div(a.size, kThreads * (by_four ? 4 : 1)));
    return LAUNCH(kernel, dim3(grid), dim3(kThreads), 0, stream, a);
  });
}
