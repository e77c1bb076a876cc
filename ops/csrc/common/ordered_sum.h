// The sum of partial sums that threads have left.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

namespace mmvmamba {

// Sum over the first dimension of a float tensor, in its order for any number of threads.
inline at::Tensor ordered_sum(const at::Tensor& parts) {
  const int64_t count = parts.size(0), size = parts.numel() / count;
  if (count == 1) return parts.select(0, 0);
  at::Tensor sum = parts.select(0, 0).clone();
  const float* from = parts.const_data_ptr<float>();
  float* to = sum.data_ptr<float>();
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[part * size + i];
    }
  });
  return sum;
}

}  // namespace mmvmamba
