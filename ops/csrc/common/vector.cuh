// Values in float whatever their type in memory, four or eight neighbours at a time.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mmvmamba {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename T> __device__ __forceinline__ T narrow(float value);
template <> __device__ __forceinline__ float narrow<float>(float value) { return value; }
template <> __device__ __forceinline__ __half narrow<__half>(float value) { return __float2half_rn(value); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ float2 widen(const __half2& pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 widen(const __nv_bfloat162& pair) { return __bfloat1622float2(pair); }

template <typename T> struct Pair;
template <> struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ Type round(float a, float b) { return __floats2half2_rn(a, b); }
};
template <> struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ Type round(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

// One load or store of 8 or 16 bytes.
template <int Bytes> struct Word;
template <> struct Word<8> { using Type = uint2; };
template <> struct Word<16> { using Type = uint4; };

// Width values from an address aligned to them: 8 or 16 bytes of a half-precision type, 16 or 32 of float.
template <int Width> __device__ __forceinline__ void load(const float* from, float (&v)[Width]) {
#pragma unroll
  for (int i = 0; i < Width; i += 4) {
    const float4 raw = *reinterpret_cast<const float4*>(from + i);
    v[i] = raw.x, v[i + 1] = raw.y, v[i + 2] = raw.z, v[i + 3] = raw.w;
  }
}
template <int Width, typename T> __device__ __forceinline__ void load(const T* from, float (&v)[Width]) {
  using Whole = typename Word<2 * Width>::Type;
  const Whole raw = *reinterpret_cast<const Whole*>(from);
#pragma unroll
  for (int i = 0; i < Width / 2; ++i) {
    const float2 pair = widen(reinterpret_cast<const typename Pair<T>::Type*>(&raw)[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}
template <int Width> __device__ __forceinline__ void store(float* to, const float (&v)[Width]) {
#pragma unroll
  for (int i = 0; i < Width; i += 4) {
    *reinterpret_cast<float4*>(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
  }
}
template <int Width, typename T> __device__ __forceinline__ void store(T* to, const float (&v)[Width]) {
  using Whole = typename Word<2 * Width>::Type;
  Whole raw;
#pragma unroll
  for (int i = 0; i < Width / 2; ++i) {
    const typename Pair<T>::Type pair = Pair<T>::round(v[2 * i], v[2 * i + 1]);
    reinterpret_cast<uint32_t*>(&raw)[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  *reinterpret_cast<Whole*>(to) = raw;
}

}  // namespace mmvmamba
