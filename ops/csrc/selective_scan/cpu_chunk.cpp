#include "common/elementary.h"
#include "selective_scan/cpu_chunk.h"

namespace mmvmamba {
namespace {

template <typename T>
MMVMAMBA_INLINE void softplus_impl(T* __restrict x, int steps) {
  for (int t = 0; t < steps; ++t) {
    const T v = x[t], magnitude = v < 0 ? -v : v;
    x[t] = (v > 0 ? v : T(0)) + log1p_(exp_of_negative(-magnitude));
  }
}

template <typename T>
MMVMAMBA_INLINE void mul_sigmoid_impl(const T* __restrict x, T* __restrict g, int steps) {
  for (int t = 0; t < steps; ++t) g[t] *= T(1) / (T(1) + exp_(-x[t]));
}

// Four chains at once: the recurrence waits for its own result, not for the processor's width.
template <typename T>
MMVMAMBA_INLINE void recur_forward(const T (*__restrict a)[kChunk], T (*__restrict b)[kChunk], T* __restrict h,
                                   int steps) {
  T h0 = h[0], h1 = h[1], h2 = h[2], h3 = h[3];
  for (int t = 0; t < steps; ++t) {
    b[0][t] = h0 = a[0][t] * h0 + b[0][t];
    b[1][t] = h1 = a[1][t] * h1 + b[1][t];
    b[2][t] = h2 = a[2][t] * h2 + b[2][t];
    b[3][t] = h3 = a[3][t] * h3 + b[3][t];
  }
  h[0] = h0, h[1] = h1, h[2] = h2, h[3] = h3;
}

// s_t += flow, flow = a_t s_t, from the last step to the first
template <typename T>
MMVMAMBA_INLINE void recur_backward(const T (*__restrict a)[kChunk], T (*__restrict s)[kChunk], T* __restrict flow,
                                    int steps) {
  T f0 = flow[0], f1 = flow[1], f2 = flow[2], f3 = flow[3];
  for (int t = steps - 1; t >= 0; --t) {
    f0 = a[0][t] * (s[0][t] += f0);
    f1 = a[1][t] * (s[1][t] += f1);
    f2 = a[2][t] * (s[2][t] += f2);
    f3 = a[3][t] * (s[3][t] += f3);
  }
  flow[0] = f0, flow[1] = f1, flow[2] = f2, flow[3] = f3;
}

template <typename T>
MMVMAMBA_INLINE void scan_impl(const T* __restrict dt, const T* __restrict u, const T* __restrict B,
                               const T* __restrict C, const T* __restrict A, T* __restrict h, T* __restrict y,
                               int steps) {
  T a[kRows][kChunk], states[kRows][kChunk];
  for (int r = 0; r < kRows; ++r) {
    const T* __restrict dt_ = dt + r * kChunk, * __restrict u_ = u + r * kChunk;
    for (int t = 0; t < steps; ++t) {
      a[r][t] = exp_(dt_[t] * A[r]);
      states[r][t] = dt_[t] * u_[t] * B[t];
    }
  }
  recur_forward(a, states, h, steps);
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < steps; ++t) y[r * kChunk + t] += C[t] * states[r][t];
  }
}

template <typename T>
MMVMAMBA_INLINE void scan_backward_impl(const T* __restrict dt, const T* __restrict u, const T* __restrict B,
                                        const T* __restrict C, const T* __restrict dy, const T* __restrict A,
                                        const T* __restrict h0, T* __restrict flow, T* __restrict du, T* __restrict ddt,
                                        T* __restrict dB, T* __restrict dC, T* __restrict dA, int steps) {
  T a[kRows][kChunk], h[kRows][kChunk], s[kRows][kChunk], state[kRows];
  for (int r = 0; r < kRows; ++r) {
    const T* __restrict dt_ = dt + r * kChunk, * __restrict u_ = u + r * kChunk, * __restrict dy_ = dy + r * kChunk;
    state[r] = h0[r];
    for (int t = 0; t < steps; ++t) {
      a[r][t] = exp_(dt_[t] * A[r]);
      h[r][t] = dt_[t] * u_[t] * B[t];
      s[r][t] = C[t] * dy_[t];
    }
  }
  recur_forward(a, h, state, steps);
  recur_backward(a, s, flow, steps);
  for (int r = 0; r < kRows; ++r) {
    const T* __restrict dt_ = dt + r * kChunk, * __restrict u_ = u + r * kChunk, * __restrict dy_ = dy + r * kChunk;
    T* __restrict du_ = du + r * kChunk, * __restrict ddt_ = ddt + r * kChunk;
    const auto step = [&](int t, T before) {
      const T grad_decay = s[r][t] * (a[r][t] * before), input = s[r][t] * B[t];
      du_[t] += input * dt_[t];
      ddt_[t] += input * u_[t] + A[r] * grad_decay;
      a[r][t] = grad_decay * dt_[t];
    };
    if (steps > 0) step(0, h0[r]);
    for (int t = 1; t < steps; ++t) step(t, h[r][t - 1]);
    for (int t = 0; t < steps; ++t) {
      dB[t] += s[r][t] * dt_[t] * u_[t];
      dC[t] += dy_[t] * h[r][t];
    }
    T lanes[16] = {};
    int t = 0;
    for (; t + 16 <= steps; t += 16) {
      for (int lane = 0; lane < 16; ++lane) lanes[lane] += a[r][t + lane];
    }
    for (; t < steps; ++t) lanes[0] += a[r][t];
    for (int lane = 0; lane < 16; ++lane) dA[r] += lanes[lane];
  }
}

}  // namespace

MMVMAMBA_CLONES void softplus(float* x, int steps) { softplus_impl(x, steps); }
void softplus(double* x, int steps) { softplus_impl(x, steps); }
MMVMAMBA_CLONES void mul_sigmoid(const float* x, float* g, int steps) { mul_sigmoid_impl(x, g, steps); }
void mul_sigmoid(const double* x, double* g, int steps) { mul_sigmoid_impl(x, g, steps); }

MMVMAMBA_CLONES void scan_chunk(const float* dt, const float* u, const float* B, const float* C, const float* A,
                                float* h, float* y, int steps) {
  scan_impl(dt, u, B, C, A, h, y, steps);
}
void scan_chunk(const double* dt, const double* u, const double* B, const double* C, const double* A, double* h,
                double* y, int steps) {
  scan_impl(dt, u, B, C, A, h, y, steps);
}

MMVMAMBA_CLONES void scan_chunk_backward(const float* dt, const float* u, const float* B, const float* C,
                                         const float* dy, const float* A, const float* h0, float* flow, float* du,
                                         float* ddt, float* dB, float* dC, float* dA, int steps) {
  scan_backward_impl(dt, u, B, C, dy, A, h0, flow, du, ddt, dB, dC, dA, steps);
}
void scan_chunk_backward(const double* dt, const double* u, const double* B, const double* C, const double* dy,
                         const double* A, const double* h0, double* flow, double* du, double* ddt, double* dB,
                         double* dC, double* dA, int steps) {
  scan_backward_impl(dt, u, B, C, dy, A, h0, flow, du, ddt, dB, dC, dA, steps);
}

}  // namespace mmvmamba
