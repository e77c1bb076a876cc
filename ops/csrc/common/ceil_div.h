// Division of positive integers, rounded up.
#pragma once

#include <type_traits>

namespace mmvmamba {

template <typename A, typename B> constexpr std::common_type_t<A, B> ceil_div(A a, B b) { return (a + b - 1) / b; }

}  // namespace mmvmamba
