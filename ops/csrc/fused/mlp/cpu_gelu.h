// GELU of the hidden values of an MLP on CPU. No torch types in here.
#pragma once

#include <cstdint>

#include "common/lanes.h"

namespace mmvmamba {
namespace gelu {

// y = GELU(x), of `count` numbers.
template <typename T> void forward(int64_t count, const T* x, T* y);

// y = GELU(x), for rows of `columns` numbers; grad, the gradient of y, becomes that of x, whose sums over the rows are
// added to `sums`.
template <typename T> void backward(int64_t rows, int64_t columns, const T* x, T* grad, T* y, float* sums);

}  // namespace gelu
}  // namespace mmvmamba
