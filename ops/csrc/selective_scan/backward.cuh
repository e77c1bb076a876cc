// Selective scan, backward. Chunks are taken from the last to the first; a warp recomputes a chunk's states from the
// saved carry, and runs the adjoint recurrence s_t = C_t dy_t + f_{t+1}, f_t = a_t s_t against time, both by shuffle
// scans as in forward. dB and dC are sums over a group's channels: a lane adds its warp's channels in registers, then
// the block its warps in shared memory, then launch_add_partial the blocks, each in a fixed order, so that results
// never vary. Moves dout, u and delta in, du and ddelta out, and 8 bytes a step, state and block of partial sums.
#pragma once

#include "common/ceil_div.h"
#include "selective_scan/common.cuh"

namespace mmvmamba {
namespace scan {

// A block's shared memory, in floats.
template <bool kSingle, int kLanes>
struct Shared {
  float *flow, *dA, *lane, *step, *sums;

  // flow, dA: a number a channel and state; lane: three sums a thread and turn (dA if single, dD, dbias); step: du and
  // ddelta of a chunk, summed over states; sums: dB and dC of the warps
  __device__ __forceinline__ Shared(const Args& p, float* memory) {
    const int cells = p.warps * p.turns * (32 / kLanes) * p.d_state, threads = 32 * p.warps;
    sums = memory;
    step = sums + p.warps * 2 * kSteps * kLanes;
    lane = step + (kSingle ? 0 : 2 * kSteps * p.turns * threads);
    flow = lane + 3 * p.turns * threads;
    dA = flow + cells;
  }
  static size_t bytes(const Args& p) {
    const size_t cells = p.warps * p.turns * (32 / kLanes) * p.d_state, threads = 32 * p.warps;
    return sizeof(float) * (p.warps * 2 * kSteps * kLanes + (kSingle ? 0 : 2 * kSteps * p.turns * threads) +
                            3 * p.turns * threads + (kSingle ? 1 : 2) * cells);
  }
};

// The values of a lane's steps that all states share. Gradients are sums over states.
struct Steps {
  float u[kSteps], dt[kSteps], slope[kSteps], dy[kSteps];  // slope: of softplus
  float du[kSteps], ddt[kSteps];
};

template <typename T, bool kSingle, int kLanes>
struct BackwardKernel {
  static constexpr int kThreads = 32 * kMaxWarps, kBlocks = 2;
  static constexpr int kWidth = kLanes * kSteps;  // steps of a chunk
  using Work = scan::Work<T, kSingle, kLanes>;
  using Memory = Shared<kSingle, kLanes>;

  // A thread's sums of a turn: dA if single, dD, dbias.
  static __device__ __forceinline__ float& lane_sums(const Memory& shared, int turn, int which) {
    return shared.lane[(turn * 3 + which) * blockDim.x + threadIdx.x];
  }

  static __device__ __forceinline__ void clear(const Work& work, const Memory& shared) {
    for (int turn = 0; turn < work.p.turns; ++turn) {
      for (int which = 0; which < 3; ++which) lane_sums(shared, turn, which) = 0.f;
      for (int n = work.place.part; n < work.N; n += kLanes) {
        shared.flow[work.place.cell(work.p, turn, n)] = 0.f;
        if (!kSingle) shared.dA[work.place.cell(work.p, turn, n)] = 0.f;
      }
    }
    __syncwarp();
  }

  static __device__ __forceinline__ void load_steps(const Work& work, int64_t row, int channel, bool valid, int t,
                                                    Steps& steps) {
    const Args& p = work.p;
    unpack(work.load_row(p.u, row, t), steps.u);
    raw_steps(work.load_row(p.delta, row, t), p.bias ? p.bias[channel] : 0.f, p.softplus, t, p.length, steps.dt);
    if (p.float_out) {
      unpack(load(static_cast<const float*>(p.dout) + row * p.length, t, p.length, p.float_vector), steps.dy);
    } else {
      unpack(work.load_row(p.dout, row, t), steps.dy);
    }
    if (!valid) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) steps.dy[j] = 0.f;  // a channel beyond the last adds nothing
    }
    if (p.softplus) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        float z;
        const float x = steps.dt[j], dt = softplus(x, z), r = __fdividef(1.f, 1.f + z);
        steps.slope[j] = x >= 0.f ? r : z * r;
        steps.dt[j] = dt;
      }
    }
  }

  // One state of a row: the states again from `carry`, which enters the chunk, then the adjoint against time from the
  // cell `flow`. Sets du and ddt, adds to dB and dC, returns the lane's part of dA.
  static __device__ __forceinline__ float adjoint(float A, float carry, const Raw<T>& raw_B, const Raw<T>& raw_C,
                                                  int part, float* flow_cell, Steps& steps, float (&dB)[kSteps],
                                                  float (&dC)[kSteps]) {
    const float (&u)[kSteps] = steps.u, (&dt)[kSteps] = steps.dt, (&dy)[kSteps] = steps.dy;
    const float A2 = base_two(A);
    float a[kSteps], before[kSteps], decay = 1.f, drive = 0.f, back = 0.f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      a[j] = exp2f(dt[j] * A2);
      drive = fmaf(a[j], drive, dt[j] * u[j] * widen(raw_B.values[j]));
      decay *= a[j];
    }
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) back = a[j] * fmaf(widen(raw_C.values[j]), dy[j], back);
    float back_decay = decay;
    warp_scan<kLanes, true>(decay, drive, part);
    warp_scan<kLanes, false>(back_decay, back, part);
    float state = entering_state<kLanes, true>(decay, drive, carry, part);
    float flow = *flow_cell;
    flow = entering_state<kLanes, false>(back_decay, back, flow, part);
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      before[j] = a[j] * state;  // the decayed state of the step before
      state = fmaf(dt[j] * u[j], widen(raw_B.values[j]), before[j]);
    }
    float dA = 0.f;
#pragma unroll
    for (int j = kSteps - 1; j >= 0; --j) {
      const float B = widen(raw_B.values[j]);
      const float s = fmaf(widen(raw_C.values[j]), dy[j], flow);
      flow = a[j] * s;
      const float drive_j = dt[j] * u[j];
      const float ddecay = s * before[j];
      dA = fmaf(ddecay, dt[j], dA);
      dB[j] = fmaf(s, drive_j, dB[j]);
      dC[j] = fmaf(dy[j], fmaf(drive_j, B, before[j]), dC[j]);
      steps.du[j] = s * B * dt[j];
      steps.ddt[j] = fmaf(s * B, u[j], A * ddecay);
    }
    __syncwarp();
    if (part == 0) *flow_cell = flow;
    __syncwarp();
    return dA;
  }

  // dA of a row, and its du and ddt summed over the states so far.
  static __device__ __forceinline__ void add_state(const Work& work, const Memory& shared, int turn, int n, float dA,
                                                   Steps& steps) {
    if (kSingle) {
      lane_sums(shared, turn, 0) += dA;
      return;
    }
    dA = lane_sum<kLanes>(dA);
    if (work.place.part == 0) shared.dA[work.place.cell(work.p, turn, n)] += dA;
    const int threads = blockDim.x;
    float* step = shared.step + turn * 2 * kSteps * threads + threadIdx.x;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (n > 0) steps.du[j] += step[j * threads], steps.ddt[j] += step[(kSteps + j) * threads];
      if (n < work.N - 1) step[j * threads] = steps.du[j], step[(kSteps + j) * threads] = steps.ddt[j];
    }
  }

  // du and ddelta of a row once all states are in, and the sums for dD and dbias.
  static __device__ __forceinline__ void finish_row(const Work& work, const Memory& shared, int turn, int64_t row,
                                                    int channel, bool valid, int t, Steps& steps) {
    const Args& p = work.p;
    const float skip = p.D ? p.D[channel] : 0.f;
    float dD = 0.f, dbias = 0.f;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      steps.du[j] = fmaf(skip, steps.dy[j], steps.du[j]);
      if (p.softplus) steps.ddt[j] *= steps.slope[j];
      dD = fmaf(steps.dy[j], steps.u[j], dD);
      dbias += t + j < p.length ? steps.ddt[j] : 0.f;
    }
    lane_sums(shared, turn, 1) += dD;
    lane_sums(shared, turn, 2) += dbias;
    if (valid) {
      store(steps.du, static_cast<T*>(p.du) + row * p.length, t, p.length, p.vector);
      store(steps.ddt, static_cast<T*>(p.ddelta) + row * p.length, t, p.length, p.vector);
    }
  }

  // dB and dC of a chunk over the warp's slots, then over the warps.
  static __device__ __forceinline__ void reduce(const Work& work, const Memory& shared, int chunk, int n,
                                                float (&dB)[kSteps], float (&dC)[kSteps]) {
    const Args& p = work.p;
    const Place<kLanes>& place = work.place;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
#pragma unroll
      for (int offset = kLanes; offset < 32; offset *= 2) {
        dB[j] += __shfl_xor_sync(kFullMask, dB[j], offset);
        dC[j] += __shfl_xor_sync(kFullMask, dC[j], offset);
      }
    }
    __syncthreads();  // the sums of the step before have been read
    if (place.slot == 0) {
      float* own = shared.sums + place.warp * 2 * kWidth + place.part * kSteps;
#pragma unroll
      for (int j = 0; j < kSteps; ++j) own[j] = dB[j], own[kWidth + j] = dC[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * kWidth; i += blockDim.x) {
      float total = 0.f;
      for (int warp = 0; warp < p.warps; ++warp) total += shared.sums[warp * 2 * kWidth + i];
      const int step = chunk * kChunk + i % kWidth;
      const int64_t plane = (place.split * 2 + i / kWidth) * p.pairs + place.pair;
      if (step < p.length) p.partial[(plane * work.N + n) * p.length + step] = total;
    }
  }

  // The sums of a row over all its steps.
  static __device__ __forceinline__ void store_sums(const Work& work, const Memory& shared) {
    const Args& p = work.p;
    const int part = work.place.part;
    for (int turn = 0; turn < p.turns; ++turn) {
      const int64_t row = work.row_of(turn);
      const float dA = lane_sum<kLanes>(lane_sums(shared, turn, 0)), dD = lane_sum<kLanes>(lane_sums(shared, turn, 1));
      const float dbias = lane_sum<kLanes>(lane_sums(shared, turn, 2));
      if (!work.valid(turn)) continue;
      if (part == 0) p.dD[row] = dD, p.dbias[row] = dbias;
      if (kSingle && part == 0) p.dA[row] = dA;
      if (!kSingle) {
        for (int n = part; n < work.N; n += kLanes) p.dA[row * work.N + n] = shared.dA[work.place.cell(p, turn, n)];
      }
    }
  }

  static __device__ __forceinline__ void run(const Args& p) {
    const Memory shared(p, shared_memory<float>());
    const Work work(p);
    const int part = work.place.part, N = work.N;
    clear(work, shared);
    for (int chunk = p.chunks - 1; chunk >= 0; --chunk) {
      const int t = chunk * kChunk + part * kSteps;
      for (int n = 0; n < N; ++n) {
        const Raw<T> raw_B = work.load_state(work.B, n, t), raw_C = work.load_state(work.C, n, t);
        float dB[kSteps] = {}, dC[kSteps] = {};
        for (int turn = 0; turn < p.turns; ++turn) {
          const int64_t row = work.row_of(turn);
          const int channel = work.channel_of(row);
          const bool valid = work.valid(turn);
          Steps steps;
          load_steps(work, row, channel, valid, t, steps);
          const float A = p.A[static_cast<int64_t>(channel) * N + n];
          const float carry = p.states[(row * (p.chunks + 1) + chunk) * N + n];
          const float dA =
              adjoint(A, carry, raw_B, raw_C, part, &shared.flow[work.place.cell(p, turn, n)], steps, dB, dC);
          add_state(work, shared, turn, n, dA, steps);
          if (kSingle || n == N - 1) finish_row(work, shared, turn, row, channel, valid, t, steps);
        }
        reduce(work, shared, chunk, n, dB, dC);
      }
    }
    store_sums(work, shared);
  }
};

template <typename T>
struct AddPartialKernel {
  static constexpr int kThreads = 256, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p, T* dB, T* dC) {
    const int64_t size = p.pairs * p.d_state * p.length;
    const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (i >= 2 * size) return;
    float total = 0.f;
    for (int split = 0; split < p.splits; ++split) total += p.partial[split * 2 * size + i];
    (i < size ? dB[i] : dC[i - size]) = narrow<T>(total);
  }
};

template <typename T, bool kSingle, int kLanes>
void run_backward(const Args& p, cudaStream_t stream) {
  launch<BackwardKernel<T, kSingle, kLanes>>(p.pairs * p.splits, 32 * p.warps, Shared<kSingle, kLanes>::bytes(p),
                                             stream, p);
}

template <typename T>
void Kernels<T>::backward(const Args& p, cudaStream_t stream) {
  if (short_rows(p)) {
    run_backward<T, true, 8>(p, stream);
  } else if (p.d_state == 1) {
    run_backward<T, true, 32>(p, stream);
  } else {
    run_backward<T, false, 32>(p, stream);
  }
}

template <typename T>
void Kernels<T>::add_partial(const Args& p, void* dB, void* dC, cudaStream_t stream) {
  const int64_t total = 2 * p.pairs * p.d_state * p.length;
  launch<AddPartialKernel<T>>(ceil_div(total, 256), 256, 0, stream, p, static_cast<T*>(dB), static_cast<T*>(dC));
}

}  // namespace scan
}  // namespace mmvmamba
