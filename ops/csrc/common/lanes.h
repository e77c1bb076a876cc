// Sixteen floats side by side, and what the CPU kernels of channel-last maps do with them. Numbers in memory are float
// or bfloat16; arithmetic is float. A processor of narrower registers takes several for one vector.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/elementary.h"

namespace mmvmamba {

constexpr int kVector = 16;
typedef float Floats __attribute__((vector_size(4 * kVector), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kVector), aligned(4), may_alias));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kVector), aligned(2), may_alias));

struct Bfloat16 {
  uint16_t bits;
};

// ---- memory ---------------------------------------------------------------------------------------------------------
MMVMAMBA_INLINE void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof(to)); }
MMVMAMBA_INLINE void load(const Bfloat16* from, Floats& to) {
  HalfWords bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Words words = __builtin_convertvector(bits, Words) << 16;
  std::memcpy(&to, &words, sizeof(to));
}

MMVMAMBA_INLINE void store(const Floats& from, float* to) { std::memcpy(to, &from, sizeof(from)); }
MMVMAMBA_INLINE void store(const Floats& from, Bfloat16* to) {  // to the nearest, ties to even
  Words words;
  std::memcpy(&words, &from, sizeof(words));
  const Words rounded = (words + 0x7FFFu + ((words >> 16) & 1u)) >> 16;
  const Words nan = Words{} + 0x7FC0u;
  const HalfWords bits = __builtin_convertvector((words & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded, HalfWords);
  std::memcpy(to, &bits, sizeof(bits));
}

// The first `count` of a vector; the others are 0, and are not written.
template <typename T> MMVMAMBA_INLINE void load(const T* from, int64_t count, Floats& to) {
  if (count >= kVector) return load(from, to);
  T part[kVector] = {};
  std::memcpy(part, from, count * sizeof(T));
  load(part, to);
}
template <typename T> MMVMAMBA_INLINE void store(const Floats& from, int64_t count, T* to) {
  if (count >= kVector) return store(from, to);
  T part[kVector];
  store(from, part);
  std::memcpy(to, part, count * sizeof(T));
}

// ---- functions ------------------------------------------------------------------------------------------------------
// In an order that no instruction set changes.
MMVMAMBA_INLINE float sum_of(const Floats& v) {
  float part[kVector];
  store(v, part);
  for (int step = kVector / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  }
  return part[0];
}

// sigmoid(z), by exp of what is not positive.
MMVMAMBA_INLINE void to_sigmoid(Floats& z) {
  Floats small = z < 0 ? z : -z;
  to_exp_of_negative<Floats, Words>(small);
  const Floats one = Floats{} + 1.f;
  z = (z < 0 ? small : one) / (one + small);
}

// The normal distribution at x, as a share of 1 and as a density: GELU is x cdf, and its slope cdf + x pdf. cdf(-|x|)
// is exp(-x^2 / 2) times a polynomial of t = 1 / (1 + 0.35 |x|), the best one for the relative error, 3.2e-8 before
// rounding.
MMVMAMBA_INLINE void normal_distribution(const Floats& x, Floats& cdf, Floats& bell) {
  const Floats size = x < 0 ? -x : x, one = Floats{} + 1.f;
  const Floats t = one / (size * 0.35f + 1.f);
  bell = size * size * -0.5f;
  to_exp_of_negative<Floats, Words>(bell);
  Floats p = t * -2.914594e-2f + 1.4397174e-1f;
  p = p * t - 2.5571436e-1f;
  p = p * t + 1.5917426e-1f;
  p = p * t - 2.3109904e-2f;
  p = p * t + 1.0550803e-1f;
  p = p * t + 1.1983286e-1f;
  p = p * t + 1.3986187e-1f;
  p = p * t + 1.396214e-1f;
  const Floats tail = p * t * bell;
  cdf = x < 0 ? tail : one - tail;
}
MMVMAMBA_INLINE void to_gelu(Floats& x) {
  Floats cdf, bell;
  normal_distribution(x, cdf, bell);
  x = x * cdf;
}
// GELU of x, and its derivative there.
MMVMAMBA_INLINE void gelu_with_slope(Floats& x, Floats& slope) {
  Floats cdf, bell;
  normal_distribution(x, cdf, bell);
  slope = cdf + x * bell * 0.3989422804f;
  x = x * cdf;
}

}  // namespace mmvmamba
