#include <algorithm>

#include "common/ceil_div.h"
#include "common/elementary.h"
#include "ss2d/cpu_tile.h"

namespace mmvmamba {
namespace ss2d {
namespace {

// Eight floats; a processor of narrower registers takes several.
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
constexpr int kVectors = kWidth / kLanes;
using Tile = Vector[kSteps][kVectors];

MMVMAMBA_INLINE const Vector& load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
MMVMAMBA_INLINE Vector& at(float* to) { return *reinterpret_cast<Vector*>(to); }

MMVMAMBA_INLINE float sum_of(const Vector& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// sum[i][j] += the sum over k < depth of row[i][k] * matrix[k][j], in registers; matrix has rows of `stride` numbers
template <int kRows, int kColumns>
MMVMAMBA_INLINE void multiply(const float* const (&row)[kRows], const float* matrix, int64_t stride, int depth,
                              Vector (&sum)[kRows][kColumns]) {
  for (int k = 0; k < depth; ++k, matrix += stride) {
    Vector column[kColumns];
    for (int j = 0; j < kColumns; ++j) column[j] = load(matrix + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) sum[i][j] += row[i][k] * column[j];
    }
  }
}

// kColumns vectors of u = dt_weight dt + bias from vector v on
template <int kColumns>
MMVMAMBA_INLINE void project_columns(const Block& p, const int64_t* pixel, int steps, int v, Tile& u) {
  constexpr int kRows = 4;  // pixels that share a load of the weights
  for (int first = 0; first < steps; first += kRows) {
    const float* dt[kRows];
    Vector sum[kRows][kColumns];
    for (int i = 0; i < kRows; ++i) {
      dt[i] = p.projections + pixel[std::min(first + i, steps - 1)] * p.columns;
      for (int j = 0; j < kColumns; ++j) sum[i][j] = load(p.bias + (v + j) * kLanes);
    }
    multiply(dt, p.dt_weight + v * kLanes, p.channels, p.rank, sum);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) u[first + i][v + j] = sum[i][j];
    }
  }
}

MMVMAMBA_INLINE void project(const Block& p, const int64_t* pixel, int steps, Tile& u) {
  const int vectors = p.width / kLanes;
  int v = 0;
  for (; v + 2 <= vectors; v += 2) project_columns<2>(p, pixel, steps, v, u);
  if (v < vectors) project_columns<1>(p, pixel, steps, v, u);
}

// u becomes delta = softplus(u); slope its derivative, for backward
template <bool kSlope> MMVMAMBA_INLINE void activate(int vectors, int steps, Tile& u, Tile& slope) {
  for (int t = 0; t < steps; ++t) {
    for (int v = 0; v < vectors; ++v) {
      const Vector value = u[t][v], zero = {};
      Vector small = value < 0 ? value : -value;
      to_exp_of_negative<Vector, Integers>(small);
      if (kSlope) slope[t][v] = (value > 0 ? zero + 1.f : small) / (small + 1.f);
      to_log1p(small);
      u[t][v] = (value > 0 ? value : zero) + small;
    }
  }
}

// ddt = dt_weight^T du, added to the columns of dt
template <int kRows, int kColumns>
MMVMAMBA_INLINE void project_backward(const Block& p, const int64_t* pixel, int steps, int r, const Tile& du,
                                      float* dprojections) {
  const int padded = ceil_div(p.rank, kLanes) * kLanes, ranks = std::min(kColumns * kLanes, p.rank - r);
  for (int first = 0; first < steps; first += kRows) {
    const float* row[kRows];
    Vector sum[kRows][kColumns] = {};
    for (int i = 0; i < kRows; ++i) row[i] = reinterpret_cast<const float*>(du[first + i]);
    multiply(row, p.dt_transposed + r, padded, p.width, sum);
    float values[kRows][kColumns * kLanes];
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) at(values[i] + j * kLanes) = sum[i][j];
    }
    for (int i = 0; i < std::min(kRows, steps - first); ++i) {
      float* to = dprojections + pixel[first + i] * p.columns + r;
      for (int j = 0; j < ranks; ++j) to[j] += values[i][j];
    }
  }
}

// The weights' gradient of kRanks ranks and kColumns vectors: the sum over pixels of dt du
template <int kRanks, int kColumns>
MMVMAMBA_INLINE void weight_backward(const Block& p, const int64_t* pixel, int steps, int r, int v, const Tile& du,
                                     float* dweight) {
  Vector sum[kRanks][kColumns] = {};
  for (int t = 0; t < steps; ++t) {
    const float* dt = p.projections + pixel[t] * p.columns + r;
    for (int i = 0; i < kRanks; ++i) {
      for (int j = 0; j < kColumns; ++j) sum[i][j] += dt[i] * du[t][v + j];
    }
  }
  for (int i = 0; i < kRanks; ++i) {
    for (int j = 0; j < kColumns; ++j) at(dweight + (r + i) * p.channels + (v + j) * kLanes) += sum[i][j];
  }
}

template <int kColumns>
MMVMAMBA_INLINE void weight_columns(const Block& p, const int64_t* pixel, int steps, int v, const Tile& du,
                                    float* dweight) {
  int r = 0;
  for (; r + 4 <= p.rank; r += 4) weight_backward<4, kColumns>(p, pixel, steps, r, v, du, dweight);
  if (r + 2 <= p.rank) weight_backward<2, kColumns>(p, pixel, steps, r, v, du, dweight), r += 2;
  if (r < p.rank) weight_backward<1, kColumns>(p, pixel, steps, r, v, du, dweight);
}

// Vector v of one state: the states again, then their adjoint. Adds to dx, ddelta, dA and to the lanes of dB and dC.
MMVMAMBA_INLINE void adjoint_of_state(const Block& p, const int64_t* pixel, int steps, int v, int state, const float* h,
                                      const float* dy, const Tile& delta, float* flow, Tile& dx, Tile& ddelta,
                                      Vector (&dB)[kSteps], Vector (&dC)[kSteps], float* dA) {
  Vector decay[kSteps], before[kSteps];
  const int64_t row = state * p.channels + v * kLanes;
  const Vector A = load(p.A + row);
  const float *B = p.projections + p.rank + state, *C = B + p.states, *x = p.x + v * kLanes;
  dy += v * kLanes;
  Vector now = load(h + row);
  for (int t = 0; t < steps; ++t) {
    decay[t] = delta[t][v] * A;
    to_exp_of_negative<Vector, Integers>(decay[t]);
    before[t] = now;
    now = decay[t] * now + delta[t][v] * load(x + pixel[t] * p.channels) * B[pixel[t] * p.columns];
  }
  Vector in = load(flow + state * kWidth + v * kLanes), sum = {};
  for (int t = steps - 1; t >= 0; --t) {
    const float B_t = B[pixel[t] * p.columns], C_t = C[pixel[t] * p.columns];
    const Vector x_t = load(x + pixel[t] * p.channels), dy_t = load(dy + pixel[t] * p.channels), delta_t = delta[t][v];
    const Vector g = in + C_t * dy_t, drive = delta_t * x_t, scaled = B_t * g;
    dC[t] += dy_t * (decay[t] * before[t] + B_t * drive);
    dB[t] += g * drive;
    in = decay[t] * g;
    const Vector ddecay = in * before[t];
    dx[t][v] += scaled * delta_t;
    ddelta[t][v] += scaled * x_t + A * ddecay;
    sum += ddecay * delta_t;
  }
  at(flow + state * kWidth + v * kLanes) = in;
  at(dA + row) += sum;
}

}  // namespace

MMVMAMBA_CLONES void skip_forward(int64_t pixels, int64_t channels, int width, const float* skip, const float* x,
                                  float* y) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int c = 0; c < width; c += kLanes) at(y + p * channels + c) = load(skip + c) * load(x + p * channels + c);
  }
}

MMVMAMBA_CLONES void skip_backward(int64_t pixels, int64_t channels, int width, const float* skip, const float* x,
                                   const float* dy, float* dx, float* dskip) {
  for (int c = 0; c < width; c += kLanes) at(dskip + c) = Vector{};
  for (int64_t p = 0; p < pixels; ++p) {
    for (int c = 0; c < width; c += kLanes) {
      const Vector dy_p = load(dy + p * channels + c);
      at(dx + p * channels + c) = load(skip + c) * dy_p;
      at(dskip + c) += dy_p * load(x + p * channels + c);
    }
  }
}

MMVMAMBA_CLONES void forward_tile(const Block& p, const int64_t* pixel, int steps, float* h, float* y) {
  const int vectors = p.width / kLanes;
  Tile delta;
  project(p, pixel, steps, delta);
  activate<false>(vectors, steps, delta, delta);
  for (int state = 0; state < p.states; ++state) {
    const float *B = p.projections + p.rank + state, *C = B + p.states;
    for (int v = 0; v < vectors; ++v) {
      const int64_t row = state * p.channels + v * kLanes;
      const Vector A = load(p.A + row);
      Vector now = load(h + row);
      for (int t = 0; t < steps; ++t) {
        const int64_t offset = pixel[t] * p.channels + v * kLanes;
        const float B_t = B[pixel[t] * p.columns], C_t = C[pixel[t] * p.columns];
        Vector decay = delta[t][v] * A;
        to_exp_of_negative<Vector, Integers>(decay);
        now = decay * now + delta[t][v] * load(p.x + offset) * B_t;
        at(y + offset) += C_t * now;
      }
      at(h + row) = now;
    }
  }
}

MMVMAMBA_CLONES void backward_tile(const Block& p, const int64_t* pixel, int steps, const float* h, const float* dy,
                                   float* flow, const Gradients& g) {
  constexpr int kTogether = 8;  // pixels of project_backward; those beyond the last are zero
  const int vectors = p.width / kLanes, rows = ceil_div(steps, kTogether) * kTogether;
  Tile delta, slope, dx, du;  // du: the gradient of delta, then of u
  project(p, pixel, steps, delta);
  activate<true>(vectors, steps, delta, slope);
  for (int t = 0; t < rows; ++t) {
    for (int v = 0; v < vectors; ++v) dx[t][v] = du[t][v] = Vector{};
  }
  for (int state = 0; state < p.states; ++state) {
    Vector dB[kSteps] = {}, dC[kSteps] = {};
    for (int v = 0; v < vectors; ++v) {
      adjoint_of_state(p, pixel, steps, v, state, h, dy, delta, flow, dx, du, dB, dC, g.A);
    }
    for (int t = 0; t < steps; ++t) {
      float* to = g.dprojections + pixel[t] * p.columns + p.rank + state;
      to[0] += sum_of(dB[t]);
      to[p.states] += sum_of(dC[t]);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    Vector sum = {};
    for (int t = 0; t < steps; ++t) {
      sum += du[t][v] *= slope[t][v];
      at(g.dx + pixel[t] * p.channels + v * kLanes) += dx[t][v];
    }
    at(g.bias + v * kLanes) += sum;
  }
  int r = 0;
  for (; r + kLanes < p.rank; r += 2 * kLanes)
    project_backward<kTogether / 2, 2>(p, pixel, steps, r, du, g.dprojections);
  if (r < p.rank) project_backward<kTogether, 1>(p, pixel, steps, r, du, g.dprojections);
  int v = 0;
  for (; v + 2 <= vectors; v += 2) weight_columns<2>(p, pixel, steps, v, du, g.dt_weight);
  if (v < vectors) weight_columns<1>(p, pixel, steps, v, du, g.dt_weight);
}

}  // namespace ss2d
}  // namespace mmvmamba
