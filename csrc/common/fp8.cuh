// Eight-bit floats: conversions that saturate, and scales.
#pragma once

#include <cfloat>

#include "reduce.cuh"
#include "vec.cuh"

namespace triaxis {

constexpr float kSmallestAmax = 1e-4f;  // a block of zeros still has a scale

__host__ __device__ constexpr float largest(__nv_fp8_interpretation_t type) { return type == __NV_E4M3 ? 448.0f : 57344.0f; }

// What the elements are multiplied by, and what the product is multiplied by to have them back.
struct Scale {
  float to, back;
};

// For elements of at most `amax`. `power_of_two` rounds `back` up to a power of two, so that scaling is exact.
template <__nv_fp8_interpretation_t kType>
__device__ __forceinline__ Scale scale_for(float amax, bool power_of_two) {
  amax = fmaxf(amax, kSmallestAmax);
  if (!(amax <= FLT_MAX)) return {0.0f, amax};  // an infinity becomes no number, and the step is skipped
  if (!power_of_two) return {largest(kType) / amax, amax / largest(kType)};
  int exponent;
  const float mantissa = frexpf(amax / largest(kType), &exponent);  // in [0.5, 1)
  if (mantissa == 0.5f) --exponent;
  return {ldexpf(1.0f, -exponent), ldexpf(1.0f, exponent)};
}

template <__nv_fp8_interpretation_t kType>
__device__ __forceinline__ uint8_t to_fp8(float x) {
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kType);
}

// Raises *at to `value`, neither of them negative: as integers they have the same order.
__device__ __forceinline__ void raise_to(float* at, float value) {
  atomicMax(reinterpret_cast<int*>(at), __float_as_int(value));
}

// Writes a thread's piece of a row to `out`. All lanes of a warp call it, also those with nothing `inside` the row (and
// zeros in `y`): lanes side by side hold the 128 elements that share a scale. `top` gathers the largest magnitude.
template <typename T>
__device__ __forceinline__ void store_fp8(
    const triaxis_fp8_output& out, const Vec<T>& y, int64_t row, int64_t columns, int64_t column, bool inside, float& top) {
  constexpr int kSize = Vec<T>::size, kLanes = 128 / kSize;
  float most = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize; ++j) most = fmaxf(most, fabsf(to_float(y.at[j])));
  Scale scale{};
  if (out.scaling == TRIAXIS_BLOCK_1X128) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    scale = scale_for<__NV_E4M3>(most, out.power_of_two);
    if (inside && column % 128 == 0) out.scale_inv[column / 128 * out.scale_inv_stride + row] = scale.back;
  } else {
    scale.to = *out.scale;
    top = fmaxf(top, most);
  }
  if (!inside) return;
  Vec<uint8_t, kSize> bytes;
#pragma unroll
  for (int j = 0; j < kSize; ++j) bytes.at[j] = to_fp8<__NV_E4M3>(to_float(y.at[j]) * scale.to);
  store(static_cast<uint8_t*>(out.values) + row * columns + column, bytes);
}

// Once a warp, behind its last row.
__device__ __forceinline__ void store_amax(const triaxis_fp8_output& out, float top) {
  if (out.scaling != TRIAXIS_TENSORWISE || out.amax == nullptr) return;
  top = warp_max(top);
  if ((threadIdx.x + threadIdx.y * blockDim.x) % kWarp == 0) raise_to(out.amax, top);
}

inline bool valid_output(const triaxis_fp8_output& out, int64_t columns) {
  return columns % 16 == 0 && (out.scaling == TRIAXIS_BLOCK_1X128 ? out.scale_inv != nullptr
                                                           : out.scaling == TRIAXIS_TENSORWISE && out.scale != nullptr);
}

}  // namespace triaxis
