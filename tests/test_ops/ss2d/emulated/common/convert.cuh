#pragma once

namespace mmvmamba {
inline float widen(float value) { return value; }
template <typename T> T narrow(float value) { return value; }
}  // namespace mmvmamba
