#pragma once

#include <cuda_runtime.h>

namespace mmvmamba {
template <typename T> T* shared_memory() { return reinterpret_cast<T*>(emulated::Block::now()->memory.data()); }
}  // namespace mmvmamba
