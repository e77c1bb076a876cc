// The fused SS2D core on CUDA for N = 2 to 16 states a channel: memory, GEMMs, and the order of the kernels.
//
// Forward: prepare parameters; one GEMM for the projections of all routes; for dt ranks above kFusedRank a batched GEMM
// for u; then for each pair of routes what enters the blocks of a chain, if an image is more than one block, and the
// scan. Backward: the scans' adjoint a pair, then the gradients of dt and of the weights by GEMMs, dx += dprojections
// Wx, and one kernel that adds the parts of the sums. Every sum has a fixed order.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>

#include "common/ceil_div.h"
#include "common/dtypes.h"
#include "common/routes.h"
#include "common/type_of.h"
#include "ss2d/products.h"
#include "ss2d/states/core.h"
#include "ss2d/states/kernels.h"

namespace mmvmamba {
namespace ss2d {
namespace states {
namespace {

using at::Tensor;

// Warps of a scan on a processor that keep its units of exponentials busy, two for each of its four parts: images are
// cut into chains of blocks where there are fewer. Each block is then scanned twice, so chains of two gain nothing.
constexpr int kBusyWarps = 8, kShortestChain = 3;

// Everything the two directions share: sizes, prepared parameters.
struct Problem {
  Type type;
  Args args{};
  int d_state, states;  // the op's N, and the kernels'
  bool column_second;
  cudaStream_t stream;
  int64_t pixels;       // of all images
  Tensor weight;        // (4, columns, channels)
  Tensor dt_matrix;     // (4, dt_columns, channels)
  Tensor floats;        // the other prepared parameters
  Tensor carry_memory;  // of a pair's chains

  Problem(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias, const Tensor& A_logs,
          const Tensor& Ds, int64_t scan_mode)
      : type(type_of("ss2d_scan", x.scalar_type())), stream(at::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK(x.numel() > 0, "ss2d_scan: x is empty, of shape ", x.sizes());
    TORCH_CHECK(A_logs.size(1) <= kMostStates, "ss2d_scan: A_logs has d_state N = ", A_logs.size(1),
                ", expected at most ", kMostStates, " for the fused kernels");
    TORCH_CHECK(is_scan_mode(scan_mode) && comes_in_pairs(kScanModes[scan_mode].routes), "ss2d_scan: scan_mode is ",
                scan_mode, ", expected 0 (cross2d), 1 (unidi) or 2 (bidi)");
    for (const Tensor* t : {&x_proj, &dt_proj, &dt_bias, &A_logs, &Ds}) {
      TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->is_cuda(),
                  "ss2d_scan: parameters must be contiguous float32 CUDA tensors");
    }
    const Routes& routes = kScanModes[scan_mode].routes;
    d_state = A_logs.size(1), states = padded_states(d_state);
    args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
    args.padded = ceil_div(args.channels, 32) * 32, args.groups = args.padded / 32;
    args.rank = dt_proj.size(2), args.dt_columns = dt_columns(args.rank), args.columns = columns(args.rank, d_state);
    const int64_t length = x.size(2) * x.size(3);
    TORCH_CHECK(4 * length * std::max(args.padded, args.columns) < (1ll << 31), "ss2d_scan: an image of ", x.size(2),
                " x ", x.size(3), " with ", args.channels, " channels is too large for the fused kernels");
    args.length = length, args.segments = ceil_div(args.length, kSegment);
    args.second_reversed = second_is_reversed(routes);
    column_second = second_is_by_column(routes) && args.height > 1 && args.width > 1;  // else both orders are one
    pixels = args.batch * length;
    choose_chain();
    prepare(x, x_proj, dt_proj, dt_bias, A_logs, Ds);
  }

  void choose_chain() {
    const int64_t scans = 2 * args.batch * args.groups;
    const int64_t wanted = int64_t{kBusyWarps} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount / scans;
    const int64_t blocks = wanted < kShortestChain ? 1 : std::min<int64_t>(wanted, args.segments);
    args.chunk = ceil_div<int64_t>(args.segments, blocks), args.chain = ceil_div(args.segments, args.chunk);
  }

  // Groups of a block in backward: as many as fit, if there are blocks for all processors then, else fewer.
  void choose_splits() {
    const auto* device = at::cuda::getCurrentDeviceProperties();
    args.block_groups = backward_groups(states, weight.element_size(), args.groups, device->sharedMemPerBlockOptin);
    TORCH_CHECK(args.block_groups > 0, "ss2d_scan: a block of the fused kernels needs more shared memory than this ",
                "GPU has; backend='naive' takes any");
    const int64_t splits = device->multiProcessorCount / (args.batch * args.chain);
    if (splits > ceil_div(args.groups, args.block_groups)) {
      args.block_groups = ceil_div<int64_t>(args.groups, std::min<int64_t>(splits, args.groups));
    }
    args.splits = ceil_div(args.groups, args.block_groups);
  }

  void prepare(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias,
               const Tensor& A_logs, const Tensor& Ds) {
    weight = allocate({4 * args.columns, args.channels}, x.options().memory_format(at::MemoryFormat::Contiguous));
    dt_matrix = allocate({4, args.dt_columns, args.channels}, weight.options());
    floats = allocate({int64_t{4 * (args.dt_columns + 1 + states) + 1} * args.padded}, x_proj.options());
    Prepare prepare{};
    prepare.x_proj = x_proj.data_ptr<float>(), prepare.dt_proj = dt_proj.data_ptr<float>();
    prepare.dt_bias = dt_bias.data_ptr<float>(), prepare.A_logs = A_logs.data_ptr<float>();
    prepare.Ds = Ds.data_ptr<float>();
    prepare.weight = weight.data_ptr(), prepare.dt_matrix = dt_matrix.data_ptr();
    prepare.skip = floats.data_ptr<float>(), prepare.bias = prepare.skip + args.padded;
    prepare.A = prepare.bias + 4 * args.padded, prepare.dt_weight = prepare.A + 4 * states * args.padded;
    prepare.channels = args.channels, prepare.padded = args.padded, prepare.rank = args.rank;
    prepare.dt_columns = args.dt_columns, prepare.columns = args.columns;
    prepare.states = d_state, prepare.padded_states = states;
    launch_prepare(type, prepare, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    args.skip = prepare.skip, args.bias = prepare.bias, args.A = prepare.A, args.dt_weight = prepare.dt_weight;
    if (args.chain > 1) {
      const int64_t rows = args.batch * args.chain * 2;
      carry_memory = allocate({rows * args.padded * (states + 1)}, floats.options());
      args.carries = carry_memory.data_ptr<float>(), args.sums = args.carries + rows * args.padded * states;
    }
  }

  int64_t saved_floats() const { return args.batch * args.segments * 4 * args.padded * states; }
  bool fused() const { return args.rank <= kFusedRank; }

  // The columns of dt as a batch of routes.
  Tensor dt_by_route(const Tensor& projections) const {
    return projections.as_strided({4, pixels, args.dt_columns}, {args.columns, 4 * args.columns, 1});
  }
  // Memory for u, or du: (batch * length, 4, channels), as a batch of routes.
  Tensor allocate_u(const Tensor& like) const {
    return allocate({4, pixels, args.channels}, {args.channels, 4 * args.channels, 1}, like.options());
  }
  // u without bias, by a batched GEMM, where the kernels do not project dt.
  Tensor make_u(const Tensor& projections) {
    Tensor u;
    if (fused()) return u;
    u = allocate_u(projections);
    at::bmm_out(u, dt_by_route(projections), dt_matrix);
    args.u = u.data_ptr();
    return u;
  }
  // A map with channels last as a matrix.
  Tensor rows(const Tensor& map) const { return map.as_strided({pixels, args.channels}, {args.channels, 1}); }

  void select_pair(int pair) { args.pair = pair, args.column_order = pair == 1 && column_second; }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                                           const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds,
                                           int64_t scan_mode, bool float_output, bool save) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Problem problem(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode);
  Args& args = problem.args;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor image = channel_last(x);
  Tensor projections = allocate({problem.pixels, 4 * args.columns}, options);
  at::mm_out(projections, problem.rows(image),
             problem.weight.as_strided({args.channels, 4 * args.columns}, {1, args.channels}));
  const Tensor u = problem.make_u(projections);
  Tensor y =
      allocate(x.sizes(), options.dtype(output_dtype(x, float_output)).memory_format(at::MemoryFormat::ChannelsLast));
  Tensor saved = allocate({save ? problem.saved_floats() : 0}, options.dtype(at::kFloat));

  args.x = image.data_ptr(), args.projections = projections.data_ptr(), args.y = y.data_ptr();
  args.states = save ? saved.data_ptr<float>() : nullptr;
  args.float_output = y.scalar_type() == at::kFloat;
  for (int pair = 0; pair < 2; ++pair) {
    problem.select_pair(pair);
    if (args.chain > 1) launch_forward_carries(problem.type, problem.states, args, problem.stream);
    launch_forward(problem.type, problem.states, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {y, projections, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_in, const Tensor& x,
                                                                    const Tensor& x_proj, const Tensor& dt_proj,
                                                                    const Tensor& dt_bias, const Tensor& A_logs,
                                                                    const Tensor& Ds, const Tensor& projections,
                                                                    const Tensor& saved, int64_t scan_mode) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Problem problem(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode);
  Args& args = problem.args;
  const auto options = x.options().memory_format(at::MemoryFormat::Contiguous);
  const Tensor image = channel_last(x);
  const Tensor dy = channel_last(dy_in.scalar_type() == x.scalar_type() ? dy_in : dy_in.to(x.scalar_type()));
  TORCH_CHECK(saved.numel() == problem.saved_floats(),
              "ss2d_scan_backward: the forward was run without saving its states");
  problem.choose_splits();
  const Tensor u = problem.make_u(projections);
  Tensor du = u.defined() ? u : problem.allocate_u(projections);  // a tile's u is read before its du is written
  Tensor dprojections = allocate({problem.pixels, 4 * args.columns}, options);
  Tensor dx = allocate(x.sizes(), options.memory_format(at::MemoryFormat::ChannelsLast));
  Tensor parts;
  if (args.splits > 1) {
    parts = allocate({args.splits * problem.pixels * 8 * problem.states}, problem.floats.options());
    args.parts = parts.data_ptr<float>();
  }
  const int64_t partial_rows = args.batch * args.chain;
  const int64_t partial_size = partial_rows * 2 * (problem.states + 2) * args.padded;
  Tensor partial = allocate({2, partial_size}, problem.floats.options());
  args.x = image.data_ptr(), args.dy = dy.data_ptr(), args.projections = projections.data_ptr(), args.y = dx.data_ptr();
  args.states = saved.data_ptr<float>(), args.du = du.data_ptr(), args.dprojections = dprojections.data_ptr();
  for (int pair = 0; pair < 2; ++pair) {
    problem.select_pair(pair);
    args.partial = partial.data_ptr<float>() + pair * partial_size;
    if (args.chain > 1) launch_backward_carries(problem.type, problem.states, args, problem.stream);
    launch_backward(problem.type, problem.states, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (args.parts != nullptr) {
    launch_add_parts(problem.type, problem.states, args, problem.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const int64_t channels = args.channels, all_columns = 4 * args.columns;
  Tensor ddt = problem.dt_by_route(dprojections);
  at::bmm_out(ddt, du,
              problem.dt_matrix.as_strided({4, channels, args.dt_columns}, {args.dt_columns * channels, 1, channels}));
  const int64_t chunks = std::min<int64_t>(128, ceil_div(problem.pixels, 256));
  const int64_t count = tall_parts(problem.pixels, chunks), matrix = args.dt_columns * channels;
  Tensor matrices = allocate({4, count, args.dt_columns, channels}, options);
  for (int q = 0; q < 4; ++q) {
    tall_product({projections, args.dt_columns, all_columns, q * args.columns},
                 {du, channels, 4 * channels, q * channels}, problem.pixels, chunks, matrices, q * count * matrix);
  }
  const Tensor weights = tall_product(dprojections, all_columns, image, channels, problem.pixels, chunks);
  problem.rows(dx).addmm_(dprojections, problem.weight);

  Tensor dx_proj = allocate_like(x_proj), ddt_proj = allocate_like(dt_proj), ddt_bias = allocate_like(dt_bias);
  Tensor dA_logs = allocate_like(A_logs), dDs = allocate_like(Ds);
  Finish finish{};
  finish.partial = partial.data_ptr<float>(), finish.rows = partial_rows;
  finish.dweight = weights.data_ptr(), finish.weight_parts = weights.size(0);
  finish.ddt = matrices.data_ptr(), finish.matrix_parts = count;
  finish.A = args.A;
  finish.dx_proj = dx_proj.data_ptr<float>(), finish.ddt_proj = ddt_proj.data_ptr<float>();
  finish.ddt_bias = ddt_bias.data_ptr<float>(), finish.dA_logs = dA_logs.data_ptr<float>();
  finish.dDs = dDs.data_ptr<float>();
  finish.channels = channels, finish.padded = args.padded, finish.rank = args.rank;
  finish.dt_columns = args.dt_columns, finish.columns = args.columns;
  finish.states = problem.d_state, finish.padded_states = problem.states;
  launch_finish(problem.type, finish, problem.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dx_proj, ddt_proj, ddt_bias, dA_logs, dDs};
}

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba
