#pragma once

#include <cstdint>
#include <cstdlib>

namespace mmvmamba {
inline void check_alignment(const void* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % 16) std::abort();
}
template <int Width> void load(const float* from, float (&v)[Width]) {
  check_alignment(from);
  for (int i = 0; i < Width; ++i) v[i] = from[i];
}
template <int Width> void store(float* to, const float (&v)[Width]) {
  check_alignment(to);
  for (int i = 0; i < Width; ++i) to[i] = v[i];
}
}  // namespace mmvmamba
