// The op mmvmamba::mlp on CPU. Products are oneDNN's, which applies bias and GELU before it writes, or torch's. Rows go
// through in pieces, whose hidden values stay in the cache; what backward reads, the hidden values before GELU, is
// written once.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "fused/common/cpu_types.h"
#include "fused/common/one_dnn.h"
#include "fused/mlp/cpu_gelu.h"

namespace mmvmamba {
namespace {

using at::Tensor;

constexpr int64_t kHiddenNumbers =
    5 << 19;                          // most hidden values of a piece: its memory is used again, and stays mapped
constexpr int64_t kGeluBlock = 8192;  // numbers that a thread takes at once

// x (..., C) as a matrix.
Tensor matrix_of(const Tensor& x) { return x.contiguous().view({x.numel() / x.size(-1), x.size(-1)}); }

// y = GELU(x), contiguous, in threads.
void gelu_into(const Tensor& x, Tensor& y) {
  with_cpu_type("mlp", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = elements<T>(x);
    T* to = elements_of<T>(y);
    const int64_t count = x.numel();
    at::parallel_for(0, ceil_div(count, kGeluBlock), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kGeluBlock, last = std::min(count, end * kGeluBlock);
      gelu::forward(last - first, from + first, to + first);
    });
  });
}

// A linear layer whose weights are in the dtype of its input.
struct LinearLayer {
  Tensor weight, bias;
  bool one_dnn;

  LinearLayer(const Tensor& weight_in, const Tensor& bias_in, at::ScalarType type)
      : weight(weight_in.to(type).contiguous()),
        bias(bias_in.to(type).contiguous()),
        one_dnn(has_one_dnn_linear(type)) {}

  Tensor run(const Tensor& x, bool gelu) const {
    if (one_dnn) return one_dnn_linear(x, weight, bias, gelu);
    Tensor y = at::addmm(bias, x, weight.t());
    if (gelu) gelu_into(y, y);
    return y;
  }
};

void check_mlp(const Tensor& x, const Tensor& weight1, const Tensor& weight2) {
  TORCH_CHECK(x.dim() > 0 && x.numel() > 0 && weight1.dim() == 2 && weight2.dim() == 2 &&
                  weight1.size(1) == x.size(-1) && weight2.size(1) == weight1.size(0),
              "mlp: the shapes ", x.sizes(), " of x, ", weight1.sizes(), " and ", weight2.sizes(),
              " of the weights do not fit together");
}

// Pieces of rows, as equal as they can be; they depend on shapes alone.
template <typename F> void for_pieces(int64_t rows, int64_t hidden, const F& run) {
  const int64_t pieces = ceil_div(rows * hidden, kHiddenNumbers), size = ceil_div(rows, pieces);
  for (int64_t first = 0; first < rows; first += size) run(first, std::min(size, rows - first));
}

std::tuple<Tensor, Tensor> mlp_forward(const Tensor& x_in, const Tensor& weight1, const Tensor& bias1,
                                       const Tensor& weight2, const Tensor& bias2, bool save) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_mlp(x_in, weight1, weight2);
  const Tensor x = matrix_of(x_in);
  const LinearLayer first(weight1, bias1, x.scalar_type()), second(weight2, bias2, x.scalar_type());
  std::vector<int64_t> sizes = x_in.sizes().vec(), hidden_sizes = sizes;
  sizes.back() = weight2.size(0), hidden_sizes.back() = weight1.size(0);
  const int64_t rows = x.size(0);
  if (save) {
    const Tensor hidden = first.run(x, /*gelu=*/false);
    Tensor y = at::empty({rows, sizes.back()}, x.options()), active;
    for_pieces(rows, weight1.size(0), [&](int64_t begin, int64_t count) {
      const Tensor own = hidden.narrow(0, begin, count);
      if (!active.defined() || active.size(0) != count) active = at::empty_like(own);
      gelu_into(own, active);
      y.narrow(0, begin, count).copy_(second.run(active, /*gelu=*/false));
    });
    return {y.view(sizes), hidden.view(hidden_sizes)};
  }
  const Tensor none = at::empty({0}, x.options());
  if (rows * weight1.size(0) <= kHiddenNumbers)
    return {second.run(first.run(x, /*gelu=*/true), /*gelu=*/false).view(sizes), none};
  Tensor y = at::empty({rows, sizes.back()}, x.options());
  for_pieces(rows, weight1.size(0), [&](int64_t begin, int64_t count) {
    y.narrow(0, begin, count).copy_(second.run(first.run(x.narrow(0, begin, count), /*gelu=*/true), /*gelu=*/false));
  });
  return {y.view(sizes), none};
}

// sum += a^T b, in float.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == at::kFloat) {
    sum.addmm_(a.t(), b);
  } else {
    sum.add_(at::mm(a.t(), b));
  }
}

// For a piece: y = GELU(hidden), grad becomes the gradient of hidden; its sums over rows, added in an order that
// depends on the number of rows alone.
Tensor gelu_backward(const Tensor& hidden, Tensor& grad, Tensor& y) {
  constexpr int64_t kBlock = 128;  // rows
  const int64_t rows = hidden.size(0), columns = hidden.size(1), blocks = ceil_div(rows, kBlock);
  Tensor parts = at::zeros({blocks, columns}, hidden.options().dtype(at::kFloat));
  float* sums = parts.mutable_data_ptr<float>();
  with_cpu_type("mlp", hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = elements<T>(hidden);
    T *slopes = elements_of<T>(grad), *to = elements_of<T>(y);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlock * columns, count = std::min(kBlock, rows - block * kBlock);
        gelu::backward(count, columns, from + first, slopes + first, to + first, sums + block * columns);
      }
    });
  });
  return ordered_sum(parts);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& dy_in, const Tensor& x_in,
                                                                const Tensor& hidden_in, const Tensor& weight1,
                                                                const Tensor& weight2) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_mlp(x_in, weight1, weight2);
  const auto type = x_in.scalar_type(), kept = weight1.scalar_type();
  TORCH_CHECK(hidden_in.dim() == x_in.dim(), "mlp_backward: the forward was run without saving its hidden values");
  const Tensor x = matrix_of(x_in), dy = matrix_of(dy_in.to(type)), hidden = matrix_of(hidden_in);
  const Tensor narrow1 = weight1.to(type).contiguous(), narrow2 = weight2.to(type).contiguous();
  const auto options = x.options().dtype(at::kFloat);
  Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dweight1 = at::zeros(weight1.sizes(), options), dweight2 = at::zeros(weight2.sizes(), options);
  Tensor dbias1 = at::zeros({weight1.size(0)}, options), grad, active;
  for_pieces(x.size(0), weight1.size(0), [&](int64_t begin, int64_t count) {
    const auto own = [&](const Tensor& tensor) { return tensor.narrow(0, begin, count); };
    if (!grad.defined() || grad.size(0) != count)
      grad = at::empty({count, hidden.size(1)}, x.options()), active = at::empty_like(grad);
    at::mm_out(grad, own(dy), narrow2);
    dbias1.add_(gelu_backward(own(hidden), grad, active));
    add_product(dweight2, own(dy), active);
    add_product(dweight1, grad, own(x));
    Tensor to = own(dx);
    at::mm_out(to, grad, narrow1);
  });
  const Tensor dbias2 = dy.sum({0}, /*keepdim=*/false, at::kFloat);
  return {dx.view(x_in.sizes()), dweight1.to(kept), dbias1.to(kept), dweight2.to(kept), dbias2.to(kept)};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("mlp", &mmvmamba::mlp_forward);
  m.impl("mlp_backward", &mmvmamba::mlp_backward);
}
