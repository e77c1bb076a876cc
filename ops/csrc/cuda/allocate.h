// Memory from the allocator without the dispatcher on the way, which costs the host more than the allocation: a training
// step of a model allocates hundreds of tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>

namespace mmvmamba {

inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::Tensor(at::detail::empty_cuda(sizes, options));
}

inline at::Tensor allocate(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  return at::Tensor(at::detail::empty_strided_cuda(sizes, strides, options));
}

// A contiguous tensor of the shape of `x`, and of its dtype.
inline at::Tensor allocate_like(const at::Tensor& x) { return allocate(x.sizes(), x.options()); }

}  // namespace mmvmamba
