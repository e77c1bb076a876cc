// Selective scan, backward. Chunks are taken from the last to the first; a warp recomputes a chunk's states from the saved
// carry, and runs the adjoint recurrence s_t = C_t dy_t + f_{t+1}, f_t = a_t s_t against time, both by shuffle scans as in
// forward. dB and dC are sums over a group's channels: a lane adds its warp's channels in registers, then the block its
// warps in shared memory, then launch_add_partial the blocks, each in a fixed order, so that results never vary.
// Moves dout, u and delta in, du and ddelta out, and 8 bytes a step, state and block of partial sums.
#pragma once

#include "selective_scan/common.cuh"

namespace mmvmamba {
namespace scan {

// A block's shared memory, in floats.
template <bool kSingle, int kLanes>
struct Shared {
  float *flow, *dA, *lane, *step, *sums;

  // flow, dA: a number a channel and state; lane: three sums a thread and turn (dA if single, dD, dbias); step: du and
  // ddelta of a chunk, summed over states; sums: dB and dC of the warps
  __device__ Shared(const Args& p, float* memory) {
    const int cells = p.warps * p.turns * (32 / kLanes) * p.states, threads = 32 * p.warps;
    sums = memory;
    step = sums + p.warps * 2 * kSteps * kLanes;
    lane = step + (kSingle ? 0 : 2 * kSteps * p.turns * threads);
    flow = lane + 3 * p.turns * threads;
    dA = flow + cells;
  }
  static size_t bytes(const Args& p) {
    const size_t cells = p.warps * p.turns * (32 / kLanes) * p.states, threads = 32 * p.warps;
    return sizeof(float) * (p.warps * 2 * kSteps * kLanes + (kSingle ? 0 : 2 * kSteps * p.turns * threads) +
                            3 * p.turns * threads + (kSingle ? 1 : 2) * cells);
  }
};

template <typename T, bool kSingle, int kLanes>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) backward_kernel(const Args p) {
  extern __shared__ __align__(16) float memory[];
  const Shared<kSingle, kLanes> shared(p, memory);
  const Place<kLanes> place(p);
  const int part = place.part, N = kSingle ? 1 : p.states, threads = blockDim.x;
  const auto* B = static_cast<const T*>(p.B) + place.pair * N * p.length;
  const auto* C = static_cast<const T*>(p.C) + place.pair * N * p.length;
  const int64_t first_row = place.pair * p.channels;
  const auto row_of = [&](int turn) { return first_row + min(place.channel(p, turn), p.channels - 1); };
  const auto lane_sums = [&](int turn, int which) -> float& {
    return shared.lane[(turn * 3 + which) * threads + threadIdx.x];
  };

  for (int turn = 0; turn < p.turns; ++turn) {
    for (int which = 0; which < 3; ++which) lane_sums(turn, which) = 0.f;
    for (int n = part; n < N; n += kLanes) {
      shared.flow[place.cell(p, turn, n)] = 0.f;
      if (!kSingle) shared.dA[place.cell(p, turn, n)] = 0.f;
    }
  }
  __syncwarp();

  for (int chunk = p.chunks - 1; chunk >= 0; --chunk) {
    const int t = chunk * kChunk + part * kSteps;
    for (int n = 0; n < N; ++n) {
      const Raw<T> raw_B = load(B + n * static_cast<int64_t>(p.length), t, p.length, p.vector);
      const Raw<T> raw_C = load(C + n * static_cast<int64_t>(p.length), t, p.length, p.vector);
      float dB[kSteps] = {}, dC[kSteps] = {};
      for (int turn = 0; turn < p.turns; ++turn) {
        const int64_t row = row_of(turn);
        const int channel = static_cast<int>(row - place.pair / p.groups * p.groups * p.channels);
        const bool valid = place.channel(p, turn) < p.channels;
        float u[kSteps], x[kSteps], dy[kSteps];
        unpack(load(static_cast<const T*>(p.u) + row * p.length, t, p.length, p.vector), u);
        raw_steps(load(static_cast<const T*>(p.delta) + row * p.length, t, p.length, p.vector),
                  p.bias ? p.bias[channel] : 0.f, p.softplus, t, p.length, x);
        if (p.float_out) {
          unpack(load(static_cast<const float*>(p.dout) + row * p.length, t, p.length, p.float_vector), dy);
        } else {
          unpack(load(static_cast<const T*>(p.dout) + row * p.length, t, p.length, p.vector), dy);
        }
        if (!valid) {
#pragma unroll
          for (int j = 0; j < kSteps; ++j) dy[j] = 0.f;  // a channel beyond the last adds nothing
        }

        float slope[kSteps];  // of softplus
        if (p.softplus) {
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            float z;
            const float dt = softplus(x[j], z), r = __fdividef(1.f, 1.f + z);
            slope[j] = x[j] >= 0.f ? r : z * r;
            x[j] = dt;
          }
        }
        const float(&dt)[kSteps] = x;

        const float A = p.A[static_cast<int64_t>(channel) * N + n], A2 = base_two(A);
        float a[kSteps], before[kSteps], decay = 1.f, drive = 0.f, back = 0.f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          a[j] = exp2f(dt[j] * A2);
          drive = fmaf(a[j], drive, dt[j] * u[j] * to_float(raw_B.values[j]));
          decay *= a[j];
        }
#pragma unroll
        for (int j = kSteps - 1; j >= 0; --j) back = a[j] * fmaf(to_float(raw_C.values[j]), dy[j], back);
        float back_decay = decay;
        warp_scan<kLanes, true>(decay, drive, part);
        warp_scan<kLanes, false>(back_decay, back, part);
        const float carry = p.carries[(row * (p.chunks + 1) + chunk) * N + n];
        float state = entering_state<kLanes, true>(decay, drive, carry, part);
        float* flow_cell = &shared.flow[place.cell(p, turn, n)];
        float flow = *flow_cell;
        flow = entering_state<kLanes, false>(back_decay, back, flow, part);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          before[j] = a[j] * state;  // the decayed state of the step before
          state = fmaf(dt[j] * u[j], to_float(raw_B.values[j]), before[j]);
        }

        float du[kSteps], ddt[kSteps], dA = 0.f;
#pragma unroll
        for (int j = kSteps - 1; j >= 0; --j) {
          const float B_ = to_float(raw_B.values[j]);
          const float s = fmaf(to_float(raw_C.values[j]), dy[j], flow);
          flow = a[j] * s;
          const float drive_j = dt[j] * u[j];
          const float ddecay = s * before[j];
          dA = fmaf(ddecay, dt[j], dA);
          dB[j] = fmaf(s, drive_j, dB[j]);
          dC[j] = fmaf(dy[j], fmaf(drive_j, B_, before[j]), dC[j]);
          du[j] = s * B_ * dt[j];
          ddt[j] = fmaf(s * B_, u[j], A * ddecay);
        }
        __syncwarp();
        if (part == 0) *flow_cell = flow;
        __syncwarp();

        if (kSingle) {
          lane_sums(turn, 0) += dA;
        } else {
          dA = lane_sum<kLanes>(dA);
          if (part == 0) shared.dA[place.cell(p, turn, n)] += dA;
          float* step = shared.step + turn * 2 * kSteps * threads + threadIdx.x;
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            if (n > 0) du[j] += step[j * threads], ddt[j] += step[(kSteps + j) * threads];
            if (n < N - 1) step[j * threads] = du[j], step[(kSteps + j) * threads] = ddt[j];
          }
        }
        if (kSingle || n == N - 1) {
          const float skip = p.D ? p.D[channel] : 0.f;
          float dD = 0.f, dbias = 0.f;
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            du[j] = fmaf(skip, dy[j], du[j]);
            if (p.softplus) ddt[j] *= slope[j];
            dD = fmaf(dy[j], u[j], dD);
            dbias += t + j < p.length ? ddt[j] : 0.f;
          }
          lane_sums(turn, 1) += dD;
          lane_sums(turn, 2) += dbias;
          if (valid) {
            store(du, static_cast<T*>(p.du) + row * p.length, t, p.length, p.vector);
            store(ddt, static_cast<T*>(p.ddelta) + row * p.length, t, p.length, p.vector);
          }
        }
      }

      // dB and dC over the warp's slots, then over the warps
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
#pragma unroll
        for (int offset = kLanes; offset < 32; offset *= 2) {
          dB[j] += __shfl_xor_sync(kFullMask, dB[j], offset);
          dC[j] += __shfl_xor_sync(kFullMask, dC[j], offset);
        }
      }
      constexpr int kWidth = kLanes * kSteps;
      __syncthreads();  // the sums of the step before have been read
      if (place.slot == 0) {
        float* own = shared.sums + place.warp * 2 * kWidth + part * kSteps;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) own[j] = dB[j], own[kWidth + j] = dC[j];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < 2 * kWidth; i += threads) {
        float total = 0.f;
        for (int warp = 0; warp < p.warps; ++warp) total += shared.sums[warp * 2 * kWidth + i];
        const int step = chunk * kChunk + i % kWidth;
        const int64_t plane = (place.split * 2 + i / kWidth) * p.pairs + place.pair;
        if (step < p.length) p.partial[(plane * N + n) * p.length + step] = total;
      }
    }
  }

  for (int turn = 0; turn < p.turns; ++turn) {
    const int64_t row = row_of(turn);
    const bool valid = place.channel(p, turn) < p.channels;
    const float dA = lane_sum<kLanes>(lane_sums(turn, 0)), dD = lane_sum<kLanes>(lane_sums(turn, 1));
    const float dbias = lane_sum<kLanes>(lane_sums(turn, 2));
    if (!valid) continue;
    if (part == 0) p.dD[row] = dD, p.dbias[row] = dbias;
    if (kSingle && part == 0) p.dA[row] = dA;
    if (!kSingle) {
      for (int n = part; n < N; n += kLanes) p.dA[row * N + n] = shared.dA[place.cell(p, turn, n)];
    }
  }
}

template <typename T>
__global__ void add_partial_kernel(const Args p, T* dB, T* dC) {
  const int64_t size = p.pairs * p.states * p.length, i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= 2 * size) return;
  float total = 0.f;
  for (int split = 0; split < p.splits; ++split) total += p.partial[split * 2 * size + i];
  from_float(total, i < size ? dB[i] : dC[i - size]);
}

template <typename T, bool kSingle, int kLanes>
void run_backward(const Args& p, cudaStream_t stream) {
  const size_t bytes = Shared<kSingle, kLanes>::bytes(p);
  const auto kernel = backward_kernel<T, kSingle, kLanes>;
  if (bytes > 48 << 10) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  }
  kernel<<<static_cast<unsigned>(p.pairs * p.splits), 32 * p.warps, bytes, stream>>>(p);
}

template <typename T>
void backward(const Args& p, cudaStream_t stream) {
  if (short_rows(p)) {
    run_backward<T, true, 8>(p, stream);
  } else if (p.states == 1) {
    run_backward<T, true, 32>(p, stream);
  } else {
    run_backward<T, false, 32>(p, stream);
  }
}

template <typename T>
void add_partial(const Args& p, void* dB, void* dC, cudaStream_t stream) {
  const int64_t total = 2 * p.pairs * p.states * p.length;
  add_partial_kernel<<<static_cast<unsigned>((total + 255) / 256), 256, 0, stream>>>(p, static_cast<T*>(dB),
                                                                                     static_cast<T*>(dC));
}

}  // namespace scan
}  // namespace mmvmamba
