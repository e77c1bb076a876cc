// The launches of the forward kernels of an element type.
#pragma once

#include "ss2d/states/forward.cuh"
#include "ss2d/states/launch.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

template <typename T> void Kernels<T>::run_forward(int states, const Args& args, cudaStream_t stream) {
  with_states(states, [&](auto n) { launch_scan<T, ForwardKernel<T, decltype(n)::value>>(states, args, stream); });
}

template <typename T> void Kernels<T>::run_forward_carries(int states, const Args& args, cudaStream_t stream) {
  with_states(states, [&](auto n) {
    launch_scan<T, CarriesKernel<T, decltype(n)::value>>(states, args, stream);
    launch_combine<decltype(n)::value>(args, false, args.second_reversed, stream);
  });
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba
