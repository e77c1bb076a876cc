// From the number of a dt rank to a constant.
#pragma once

#include <type_traits>

namespace mmvmamba {
namespace ss2d {

// Call f(rank) with a compile-time number: 6 or 12, dt ranks up to those, or 0 for any.
template <typename F> auto with_rank(int rank, F f) {
  if (rank == 6) return f(std::integral_constant<int, 6>());
  if (rank == 12) return f(std::integral_constant<int, 12>());
  return f(std::integral_constant<int, 0>());
}

}  // namespace ss2d
}  // namespace mmvmamba
