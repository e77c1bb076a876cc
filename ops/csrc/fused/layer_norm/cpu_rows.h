// Layer normalisation of rows of channels on CPU, in one pass over memory for each direction. No torch types in here.
#pragma once

#include <cstdint>

#include "common/lanes.h"

namespace mmvmamba {
namespace norm {

// Rows of `channels` numbers; pointers are at the first of `rows` rows.
struct Rows {
  int64_t rows, channels;
  const float *weight, *bias;
  const float* shift;  // added to each row first, or none
  float eps;
  bool gelu;
};

// y = norm(x), or of the sum x + factor branch, which is written too. statistics: mean and 1 / deviation of a row each,
// or none.
template <typename X, typename Y> void forward(const Rows& p, const X* x, Y* y, float* statistics);
template <typename X, typename Y>
void forward_of_sum(const Rows& p, const X* x, const Y* branch, float factor, X* sum, Y* y, float* statistics);

// dx of forward, plus dsum where there is one; dbranch, where there is one, is factor dx. Adds to the gradients of
// weight and bias, and to that of shift where there is one.
template <typename X, typename Y> struct Gradients {
  const Y* dy;
  const X* dsum;
  X* dx;
  Y* dbranch;
  float factor;
  float *dweight, *dbias, *dshift;
};
template <typename X, typename Y>
void backward(const Rows& p, const X* x, const float* statistics, const Gradients<X, Y>& g);

}  // namespace norm
}  // namespace mmvmamba
