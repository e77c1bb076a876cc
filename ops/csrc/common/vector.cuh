// Four or eight neighbours at a time, in float whatever their type in memory.
#pragma once

#include "common/convert.cuh"

namespace mmvmamba {

// One load or store of 8 or 16 bytes.
template <int Bytes> struct Word;
template <> struct Word<8> {
  using Type = uint2;
};
template <> struct Word<16> {
  using Type = uint4;
};

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
    reinterpret_cast<uint32_t*>(&raw)[i] = pack<T>(v[2 * i], v[2 * i + 1]);
  }
  *reinterpret_cast<Whole*>(to) = raw;
}

}  // namespace mmvmamba
