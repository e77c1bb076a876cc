// Division by a constant of a launch, of numbers below 2^31, as a multiplication: ATen's, whose header needs no others.
#pragma once

// clang-format off: the second needs the first
#include <c10/macros/Macros.h>
#include <ATen/cuda/detail/IntegerDivider.cuh>
// clang-format on

#include <cstdint>

namespace mmvmamba {

using Divisor = at::cuda::detail::IntDivider<uint32_t>;

}  // namespace mmvmamba
