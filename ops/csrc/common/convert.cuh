// Conversion between memory and arithmetic: float and double stay, 16-bit types become float. By functions, since torch
// compiles without the conversions of the half types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mmvmamba {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float2 widen(const __half2& pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 widen(const __nv_bfloat162& pair) { return __bfloat1622float2(pair); }

// What a type is computed in.
template <typename T> using Wide = std::conditional_t<std::is_same<T, double>::value, double, float>;

template <typename T> __device__ __forceinline__ T narrow(Wide<T> value);
template <> __device__ __forceinline__ float narrow<float>(float value) { return value; }
template <> __device__ __forceinline__ double narrow<double>(double value) { return value; }
template <> __device__ __forceinline__ __half narrow<__half>(float value) { return __float2half_rn(value); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two neighbours of a 16-bit type, which are a 32-bit word: the unit of the tensor cores' fragments.
template <typename T> struct Pair;
template <> struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ Type round(float low, float high) { return __floats2half2_rn(low, high); }
};
template <> struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ Type round(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high) {
  const typename Pair<T>::Type pair = Pair<T>::round(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace mmvmamba
