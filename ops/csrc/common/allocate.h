// Memory from the allocator without the dispatcher on the way, which costs the host more than the allocation: a
// training step of a model allocates hundreds of tensors.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

namespace mmvmamba {

// Whether torch is asked to fill new memory with NaN, which at::empty does.
inline bool fills_memory() {
  const at::Context& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (fills_memory()) return at::empty(sizes, options);
  return at::Tensor(at::detail::empty_cuda(sizes, options));
}

inline at::Tensor allocate(at::IntArrayRef sizes, at::IntArrayRef strides, const at::TensorOptions& options) {
  if (fills_memory()) return at::empty_strided(sizes, strides, options);
  return at::Tensor(at::detail::empty_strided_cuda(sizes, strides, options));
}

// A contiguous tensor of the shape of `x`, and of its dtype.
inline at::Tensor allocate_like(const at::Tensor& x) { return allocate(x.sizes(), x.options()); }

}  // namespace mmvmamba
