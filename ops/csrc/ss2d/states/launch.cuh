// Launches of the fused SS2D kernels for N = 2 to 16 states a channel.
#pragma once

#include <type_traits>

#include "ss2d/states/forward.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

// Call f(N) with a compile-time number, one of kStates.
template <typename F> void with_states(int states, F f) {
  switch (states) {
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    case 8: return f(std::integral_constant<int, 8>());
    default: return f(std::integral_constant<int, 16>());
  }
}

// A scan of two warps a block.
template <typename T, typename Kernel> void launch_scan(int states, const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.groups * args.chain;
  launch<Kernel>(blocks, 64, forward_bytes(states, sizeof(T), args.float_output ? 4 : sizeof(T)), stream, args);
}

template <int N>
void launch_combine(const Args& args, bool first_reversed, bool second_reversed, cudaStream_t stream) {
  launch<CombineKernel<N>>(args.batch * args.groups, 32, 0, stream, args, first_reversed, second_reversed);
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba
