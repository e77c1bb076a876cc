// Launches of the small kernels, and of the scans, which lie in files of a type and a direction.
#include "common/ceil_div.h"
#include "ss2d/states/launch.cuh"
#include "ss2d/states/parameters.cuh"

namespace mmvmamba {
namespace ss2d {
namespace states {

void launch_prepare(Type type, const Prepare& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(int64_t{4} * args.columns * args.padded, kThreads);
  with_type(type, [&](auto t) { launch<PrepareKernel<decltype(t)>>(blocks, kThreads, 0, stream, args); });
}

void launch_finish(Type type, const Finish& args, cudaStream_t stream) {
  with_type(type, [&](auto t) {
    using Kernel = FinishKernel<decltype(t)>;
    launch<Kernel>(ceil_div(Kernel::threads(args), kThreads), kThreads, 0, stream, args);
  });
}

void launch_add_parts(Type type, int states, const Args& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.batch * args.length * 4 * (args.columns - args.dt_columns), kThreads);
  with_type(type, [&](auto t) {
    with_states(states, [&](auto n) {
      launch<AddPartsKernel<decltype(t), decltype(n)::value>>(blocks, kThreads, 0, stream, args);
    });
  });
}

void launch_forward(Type type, int states, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Kernels<decltype(t)>::run_forward(states, args, stream); });
}
void launch_forward_carries(Type type, int states, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Kernels<decltype(t)>::run_forward_carries(states, args, stream); });
}
void launch_backward(Type type, int states, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { BackwardKernels<decltype(t)>::run_backward(states, args, stream); });
}
void launch_backward_carries(Type type, int states, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { BackwardKernels<decltype(t)>::run_backward_carries(states, args, stream); });
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba
