// Small kernels around the scans for N = 2 to 16 states a channel: parameters in, parameter gradients out. A thread a
// value, neighbours along the channels.
#pragma once

#include <cfloat>

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/softplus.cuh"
#include "ss2d/states/kernels.h"

namespace mmvmamba {
namespace ss2d {
namespace states {

constexpr int kThreads = 256;

// Route of the op that pair-order index q stands for, and back: (0, 2 | 1, 3).
__device__ __forceinline__ int route_of(int q) { return (q & 1) * 2 + (q >> 1); }

__device__ __forceinline__ int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Row of x_proj that a column of the projections is; -1 for padding.
template <typename Problem> __device__ __forceinline__ int projected_row(const Problem& p, int column) {
  if (column < p.dt_columns) return column < p.rank ? column : -1;
  const int state = column - p.dt_columns, which = state / p.padded_states, n = state % p.padded_states;
  return which < 2 && n < p.states ? p.rank + which * p.states + n : -1;
}
template <typename Problem> __device__ __forceinline__ float row_scale(const Problem& p, int row) {
  return row >= p.rank && row < p.rank + p.states ? kLn2 : 1.f;  // B has ln 2 folded in
}

// One thread a channel of a column of a route; `columns` are at least as many as the states.
template <typename T> struct PrepareKernel {
  static constexpr int kThreads = states::kThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const Prepare& p) {
    const int64_t number = thread_number();
    if (number >= int64_t{4} * p.columns * p.padded) return;
    const int channel = number % p.padded, column = number / p.padded % p.columns;
    const int q = number / p.padded / p.columns, route = route_of(q);
    const bool active = channel < p.channels;
    const int64_t own = static_cast<int64_t>(route) * p.channels + channel;
    if (active) {
      const int row = projected_row(p, column);
      const float* from = p.x_proj + static_cast<int64_t>(route) * (p.rank + 2 * p.states) * p.channels + channel;
      const float value = row < 0 ? 0.f : row_scale(p, row) * from[static_cast<int64_t>(row) * p.channels];
      static_cast<T*>(p.weight)[(static_cast<int64_t>(q) * p.columns + column) * p.channels + channel] =
          narrow<T>(value);
    }
    if (column < p.dt_columns) {
      const float dt = active && column < p.rank ? kLog2e * p.dt_proj[own * p.rank + column] : 0.f;
      if (active) {
        static_cast<T*>(p.dt_matrix)[(static_cast<int64_t>(q) * p.dt_columns + column) * p.channels + channel] =
            narrow<T>(dt);
      }
      p.dt_weight[(static_cast<int64_t>(q) * p.dt_columns + column) * p.padded + channel] = dt;
    }
    if (column < p.padded_states) {
      // a state that only pads has no drive and no output
      const float A = active && column < p.states ? -expf(p.A_logs[own * p.states + column]) : 0.f;
      p.A[(q * p.padded_states + column) * p.padded + channel] = A < -FLT_MAX ? -FLT_MAX : A;  // inert steps: A 0 is 0
    }
    if (column == 0) {
      p.bias[q * p.padded + channel] = active ? kLog2e * p.dt_bias[own] : 0.f;
      if (q == 0) {
        float skip = 0.f;
        for (int k = 0; k < 4 && active; ++k) skip += p.Ds[k * p.channels + channel];
        p.skip[channel] = skip;
      }
    }
  }
};

// The sum of `rows` values, `stride` from one to the next, in their order.
template <typename E> __device__ __forceinline__ float sum_rows(const E* from, int64_t stride, int64_t rows) {
  float sum = 0.f;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) sum += widen(from[row * stride]);
  return sum;
}

// One thread a value of the gradients of x_proj, then of dt_proj, then of bias, A and D, each of 4 routes.
template <typename T> struct FinishKernel {
  static constexpr int kThreads = states::kThreads, kBlocks = 0;

  __host__ __device__ static int64_t threads(const Finish& p) {
    return int64_t{4} * p.channels * (p.columns + p.rank + p.padded_states + 2);
  }

  static __device__ __forceinline__ void run(const Finish& p) {
    const int64_t number = thread_number();
    if (number >= threads(p)) return;
    const int channel = number % p.channels;
    int row = number / p.channels;  // of those before
    if (row < 4 * p.columns) {
      weight(p, row / p.columns, row % p.columns, channel);
      return;
    }
    row -= 4 * p.columns;
    if (row < 4 * p.rank) {
      matrix(p, row / p.rank, row % p.rank, channel);
      return;
    }
    row -= 4 * p.rank;
    sums(p, row / (p.padded_states + 2), row % (p.padded_states + 2), channel);
  }

  static __device__ __forceinline__ void weight(const Finish& p, int q, int column, int channel) {
    const int row = projected_row(p, column);
    if (row < 0) return;
    const int64_t size = int64_t{4} * p.columns * p.channels;
    const T* from =
        static_cast<const T*>(p.dweight) + (static_cast<int64_t>(q) * p.columns + column) * p.channels + channel;
    p.dx_proj[(static_cast<int64_t>(route_of(q)) * (p.rank + 2 * p.states) + row) * p.channels + channel] =
        row_scale(p, row) * sum_rows(from, size, p.weight_parts);
  }

  static __device__ __forceinline__ void matrix(const Finish& p, int q, int row, int channel) {
    const int64_t size = static_cast<int64_t>(p.dt_columns) * p.channels;
    const T* from = static_cast<const T*>(p.ddt) + q * p.matrix_parts * size + row * p.channels + channel;
    p.ddt_proj[(static_cast<int64_t>(route_of(q)) * p.channels + channel) * p.rank + row] =
        kLog2e * sum_rows(from, size, p.matrix_parts);
  }

  static __device__ __forceinline__ void sums(const Finish& p, int q, int which, int channel) {
    if (which < p.padded_states ? which >= p.states : which > p.padded_states && q > 0) return;
    const int64_t size = int64_t{2} * (p.padded_states + 2) * p.padded;
    const float* from =
        p.partial + q / 2 * p.rows * size + (q % 2 * (p.padded_states + 2) + which) * p.padded + channel;
    const float sum = sum_rows(from, size, p.rows);
    const int64_t own = static_cast<int64_t>(route_of(q)) * p.channels + channel;
    if (which < p.states) {
      p.dA_logs[own * p.states + which] = kLn2 * p.A[(q * p.padded_states + which) * p.padded + channel] * sum;
    } else if (which == p.padded_states) {
      p.ddt_bias[own] = kLog2e * sum;
    } else {
      for (int k = 0; k < 4; ++k) p.dDs[k * p.channels + channel] = sum;  // every route adds D x at every pixel
    }
  }
};

// One thread a value.
template <typename T, int N> struct AddPartsKernel {
  static constexpr int kThreads = states::kThreads, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p) {
    const int width = p.columns - p.dt_columns;
    const int64_t number = thread_number(), rows = p.batch * p.length * 4, row = number / width;
    if (row >= rows) return;
    const int column = number % width;
    float sum = 0.f;
    if (column < 2 * N) sum = sum_rows(p.parts + row * 2 * N + column, rows * 2 * N, p.splits);
    static_cast<T*>(p.dprojections)[row * p.columns + p.dt_columns + column] = narrow<T>(sum);
  }
};

}  // namespace states
}  // namespace ss2d
}  // namespace mmvmamba
