// The fused SS2D core, mmvmamba::ss2d_scan and ss2d_scan_backward on CUDA (cross2d, unidi, bidi), for N = 1; several
// states a channel are those of states/core.h.
//
// Forward: prepare parameters; one GEMM for the projections of all routes; for float with a dt rank above 12 a batched
// GEMM for u; then for each pair of routes the block carries (if an image has too many blocks to wait for) and the
// scan; both pairs at once if one block holds an image. Backward: the same projections, the scans' adjoint a pair, then
// dx += dprojections Wx, weight sums by chunked GEMMs, and one kernel that adds the chunks' and the blocks' sums.
//
// To spare the host: what only the kernels here read is one allocation, as_strided stands for chains of narrow, view
// and transpose, and the calls go past autograd.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "common/allocate.h"
#include "common/ceil_div.h"
#include "common/dtypes.h"
#include "common/routes.h"
#include "common/type_of.h"
#include "ss2d/kernels.h"
#include "ss2d/products.h"
#include "ss2d/states/core.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using namespace ss2d;

// Blocks of a look-back chain wait for one another, so all must be resident at once, beside those of other streams.
// Blocks start in their order, and a processor holds at least one: chains of at most half the processors are safe.
int longest_look_back() { return std::min(32, at::cuda::getCurrentDeviceProperties()->multiProcessorCount / 2); }

// Everything the two directions share: sizes, prepared parameters, the projections.
struct Problem {
  Type type;
  Args args{};
  Prepare prepare{};
  int dt_rank, rank;  // the op's R, and the kernels': 6, 12, or 0 for any
  int warps;          // segments of a block
  bool column_second;
  cudaStream_t stream;
  int64_t pixels, blocks;        // of all images
  int64_t carries;               // of a pair's blocks
  Tensor projection, dt_matrix;  // what GEMMs read
  Tensor workspace;              // what only the kernels here read, all of it, because every allocation costs the host
  float *partial, *dprojections_part;  // in it, of backward

  Problem(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias, const Tensor& A_logs,
          const Tensor& Ds, int64_t scan_mode, bool backward)
      : type(type_of("ss2d_scan", x.scalar_type())), stream(at::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK(x.numel() > 0, "ss2d_scan: x is empty, of shape ", x.sizes());
    TORCH_CHECK(A_logs.size(1) == 1, "ss2d_scan: the fused kernels take d_state N = 1, got ", A_logs.size(1));
    TORCH_CHECK(is_scan_mode(scan_mode) && comes_in_pairs(kScanModes[scan_mode].routes), "ss2d_scan: scan_mode is ",
                scan_mode, ", expected 0 (cross2d), 1 (unidi) or 2 (bidi)");
    const Routes& routes = kScanModes[scan_mode].routes;
    for (const Tensor* t : {&x_proj, &dt_proj, &dt_bias, &A_logs, &Ds}) {
      TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->is_cuda(),
                  "ss2d_scan: parameters must be contiguous float32 CUDA tensors");
    }
    dt_rank = dt_proj.size(2);
    rank = dt_rank <= kRanks[0] ? kRanks[0] : dt_rank <= kRanks[1] ? kRanks[1] : 0;
    args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
    args.padded = ceil_div(args.channels, kGroup) * kGroup, args.groups = args.padded / kGroup;
    args.projection_columns = rank == kRanks[0]   ? kRankColumns[0]
                              : rank == kRanks[1] ? kRankColumns[1]
                                                  : ceil_div(dt_rank + 2, kColumnStep) * kColumnStep;
    const int64_t length = x.size(2) * x.size(3);
    TORCH_CHECK(4 * length * std::max<int64_t>(args.padded, args.projection_columns) < (1ll << 31),
                "ss2d_scan: an image of ", x.size(2), " x ", x.size(3), " with ", args.channels,
                " channels is too large for the fused kernels");
    args.length = length;
    args.segments = ceil_div(length, kSegment);
    args.second_reversed = second_is_reversed(routes);
    column_second = second_is_by_column(routes) && args.height > 1 && args.width > 1;  // else both orders are one

    choose_chain(backward);
    pixels = args.batch * length, blocks = args.batch * args.chain;
    const int64_t most = std::min<int64_t>(args.groups, ceil_div(1056, blocks));  // splits: 8 blocks a processor do
    args.splits = rank > 0 ? 1 : ceil_div(args.groups, ceil_div(args.groups, most));
    args.by_splits = Divisor(args.splits);

    prepare.x_proj = x_proj.data_ptr<float>(), prepare.dt_proj = dt_proj.data_ptr<float>();
    prepare.dt_bias = dt_bias.data_ptr<float>(), prepare.A_logs = A_logs.data_ptr<float>();
    prepare.Ds = Ds.data_ptr<float>();
    prepare.channels = args.channels, prepare.padded = args.padded, prepare.dt_rank = dt_rank;
    prepare.rank = rank, prepare.projection_columns = args.projection_columns;
    prepare.by_padded = Divisor(args.padded), prepare.by_columns = Divisor(args.projection_columns);
    projection = allocate({4 * args.projection_columns, args.channels}, x.options());
    prepare.weight = projection.data_ptr();
    if (rank == 0) {
      dt_matrix = allocate({4, args.projection_columns, args.channels}, x.options());
      prepare.dt_matrix = dt_matrix.data_ptr();
    }
    lay_out(x.options(), backward);
    launch_prepare(type, prepare, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    args.skip = prepare.skip, args.bias = prepare.bias, args.A = prepare.A, args.dt_weight = prepare.dt_weight;
    args.dt_fragment = prepare.dt_fragment, args.dt_operand = prepare.dt_operand;
  }

  // Lay out the workspace.
  void lay_out(const at::TensorOptions& options, bool backward) {
    int64_t size = 0;
    const auto reserve = [&size](bool needed, int64_t bytes) {
      const int64_t at = size;
      if (needed) size += ceil_div(bytes, 256) * 256;
      return at;
    };
    const bool fused = rank > 0, chained = args.chaining != Chain::kNone, tensor_cores = type != Type::kFloat;
    carries = blocks * 2 * args.padded;
    const int64_t floats_at = reserve(true, (4 * std::max(rank, 1) + 9) * args.padded * sizeof(float));
    const int64_t operand_at = reserve(tensor_cores, int64_t{4} * args.groups * (128 + 64 * args.projection_columns));
    const int64_t fragment_at = reserve(fused, 4 * args.projection_columns * args.padded * options.dtype().itemsize());
    const int64_t carries_at = reserve(chained, 2 * carries * sizeof(uint2));
    const int64_t partial_at = reserve(backward, 2 * blocks * args.groups * partial_size(rank) * sizeof(float));
    const int64_t part_at = reserve(backward && !fused, args.splits * pixels * 8 * sizeof(float));
    workspace = allocate({size}, options.dtype(at::kByte));
    char* base = static_cast<char*>(workspace.data_ptr());

    prepare.skip = reinterpret_cast<float*>(base + floats_at), prepare.bias = prepare.skip + args.padded;
    prepare.A = prepare.bias + 4 * args.padded, prepare.dt_weight = prepare.A + 4 * args.padded;
    if (tensor_cores) prepare.dt_operand = base + operand_at;
    if (fused) prepare.dt_fragment = base + fragment_at;
    if (chained) prepare.carries = reinterpret_cast<uint2*>(base + carries_at);
    prepare.num_carries = args.chaining == Chain::kLookBack ? 2 * carries : 0;
    partial = reinterpret_cast<float*>(base + partial_at), dprojections_part = reinterpret_cast<float*>(base + part_at);
  }

  void select_pair(int pair) {
    args.pair = pair;
    if (prepare.carries != nullptr) args.block_carries = prepare.carries + pair * carries;
    args.partial = partial + pair * blocks * args.groups * partial_size(rank);
    args.column_order = pair == 1 && column_second;
  }

  // Segments a block holds: of the forward those of an image if they fit (many of them so that two blocks run beside
  // one another), else as many as fit into its shared memory, evenly over the chain of blocks that an image is.
  void choose_chain(bool backward) {
    const auto* device = at::cuda::getCurrentDeviceProperties();
    const auto fits = [&](int64_t bytes) { return shared_bytes(type, rank, warps, backward, args) <= bytes; };
    const int64_t of_block = device->sharedMemPerBlockOptin;
    const int64_t of_two = device->sharedMemPerMultiprocessor / 2 - device->reservedSharedMemPerBlock;
    args.chaining = Chain::kNone, args.chain = 1, warps = args.segments;
    if (backward || warps > kMaxImageWarps || !fits(warps > kMaxWarps ? std::min(of_block, of_two) : of_block)) {
      args.chaining = Chain::kLookBack;  // which takes the most
      warps = max_warps(rank);
      while (warps > 1 && !fits(of_block)) --warps;
      TORCH_CHECK(fits(of_block), "ss2d_scan: dt_projs_weight has rank ", dt_rank,
                  ", too large for the fused kernels on this GPU; backend='naive' takes any");
      args.chain = ceil_div(args.segments, warps);
      args.chaining = args.chain == 1 && backward         ? Chain::kNone
                      : args.chain <= longest_look_back() ? Chain::kLookBack
                                                          : Chain::kPrefix;
      warps = ceil_div(args.segments, args.chain);
    }
    args.by_height = Divisor(args.height), args.by_chain = Divisor(args.chain), args.by_groups = Divisor(args.groups);
    args.by_warps = Divisor(warps), args.by_parts = Divisor(args.projection_columns / 4);
  }

  // For rank 0 memory for du2, (batch * length, 4, channels) as a batch of routes, and for float u2 without bias in it,
  // by a batched GEMM.
  Tensor make_u(const Tensor& projections) const {
    Tensor u = allocate({4, pixels, args.channels}, {args.channels, 4 * args.channels, 1}, projections.options());
    if (type == Type::kFloat) at::bmm_out(u, by_route(projections), dt_matrix);
    return u;
  }
  Tensor by_route(const Tensor& projections) const {
    return projections.as_strided({4, pixels, args.projection_columns},
                                  {args.projection_columns, 4 * args.projection_columns, 1});
  }
  // A map with channels last as a matrix.
  Tensor rows(const Tensor& map) const { return map.as_strided({pixels, args.channels}, {args.channels, 1}); }
};

std::tuple<Tensor, Tensor, Tensor> ss2d_forward(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                                                const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds,
                                                int64_t scan_mode, bool float_output, bool save,
                                                const std::optional<Tensor>& z) {
  check_absent("ss2d_scan", "z", z);
  if (A_logs.size(1) > 1) {
    return ss2d::states::forward(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode, float_output, save);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Problem problem(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode, false);
  Args& args = problem.args;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor image = channel_last(x);
  Tensor projections = allocate({problem.pixels, 4 * args.projection_columns}, options);
  at::mm_out(projections, problem.rows(image),
             problem.projection.as_strided({args.channels, 4 * args.projection_columns}, {1, args.channels}));
  Tensor u;
  if (problem.rank == 0 && problem.type == Type::kFloat) u = problem.make_u(projections);
  Tensor y =
      allocate(x.sizes(), options.dtype(output_dtype(x, float_output)).memory_format(at::MemoryFormat::ChannelsLast));
  Tensor states = allocate({save ? args.batch * args.segments * 4 * args.channels : 0}, options.dtype(at::kFloat));

  args.x = image.data_ptr(), args.projections = projections.data_ptr(), args.y = y.data_ptr();
  args.u = u.defined() ? u.data_ptr() : nullptr;
  args.states = save ? states.data_ptr<float>() : nullptr;
  args.float_output = y.scalar_type() == at::kFloat;
  for (int pair = args.chaining == Chain::kNone; pair < 2; ++pair) {  // a block that is an image takes both pairs
    problem.select_pair(pair);
    if (args.chaining == Chain::kPrefix) {
      launch_forward_carries(problem.type, problem.rank, problem.warps, args, problem.stream);
      launch_combine(args, false, args.second_reversed, problem.stream);
    }
    launch_forward(problem.type, problem.rank, problem.warps, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {y, projections, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ss2d_backward(const Tensor& dy_in, const Tensor& x,
                                                                         const Tensor& x_proj, const Tensor& dt_proj,
                                                                         const Tensor& dt_bias, const Tensor& A_logs,
                                                                         const Tensor& Ds, const Tensor& projections,
                                                                         const Tensor& states, int64_t scan_mode) {
  if (A_logs.size(1) > 1) {
    return ss2d::states::backward(dy_in, x, x_proj, dt_proj, dt_bias, A_logs, Ds, projections, states, scan_mode);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Problem problem(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode, true);
  Args& args = problem.args;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor image = channel_last(x);
  const Tensor dy = channel_last(dy_in.scalar_type() == x.scalar_type() ? dy_in : dy_in.to(x.scalar_type()));
  TORCH_CHECK(states.numel() == args.batch * args.segments * 4 * args.channels,
              "ss2d_scan_backward: the forward was run without saving its states");
  const bool fused = problem.rank > 0;
  Tensor u;
  if (!fused) u = problem.make_u(projections);

  Tensor dprojections = allocate({problem.pixels, 4 * args.projection_columns}, options);
  Tensor dx = allocate(x.sizes(), options.memory_format(at::MemoryFormat::ChannelsLast));
  args.x = image.data_ptr(), args.dy = dy.data_ptr(), args.projections = projections.data_ptr(), args.y = dx.data_ptr();
  args.u = fused ? nullptr : u.data_ptr();
  args.states = states.data_ptr<float>();
  args.dprojections = dprojections.data_ptr(), args.dprojections_part = problem.dprojections_part;
  for (int pair = 0; pair < 2; ++pair) {
    problem.select_pair(pair);
    if (args.chaining == Chain::kPrefix) {
      launch_backward_carries(problem.type, problem.rank, problem.warps, args, problem.stream);
      launch_combine(args, true, !args.second_reversed, problem.stream);
    }
    launch_backward(problem.type, problem.rank, problem.warps, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const int64_t chunks = ceil_div(problem.pixels, 256);
  Tensor ddt_matrix;
  if (!fused) {
    // du2 lies in u. Its products with the block-diagonal dt projection, one well-shaped GEMM each.
    Tensor by_route = problem.by_route(dprojections);
    const int64_t columns = args.projection_columns, channels = args.channels;
    at::bmm_out(by_route, u, problem.dt_matrix.as_strided({4, channels, columns}, {columns * channels, 1, channels}));
    launch_add_parts(problem.type, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    ddt_matrix = tall_product(projections, 4 * args.projection_columns, u, 4 * args.channels, problem.pixels,
                              std::min<int64_t>(8, chunks));
  }
  const Tensor dweight_parts = tall_product(dprojections, 4 * args.projection_columns, image, args.channels,
                                            problem.pixels, std::min<int64_t>(128, chunks));
  problem.rows(dx).addmm_(dprojections, problem.projection);

  Tensor dx_proj = allocate_like(x_proj), ddt_proj = allocate_like(dt_proj), ddt_bias = allocate_like(dt_bias);
  Tensor dA_logs = allocate_like(A_logs), dDs = allocate_like(Ds);
  Finish finish{};
  finish.partial = problem.partial;
  finish.dweight = dweight_parts.data_ptr(), finish.weight_parts = dweight_parts.size(0);
  if (!fused) finish.ddt_matrix = ddt_matrix.data_ptr(), finish.matrix_parts = ddt_matrix.size(0);
  finish.A = args.A;
  finish.dx_proj = dx_proj.data_ptr<float>(), finish.ddt_proj = ddt_proj.data_ptr<float>();
  finish.ddt_bias = ddt_bias.data_ptr<float>(), finish.dA_logs = dA_logs.data_ptr<float>();
  finish.dDs = dDs.data_ptr<float>();
  finish.blocks = problem.blocks, finish.channels = args.channels, finish.padded = args.padded;
  finish.groups = args.groups, finish.dt_rank = problem.dt_rank, finish.rank = problem.rank;
  finish.projection_columns = args.projection_columns, finish.by_columns = problem.prepare.by_columns;
  finish.by_channels = Divisor(args.channels);
  launch_finish(problem.type, finish, problem.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dx_proj, ddt_proj, ddt_bias, dA_logs, dDs};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("ss2d_scan", &mmvmamba::ss2d_forward);
  m.impl("ss2d_scan_backward", &mmvmamba::ss2d_backward);
}
