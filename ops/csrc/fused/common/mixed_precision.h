// What mixed precision asks of a layer: weights in the dtype of its input, gradients in that of the weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace mmvmamba {

constexpr size_t kMostCasts = 4, kNoneTransposed = kMostCasts;

// `tensors`, at most 4 of one dtype, cast to another by one launch; contiguous, from multiples of 16 bytes on, and the
// matrix number `transposed`, if there is one, transposed. Of tensors that have the dtype already only those are copied
// that are not laid out so.
std::vector<at::Tensor> cast(std::vector<at::Tensor> tensors, at::ScalarType dtype,
                             size_t transposed = kNoneTransposed);

// A convolution's weight (C_out, C_in, k, k) in another dtype and layout, by one launch.
at::Tensor cast_layout(const at::Tensor& weight, at::ScalarType dtype, at::MemoryFormat layout);

// The product a b in `type`: that of a, or float32, in which case torch 2.8 and later do not round it in between.
at::Tensor product_as(at::ScalarType type, const at::Tensor& a, const at::Tensor& b);

// The shape of `x` with another last dimension.
std::vector<int64_t> with_last(const at::Tensor& x, int64_t size);

}  // namespace mmvmamba
