// Eight-bit floats: conversions that saturate, and scales.
#pragma once

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

}  // namespace triaxis
