// The launches of the backward kernels of an element type.
#pragma once

#include "ss2d/states/backward.cuh"
#include "ss2d/states/backward_carries.cuh"
#include "ss2d/states/launch.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

template <typename T> void BackwardKernels<T>::run_backward(int states, const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.splits * args.chain;
  const int bytes = backward_bytes(states, sizeof(T), args.block_groups);
  with_states(states, [&](auto n) {
    launch<BackwardKernel<T, decltype(n)::value>>(blocks, 64 * args.block_groups, bytes, stream, args);
  });
}

template <typename T>
void BackwardKernels<T>::run_backward_carries(int states, const Args& args, cudaStream_t stream) {
  with_states(states, [&](auto n) {
    launch_scan<T, BackwardCarriesKernel<T, decltype(n)::value>>(states, args, stream);
    launch_combine<decltype(n)::value>(args, true, !args.second_reversed, stream);
  });
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba
