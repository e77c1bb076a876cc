// Sums over the rows of a matrix, in float and in a fixed order, for the gradients of weights and biases; and their
// adjoint, a bias added to every row.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mmvmamba {

// Columns of a contiguous float matrix, the partial sums that the blocks of a kernel left.
struct Columns {
  at::Tensor partial;
  int64_t first, count;
};

// The sums over rows of up to four of them, each a tensor of `count` elements, by one kernel.
std::vector<at::Tensor> add_rows(const std::vector<Columns>& addends);

// All columns of the partial sums of `x` over all its dimensions but the last. Contiguous; the last dimension a
// multiple of 4.
Columns partial_column_sum(const at::Tensor& x);

// Those sums themselves, in float.
at::Tensor column_sum(const at::Tensor& x);

// Add `bias` (columns) float to every row of `x`, in place. Contiguous; the last dimension a multiple of 4.
void add_bias_(const at::Tensor& x, const at::Tensor& bias);

}  // namespace mmvmamba
