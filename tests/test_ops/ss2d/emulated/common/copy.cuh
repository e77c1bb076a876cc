#pragma once

#include <cstring>

namespace mmvmamba {

// Either at once or when the thread waits, as the seed says.
template <int Bytes> void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<std::uintptr_t>(to) % Bytes || reinterpret_cast<std::uintptr_t>(from) % Bytes) std::abort();
  emulated::Block::now()->copy([=] { valid ? std::memcpy(to, from, Bytes) : std::memset(to, 0, Bytes); });
}
inline void wait_for_copies() { emulated::Block::now()->finish_copies(); }

}  // namespace mmvmamba
