// The fused SS2D core on CPU, mmvmamba::ss2d_scan and ss2d_scan_backward (any N; cross2d, unidi, bidi), in float.
//
// Forward: a GEMM for the projections (dt, B, C of every pixel and route); then a task owns a block of channels of one
// image, walks its pixels along the four routes by index, and adds their outputs in place. Every kSteps pixels the
// states entering are saved. Backward: a task owns a group of such blocks, walks back tile by tile, and leaves partial
// sums of the gradients that are sums over channels or images; these are added in an order that depends on shapes
// alone.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "common/ceil_div.h"
#include "common/constants.h"
#include "common/dtypes.h"
#include "common/ordered_sum.h"
#include "common/routes.h"
#include "ss2d/cpu_tile.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using namespace ss2d;

constexpr int64_t kRows = 1024;  // most rows of a GEMM
constexpr int64_t kTasks = 32;   // backward groups the blocks of channels so that there are about as many tasks

// (B, D, H, W) of any strides and dtype to (B, H, W, D) of float
Tensor channel_last(const Tensor& x) { return x.permute({0, 2, 3, 1}).to(at::kFloat).contiguous(); }

Tensor pad_last(const Tensor& tensor, int64_t size) {
  if (tensor.size(-1) == size) return tensor.contiguous();
  return at::constant_pad_nd(tensor, {0, size - tensor.size(-1)}).contiguous();
}

// Rows of pixels in pieces that depend on their number alone, each for one thread: a GEMM rounds differently with
// several. There are two pieces at least, as a single one would be given all threads.
struct Pieces {
  int64_t rows, size, count;

  explicit Pieces(int64_t rows_) : rows(rows_), size(std::min(kRows, ceil_div(rows, 2))), count(ceil_div(rows, size)) {}

  template <typename Function> void for_each(const Function& function) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * size, own = std::min(size, rows - first);
        function(piece, [&](const Tensor& tensor) { return tensor.narrow(0, first, own); });
      }
    });
  }
};

// What the two directions share: sizes and prepared parameters, channels padded to whole vectors.
struct Problem {
  int64_t batch, channels, height, width, pixels, padded, rank, states, columns, tiles, mode;  // pixels of an image
  Tensor projection;                                                                           // (4 * (R + 2N), D)
  Tensor dt_weight;                                                                            // (4, R, padded)
  Tensor dt_transposed;                                                                        // (4, padded, padded R)
  Tensor bias, A, skip;  // (4, padded), (4, N, padded), (padded)

  Problem(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias, const Tensor& A_logs,
          const Tensor& Ds, int64_t scan_mode)
      : batch(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        pixels(height * width),
        padded(ceil_div(channels, kLanes) * kLanes),
        rank(dt_proj.size(2)),
        states(A_logs.size(1)),
        columns(rank + 2 * states),
        tiles(ceil_div(pixels, kSteps)),
        mode(scan_mode) {
    TORCH_CHECK(is_scan_mode(mode) && comes_in_pairs(kScanModes[mode].routes), "ss2d_scan: scan_mode is ", mode,
                ", expected 0 (cross2d), 1 (unidi) or 2 (bidi)");
    TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
                "ss2d_scan: x is ", x.scalar_type(), ", expected float16, bfloat16 or float32");
    for (const Tensor* t : {&x_proj, &dt_proj, &dt_bias, &A_logs, &Ds}) {
      TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->is_cpu(),
                  "ss2d_scan: parameters must be contiguous float32 CPU tensors");
    }
    // projections have the precision of x
    projection = x_proj.to(x.scalar_type()).to(at::kFloat).view({kRoutes * columns, channels});
    const Tensor weight = dt_proj.to(x.scalar_type()).to(at::kFloat).transpose(1, 2);  // (4, R, D)
    dt_weight = pad_last(weight, padded);
    dt_transposed = pad_last(dt_weight.transpose(1, 2), ceil_div(rank, kLanes) * kLanes);
    bias = pad_last(dt_bias, padded);
    A = pad_last(A_logs.exp().neg().view({kRoutes, channels, states}).transpose(1, 2), padded);
    skip = pad_last(Ds.view({kRoutes, channels}).sum(0), padded);
  }

  // Channels of a block if a row of them is cut into blocks of at most `most`.
  int block_width(int64_t most) const {
    const int64_t vectors = padded / kLanes, blocks = ceil_div(padded, most);
    return static_cast<int>(ceil_div(vectors, blocks) * kLanes);
  }

  // Parameters and pointers of `width` channels from `first` of image b on route k.
  Block block(int64_t b, int64_t k, int64_t first, int width, const float* x, const float* projections) const {
    Block block{};
    block.channels = padded, block.columns = kRoutes * columns;
    block.rank = static_cast<int>(rank), block.states = static_cast<int>(states), block.width = width;
    block.dt_weight = dt_weight.const_data_ptr<float>() + k * rank * padded + first;
    block.dt_transposed = dt_transposed.const_data_ptr<float>() + (k * padded + first) * dt_transposed.size(2);
    block.bias = bias.const_data_ptr<float>() + k * padded + first;
    block.A = A.const_data_ptr<float>() + k * states * padded + first;
    block.x = x + b * pixels * padded + first;
    block.projections = projections + b * pixels * block.columns + k * columns;
    return block;
  }

  // The pixels of a tile in the route's order; returns their number.
  int tile_pixels(int64_t k, int64_t tile, int64_t* pixel) const {
    const int64_t start = tile * kSteps, steps = std::min<int64_t>(kSteps, pixels - start);
    for (int64_t t = 0; t < steps; ++t) pixel[t] = route_pixel(mode, k, start + t, height, width);
    return static_cast<int>(steps);
  }

  int64_t state_offset(int64_t b, int64_t k, int64_t tile) const {
    return ((b * kRoutes + k) * tiles + tile) * states * padded;
  }

  // (B, L, padded) to a map (B, D, H, W) with channels_last strides
  Tensor as_map(const Tensor& rows, at::ScalarType dtype) const {
    const Tensor own = rows.narrow(2, 0, channels).to(dtype).contiguous();
    return own.view({batch, height, width, channels}).permute({0, 3, 1, 2});
  }
};

std::tuple<Tensor, Tensor, Tensor> ss2d_forward(const Tensor& x, const Tensor& x_proj, const Tensor& dt_proj,
                                                const Tensor& dt_bias, const Tensor& A_logs, const Tensor& Ds,
                                                int64_t scan_mode, bool float_output, bool save,
                                                const std::optional<Tensor>& z) {
  check_absent("ss2d_scan", "z", z);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Problem n(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode);
  const Tensor image = channel_last(x);
  const Tensor points = image.view({n.batch * n.pixels, n.channels});
  Tensor projections = at::empty({n.batch * n.pixels, kRoutes * n.columns}, image.options());
  Pieces(points.size(0)).for_each([&](int64_t, const auto& own) {
    Tensor out = own(projections);
    at::mm_out(out, own(points), n.projection.t());
  });
  const Tensor rows = pad_last(image, n.padded);
  Tensor y = at::empty({n.batch, n.pixels, n.padded}, image.options());
  Tensor states = at::empty({save ? n.state_offset(n.batch, 0, 0) : 0}, image.options());
  const float *x_data = rows.const_data_ptr<float>(), *projection_data = projections.const_data_ptr<float>();
  const float* skip = n.skip.const_data_ptr<float>();
  float *y_data = y.data_ptr<float>(), *state_data = states.data_ptr<float>();

  // a channel's numbers do not depend on its block, so that few images may be cut finer
  const bool few = n.batch * ceil_div(n.padded, kWidth) < 2 * at::get_num_threads();
  const int width = n.block_width(few ? 2 * kLanes : kWidth);
  const int64_t blocks = ceil_div(n.padded, width);
  at::parallel_for(0, n.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> h(n.states * n.padded);
    int64_t pixel[kSteps];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, first = task % blocks * width;
      const int own = static_cast<int>(std::min<int64_t>(width, n.padded - first));
      float* out = y_data + b * n.pixels * n.padded + first;
      skip_forward(n.pixels, n.padded, own, skip + first, x_data + b * n.pixels * n.padded + first, out);
      for (int64_t k = 0; k < kRoutes; ++k) {
        const Block block = n.block(b, k, first, own, x_data, projection_data);
        std::fill(h.begin(), h.end(), 0.f);
        for (int64_t tile = 0; tile < n.tiles; ++tile) {
          for (int64_t s = 0; save && s < n.states; ++s) {
            const float* from = h.data() + s * n.padded;
            std::copy(from, from + own, state_data + n.state_offset(b, k, tile) + s * n.padded + first);
          }
          const int steps = n.tile_pixels(k, tile, pixel);
          forward_tile(block, pixel, steps, h.data(), out);
        }
      }
    }
  });
  return {n.as_map(y, output_dtype(x, float_output)), projections, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ss2d_backward(const Tensor& dy_, const Tensor& x,
                                                                         const Tensor& x_proj, const Tensor& dt_proj,
                                                                         const Tensor& dt_bias, const Tensor& A_logs,
                                                                         const Tensor& Ds, const Tensor& projections_,
                                                                         const Tensor& states_, int64_t scan_mode) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Problem n(x, x_proj, dt_proj, dt_bias, A_logs, Ds, scan_mode);
  TORCH_CHECK(states_.numel() == n.state_offset(n.batch, 0, 0),
              "ss2d_scan_backward: the forward was run without saving its states");
  const Tensor image = channel_last(x), rows = pad_last(image, n.padded), dy = pad_last(channel_last(dy_), n.padded);
  const Tensor projections = projections_.contiguous(), states = states_.contiguous();
  const int width = n.block_width(kWidth);
  const int64_t blocks = ceil_div(n.padded, width), groups = std::min(blocks, ceil_div(kTasks, n.batch));
  const int64_t sums = n.rank + 1 + n.states;  // rows of the parameters' partial sums: dt_weight, bias, A
  const auto options = image.options();
  Tensor dx = at::empty({n.batch, n.pixels, n.padded}, options);
  Tensor dprojections_parts = at::zeros({groups, n.batch * n.pixels, kRoutes * n.columns}, options);
  Tensor partial = at::zeros({n.batch, kRoutes, sums, n.padded}, options);
  Tensor dskip_parts = at::empty({n.batch, n.padded}, options);
  const float *x_data = rows.const_data_ptr<float>(), *dy_data = dy.const_data_ptr<float>();
  const float *projection_data = projections.const_data_ptr<float>(), *state_data = states.const_data_ptr<float>();
  const float* skip = n.skip.const_data_ptr<float>();
  float *dx_data = dx.data_ptr<float>(), *dprojections_data = dprojections_parts.data_ptr<float>();
  float *partial_data = partial.data_ptr<float>(), *dskip_data = dskip_parts.data_ptr<float>();

  at::parallel_for(0, n.batch * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> flow(n.states * kWidth);
    int64_t pixel[kSteps];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / groups, group = task % groups;
      for (int64_t index = group * blocks / groups; index < (group + 1) * blocks / groups; ++index) {
        const int64_t first = index * width, image_offset = b * n.pixels * n.padded + first;
        const int own = static_cast<int>(std::min<int64_t>(width, n.padded - first));
        skip_backward(n.pixels, n.padded, own, skip + first, x_data + image_offset, dy_data + image_offset,
                      dx_data + image_offset, dskip_data + b * n.padded + first);
        for (int64_t k = 0; k < kRoutes; ++k) {
          const Block block = n.block(b, k, first, own, x_data, projection_data);
          Gradients g{};
          g.dt_weight = partial_data + (b * kRoutes + k) * sums * n.padded + first;
          g.bias = g.dt_weight + n.rank * n.padded, g.A = g.bias + n.padded;
          g.dx = dx_data + image_offset;
          g.dprojections = dprojections_data + (group * n.batch + b) * n.pixels * block.columns + k * n.columns;
          std::fill(flow.begin(), flow.end(), 0.f);
          for (int64_t tile = n.tiles - 1; tile >= 0; --tile) {
            const int steps = n.tile_pixels(k, tile, pixel);
            const float* h = state_data + n.state_offset(b, k, tile) + first;
            backward_tile(block, pixel, steps, h, dy_data + image_offset, flow.data(), g);
          }
        }
      }
    }
  });

  const Tensor dprojections = ordered_sum(dprojections_parts), parameters = ordered_sum(partial),
               dskip = ordered_sum(dskip_parts);
  const Tensor points = image.view({n.batch * n.pixels, n.channels});
  const Tensor dpoints = dx.view({n.batch * n.pixels, n.padded}).narrow(1, 0, n.channels);
  const Pieces pieces(points.size(0));
  Tensor dweight_parts = at::empty({pieces.count, kRoutes * n.columns, n.channels}, options);
  pieces.for_each([&](int64_t piece, const auto& own) {
    own(dpoints).addmm_(own(dprojections), n.projection);
    Tensor out = dweight_parts.select(0, piece);
    at::mm_out(out, own(dprojections).t(), own(points));
  });
  const auto rows_of = [&](int64_t begin, int64_t count) {  // (4, D, count)
    return parameters.narrow(1, begin, count).narrow(2, 0, n.channels).transpose(1, 2);
  };
  const auto layout = at::MemoryFormat::Contiguous;
  const Tensor dA = rows_of(n.rank + 1, n.states).mul(n.A.narrow(2, 0, n.channels).transpose(1, 2));
  const Tensor dDs = dskip.narrow(0, 0, n.channels).expand({kRoutes, n.channels}).clone(layout);
  return {n.as_map(dx, x.scalar_type()),        ordered_sum(dweight_parts).view(x_proj.sizes()),
          rows_of(0, n.rank).clone(layout),     rows_of(n.rank, 1).clone(layout).view(dt_bias.sizes()),
          dA.contiguous().view(A_logs.sizes()), dDs.view(Ds.sizes())};
}

const AddConstants add_tile({{"ss2d_scan.cpu.segment", {kSteps}}, {"ss2d_scan.cpu.lanes", {kLanes}}});

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("ss2d_scan", &mmvmamba::ss2d_forward);
  m.impl("ss2d_scan_backward", &mmvmamba::ss2d_backward);
}
