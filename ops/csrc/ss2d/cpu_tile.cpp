#include <algorithm>

#include "common/ceil_div.h"
#include "common/elementary.h"
#include "ss2d/cpu_tile.h"

namespace mmvmamba {
namespace ss2d {
namespace {

// Vectors of so many floats; a processor of narrower registers takes several. Eight, and where registers hold sixteen,
// forward takes those: a channel has the same numbers in both. (Templates would drop the attributes of type arguments.)
template <int kFloats> struct Lanes;
template <> struct Lanes<kLanes> {
  typedef float V __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  typedef uint32_t I __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
};
template <> struct Lanes<2 * kLanes> {
  typedef float V __attribute__((vector_size(8 * kLanes), aligned(4), may_alias));
  typedef uint32_t I __attribute__((vector_size(8 * kLanes), aligned(4), may_alias));
};
template <int kFloats> struct TileOf {
  typename Lanes<kFloats>::V value[kSteps][kWidth / kFloats];
  auto& operator[](int step) { return value[step]; }
  const auto& operator[](int step) const { return value[step]; }
};
using Vector = Lanes<kLanes>::V;
using Tile = TileOf<kLanes>;

template <int kFloats = kLanes> MMVMAMBA_INLINE const typename Lanes<kFloats>::V& load(const float* from) {
  return *reinterpret_cast<const typename Lanes<kFloats>::V*>(from);
}
template <int kFloats = kLanes> MMVMAMBA_INLINE typename Lanes<kFloats>::V& at(float* to) {
  return *reinterpret_cast<typename Lanes<kFloats>::V*>(to);
}

MMVMAMBA_INLINE float sum_of(const Vector& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// sum[i][j] += the sum over k < depth of row[i][k] * matrix[k][j], in registers; matrix has rows of `stride` numbers
template <int kFloats, int kRows, int kColumns>
MMVMAMBA_INLINE void multiply(const float* const (&row)[kRows], const float* matrix, int64_t stride, int depth,
                              typename Lanes<kFloats>::V (&sum)[kRows][kColumns]) {
  for (int k = 0; k < depth; ++k, matrix += stride) {
    typename Lanes<kFloats>::V column[kColumns];
    for (int j = 0; j < kColumns; ++j) column[j] = load<kFloats>(matrix + j * kFloats);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) sum[i][j] += row[i][k] * column[j];
    }
  }
}

// kColumns vectors of u = dt_weight dt + bias from vector v on; those of the tile begin at channel `first_channel`
template <int kFloats, int kColumns>
MMVMAMBA_INLINE void project_columns(const Block& p, const int64_t* pixel, int steps, int first_channel, int v,
                                     TileOf<kFloats>& u) {
  constexpr int kRows = 4;  // pixels that share a load of the weights
  const int channel = first_channel + v * kFloats;
  for (int first = 0; first < steps; first += kRows) {
    const float* dt[kRows];
    typename Lanes<kFloats>::V sum[kRows][kColumns];
    for (int i = 0; i < kRows; ++i) {
      dt[i] = p.projections + pixel[std::min(first + i, steps - 1)] * p.columns;
      for (int j = 0; j < kColumns; ++j) sum[i][j] = load<kFloats>(p.bias + channel + j * kFloats);
    }
    multiply<kFloats>(dt, p.dt_weight + channel, p.channels, p.rank, sum);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) u[first + i][v + j] = sum[i][j];
    }
  }
}

template <int kFloats>
MMVMAMBA_INLINE void project(const Block& p, const int64_t* pixel, int steps, int first_channel, int vectors,
                             TileOf<kFloats>& u) {
  int v = 0;
  for (; v + 2 <= vectors; v += 2) project_columns<kFloats, 2>(p, pixel, steps, first_channel, v, u);
  if (v < vectors) project_columns<kFloats, 1>(p, pixel, steps, first_channel, v, u);
}

// u becomes delta = softplus(u); slope its derivative, for backward
template <int kFloats, bool kSlope>
MMVMAMBA_INLINE void activate(int vectors, int steps, TileOf<kFloats>& u, TileOf<kFloats>& slope) {
  using V = typename Lanes<kFloats>::V;
  for (int t = 0; t < steps; ++t) {
    for (int v = 0; v < vectors; ++v) {
      const V value = u[t][v], zero = {};
      V small = value < 0 ? value : -value;
      to_exp_of_negative<V, typename Lanes<kFloats>::I>(small);
      if (kSlope) slope[t][v] = (value > 0 ? zero + 1.f : small) / (small + 1.f);
      to_log1p(small);
      u[t][v] = (value > 0 ? value : zero) + small;
    }
  }
}

// forward_tile for the vectors of a block that begin at a channel
template <int kFloats>
MMVMAMBA_INLINE void forward_vectors(const Block& p, const int64_t* pixel, int steps, int first_channel, int vectors,
                                     float* h, float* y) {
  using V = typename Lanes<kFloats>::V;
  TileOf<kFloats> delta;
  project<kFloats>(p, pixel, steps, first_channel, vectors, delta);
  activate<kFloats, false>(vectors, steps, delta, delta);
  for (int state = 0; state < p.states; ++state) {
    const float *B = p.projections + p.rank + state, *C = B + p.states;
    for (int v = 0; v < vectors; ++v) {
      const int64_t channel = first_channel + v * kFloats, row = state * p.channels + channel;
      const V A = load<kFloats>(p.A + row);
      V now = load<kFloats>(h + row);
      for (int t = 0; t < steps; ++t) {
        const int64_t offset = pixel[t] * p.channels + channel;
        const float B_t = B[pixel[t] * p.columns], C_t = C[pixel[t] * p.columns];
        V decay = delta[t][v] * A;
        to_exp_of_negative<V, typename Lanes<kFloats>::I>(decay);
        now = decay * now + delta[t][v] * load<kFloats>(p.x + offset) * B_t;
        at<kFloats>(y + offset) += C_t * now;
      }
      at<kFloats>(h + row) = now;
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
    for (int i = 0; i < kRows; ++i) row[i] = reinterpret_cast<const float*>(&du[first + i]);
    multiply<kLanes>(row, p.dt_transposed + r, padded, p.width, sum);
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
    to_exp_of_negative<Vector, Lanes<kLanes>::I>(decay[t]);
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

MMVMAMBA_NARROW_CLONES void forward_tile_narrow(const Block& p, const int64_t* pixel, int steps, float* h, float* y) {
  forward_vectors<kLanes>(p, pixel, steps, 0, p.width / kLanes, h, y);
}

#ifdef MMVMAMBA_WIDE
MMVMAMBA_WIDE void forward_tile_wide(const Block& p, const int64_t* pixel, int steps, float* h, float* y) {
  const int vectors = p.width / (2 * kLanes), rest = vectors * 2 * kLanes;
  if (vectors) forward_vectors<2 * kLanes>(p, pixel, steps, 0, vectors, h, y);
  if (rest < p.width) forward_vectors<kLanes>(p, pixel, steps, rest, 1, h, y);
}
#endif

void forward_tile(const Block& p, const int64_t* pixel, int steps, float* h, float* y) {
#ifdef MMVMAMBA_WIDE
  static const bool wide = has_wide_registers();
  if (wide) return forward_tile_wide(p, pixel, steps, h, y);
#endif
  forward_tile_narrow(p, pixel, steps, h, y);
}

MMVMAMBA_CLONES void backward_tile(const Block& p, const int64_t* pixel, int steps, const float* h, const float* dy,
                                   float* flow, const Gradients& g) {
  constexpr int kTogether = 8;  // pixels of project_backward; those beyond the last are zero
  const int vectors = p.width / kLanes, rows = ceil_div(steps, kTogether) * kTogether;
  Tile delta, slope, dx, du;  // du: the gradient of delta, then of u
  project<kLanes>(p, pixel, steps, 0, vectors, delta);
  activate<kLanes, true>(vectors, steps, delta, slope);
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
