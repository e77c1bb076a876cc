#include "fused/mlp/cpu_gelu.h"

namespace mmvmamba {
namespace gelu {
namespace {

template <typename T> MMVMAMBA_INLINE void forward_all(int64_t count, const T* x, T* y) {
  for (int64_t i = 0; i < count; i += kVector) {
    Floats value;
    load(x + i, count - i, value);
    to_gelu(value);
    store(value, count - i, y + i);
  }
}

template <typename T>
MMVMAMBA_INLINE void backward_all(int64_t rows, int64_t columns, const T* x, T* grad, T* y, float* sums) {
  for (int64_t row = 0; row < rows; ++row, x += columns, grad += columns, y += columns) {
    for (int64_t c = 0; c < columns; c += kVector) {
      const int64_t count = columns - c;
      Floats value, slope, dy, sum;
      load(x + c, count, value), load(grad + c, count, dy), load(sums + c, count, sum);
      gelu_with_slope(value, slope);
      dy = dy * slope;
      store(value, count, y + c), store(dy, count, grad + c), store(sum + dy, count, sums + c);
    }
  }
}

}  // namespace

// Function clones want names without templates.
#define MMVMAMBA_GELU(T)                                                                                     \
  MMVMAMBA_CLONES void run_forward(int64_t count, const T* x, T* y) { forward_all(count, x, y); }            \
  MMVMAMBA_CLONES void run_backward(int64_t rows, int64_t columns, const T* x, T* grad, T* y, float* sums) { \
    backward_all(rows, columns, x, grad, y, sums);                                                           \
  }                                                                                                          \
  template <> void forward(int64_t count, const T* x, T* y) { run_forward(count, x, y); }                    \
  template <> void backward(int64_t rows, int64_t columns, const T* x, T* grad, T* y, float* sums) {         \
    run_backward(rows, columns, x, grad, y, sums);                                                           \
  }

MMVMAMBA_GELU(float)
MMVMAMBA_GELU(Bfloat16)

}  // namespace gelu
}  // namespace mmvmamba
