// The op mmvmamba::depthwise_conv_silu on CPU: a thread takes bands of rows, of which it keeps three in float, padded.
// Backward makes the convolution again, and from it dz, the gradient before SiLU, with a partial sum of the weight's
// gradient for each band; then dx. Bands depend on shapes alone, and so does the order that the sums are added in.
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "fused/common/cpu_types.h"
#include "fused/depthwise_conv/cpu_rows.h"

namespace mmvmamba {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using depthwise::kTaps;

constexpr int64_t kBand = 16;  // rows of a task

struct DepthwiseProblem {
  int64_t batch, height, bands;
  depthwise::Map map{};
  std::vector<float> taps;

  DepthwiseProblem(const Tensor& x, const Tensor& weight_in, const MaybeTensor& bias_in)
      : batch(x.size(0)), height(x.size(1)), bands(ceil_div(x.size(1), kBand)) {
    TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && weight_in.numel() == kTaps * x.size(3) &&
                    (!bias_in || bias_in->numel() == x.size(3)),
                "depthwise_conv_silu: x must have the shape (B, H, W, C), weight (C, 1, 3, 3) and bias (C,), got ",
                x.sizes(), " and ", weight_in.sizes());
    map.width = x.size(2), map.channels = x.size(3), map.vectors = ceil_div(map.channels, int64_t{kVector});
    const Tensor weight = as_float(weight_in), bias = bias_in ? as_float(*bias_in) : Tensor();
    const float *from = weight.const_data_ptr<float>(), *shift = bias_in ? bias.const_data_ptr<float>() : nullptr;
    taps.resize(map.vectors * (kTaps + 1) * kVector);
    map.taps = taps.data();
    for (int64_t c = 0; c < map.channels; ++c) {
      float* to = taps.data() + c / kVector * (kTaps + 1) * kVector + c % kVector;
      for (int tap = 0; tap < kTaps; ++tap) to[tap * kVector] = from[c * kTaps + tap];
      if (shift) to[kTaps * kVector] = shift[c];
    }
  }

  int64_t row_size() const { return map.width * map.channels; }

  // Calls run(image, first row, last row, band) for all bands.
  template <typename F> void for_each_band(const F& run) const {
    at::parallel_for(0, batch * bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) {
        const int64_t first = band % bands * kBand;
        run(band / bands, first, std::min(height, first + kBand), band);
      }
    });
  }

  // Calls run(row, three padded rows of x around it) for the rows of a band.
  template <typename T, typename F>
  void for_each_row(const T* image, int64_t first, int64_t last, const F& run) const {
    const int64_t size = map.padded_row();
    std::vector<float> buffer(4 * size);  // three rows in turns, and zeros
    const auto row_of = [&](int64_t row) { return buffer.data() + (row < 0 || row >= height ? 3 : row % 3) * size; };
    const auto fetch = [&](int64_t row) {
      if (row >= 0 && row < height) depthwise::pad_row(map, image + row * row_size(), row_of(row));
    };
    fetch(first - 1), fetch(first);
    for (int64_t row = first; row < last; ++row) {
      fetch(row + 1);
      const float* rows[3] = {row_of(row - 1), row_of(row), row_of(row + 1)};
      run(row, rows);
    }
  }
};

Tensor depthwise_forward(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias) {
  const DepthwiseProblem n(x_in, weight, bias);
  const Tensor x = x_in.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  with_cpu_type("depthwise_conv_silu", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = elements<T>(x);
    T* to = elements_of<T>(y);
    n.for_each_band([&](int64_t image, int64_t first, int64_t last, int64_t) {
      const int64_t offset = image * n.height * n.row_size();
      n.for_each_row(from + offset, first, last, [&](int64_t row, const float* const* rows) {
        depthwise::forward_row(n.map, rows, to + offset + row * n.row_size());
      });
    });
  });
  return y;
}

// dx from dz (B, H, padded row).
template <typename T> void depthwise_input(const DepthwiseProblem& n, const float* dz, T* dx) {
  const int64_t size = n.map.padded_row();
  const std::vector<float> zeros(size);
  n.for_each_band([&](int64_t image, int64_t first, int64_t last, int64_t) {
    const float* from = dz + image * n.height * size;
    for (int64_t row = first; row < last; ++row) {
      const float* rows[3] = {row > 0 ? from + (row - 1) * size : zeros.data(), from + row * size,
                              row + 1 < n.height ? from + (row + 1) * size : zeros.data()};
      depthwise::input_row(n.map, rows, dx + (image * n.height + row) * n.row_size());
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight,
                                                      const MaybeTensor& bias) {
  const DepthwiseProblem n(x_in, weight, bias);
  const Tensor x = x_in.contiguous(), dy = dy_in.to(x.scalar_type()).contiguous();
  const auto options = x.options().dtype(at::kFloat);
  const int64_t size = n.map.padded_row(), sums = static_cast<int64_t>(n.taps.size());
  Tensor dx = at::empty(x.sizes(), x.options()), dz = at::zeros({n.batch, n.height, size}, options);
  Tensor parts = at::zeros({n.batch * n.bands, sums}, options);
  float *slopes = dz.mutable_data_ptr<float>(), *part = parts.mutable_data_ptr<float>();
  with_cpu_type("depthwise_conv_silu", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T *from = elements<T>(x), *grad = elements<T>(dy);
    n.for_each_band([&](int64_t image, int64_t first, int64_t last, int64_t band) {
      const int64_t offset = image * n.height * n.row_size();
      n.for_each_row(from + offset, first, last, [&](int64_t row, const float* const* rows) {
        float* to = slopes + (image * n.height + row) * size;
        depthwise::backward_row(n.map, rows, grad + offset + row * n.row_size(), to, part + band * sums);
      });
    });
    depthwise_input(n, slopes, elements_of<T>(dx));
  });
  const Tensor sum = ordered_sum(parts).view({n.map.vectors, kTaps + 1, kVector}).transpose(1, 2);
  const Tensor taps = sum.reshape({n.map.vectors * kVector, kTaps + 1}).narrow(0, 0, n.map.channels);
  const Tensor dbias = bias ? taps.select(1, kTaps).clone().to(bias->scalar_type()) : at::empty({0}, options);
  const Tensor dweight = taps.narrow(1, 0, kTaps).contiguous().view(weight.sizes());
  return {dx, dweight.to(weight.scalar_type()), dbias};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("depthwise_conv_silu", &mmvmamba::depthwise_forward);
  m.impl("depthwise_conv_silu_backward", &mmvmamba::depthwise_backward);
}
