// Rows times a factor each on CPU. A task owns a range of rows.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace mmvmamba {
namespace {

using at::Tensor;

Tensor scale_rows(const Tensor& x_, const Tensor& factors_) {
  const Tensor x = x_.contiguous(), factors = factors_.contiguous();
  Tensor y = at::empty_like(x);
  const int64_t columns = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scale_rows", [&] {
    const auto *from = x.const_data_ptr<scalar_t>(), *factor = factors.const_data_ptr<scalar_t>();
    auto* to = y.data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * columns; i < end * columns; ++i) to[i] = from[i] * factor[i / columns];
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> scale_rows_backward(const Tensor& dy_, const Tensor& x_, const Tensor& factors_) {
  const Tensor dy = dy_.contiguous(), x = x_.contiguous(), factors = factors_.contiguous();
  Tensor dx = at::empty_like(x), dfactors = at::empty_like(factors);
  const int64_t columns = x.size(1);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scale_rows_backward", [&] {
    const auto *from = x.const_data_ptr<scalar_t>(), *factor = factors.const_data_ptr<scalar_t>();
    const auto* grad = dy.const_data_ptr<scalar_t>();
    auto *to = dx.data_ptr<scalar_t>(), *sums = dfactors.data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        scalar_t sum = 0;
        for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
          to[i] = grad[i] * factor[row];
          sum += grad[i] * from[i];
        }
        sums[row] = sum;
      }
    });
  });
  return {dx, dfactors};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("scale_rows", &mmvmamba::scale_rows);
  m.impl("scale_rows_backward", &mmvmamba::scale_rows_backward);
}
