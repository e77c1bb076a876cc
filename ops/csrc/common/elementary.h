// exp and log1p as straight-line code that a compiler vectorises, and what compiles a function for several processors.
// float versions are for loops over many values, or take vectors (those by reference); double ones are for reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One binary serves every x86-64: the loader picks the widest version that the processor has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)  // the loader picks before the sanitizer is ready
#define MMVMAMBA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// a function in two forms: for registers of sixteen floats where has_wide_registers(), and for all others
#define MMVMAMBA_WIDE __attribute__((target("arch=x86-64-v4")))
#define MMVMAMBA_NARROW_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define MMVMAMBA_CLONES
#define MMVMAMBA_NARROW_CLONES
#endif
#define MMVMAMBA_INLINE inline __attribute__((always_inline))

namespace mmvmamba {

#ifdef MMVMAMBA_WIDE
inline bool has_wide_registers() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// x = k ln2 + r with |r| <= ln2 / 2 becomes exp(r), and exponent k. Float: float, or a vector type of them, with the
// unsigned integer of its size.
template <typename Float, typename Unsigned = uint32_t> MMVMAMBA_INLINE void split_exp(Float& x, Unsigned& exponent) {
  const Float shifted = x * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23 rounds to an integer
  const Float k = shifted - 12582912.f;
  Float r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  x = r * 1.9875691500e-4f + 1.3981999507e-3f;
  x = x * r + 8.3334519073e-3f;
  x = x * r + 4.1665795894e-2f;
  x = x * r + 1.6666665459e-1f;
  x = x * r + 5.0000001201e-1f;
  x = x * r * r + r + 1.f;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = exponent - 0x4B400000u;
}
template <typename Float, typename Unsigned>
MMVMAMBA_INLINE void multiply_by_power(Float& x, const Unsigned& exponent) {
  const Unsigned bits = (exponent + 127u) << 23;
  Float power;
  std::memcpy(&power, &bits, sizeof(power));
  x = x * power;
}

// exp of x <= 0 (or NaN) with an error of about 1 ulp. Below -87.68, where k is -127, the power of two is 0.
template <typename Float, typename Unsigned = uint32_t> MMVMAMBA_INLINE void to_exp_of_negative(Float& x) {
  x = x < -88.f ? Float{} - 88.f : x;
  Unsigned exponent;
  split_exp(x, exponent);
  multiply_by_power(x, exponent);
}
MMVMAMBA_INLINE float exp_of_negative(float x) { return to_exp_of_negative(x), x; }
MMVMAMBA_INLINE double exp_of_negative(double x) { return std::exp(x); }

// exp with an error of about 1 ulp of a normal number. Below -103.97 the result is 0, above 88.72 it is infinite; NaN
// stays NaN.
MMVMAMBA_INLINE float exp_(float x) {
  x = x < -176.f ? -176.f : x;
  x = x > 89.f ? 89.f : x;
  uint32_t exponent;
  split_exp(x, exponent);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  multiply_by_power(x, half);  // two factors, since 2^128 has no float
  multiply_by_power(x, exponent - half);
  return x;
}
MMVMAMBA_INLINE double exp_(double x) { return std::exp(x); }

// log1p on [0, 1] with an error of about 1 ulp: z times a polynomial through log1p(z) / z at Chebyshev's points.
template <typename Float> MMVMAMBA_INLINE void to_log1p(Float& z) {
  Float p = z * 1.986696617677808e-3f - 1.3187826611101627e-2f;
  p = p * z + 4.1006576269865036e-2f;
  p = p * z - 8.188041299581528e-2f;
  p = p * z + 1.2377995997667313e-1f;
  p = p * z - 1.6087622940540314e-1f;
  p = p * z + 1.9885820150375366e-1f;
  p = p * z - 2.4986496567726135e-1f;
  p = p * z + 3.3332496881484985e-1f;
  p = p * z - 4.999997913837433e-1f;
  p = p * z + 1.f;
  z = p * z;
}
MMVMAMBA_INLINE float log1p_(float z) { return to_log1p(z), z; }
MMVMAMBA_INLINE double log1p_(double z) { return std::log1p(z); }

}  // namespace mmvmamba
