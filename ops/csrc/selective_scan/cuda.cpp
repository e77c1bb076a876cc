// mmvmamba::selective_scan and its backward on CUDA: checks, allocation and how the work is divided.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "common/allocate.h"
#include "common/ceil_div.h"
#include "common/constants.h"
#include "common/dtypes.h"
#include "common/type_of.h"
#include "selective_scan/arguments.h"
#include "selective_scan/kernels.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using namespace scan;

constexpr int kForwardTurns = 4, kBackwardTurns = 6;  // measured on an H200: more share B and C, and dB and dC

// The widest access, in bytes, that every row of these tensors allows (16, 8 or one element).
int vector_width(std::initializer_list<const Tensor*> tensors, int64_t row_bytes) {
  uintptr_t bits = row_bytes;
  for (const Tensor* tensor : tensors) bits |= reinterpret_cast<uintptr_t>(tensor->data_ptr());
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 1;
}

const float* pointer_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// Contiguous inputs, and the arguments that both directions share.
struct Problem {
  Tensor u, delta, A, B, C;
  OptionalTensor D, bias;
  Type type;
  Args args{};
  cudaStream_t stream;

  Problem(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
          const OptionalTensor& D_, const OptionalTensor& bias_, bool softplus, at::ScalarType out_dtype)
      : u(u_.contiguous()),
        delta(delta_.contiguous()),
        A(A_.contiguous()),
        B(B_.contiguous()),
        C(C_.contiguous()),
        D(contiguous(D_)),
        bias(contiguous(bias_)),
        type(type_of("selective_scan", u.scalar_type())),
        stream(at::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK(u.size(2) <= std::numeric_limits<int>::max() - kChunk, "selective_scan: u has ", u.size(2),
                " steps, which is too long for the CUDA kernels");
    args.u = u.const_data_ptr(), args.delta = delta.const_data_ptr(), args.A = A.const_data_ptr<float>();
    args.B = B.const_data_ptr(), args.C = C.const_data_ptr();
    args.D = pointer_or_null(D), args.bias = pointer_or_null(bias);
    args.groups = B.size(1), args.channels = u.size(1) / B.size(1), args.pairs = u.size(0) * B.size(1);
    args.d_state = A.size(1), args.length = u.size(2), args.chunks = ceil_div(args.length, kChunk);
    args.softplus = softplus, args.float_out = out_dtype == at::kFloat && u.scalar_type() != at::kFloat;
  }

  // Blocks of `limit` turns, or fewer where that would leave multiprocessors without work.
  void divide(int limit) {
    const int64_t wanted = 4 * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    const auto blocks = [&](int64_t warps, int64_t turns) {
      return args.pairs * ceil_div(args.channels, warps * turns * slots(args));
    };
    int64_t warps = std::min<int64_t>(kMaxWarps, ceil_div(args.channels, slots(args)));
    int64_t turns = std::min<int64_t>(limit, ceil_div(args.channels, warps * slots(args)));
    while (turns > 1 && blocks(warps, turns) < wanted) --turns;
    while (warps > 1 && blocks(warps, turns) < wanted / 2) warps = ceil_div(warps, 2);
    args.splits = ceil_div(args.channels, warps * turns * slots(args));
    args.warps = warps;
    args.turns = ceil_div(args.channels, args.splits * warps * slots(args));  // evenly
    TORCH_CHECK(args.pairs * args.splits <= std::numeric_limits<int>::max(), "selective_scan: too large a batch");
  }
};

std::tuple<Tensor, Tensor> selective_scan_forward(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& bias, bool softplus, bool float_output,
                                                  const OptionalTensor& z, const OptionalTensor& initial_state) {
  check_supported(u, delta, z, initial_state);
  const c10::cuda::CUDAGuard guard(u.device());
  const at::ScalarType out_dtype = output_dtype(u, float_output);
  Problem problem(u, delta, A, B, C, D, bias, softplus, out_dtype);
  Args& args = problem.args;
  Tensor out = allocate(u.sizes(), problem.u.options().dtype(out_dtype));
  Tensor states = allocate({u.size(0), u.size(1), args.chunks + 1, args.d_state}, problem.A.options());
  args.out = out.data_ptr(), args.states = states.data_ptr<float>();
  args.vector = vector_width({&problem.u, &problem.delta, &problem.B, &problem.C, &out}, u.size(2) * u.element_size());
  args.float_vector = vector_width({&out}, u.size(2) * sizeof(float));
  problem.divide(args.d_state == 1 ? kForwardTurns : 1);
  launch_forward(problem.type, args, problem.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& dout_, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptionalTensor& D, const OptionalTensor& bias, const Tensor& states_, bool softplus) {
  const c10::cuda::CUDAGuard guard(u.device());
  Problem problem(u, delta, A, B, C, D, bias, softplus, dout_.scalar_type());
  Args& args = problem.args;
  const Tensor dout = dout_.contiguous(), states = states_.contiguous();
  Tensor du = allocate(u.sizes(), problem.u.options()), ddelta = allocate(u.sizes(), problem.u.options());
  Tensor dB = allocate(B.sizes(), problem.B.options()), dC = allocate(C.sizes(), problem.C.options());
  const auto options = problem.A.options();
  Tensor dA = allocate({u.size(0), u.size(1), args.d_state}, options);
  Tensor sums = allocate({2, u.size(0), u.size(1)}, options);
  args.dout = dout.const_data_ptr(), args.states = states.data_ptr<float>();
  args.du = du.data_ptr(), args.ddelta = ddelta.data_ptr(), args.dA = dA.data_ptr<float>();
  args.dD = sums.data_ptr<float>(), args.dbias = args.dD + u.size(0) * u.size(1);
  const int64_t row = u.size(2) * u.element_size();
  args.vector = vector_width({&problem.u, &problem.delta, &problem.B, &problem.C, &du, &ddelta, &dout}, row);
  args.float_vector = vector_width({&dout}, u.size(2) * sizeof(float));
  problem.divide(args.d_state == 1 ? kBackwardTurns : 2);
  Tensor partial = allocate({args.splits, 2, args.pairs, args.d_state, u.size(2)}, options);
  args.partial = partial.data_ptr<float>();
  launch_backward(problem.type, args, problem.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  launch_add_partial(problem.type, args, dB.data_ptr(), dC.data_ptr(), problem.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor over_batch = sums.sum(1), none = allocate({0}, options);
  return {du, ddelta, dA.sum(0), dB, dC, D ? over_batch[0].clone() : none, bias ? over_batch[1].clone() : none};
}

const AddConstants add_chunk({{"selective_scan.cuda.chunk", {kChunk}}});

}  // namespace

namespace scan {

void launch_forward(Type type, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Kernels<decltype(t)>::forward(args, stream); });
}
void launch_backward(Type type, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Kernels<decltype(t)>::backward(args, stream); });
}
void launch_add_partial(Type type, const Args& args, void* dB, void* dC, cudaStream_t stream) {
  with_type(type, [&](auto t) { Kernels<decltype(t)>::add_partial(args, dB, dC, stream); });
}

}  // namespace scan
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("selective_scan", &mmvmamba::selective_scan_forward);
  m.impl("selective_scan_backward", &mmvmamba::selective_scan_backward);
}
