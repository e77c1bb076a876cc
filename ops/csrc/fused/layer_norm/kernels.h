// Launch interface of the norm kernels. No torch types in here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace mmvmamba {
namespace norm {

// A factor for each sample, whose rows lie together; none is 1.
struct Factors {
  const float* values;
  unsigned rows;  // of a sample
};

// Beside the norm: a branch is added to x first, which gives `sum`; or a convolution's bias (shift) first and GELU
// after.
struct Forward {
  const void* x;  // (rows, channels), In
  const float *weight, *bias;
  void* y;             // (rows, channels), Out
  float2* statistics;  // (rows), mean and 1 / standard deviation; or null
  int64_t rows;
  int channels, processors;
  float eps;
  const void* branch;  // Out, or null
  void* sum;           // In
  Factors factors;     // of the branch
  const float* shift;  // (channels), or null
  bool gelu;
};

struct Backward {
  const void *dy, *x;  // Out, In
  const float *weight, *bias;
  const float2* statistics;
  void* dx;  // In
  int64_t rows;
  int channels, processors;
  const void* dsum;  // the gradient of the sum, In; or null
  void* dbranch;     // Out
  Factors factors;
  const float* shift;
  bool gelu;
};

// Gives memory for so many rows and columns of floats.
using AllocatePartial = std::function<float*(int64_t, int64_t)>;

// The kernels of a type of x and one of the output, each pair instantiated in a file of its own. Backward leaves a row
// a block of partial sums: for the weight, the bias, and after a convolution its bias.
template <typename In, typename Out> struct Kernels {
  static void forward(const Forward& args, cudaStream_t stream);
  static void backward(const Backward& args, const AllocatePartial& allocate, cudaStream_t stream);
};

}  // namespace norm
}  // namespace mmvmamba
