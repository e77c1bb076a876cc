// Sums over the rows of a matrix, in float and in a fixed order, for the gradients of weights and biases; and their
// adjoint, a bias added to every row.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mmvmamba {

// Sums over the rows of `partial`, (rows, parts * columns) contiguous float: `parts` tensors of `columns` elements.
std::vector<at::Tensor> add_rows(const at::Tensor& partial, int64_t parts);

// Sum over all dimensions of `x` but the last, in float. Contiguous; the last dimension a multiple of 4.
at::Tensor column_sum(const at::Tensor& x);

// Add `bias` (columns) float to every row of `x`, in place. Contiguous; the last dimension a multiple of 4.
void add_bias_(const at::Tensor& x, const at::Tensor& bias);

}  // namespace mmvmamba
