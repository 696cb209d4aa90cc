// Vectors: what a thread loads or stores in one access; 16 bytes if the alignment allows, else one element.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace triaxis {

template <typename T, int kSize = 16 / sizeof(T)>
struct alignas(kSize * sizeof(T)) Vec {
  static constexpr int size = kSize;
  T at[kSize];
};

template <int kSize, typename T>
__device__ __forceinline__ Vec<T, kSize> load(const T* p) {
  return *reinterpret_cast<const Vec<T, kSize>*>(p);
}

template <typename T, int kSize>
__device__ __forceinline__ void store(T* p, const Vec<T, kSize>& v) {
  *reinterpret_cast<Vec<T, kSize>*>(p) = v;
}

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__host__ __device__ __forceinline__ T from_float(float x);
template <>
__host__ __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__host__ __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__host__ __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// A vector in as few registers as it fills, for what a kernel keeps over an iteration or a barrier: of a Vec, which has
// elements of 2 bytes, the compiler would keep each in a register.
template <typename T, int kSize = 16 / sizeof(T)>
struct alignas(kSize * sizeof(T)) Packed {
  static constexpr int size = kSize, num_words = kSize * sizeof(T) / 4;
  uint32_t words[num_words];

  __device__ __forceinline__ static Packed load(const T* p) { return *reinterpret_cast<const Packed*>(p); }

  // Element j as a float, in one instruction; of FP8 in three for two.
  __device__ __forceinline__ float operator[](int j) const {
    if constexpr (sizeof(T) == 4) return __int_as_float(int(words[j]));
    if constexpr (sizeof(T) == 1) {
      constexpr auto kType = std::is_same_v<T, __nv_fp8_e4m3> ? __NV_E4M3 : __NV_E5M2;
      const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(uint16_t(words[j / 4] >> (j % 4 < 2 ? 0 : 16)), kType);
      return to_float(__ushort_as_half(j % 2 == 0 ? pair.x : pair.y));
    }
    const uint32_t word = words[j / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __int_as_float(int(j % 2 == 0 ? word << 16 : word & 0xffff0000u));
    return to_float(__ushort_as_half(uint16_t(j % 2 == 0 ? word : word >> 16)));
  }

  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Packed*>(p) = *this; }

  // Elements 2i and 2i + 1, rounded: in one instruction to bf16.
  __device__ __forceinline__ void set_pair(int i, float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      words[i] = uint32_t(__bfloat16_as_ushort(pair.y)) << 16 | __bfloat16_as_ushort(pair.x);
    } else if constexpr (std::is_same_v<T, __half>) {
      words[i] = uint32_t(__half_as_ushort(from_float<T>(high))) << 16 | __half_as_ushort(from_float<T>(low));
    } else {
      words[2 * i] = uint32_t(__float_as_int(low));
      words[2 * i + 1] = uint32_t(__float_as_int(high));
    }
  }

  // Makes the compiler convert the elements again, where it would keep their floats in registers. `zero` is an argument of the
  // kernel, so that the compiler does not know that nothing changes; ptxas sees through anything weaker, as an empty `asm`.
  __device__ __forceinline__ void forget(uint32_t zero) {
    if constexpr (sizeof(T) < 4) {  // else nothing was converted
#pragma unroll
      for (int i = 0; i < num_words; ++i) words[i] += zero;  // not ^=: a second time would undo the first
    }
  }
};

template <typename T>
struct Packed<T, 1> {
  static constexpr int size = 1;
  T only;

  __device__ __forceinline__ static Packed load(const T* p) { return {*p}; }
  __device__ __forceinline__ float operator[](int) const { return to_float(only); }
  __device__ __forceinline__ void store(T* p) const { *p = only; }
};

template <typename T>
__host__ __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// Whether rows from `p` on, `stride` elements apart, all start at multiples of 16 bytes.
template <typename T>
bool aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % Vec<T>::size == 0;
}

inline bool floating(triaxis_dtype dtype) {
  return dtype == TRIAXIS_F32 || dtype == TRIAXIS_BF16 || dtype == TRIAXIS_F16;
}

// Calls `f` with a value of the dtype's type.
template <typename F>
auto with_dtype(triaxis_dtype dtype, F f) {
  if (dtype == TRIAXIS_BF16) return f(__nv_bfloat16());
  if (dtype == TRIAXIS_F16) return f(__half());
  return f(float());
}

}  // namespace triaxis
