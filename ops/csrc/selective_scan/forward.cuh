// Selective scan, forward. A warp scans a row (batch, channel) 256 steps at a time, eight consecutive ones a lane: each
// lane folds its steps into one affine map, a shuffle scan gives the state that enters it, and a second pass over
// registers gives the outputs. A block's warps take channels of one group, which share B and C; the state goes from chunk
// to chunk in shared memory. Rows of up to 64 steps take eight lanes, four channels a warp.
// Moves u and delta in, out once, B and C once a warp (mostly from L1 and L2), and N floats a chunk of carries.
#pragma once

#include "selective_scan/common.cuh"

namespace mmvmamba {
namespace scan {

template <typename T, bool kSingle, int kLanes>
__global__ void __launch_bounds__(32 * kMaxWarps) forward_kernel(const Args p) {
  extern __shared__ float states[];
  const Place<kLanes> place(p);
  const int part = place.part, N = kSingle ? 1 : p.states;
  const auto* B = static_cast<const T*>(p.B) + place.pair * N * p.length;
  const auto* C = static_cast<const T*>(p.C) + place.pair * N * p.length;
  const int64_t first_row = place.pair * p.channels;  // dim is groups * channels
  const auto row_of = [&](int turn) { return first_row + min(place.channel(p, turn), p.channels - 1); };

  if (part == 0) {
    for (int turn = 0; turn < p.turns; ++turn) {
      for (int n = 0; n < N; ++n) states[place.cell(p, turn, n)] = 0.f;
      if (place.channel(p, turn) < p.channels) {
        for (int n = 0; n < N; ++n) p.carries[row_of(turn) * (p.chunks + 1) * N + n] = 0.f;
      }
    }
  }
  __syncwarp();

  int t = part * kSteps;
  Raw<T> next_u = load(static_cast<const T*>(p.u) + row_of(0) * p.length, t, p.length, p.vector);
  Raw<T> next_delta = load(static_cast<const T*>(p.delta) + row_of(0) * p.length, t, p.length, p.vector);
  for (int chunk = 0; chunk < p.chunks; ++chunk, t += kChunk) {
    Raw<T> raw_B, raw_C;
    if (kSingle) raw_B = load(B, t, p.length, p.vector), raw_C = load(C, t, p.length, p.vector);
    for (int turn = 0; turn < p.turns; ++turn) {
      const int64_t row = row_of(turn);
      const int channel = static_cast<int>(row - place.pair / p.groups * p.groups * p.channels);
      const bool valid = place.channel(p, turn) < p.channels;
      const Raw<T> raw_u = next_u, raw_delta = next_delta;
      {  // the next turn's loads, in flight during this one's arithmetic
        const bool last_turn = turn + 1 == p.turns;
        const int64_t next = row_of(last_turn ? 0 : turn + 1) * p.length;
        const int next_t = last_turn ? t + kChunk : t;
        if (next_t - part * kSteps < p.length) {
          next_u = load(static_cast<const T*>(p.u) + next, next_t, p.length, p.vector);
          next_delta = load(static_cast<const T*>(p.delta) + next, next_t, p.length, p.vector);
        }
      }
      float u[kSteps], dt[kSteps], y[kSteps];
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
      for (int n = 0; n < N; ++n) {
        if (!kSingle) {
          raw_B = load(B + n * static_cast<int64_t>(p.length), t, p.length, p.vector);
          raw_C = load(C + n * static_cast<int64_t>(p.length), t, p.length, p.vector);
        }
        const float A = base_two(p.A[static_cast<int64_t>(channel) * N + n]);
        float a[kSteps], b[kSteps], decay = 1.f, drive = 0.f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          a[j] = exp2f(dt[j] * A);
          b[j] = u[j] * to_float(raw_B.values[j]);
          drive = fmaf(a[j], drive, b[j]);
          decay *= a[j];
        }
        warp_scan<kLanes, true>(decay, drive, part);
        float* state = &states[place.cell(p, turn, n)];
        const float carry = *state;
        float h = entering_state<kLanes, true>(decay, drive, carry, part);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          h = fmaf(a[j], h, b[j]);
          y[j] = fmaf(to_float(raw_C.values[j]), h, y[j]);
        }
        __syncwarp();
        if (part == kLanes - 1) {
          *state = h;
          if (valid) p.carries[(row * (p.chunks + 1) + chunk + 1) * N + n] = h;
        }
        __syncwarp();
      }
      if (valid && p.float_out) {
        store(y, static_cast<float*>(p.out) + row * p.length, t, p.length, p.float_vector);
      } else if (valid) {
        store(y, static_cast<T*>(p.out) + row * p.length, t, p.length, p.vector);
      }
    }
  }
}

template <typename T>
void forward(const Args& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(p.pairs * p.splits), threads = 32 * p.warps;
  const size_t shared = sizeof(float) * p.warps * p.turns * slots(p) * p.states;
  if (short_rows(p)) {
    forward_kernel<T, true, 8><<<blocks, threads, shared, stream>>>(p);
  } else if (p.states == 1) {
    forward_kernel<T, true, 32><<<blocks, threads, shared, stream>>>(p);
  } else {
    forward_kernel<T, false, 32><<<blocks, threads, shared, stream>>>(p);
  }
}

}  // namespace scan
}  // namespace mmvmamba
