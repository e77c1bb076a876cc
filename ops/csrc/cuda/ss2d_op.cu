// The fused SS2D core, mmvmamba::ss2d_scan and ss2d_scan_backward on CUDA (N = 1; cross2d, unidi, bidi).
//
// Forward: prepare parameters; one GEMM for the maps of all routes; for float with a dt rank above 12 a batched GEMM
// for u; then for each pair of routes the block carries (if an image has too many blocks to wait for) and the scan; both
// pairs at once if one block holds an image.
// Backward: the same maps, the scans' adjoint a pair, then dx += dmaps Wx, and weight sums by chunked GEMMs.

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "dense.h"
#include "ss2d_kernels.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using namespace ss2d;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a look-back chain wait for one another, so all must be resident at once, beside those of other streams.
// Blocks start in their order, and a processor holds at least one: chains of at most half the processors are safe.
int longest_look_back() { return std::min(32, at::cuda::getCurrentDeviceProperties()->multiProcessorCount / 2); }

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBfloat16;
    case at::kFloat: return Type::kFloat;
    default: TORCH_CHECK(false, "ss2d_scan: x is ", x.scalar_type(), ", expected float16, bfloat16 or float32");
  }
}

// Everything the two directions share: sizes, prepared parameters, the maps.
struct Problem {
  Type type;
  Args args{};
  Prepare prepare{};
  int dt_rank, rank;  // the op's R, and the kernels': 6, 12, or 0 for any
  int warps;          // segments of a block
  bool column_second;
  cudaStream_t stream;
  Tensor projection, dt_matrix, floats, fragment, operand;
  Tensor carries;     // of both pairs' blocks

  Problem(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias, const Tensor& A_logs,
          const Tensor& Ds, const std::string& scan_mode)
      : type(type_of(x)), stream(at::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK(A_logs.size(1) == 1, "ss2d_scan: the fused kernels take d_state N = 1, got ", A_logs.size(1));
    TORCH_CHECK(scan_mode == "cross2d" || scan_mode == "unidi" || scan_mode == "bidi", "ss2d_scan: scan_mode is '",
                scan_mode, "', expected cross2d, unidi or bidi");
    for (const Tensor* t : {&x_proj, &dt_proj, &dt_bias, &A_logs, &Ds}) {
      TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->is_cuda(),
                  "ss2d_scan: parameters must be contiguous float32 CUDA tensors");
    }
    dt_rank = dt_proj.size(2);
    rank = dt_rank <= 6 ? 6 : dt_rank <= 12 ? 12 : 0;
    args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
    args.padded = ceil_div(args.channels, 32) * 32, args.groups = args.padded / 32;
    args.map_columns = rank == 6 ? 8 : rank == 12 ? 16 : ceil_div(dt_rank + 2, 16) * 16;
    const int64_t length = x.size(2) * x.size(3);
    TORCH_CHECK(4 * length * std::max<int64_t>(args.padded, args.map_columns) < (1ll << 31),
                "ss2d_scan: an image of ", x.size(2), " x ", x.size(3), " with ", args.channels,
                " channels is too large for the fused kernels");
    args.length = length;
    args.segments = ceil_div(length, kSegment);
    args.second_reversed = scan_mode != "unidi";
    column_second = scan_mode == "cross2d" && args.height > 1 && args.width > 1;  // else both orders are one

    const auto options = x.options();
    projection = at::empty({4 * args.map_columns, args.channels}, options);
    floats = at::empty({(4 * std::max(rank, 1) + 9), args.padded}, options.dtype(at::kFloat));
    prepare.x_proj = x_proj.data_ptr<float>(), prepare.dt_proj = dt_proj.data_ptr<float>();
    prepare.dt_bias = dt_bias.data_ptr<float>(), prepare.A_logs = A_logs.data_ptr<float>();
    prepare.Ds = Ds.data_ptr<float>();
    prepare.projection = projection.data_ptr();
    if (type != Type::kFloat) {
      operand = at::empty({4, args.groups, 128 + 64 * args.map_columns}, options.dtype(at::kByte));
      prepare.dt_operand = operand.data_ptr();
    }
    if (rank > 0) {
      fragment = at::empty({4, args.map_columns, args.padded}, options);
      prepare.dt_fragment = fragment.data_ptr();
    } else {
      dt_matrix = at::empty({4, args.map_columns, args.channels}, options);
      prepare.dt_matrix = dt_matrix.data_ptr();
    }
    prepare.skip = floats.data_ptr<float>(), prepare.bias = prepare.skip + args.padded;
    prepare.A = prepare.bias + 4 * args.padded, prepare.dt_weight = prepare.A + 4 * args.padded;
    prepare.channels = args.channels, prepare.padded = args.padded, prepare.dt_rank = dt_rank;
    prepare.rank = rank, prepare.map_columns = args.map_columns;
    prepare.by_padded = Divisor(args.padded), prepare.by_columns = Divisor(args.map_columns);
    choose_chain();
    if (args.chaining != Chain::kNone) {
      carries = at::empty({2, args.batch * args.chain * 2 * args.padded * 2}, options.dtype(at::kFloat));
      prepare.carries = static_cast<uint2*>(carries.data_ptr());
      prepare.num_carries = args.chaining == Chain::kLookBack ? carries.numel() / 2 : 0;
    }
    launch_prepare(type, prepare, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    args.skip = prepare.skip, args.bias = prepare.bias, args.A = prepare.A, args.dt_weight = prepare.dt_weight;
    args.dt_fragment = prepare.dt_fragment, args.dt_operand = prepare.dt_operand;
  }

  void select_pair(int pair) {
    args.pair = pair;
    if (carries.defined()) args.block_carries = carries[pair].data_ptr();
    args.column_order = pair == 1 && column_second;
  }

  // Segments a block holds, as many as fit into its shared memory, evenly over the chain of blocks that an image is.
  void choose_chain() {
    const int most_bytes = static_cast<int>(at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin);
    args.chaining = Chain::kLookBack;  // which takes the most
    warps = max_warps(rank);
    while (warps > 1 && shared_bytes(type, rank, warps, args) > most_bytes) --warps;
    TORCH_CHECK(shared_bytes(type, rank, warps, args) <= most_bytes, "ss2d_scan: dt_projs_weight has rank ", dt_rank,
                ", too large for the fused kernels on this GPU; backend='naive' takes any");
    args.chain = ceil_div(args.segments, warps);
    args.chaining = args.chain == 1                     ? Chain::kNone
                    : args.chain <= longest_look_back() ? Chain::kLookBack
                                                        : Chain::kPrefix;
    warps = ceil_div(args.segments, args.chain);
    args.by_height = Divisor(args.height), args.by_chain = Divisor(args.chain), args.by_groups = Divisor(args.groups);
    args.by_warps = Divisor(warps), args.by_parts = Divisor(args.map_columns / 4);
  }

  // For rank 0 memory for du2, (batch * length, 4, channels), and for float u2 without bias in it, by a batched GEMM.
  Tensor make_u(const Tensor& maps) const {
    const int64_t pixels = args.batch * args.length;
    Tensor u = at::empty({pixels, 4, args.channels}, maps.options());
    if (type != Type::kFloat) return u;
    Tensor by_route = u.transpose(0, 1);
    at::bmm_out(by_route, maps.view({pixels, 4, args.map_columns}).transpose(0, 1), dt_matrix);
    return u;
  }
};

Tensor channel_last(const Tensor& x) { return dense(x.permute({0, 2, 3, 1})); }

std::tuple<Tensor, Tensor, Tensor> ss2d_forward(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                                                const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds,
                                                std::string scan_mode, at::ScalarType out_dtype, bool save) {
  const c10::cuda::CUDAGuard guard(x.device());
  Problem problem(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode);
  Args& args = problem.args;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor image = channel_last(x);
  const int64_t pixels = args.batch * args.length;
  Tensor maps = at::empty({pixels, 4 * args.map_columns}, options);
  at::mm_out(maps, image.view({pixels, args.channels}), problem.projection.t());
  Tensor u;
  if (problem.rank == 0 && problem.type == Type::kFloat) u = problem.make_u(maps);
  Tensor y = at::empty({args.batch, args.height, args.width, args.channels}, options.dtype(out_dtype));
  Tensor states = at::empty({save ? args.batch * args.segments * 4 * args.channels : 0}, options.dtype(at::kFloat));

  args.x = image.data_ptr(), args.maps = maps.data_ptr(), args.y = y.data_ptr();
  args.u = u.defined() ? u.data_ptr() : nullptr;
  args.states = save ? states.data_ptr<float>() : nullptr;
  args.float_output = out_dtype == at::kFloat;
  for (int pair = args.chaining == Chain::kNone; pair < 2; ++pair) {  // a block that is an image takes both pairs
    problem.select_pair(pair);
    if (args.chaining == Chain::kPrefix) {
      launch_forward_carries(problem.type, problem.rank, problem.warps, args, problem.stream);
      launch_combine(args, false, args.second_reversed, problem.stream);
    }
    launch_forward(problem.type, problem.rank, problem.warps, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {y.permute({0, 3, 1, 2}), maps, states};
}

// a^T b for tall matrices, in float: chunks of rows as a batch, then their sum, so that the GEMM fills the GPU.
Tensor tall_product(const Tensor& a, const Tensor& b, int64_t chunks) {
  const int64_t rows = a.size(0), length = rows / chunks, whole = length * chunks;
  Tensor sum;
  if (length > 0) {
    const Tensor left = a.narrow(0, 0, whole).view({chunks, length, a.size(1)}).transpose(1, 2);
    sum = at::bmm(left, b.narrow(0, 0, whole).view({chunks, length, b.size(1)})).sum(0, false, at::kFloat);
  }
  if (whole == rows) return sum;
  const Tensor rest =
      at::mm(a.narrow(0, whole, rows - whole).t(), b.narrow(0, whole, rows - whole)).to(at::kFloat);
  return sum.defined() ? sum.add_(rest) : rest;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ss2d_backward(
    const Tensor& dy_in, const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias,
    const Tensor& A_logs, const Tensor& Ds, const Tensor& maps, const Tensor& states, std::string scan_mode) {
  const c10::cuda::CUDAGuard guard(x.device());
  Problem problem(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode);
  Args& args = problem.args;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const auto float_options = options.dtype(at::kFloat);
  const Tensor image = channel_last(x), dy = channel_last(dy_in.to(x.scalar_type()));
  const int64_t pixels = args.batch * args.length;
  TORCH_CHECK(states.numel() == args.batch * args.segments * 4 * args.channels,
              "ss2d_scan_backward: the forward was run without saving its states");
  const bool fused = problem.rank > 0;
  Tensor u;
  if (!fused) u = problem.make_u(maps);

  const int64_t blocks = args.batch * args.chain;
  const int64_t most = std::min<int64_t>(args.groups, ceil_div(1056, blocks));  // splits: 8 blocks a processor do
  args.splits = fused ? 1 : ceil_div(args.groups, ceil_div(args.groups, most));
  args.by_splits = Divisor(args.splits);
  Tensor dmaps = at::empty({pixels, 4 * args.map_columns}, options);
  Tensor parts = at::empty({fused ? 0 : args.splits * pixels * 8}, float_options);
  Tensor dx = at::empty({pixels, args.channels}, options);
  Tensor partial = at::empty({2, blocks * args.groups * partial_size(problem.rank)}, float_options);
  args.x = image.data_ptr(), args.dy = dy.data_ptr(), args.maps = maps.data_ptr(), args.y = dx.data_ptr();
  args.u = fused ? nullptr : u.data_ptr();
  args.states = states.data_ptr<float>();
  args.dmaps = dmaps.data_ptr(), args.dmaps_part = parts.data_ptr<float>();
  for (int pair = 0; pair < 2; ++pair) {
    problem.select_pair(pair);
    args.partial = partial[pair].data_ptr<float>();
    if (args.chaining == Chain::kPrefix) {
      launch_backward_carries(problem.type, problem.rank, problem.warps, args, problem.stream);
      launch_combine(args, true, !args.second_reversed, problem.stream);
    }
    launch_backward(problem.type, problem.rank, problem.warps, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  Tensor ddt_matrix;
  if (!fused) {
    // du2 lies in u. Its products with the block-diagonal dt projection, one well-shaped GEMM each.
    const Tensor du = u.view({pixels, 4 * args.channels});
    Tensor by_route = dmaps.view({pixels, 4, args.map_columns}).transpose(0, 1);
    at::bmm_out(by_route, u.transpose(0, 1), problem.dt_matrix.transpose(1, 2));
    launch_add_parts(problem.type, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    ddt_matrix = tall_product(maps, du, std::min<int64_t>(8, ceil_div(pixels, 256)));
  }
  const Tensor dprojection =
      tall_product(dmaps, image.view({pixels, args.channels}), std::min<int64_t>(128, ceil_div(pixels, 256)));
  dx.addmm_(dmaps, problem.projection);

  Tensor dx_proj = at::empty_like(x_proj), ddt_proj = at::empty_like(dt_proj), ddt_bias = at::empty_like(dt_bias);
  Tensor dA_logs = at::empty_like(A_logs), dDs = at::empty_like(Ds);
  Finish finish{};
  finish.partial[0] = partial[0].data_ptr<float>(), finish.partial[1] = partial[1].data_ptr<float>();
  finish.dprojection = dprojection.data_ptr<float>();
  finish.ddt_matrix = fused ? nullptr : ddt_matrix.data_ptr<float>();
  finish.A = args.A;
  finish.dx_proj = dx_proj.data_ptr<float>(), finish.ddt_proj = ddt_proj.data_ptr<float>();
  finish.ddt_bias = ddt_bias.data_ptr<float>(), finish.dA_logs = dA_logs.data_ptr<float>();
  finish.dDs = dDs.data_ptr<float>();
  finish.blocks = blocks, finish.channels = args.channels, finish.padded = args.padded, finish.groups = args.groups;
  finish.dt_rank = problem.dt_rank, finish.rank = problem.rank, finish.map_columns = args.map_columns;
  launch_finish(finish, problem.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx.view({args.batch, args.height, args.width, args.channels}).permute({0, 3, 1, 2}), dx_proj, ddt_proj,
          ddt_bias, dA_logs, dDs};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("ss2d_scan", &mmvmamba::ss2d_forward);
  m.impl("ss2d_scan_backward", &mmvmamba::ss2d_backward);
}
