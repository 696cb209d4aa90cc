// FP8: saturating conversions, scales, and the quantized output of fused kernels.
#pragma once

#include <cfloat>

#include "reduce.cuh"
#include "vec.cuh"

namespace triaxis {

constexpr float kMinAmax = 1e-30f;  // as MIN_AMAX in engine/ops/quantize.py

__host__ __device__ constexpr float max_value(__nv_fp8_interpretation_t type) {
  return type == __NV_E4M3 ? 448.0f : 57344.0f;
}

// What values are multiplied by before the cast to FP8, and what FP8 values are multiplied by to dequantize.
struct Scale {
  float scale, inv;
};

// The scale of a block with this amax. `kPowerOfTwo` rounds `inv` up to a power of two, so that scaling is exact.
//
// The largest FP8 value is 1.75 · 2^8 or 1.75 · 2^15, so for amax = m · 2^e, `inv` is 2^(e − 8) if m <= 1.75, else twice that:
// adding 0x1fffff to the bits carries into the exponent if m > 1.75. All in integers, without a division.
template <__nv_fp8_interpretation_t kType, bool kPowerOfTwo>
__device__ __forceinline__ Scale scale_from_amax(float amax) {
  amax = fmaxf(amax, kMinAmax);
  if (!(amax <= FLT_MAX)) return {0.0f, amax};  // infinity · 0 = NaN, so that the optimizer skips the step
  if (!kPowerOfTwo) return {max_value(kType) / amax, amax / max_value(kType)};
  constexpr int kExponent = (kType == __NV_E4M3 ? 8 : 15) << 23, kOne = 127 << 23;
  const int inv = ((__float_as_int(amax) + 0x1fffff) & 0x7f800000) - kExponent;
  return {__int_as_float(2 * kOne - inv), __int_as_float(inv)};
}

// Two numbers as adjacent bytes, `low` first, saturated: one instruction.
template <__nv_fp8_interpretation_t kType>
__device__ __forceinline__ uint16_t to_fp8(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(float2{low, high}, __NV_SATFINITE, kType);
}

// The larger of a maximum, kept as the bits of a number that is not negative, and |x|. As integers such bits have the order
// of the numbers, with NaN behind infinity: a NaN is not lost, as fmaxf would lose it.
__device__ __forceinline__ int max_magnitude(int maximum, float x) {
  const int magnitude = __float_as_int(fabsf(x));
  return magnitude > maximum ? magnitude : maximum;
}

// Raises *at to `maximum`. Most calls find a larger value there and spare the atomic, of which the same address takes one at
// a time.
__device__ __forceinline__ void raise_to(float* at, int maximum) {
  int* const bits = reinterpret_cast<int*>(at);
  if (maximum > *static_cast<volatile int*>(bits)) atomicMax(bits, maximum);
}

// Raises *amax, if it is not null, to the maximum of a warp. All lanes call it, after their last row.
__device__ __forceinline__ void raise_amax(float* amax, int maximum) {
  if (amax == nullptr) return;
  maximum = warp_max(maximum);
  if ((threadIdx.x + threadIdx.y * blockDim.x) % kWarp == 0) raise_to(amax, maximum);
}

// How an operator writes its output: in its own dtype; or in E4M3, with one scale or one for each 1 × 128 block.
enum class Output { kPlain, kTensorwise, kBlocks };

inline Output output_of(const triaxis_fp8_output& out) {
  if (out.values == nullptr) return Output::kPlain;
  return out.scaling == TRIAXIS_TENSORWISE ? Output::kTensorwise : Output::kBlocks;
}

// Element j of a vector of either kind, as a float.
template <typename T, int kSize>
__device__ __forceinline__ float element(const Vec<T, kSize>& v, int j) { return to_float(v.at[j]); }
template <typename T, int kSize>
__device__ __forceinline__ float element(const Packed<T, kSize>& v, int j) { return v[j]; }

// Quantizes a thread's vector of the output at (row, column). All lanes of a warp call it, also those that are not `inside`
// the row (with zeros in `y`), because adjacent lanes hold the 128 elements that share a scale. For kTensorwise, `scale` is
// that of the tensor, and `amax` the maximum of this thread, for raise_amax().
template <Output kOutput, typename V>
__device__ __forceinline__ void store_fp8(
    const triaxis_fp8_output& out, float scale, const V& y, int64_t row, int64_t columns, int64_t column, bool inside,
    int& amax) {
  constexpr int kSize = V::size, kLanes = 128 / kSize;
  if constexpr (kOutput == Output::kBlocks) {
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) largest = fmaxf(largest, fabsf(element(y, j)));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const Scale block = scale_from_amax<__NV_E4M3, true>(largest);
    scale = block.scale;
    if (inside && column % 128 == 0) out.scale_inv[column / 128 * out.scale_inv_stride + row] = block.inv;
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) amax = max_magnitude(amax, element(y, j));
  }
  if (!inside) return;
  Vec<uint16_t, kSize / 2> pairs;
#pragma unroll
  for (int j = 0; j < kSize; j += 2)
    pairs.at[j / 2] = to_fp8<__NV_E4M3>(element(y, j) * scale, element(y, j + 1) * scale);
  store(reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(out.values) + row * columns + column), pairs);
}

inline bool valid_output(const triaxis_fp8_output& out, int64_t columns) {
  return columns % 16 == 0 && (out.scaling == TRIAXIS_BLOCK_1X128 ? out.scale_inv != nullptr
                                                                  : out.scaling == TRIAXIS_TENSORWISE && out.scale != nullptr);
}

}  // namespace triaxis
