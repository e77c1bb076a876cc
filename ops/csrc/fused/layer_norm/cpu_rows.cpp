#include <algorithm>
#include <cmath>
#include <vector>

#include "fused/layer_norm/cpu_rows.h"

namespace mmvmamba {
namespace norm {
namespace {

// Mean and 1 / deviation of a row, whose numbers lie in `row`, those beyond the last channel being 0.
MMVMAMBA_INLINE void describe(const Rows& p, const float* row, float& mean, float& scale) {
  Floats sum = {}, squares = {}, value;
  for (int64_t c = 0; c < p.channels; c += kVector) load(row + c, value), sum += value;
  mean = sum_of(sum) / static_cast<float>(p.channels);
  for (int64_t c = 0; c < p.channels; c += kVector) {
    load(row + c, value);
    value = value - mean;
    if (c + kVector > p.channels) {
      for (int i = static_cast<int>(p.channels - c); i < kVector; ++i) value[i] = 0;
    }
    squares += value * value;
  }
  scale = 1 / std::sqrt(sum_of(squares) / static_cast<float>(p.channels) + p.eps);
}

template <typename Y>
MMVMAMBA_INLINE void normalise(const Rows& p, const float* row, float mean, float scale, Y* y) {
  for (int64_t c = 0; c < p.channels; c += kVector) {
    const int64_t count = p.channels - c;
    Floats value, weight, bias;
    load(row + c, value), load(p.weight + c, count, weight), load(p.bias + c, count, bias);
    value = (value - mean) * scale * weight + bias;
    if (p.gelu) to_gelu(value);
    store(value, count, y + c);
  }
}

template <bool kSum, typename X, typename Y>
MMVMAMBA_INLINE void forward_rows(const Rows& p, const X* x, const Y* branch, float factor, X* sum, Y* y,
                                  float* statistics, float* row) {
  for (int64_t r = 0; r < p.rows; ++r, x += p.channels, y += p.channels) {
    for (int64_t c = 0; c < p.channels; c += kVector) {
      const int64_t count = p.channels - c;
      Floats value, other;
      load(x + c, count, value);
      if (kSum) {
        load(branch + c, count, other);
        value += factor * other;
        store(value, count, sum + c);
        load(sum + c, count, value);  // as rounded
      } else if (p.shift) {
        load(p.shift + c, count, other);
        value += other;
      }
      store(value, row + c);
    }
    float mean, scale;
    describe(p, row, mean, scale);
    normalise(p, row, mean, scale, y);
    if (statistics) statistics[2 * r] = mean, statistics[2 * r + 1] = scale;
    if (kSum) branch += p.channels, sum += p.channels;
  }
}

// `row` and `slopes` take a row of numbers each: x normalised, and the gradient of that.
template <typename X, typename Y>
MMVMAMBA_INLINE void backward_rows(const Rows& p, const X* x, const float* statistics, const Gradients<X, Y>& g,
                                   float* row, float* slopes) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const float mean = statistics[2 * r], scale = statistics[2 * r + 1];
    const int64_t first = r * p.channels;
    Floats sum = {}, product = {};
    for (int64_t c = 0; c < p.channels; c += kVector) {
      const int64_t count = p.channels - c;
      Floats value, dy, weight, other;
      load(x + first + c, count, value), load(g.dy + first + c, count, dy), load(p.weight + c, count, weight);
      if (p.shift) load(p.shift + c, count, other), value += other;
      value = (value - mean) * scale;
      if (p.gelu) {
        load(p.bias + c, count, other);
        Floats before = value * weight + other, slope;
        gelu_with_slope(before, slope);
        dy = dy * slope;
      }
      load(g.dweight + c, count, other);
      store(other + dy * value, count, g.dweight + c);
      load(g.dbias + c, count, other);
      store(other + dy, count, g.dbias + c);
      dy = dy * weight;  // 0 beyond the last channel, as its weight is
      sum += dy, product += dy * value;
      store(value, row + c), store(dy, slopes + c);
    }
    const float mean_dy = sum_of(sum) / static_cast<float>(p.channels);
    const float mean_product = sum_of(product) / static_cast<float>(p.channels);
    for (int64_t c = 0; c < p.channels; c += kVector) {
      const int64_t count = p.channels - c;
      Floats value, dy, other;
      load(row + c, value), load(slopes + c, dy);
      value = (dy - mean_dy - value * mean_product) * scale;
      if (g.dshift) load(g.dshift + c, count, other), store(other + value, count, g.dshift + c);
      if (g.dsum) load(g.dsum + first + c, count, other), value += other;
      store(value, count, g.dx + first + c);
      if (g.dbranch) store(value * g.factor, count, g.dbranch + first + c);
    }
  }
}

int64_t padded(const Rows& p) { return (p.channels + kVector - 1) / kVector * kVector; }

}  // namespace

// Function clones want names without templates.
#define MMVMAMBA_NORM(X, Y)                                                                                       \
  MMVMAMBA_CLONES void run_forward(const Rows& p, const X* x, Y* y, float* statistics, float* row) {              \
    forward_rows<false, X, Y>(p, x, nullptr, 0, nullptr, y, statistics, row);                                     \
  }                                                                                                               \
  template <> void forward(const Rows& p, const X* x, Y* y, float* statistics) {                                  \
    std::vector<float> row(padded(p));                                                                            \
    run_forward(p, x, y, statistics, row.data());                                                                 \
  }                                                                                                               \
  MMVMAMBA_CLONES void run_backward(const Rows& p, const X* x, const float* statistics, const Gradients<X, Y>& g, \
                                    float* row, float* slopes) {                                                  \
    backward_rows(p, x, statistics, g, row, slopes);                                                              \
  }                                                                                                               \
  template <> void backward(const Rows& p, const X* x, const float* statistics, const Gradients<X, Y>& g) {       \
    std::vector<float> rows(2 * padded(p));                                                                       \
    run_backward(p, x, statistics, g, rows.data(), rows.data() + padded(p));                                      \
  }
#define MMVMAMBA_NORM_OF_SUM(X, Y)                                                                                 \
  MMVMAMBA_CLONES void run_sum(const Rows& p, const X* x, const Y* branch, float factor, X* sum, Y* y,             \
                               float* statistics, float* row) {                                                    \
    forward_rows<true, X, Y>(p, x, branch, factor, sum, y, statistics, row);                                       \
  }                                                                                                                \
  template <>                                                                                                      \
  void forward_of_sum(const Rows& p, const X* x, const Y* branch, float factor, X* sum, Y* y, float* statistics) { \
    std::vector<float> row(padded(p));                                                                             \
    run_sum(p, x, branch, factor, sum, y, statistics, row.data());                                                 \
  }

MMVMAMBA_NORM(float, float)
MMVMAMBA_NORM(float, Bfloat16)
MMVMAMBA_NORM(Bfloat16, float)
MMVMAMBA_NORM(Bfloat16, Bfloat16)
MMVMAMBA_NORM_OF_SUM(float, float)
MMVMAMBA_NORM_OF_SUM(float, Bfloat16)
MMVMAMBA_NORM_OF_SUM(Bfloat16, Bfloat16)

}  // namespace norm
}  // namespace mmvmamba
