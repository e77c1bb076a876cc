// The ops mmvmamba::layer_norm and add_layer_norm on CPU: a thread takes blocks of rows. Backward leaves a partial sum
// of the parameters' gradients for each block; blocks depend on shapes alone, and so does the order they are added in.
#include <torch/library.h>

#include <tuple>

#include "common/dtypes.h"
#include "fused/common/cpu_types.h"
#include "fused/layer_norm/cpu_rows.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kNumbersOfBlock = 1 << 15;  // of a forward block; backward has at most kNormParts blocks
constexpr int64_t kNormParts = 64;

struct NormProblem {
  Tensor weight, bias, shift, factors;
  norm::Rows rows{};
  int64_t count, sample;  // rows of all, and of a sample

  NormProblem(const Tensor& x, const Tensor& weight_, const Tensor& bias_, const MaybeTensor& shift_,
              const MaybeTensor& factors_, double eps, bool gelu)
      : weight(as_float(weight_)), bias(as_float(bias_)) {
    TORCH_CHECK(x.dim() > 0 && x.numel() > 0 && weight.numel() == x.size(-1) && bias.numel() == x.size(-1),
                "layer_norm: weight and bias must have an element for each of the last dimension of x, ", x.sizes());
    rows.channels = x.size(-1), rows.eps = static_cast<float>(eps), rows.gelu = gelu;
    count = x.numel() / rows.channels;
    if (shift_) {
      shift = as_float(*shift_);
      TORCH_CHECK(shift.numel() == rows.channels, "layer_norm: shift must have an element a channel");
      rows.shift = shift.const_data_ptr<float>();
    }
    if (factors_) {
      factors = as_float(*factors_);
      TORCH_CHECK(factors.numel() == x.size(0), "add_layer_norm: factors must have an element a sample");
    }
    sample = factors_ ? count / x.size(0) : count;
    rows.weight = weight.const_data_ptr<float>(), rows.bias = bias.const_data_ptr<float>();
  }

  float factor(int64_t row) const { return factors.defined() ? factors.const_data_ptr<float>()[row / sample] : 1.f; }

  // Calls run(rows, first row, factor, block) for pieces of the rows of a block that have one factor.
  template <typename F> void for_each_block(int64_t size, const F& run) const {
    at::parallel_for(0, ceil_div(count, size), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t row = block * size, last = std::min(count, row + size), next; row < last; row = next) {
          next = std::min(last, (row / sample + 1) * sample);
          norm::Rows own = rows;
          own.rows = next - row;
          run(own, row, factor(row), block);
        }
      }
    });
  }
  int64_t forward_block() const { return std::max<int64_t>(1, kNumbersOfBlock / rows.channels); }
  int64_t backward_block() const { return std::max(forward_block(), ceil_div(count, kNormParts)); }
};

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& x_in, const MaybeTensor& shift, const Tensor& weight,
                                              const Tensor& bias, double eps, int64_t output_type, bool gelu,
                                              bool save) {
  const NormProblem n(x_in, weight, bias, shift, std::nullopt, eps, gelu);
  const Tensor x = x_in.contiguous();
  Tensor y = at::empty(x.sizes(), x.options().dtype(output_dtype("layer_norm", output_type)));
  Tensor statistics = at::empty({save ? n.count : 0, 2}, n.weight.options());
  float* kept = save ? statistics.mutable_data_ptr<float>() : nullptr;
  with_cpu_type("layer_norm", x.scalar_type(), [&](auto in) {
    with_cpu_type("layer_norm", y.scalar_type(), [&](auto out) {
      const auto* from = elements<decltype(in)>(x);
      auto* to = elements_of<decltype(out)>(y);
      n.for_each_block(n.forward_block(), [&](const norm::Rows& rows, int64_t row, float, int64_t) {
        norm::forward(rows, from + row * rows.channels, to + row * rows.channels, kept ? kept + 2 * row : nullptr);
      });
    });
  });
  return {y, statistics};
}

// The dtypes of x and of branch, which that of x holds.
template <typename F> void with_sum_types(const Tensor& x, const Tensor& branch, const F& f) {
  TORCH_CHECK(branch.scalar_type() == x.scalar_type() || x.scalar_type() == at::kFloat, "add_layer_norm: x is ",
              x.scalar_type(), " and branch ", branch.scalar_type());
  with_cpu_type("add_layer_norm", branch.scalar_type(), [&](auto out) {
    if (x.scalar_type() == at::kFloat) f(float(), out);
    if constexpr (!std::is_same_v<decltype(out), float>) {
      if (x.scalar_type() != at::kFloat) f(out, out);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x_in, const Tensor& branch_in,
                                                          const MaybeTensor& factors, const Tensor& weight,
                                                          const Tensor& bias, double eps, bool save) {
  const NormProblem n(x_in, weight, bias, std::nullopt, factors, eps, /*gelu=*/false);
  TORCH_CHECK(branch_in.sizes() == x_in.sizes(), "add_layer_norm: branch must have the shape of x");
  const Tensor x = x_in.contiguous(), branch = branch_in.contiguous();
  Tensor sum = at::empty(x.sizes(), x.options()), y = at::empty(x.sizes(), branch.options());
  Tensor statistics = at::empty({save ? n.count : 0, 2}, n.weight.options());
  float* kept = save ? statistics.mutable_data_ptr<float>() : nullptr;
  with_sum_types(x, branch, [&](auto in, auto out) {
    using X = decltype(in);
    using Y = decltype(out);
    const X* from = elements<X>(x);
    const Y* addend = elements<Y>(branch);
    X* total = elements_of<X>(sum);
    Y* to = elements_of<Y>(y);
    n.for_each_block(n.forward_block(), [&](const norm::Rows& rows, int64_t row, float factor, int64_t) {
      const int64_t first = row * rows.channels;
      norm::forward_of_sum(rows, from + first, addend + first, factor, total + first, to + first,
                           kept ? kept + 2 * row : nullptr);
    });
  });
  return {sum, y, statistics};
}

struct NormGrads {
  Tensor dx, dbranch, parameters;  // (3 or 2, C): of weight, bias and shift
};

// `dsum` has the dtype of x; undefined without a branch, as are the factors.
template <typename X, typename Y>
NormGrads norm_backward(const NormProblem& n, const Tensor& dsum, const Tensor& dy, const Tensor& x,
                        const Tensor& statistics) {
  TORCH_CHECK(statistics.size(0) == n.count, "layer_norm_backward: the forward was run without its statistics");
  const int64_t channels = n.rows.channels, size = n.backward_block(), sums = n.rows.shift ? 3 : 2;
  NormGrads grads{at::empty(x.sizes(), x.options()), {}, {}};
  if (dsum.defined()) grads.dbranch = at::empty(dy.sizes(), dy.options());
  Tensor parts = at::zeros({ceil_div(n.count, size), sums, channels}, n.weight.options());
  float* part = parts.mutable_data_ptr<float>();
  const float* kept = statistics.const_data_ptr<float>();
  const X *from = elements<X>(x), *total = dsum.defined() ? elements<X>(dsum) : nullptr;
  const Y* slopes = elements<Y>(dy);
  X* to = elements_of<X>(grads.dx);
  Y* branch = dsum.defined() ? elements_of<Y>(grads.dbranch) : nullptr;
  n.for_each_block(size, [&](const norm::Rows& rows, int64_t row, float factor, int64_t block) {
    const int64_t first = row * channels;
    norm::Gradients<X, Y> g{};
    g.dy = slopes + first, g.dx = to + first, g.factor = factor;
    if (total) g.dsum = total + first, g.dbranch = branch + first;
    g.dweight = part + block * sums * channels, g.dbias = g.dweight + channels;
    if (rows.shift) g.dshift = g.dbias + channels;
    norm::backward(rows, from + first, kept + 2 * row, g);
  });
  grads.parameters = ordered_sum(parts);
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_in, const Tensor& x_in,
                                                               const MaybeTensor& shift, const Tensor& weight,
                                                               const Tensor& bias, const Tensor& statistics,
                                                               bool gelu) {
  const NormProblem n(x_in, weight, bias, shift, std::nullopt, 0, gelu);
  const Tensor x = x_in.contiguous(), dy = dy_in.contiguous();
  NormGrads grads;
  with_cpu_type("layer_norm", x.scalar_type(), [&](auto in) {
    with_cpu_type("layer_norm", dy.scalar_type(), [&](auto out) {
      grads = norm_backward<decltype(in), decltype(out)>(n, {}, dy, x, statistics.contiguous());
    });
  });
  const auto part = [&](int64_t i) { return grads.parameters.select(0, i).clone(); };
  const Tensor dshift = shift ? part(2) : at::empty({0}, n.weight.options());
  return {grads.dx, dshift, part(0).to(weight.scalar_type()), part(1).to(bias.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& dsum, const Tensor& dy_in,
                                                                   const Tensor& sum_in, const MaybeTensor& factors,
                                                                   const Tensor& weight, const Tensor& statistics) {
  const NormProblem n(sum_in, weight, weight, std::nullopt, factors, 0, /*gelu=*/false);  // no bias is read
  const Tensor sum = sum_in.contiguous(), dy = dy_in.contiguous();
  NormGrads grads;
  with_sum_types(sum, dy, [&](auto in, auto out) {
    const Tensor own = dsum.to(sum.scalar_type()).contiguous();
    grads = norm_backward<decltype(in), decltype(out)>(n, own, dy, sum, statistics.contiguous());
  });
  const auto part = [&](int64_t i) { return grads.parameters.select(0, i).clone().to(weight.scalar_type()); };
  return {grads.dx, grads.dbranch, part(0), part(1)};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("layer_norm", &mmvmamba::layer_norm_forward);
  m.impl("layer_norm_backward", &mmvmamba::layer_norm_backward);
  m.impl("add_layer_norm", &mmvmamba::add_layer_norm_forward);
  m.impl("add_layer_norm_backward", &mmvmamba::add_layer_norm_backward);
}
