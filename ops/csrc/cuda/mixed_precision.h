// What mixed precision asks of a layer: its weights in the dtype of its input, and their gradients in that of the weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace mmvmamba {

constexpr size_t kMostCasts = 4, kNoneTransposed = kMostCasts;

// `tensors`, at most 4 of one dtype, in another, by one launch; contiguous, and the matrix number `transposed`, if there is
// one, transposed. Those that are so already are returned.
std::vector<at::Tensor> cast(std::vector<at::Tensor> tensors, at::ScalarType dtype, size_t transposed = kNoneTransposed);

// A convolution's weight (C_out, C_in, k, k) in another dtype and layout, by one launch.
at::Tensor cast_layout(const at::Tensor& weight, at::ScalarType dtype, at::MemoryFormat layout);

// The product a b in `type`: that of a, or float32, in which case it is not rounded in between.
at::Tensor product_as(at::ScalarType type, const at::Tensor& a, const at::Tensor& b);

// The shape of `x` with another last dimension.
std::vector<int64_t> with_last(const at::Tensor& x, int64_t size);

}  // namespace mmvmamba
