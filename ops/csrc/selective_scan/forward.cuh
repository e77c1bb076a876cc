// Selective scan, forward. A warp scans a row (batch, channel) 256 steps at a time, eight consecutive ones a lane: each
// lane folds its steps into one affine map, a shuffle scan gives the state that enters it, and a second pass over
// registers gives the outputs. A block's warps take channels of one group, which share B and C; the state goes from
// chunk to chunk in shared memory. Rows of up to 64 steps take eight lanes, four channels a warp. Moves u and delta in,
// out once, B and C once a warp (mostly from L1 and L2), and N floats a chunk of states.
#pragma once

#include "selective_scan/common.cuh"

namespace mmvmamba {
namespace scan {

template <typename T, bool kSingle, int kLanes>
struct ForwardKernel {
  static constexpr int kThreads = 32 * kMaxWarps, kBlocks = 0;
  using Work = scan::Work<T, kSingle, kLanes>;

  // Begin from zero: the states of the warp's rows in shared memory, and the first ones saved.
  static __device__ __forceinline__ void clear(const Work& work, float* states) {
    const Args& p = work.p;
    if (work.place.part == 0) {
      for (int turn = 0; turn < p.turns; ++turn) {
        for (int n = 0; n < work.N; ++n) states[work.place.cell(p, turn, n)] = 0.f;
        if (work.valid(turn)) {
          for (int n = 0; n < work.N; ++n) p.states[work.row_of(turn) * (p.chunks + 1) * work.N + n] = 0.f;
        }
      }
    }
    __syncwarp();
  }

  // One state of a row over the lane's steps: adds to y. `u` is the input times the step sizes dt; `state` what enters
  // the chunk, and then leaves it; `saved` likewise in memory, null for a thread without a channel.
  static __device__ __forceinline__ void scan_state(const float (&dt)[kSteps], const float (&u)[kSteps], float A,
                                                    const Raw<T>& raw_B, const Raw<T>& raw_C, int part, float* state,
                                                    float* saved, float (&y)[kSteps]) {
    float a[kSteps], b[kSteps], decay = 1.f, drive = 0.f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      a[j] = exp2f(dt[j] * A);
      b[j] = u[j] * widen(raw_B.values[j]);
      drive = fmaf(a[j], drive, b[j]);
      decay *= a[j];
    }
    warp_scan<kLanes, true>(decay, drive, part);
    const float carry = *state;
    float h = entering_state<kLanes, true>(decay, drive, carry, part);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      h = fmaf(a[j], h, b[j]);
      y[j] = fmaf(widen(raw_C.values[j]), h, y[j]);
    }
    __syncwarp();
    if (part == kLanes - 1) {
      *state = h;
      if (saved != nullptr) *saved = h;
    }
    __syncwarp();
  }

  // Step sizes dt, y = D u, and u times dt.
  static __device__ __forceinline__ void start_row(const Args& p, int channel, int t, const Raw<T>& raw_u,
                                                   const Raw<T>& raw_delta, float (&u)[kSteps], float (&dt)[kSteps],
                                                   float (&y)[kSteps]) {
    unpack(raw_u, u);
    raw_steps(raw_delta, p.bias ? p.bias[channel] : 0.f, p.softplus, t, p.length, dt);
    if (p.softplus) {
      float z;
#pragma unroll
      for (int j = 0; j < kSteps; ++j) dt[j] = softplus(dt[j], z);
    }
    const float skip = p.D ? p.D[channel] : 0.f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      y[j] = skip * u[j];
      u[j] *= dt[j];
    }
  }

  static __device__ __forceinline__ void store_row(const Args& p, int64_t row, int t, const float (&y)[kSteps]) {
    if (p.float_out) {
      store(y, static_cast<float*>(p.out) + row * p.length, t, p.length, p.float_vector);
    } else {
      store(y, static_cast<T*>(p.out) + row * p.length, t, p.length, p.vector);
    }
  }

  static __device__ __forceinline__ void run(const Args& p) {
    float* states = shared_memory<float>();
    const Work work(p);
    const int part = work.place.part;
    clear(work, states);
    int t = part * kSteps;
    Raw<T> next_u = work.load_row(p.u, work.row_of(0), t), next_delta = work.load_row(p.delta, work.row_of(0), t);
    for (int chunk = 0; chunk < p.chunks; ++chunk, t += kChunk) {
      Raw<T> raw_B, raw_C;
      if (kSingle) raw_B = work.load_state(work.B, 0, t), raw_C = work.load_state(work.C, 0, t);
      for (int turn = 0; turn < p.turns; ++turn) {
        const int64_t row = work.row_of(turn);
        const int channel = work.channel_of(row);
        const bool valid = work.valid(turn);
        const Raw<T> raw_u = next_u, raw_delta = next_delta;
        {  // the next turn's loads, in flight during this one's arithmetic
          const bool last_turn = turn + 1 == p.turns;
          const int64_t next = work.row_of(last_turn ? 0 : turn + 1);
          const int next_t = last_turn ? t + kChunk : t;
          if (next_t - part * kSteps < p.length) {
            next_u = work.load_row(p.u, next, next_t);
            next_delta = work.load_row(p.delta, next, next_t);
          }
        }
        float u[kSteps], dt[kSteps], y[kSteps];
        start_row(p, channel, t, raw_u, raw_delta, u, dt, y);
        for (int n = 0; n < work.N; ++n) {
          if (!kSingle) raw_B = work.load_state(work.B, n, t), raw_C = work.load_state(work.C, n, t);
          const float A = base_two(p.A[static_cast<int64_t>(channel) * work.N + n]);
          float* saved = valid ? &p.states[(row * (p.chunks + 1) + chunk + 1) * work.N + n] : nullptr;
          scan_state(dt, u, A, raw_B, raw_C, part, &states[work.place.cell(p, turn, n)], saved, y);
        }
        if (valid) store_row(p, row, t, y);
      }
    }
  }
};

template <typename T>
void Kernels<T>::forward(const Args& p, cudaStream_t stream) {
  const int64_t blocks = p.pairs * p.splits;
  const int threads = 32 * p.warps;
  const size_t shared = sizeof(float) * p.warps * p.turns * slots(p) * p.d_state;
  if (short_rows(p)) {
    launch<ForwardKernel<T, true, 8>>(blocks, threads, shared, stream, p);
  } else if (p.d_state == 1) {
    launch<ForwardKernel<T, true, 32>>(blocks, threads, shared, stream, p);
  } else {
    launch<ForwardKernel<T, false, 32>>(blocks, threads, shared, stream, p);
  }
}

}  // namespace scan
}  // namespace mmvmamba
