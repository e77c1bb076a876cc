// What the kernels with wide loads need of a tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace mmvmamba {

// `x`, or a copy of it that is contiguous and begins at a multiple of 16 bytes.
inline at::Tensor dense(const at::Tensor& x) {
  const at::Tensor contiguous = x.contiguous();
  return reinterpret_cast<std::uintptr_t>(contiguous.data_ptr()) % 16 ? contiguous.clone() : contiguous;
}

}  // namespace mmvmamba
