// GELU(x) = x Phi(x) and its derivative, in float; `Exact` for float data.
#pragma once

namespace mmvmamba {

// erfc(|x| / sqrt 2) / 2 and exp(-x^2 / 2), by formula 7.1.26 of Abramowitz and Stegun, absolute error below 3e-7;
// float inputs get the exact function.
template <bool Exact> __device__ __forceinline__ float half_erfc(float x, float& gauss) {
  gauss = exp2f(-0.72134752f * x * x);
  if constexpr (Exact) return 0.5f * erfcf(0.70710678f * fabsf(x));
  const float t = __fdividef(1.f, fmaf(0.23164189f, fabsf(x), 1.f));
  float poly = fmaf(0.530702715f, t, -0.726576014f);
  poly = fmaf(poly, t, 0.710706870f);
  poly = fmaf(poly, t, -0.142248368f);
  poly = fmaf(poly, t, 0.127414796f);
  return poly * t * gauss;
}

// GELU(x) = x Phi(x), with Phi(-|x|) = half_erfc.
template <bool Exact> __device__ __forceinline__ float gelu(float x) {
  float gauss;
  const float tail = half_erfc<Exact>(x, gauss);
  return fmaf(-fabsf(x), tail, fmaxf(x, 0.f));
}

// GELU and its derivative Phi(x) + x phi(x).
template <bool Exact> __device__ __forceinline__ float2 gelu_and_slope(float x) {
  float gauss;
  const float tail = half_erfc<Exact>(x, gauss);
  const float slope = fmaf(0.39894228f * x, gauss, x < 0.f ? tail : 1.f - tail);
  return make_float2(fmaf(-fabsf(x), tail, fmaxf(x, 0.f)), slope);
}

}  // namespace mmvmamba
