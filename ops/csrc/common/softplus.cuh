// softplus and powers of two on the GPU.
#pragma once

#include <cfloat>
#include <utility>

#include "common/softplus_coefficients.h"

namespace mmvmamba {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// 2^-v and 2^-|v|: the signs are modifiers of the instruction, if nothing flushes denormals before.
__device__ __forceinline__ float exp2_of_negative(float v) {
  float r;
  asm("{.reg .f32 t; neg.f32 t, %1; ex2.approx.ftz.f32 %0, t;}" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float exp2_of_negative_abs(float v) {
  float r;
  asm("{.reg .f32 t; abs.f32 t, %1; neg.f32 t, t; ex2.approx.ftz.f32 %0, t;}" : "=f"(r) : "f"(v));
  return r;
}

template <bool Half, bool BaseTwo, size_t I>
constexpr float kCoefficient =
    static_cast<float>((BaseTwo ? 1.4426950408889634 : 1.0) * (Half ? kLog1pHalf[I] : kLog1pFloat[I]));

template <bool Half, bool BaseTwo, size_t... I>
__device__ __forceinline__ float log1p_ratio(float z, std::index_sequence<I...>) {
  float p = kCoefficient<Half, BaseTwo, 0>;
  ((p = fmaf(p, z, kCoefficient<Half, BaseTwo, I + 1>)), ...);
  return p;
}

// softplus(x), in float; z is exp(-|x|).
__device__ __forceinline__ float softplus(float x, float& z) {
  constexpr size_t degree = sizeof(kLog1pFloat) / sizeof(double) - 1;
  z = exp2f(-fabsf(x) * kLog2e);
  return fmaf(z, log1p_ratio<false, false>(z, std::make_index_sequence<degree>()), fmaxf(x, 0.f));
}

// The same in base two, log2(1 + 2^u) = max(u, 0) + log2(1 + 2^-|u|), for values of type T.
template <typename T> __device__ __forceinline__ float softplus2(float u) {
  constexpr bool half = sizeof(T) == 2;
  constexpr size_t degree = (half ? sizeof(kLog1pHalf) : sizeof(kLog1pFloat)) / sizeof(double) - 1;
  const float z = exp2_of_negative_abs(u);
  return fmaf(z, log1p_ratio<half, true>(z, std::make_index_sequence<degree>()), fmaxf(u, 0.f));
}

// The derivative of softplus2 expressed in its value: 1 - 2^-d2. For float a series where that would cancel.
template <typename T> __device__ __forceinline__ float softplus2_slope(float d2) {
  const float slope = 1.f - exp2_of_negative(d2);
  if constexpr (sizeof(T) == 4) {
    constexpr float c1 = kLn2, c2 = -kLn2 * kLn2 / 2, c3 = kLn2 * kLn2 * kLn2 / 6, c4 = -kLn2 * kLn2 * kLn2 * kLn2 / 24;
    const float series = d2 * fmaf(d2, fmaf(d2, fmaf(d2, c4, c3), c2), c1);
    return d2 < 0.125f ? series : slope;
  }
  return slope;
}

}  // namespace mmvmamba
