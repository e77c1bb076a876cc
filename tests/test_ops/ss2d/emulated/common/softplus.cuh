#pragma once

#include <cmath>

namespace mmvmamba {
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
inline float exp2_fast(float v) { return std::exp2(v); }
template <typename T> float softplus2(float u) {
  return std::log1p(std::exp2(-std::fabs(u))) * kLog2e + std::fmax(u, 0.f);
}
template <typename T> float softplus2_slope(float d2) { return -std::expm1(-d2 * kLn2); }
}  // namespace mmvmamba
