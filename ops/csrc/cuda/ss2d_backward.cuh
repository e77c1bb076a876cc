// Backward scan kernels of the fused SS2D core, N = 1.
//
// With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan. The state before a step is
// never needed alone: decay h_{t-1} = h_t - drive_t.
//
// backward_kernel: a block takes S segments of one image, both routes of a pair, and loops over channel groups of 32.
//   A thread recomputes its channel's segment from the saved entering state (d2, decay, h in registers), scans s
//   backwards from zero for the carry, takes the entering s from shared memory and the blocks' carries, and walks back
//   a second time for the gradients. Sums over channels (dmaps) stay in registers over the groups; sums over pixels
//   (weights, bias, A, D) are added over the block's warps in a fixed order and leave as one partial sum a block.
//   Moves: x, dy once a pair, dx once (twice for the second pair), states, maps and dmaps once a pair, partial sums.
//   With u projected outside (Rank = 0), u is read and du2 written in its place.
// backward_carries_kernel: the carries of s alone, one a block, route and channel (needs neither x nor states).
#pragma once

#include "ss2d_forward.cuh"
#include "ss2d_reduce.cuh"

namespace mmvmamba {
namespace ss2d {

// 16 values of a thread, two to a register for 16-bit types.
template <typename T> struct Values {
  uint32_t v[kSegment / 2];
  __device__ __forceinline__ float operator[](int t) const {
    const uint16_t bits = t % 2 ? v[t / 2] >> 16 : v[t / 2];
    return to_float(*reinterpret_cast<const T*>(&bits));
  }
  __device__ __forceinline__ void set(int t, T value) {
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(&value);
    v[t / 2] = t % 2 ? v[t / 2] | bits << 16 : bits;  // set in ascending order
  }
};
template <> struct Values<float> {
  float v[kSegment];
  __device__ __forceinline__ float operator[](int t) const { return v[t]; }
  __device__ __forceinline__ void set(int t, float value) { v[t] = value; }
};

template <typename T>
__device__ __forceinline__ void load_values(const Args& p, const void* from, int64_t offset, int first, int count,
                                            bool active, Values<T>& to) {
  Walk walk(p, min(first, p.length - 1));
  T raw[kSegment];
#pragma unroll
  for (int t = 0; t < kSegment; ++t) {
    raw[t] = active && t < count ? static_cast<const T*>(from)[offset + walk.pixel * p.channels] : from_float<T>(0.f);
    walk.next(p);
  }
#pragma unroll
  for (int t = 0; t < kSegment; ++t) to.set(t, raw[t]);
}

// ---- carries of s ---------------------------------------------------------------------------------------------------
template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ Carry scan_back(const float* maps, const Values<T>& dy, const T (&u)[kSegment],
                                           const float (&weight)[Rank ? Rank : 1], float bias, float A) {
  constexpr int columns = Maps<Rank>::kColumns;
  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float* row = maps + t * columns;
    const float d2 = softplus2<T>(Rank ? project_dt<Rank>(row, weight, bias) : bias + to_float(u[t]));
    const float decay = exp2_fast(A * d2);
    carry.end = decay * fmaf(row[Maps<Rank>::kB + 1], dy[t], carry.end);
    carry.product *= decay;
  }
  return carry;
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32) backward_carries_kernel(const __grid_constant__ Args p) {
  extern __shared__ float4 shared[];
  float* maps = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int group = blockIdx.x % p.groups, block = blockIdx.x / p.groups % p.chain;
  const int64_t batch = blockIdx.x / (p.groups * p.chain);
  const int padded_channel = group * 32 + lane, channel = min(padded_channel, p.channels - 1);
  const int first = (block * warps + warp) * kSegment, count = max(0, min(kSegment, p.length - first));
  const int steps = warps * kSegment;
  Carry* local = reinterpret_cast<Carry*>(maps + 2 * steps * Maps<Rank>::kColumns);

  Values<T> dy;
  load_values<T>(p, p.dy, batch * p.length * p.channels + channel, first, count, true, dy);
  T u0[kSegment], u1[kSegment];
  load_u<T, Rank>(p, batch, first, count, 2 * p.pair, channel, u0);
  load_u<T, Rank>(p, batch, first, count, 2 * p.pair + 1, channel, u1);
  stage_maps<T, Rank>(p, batch, block * steps, steps, maps);
  __syncthreads();
  const float* rows = maps + warp * kSegment * Maps<Rank>::kColumns;
  float weight[Rank ? Rank : 1];
  int q = 2 * p.pair;
  load_weight<Rank>(p, q, padded_channel, weight);
  local[warp * 32 + lane] = scan_back<T, Rank, false>(rows, dy, u0, weight, p.bias[q * p.padded + padded_channel],
                                                      p.A[q * p.padded + padded_channel]);
  ++q;
  load_weight<Rank>(p, q, padded_channel, weight);
  local[(warps + warp) * 32 + lane] =
      scan_back<T, Rank, SecondReversed>(rows + steps * Maps<Rank>::kColumns, dy, u1, weight,
                                         p.bias[q * p.padded + padded_channel], p.A[q * p.padded + padded_channel]);
  __syncthreads();
  for (int route = warp; route < 2; route += warps) {
    Carry carry = {1.f, 0.f};
    for (int w = 0; w < warps; ++w) {
      append(carry, local[(route * warps + (route == 1 && SecondReversed ? w : warps - 1 - w)) * 32 + lane]);
    }
    static_cast<Carry*>(p.block_carries)[carry_index(p, batch, block, route) + padded_channel] = carry;
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------------
// Where a thread works, and its block's shared memory.
template <typename T> struct Place {
  int lane, warp, warps, group, block, channel, padded_channel, first, count;
  int64_t batch;
  bool active;
  const float* rows;  // staged maps of this warp's segment and the route
  Carry *local, *before;
  T* tile;
};

template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ void backward_route(const Args& p, const Place<T>& at, int q, const Values<T>& x,
                                               const Values<T>& dy, float (&dx)[kSegment], float& dA,
                                               MapSums<T, Rank>& dmaps) {
  constexpr int columns = Maps<Rank>::kColumns;
  float weight[Rank ? Rank : 1];
  T u[kSegment];
  load_weight<Rank>(p, q, at.padded_channel, weight);
  load_u<T, Rank>(p, at.batch, at.first, at.count, q, at.channel, u);
  const float bias = p.bias[q * p.padded + at.padded_channel], A = p.A[q * p.padded + at.padded_channel];
  const int segment = at.block * at.warps + at.warp;
  float state = at.active && at.count > 0
                    ? p.states[((at.batch * p.segments + segment) * 4 + q) * p.channels + at.channel]
                    : 0.f;
  float d2[kSegment], decay[kSegment], h[kSegment];
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? kSegment - 1 - i : i;
    const float* row = at.rows + t * columns;
    d2[t] = softplus2<T>(Rank ? project_dt<Rank>(row, weight, bias) : bias + to_float(u[t]));
    decay[t] = exp2_fast(A * d2[t]);
    state = h[t] = fmaf(decay[t], state, d2[t] * x[t] * row[Maps<Rank>::kB]);
  }

  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    carry.end = decay[t] * fmaf(at.rows[t * columns + Maps<Rank>::kB + 1], dy[t], carry.end);
    carry.product *= decay[t];
  }
  at.local[at.warp * 32 + at.lane] = carry;
  const bool chained = p.chain > 1;
  if (chained) {
    at.before[at.warp * 32 + at.lane] =
        share_of_chain(p, at.batch, at.block, q % 2, at.padded_channel, !Reversed, at.warp, at.warps);
  }
  __syncthreads();
  float s = incoming(at.local, at.before, chained, !Reversed, at.warp, at.warps, at.lane);
  if (!at.active) s = 0.f;

  const float A_ln2 = A * kLn2;
  T* tile = at.tile + at.lane * kTileStride<T>;
  T* du_to = static_cast<T*>(p.u) + (at.batch * p.length * 4 + q) * p.channels + at.channel;
  float previous[3];
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float2 bc = *reinterpret_cast<const float2*>(at.rows + t * columns + Maps<Rank>::kB);
    const float g = fmaf(bc.y, dy[t], s);
    s = decay[t] * g;
    const float g_d2 = g * d2[t], B_x = bc.x * x[t];
    const float carried = fmaf(-d2[t], B_x, h[t]);  // decay times the state before
    const float du = g * fmaf(A_ln2, carried, B_x) * softplus2_slope<T>(d2[t]);
    dx[t] = fmaf(g_d2, bc.x, dx[t]);
    dA = fmaf(g_d2, carried, dA);
    const float values[3] = {du, g_d2 * x[t], h[t] * dy[t]};
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if constexpr (sizeof(T) == 4) {
        tile[j * 32 * kTileStride<T> + t] = values[j];
      } else if (i % 2 == 0) {
        previous[j] = values[j];
      } else {
        *reinterpret_cast<uint32_t*>(tile + j * 32 * kTileStride<T> + t / 2 * 2) =
            Reversed ? pack2<T>(previous[j], values[j]) : pack2<T>(values[j], previous[j]);
      }
    }
  }
  __syncwarp();
  if constexpr (Rank == 0) {
    Walk walk(p, min(at.first, p.length - 1));
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      if (at.active && t < at.count) du_to[static_cast<int64_t>(walk.pixel) * 4 * p.channels] = tile[t];
      walk.next(p);
    }
  }
  const T* fragment = static_cast<const T*>(p.dt_fragment) + q * kPartialColumns<Rank> * p.padded + at.group * 32;
  dmaps.add(at.tile, fragment, p.padded, at.lane);
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(sizeof(T) == 4 ? 256 : kMaxWarps * 32)
    backward_kernel(const __grid_constant__ Args p) {
  constexpr int columns = Maps<Rank>::kColumns, out_columns = kPartialColumns<Rank>, outputs = kPartialSize<Rank>;
  extern __shared__ float4 shared[];
  Place<T> at;
  at.lane = threadIdx.x & 31, at.warp = threadIdx.x >> 5, at.warps = blockDim.x >> 5;
  const int split = blockIdx.x % p.splits;
  at.block = blockIdx.x / p.splits % p.chain;
  at.batch = blockIdx.x / (p.splits * p.chain);
  at.first = (at.block * at.warps + at.warp) * kSegment;
  at.count = max(0, min(kSegment, p.length - at.first));
  const int steps = at.warps * kSegment;
  float* maps = reinterpret_cast<float*>(shared);                      // [2][steps][columns]
  Carry* local = reinterpret_cast<Carry*>(maps + 2 * steps * columns);  // [2][warps][32]
  Carry* before = local + 2 * at.warps * 32;                           // [2][warps][32]
  T* tiles = reinterpret_cast<T*>(before + 2 * at.warps * 32);         // [warps][3][32][stride]
  float* sums = reinterpret_cast<float*>(tiles + at.warps * kTileSize<T>);  // [warps][outputs]
  at.tile = tiles + at.warp * kTileSize<T>;
  stage_maps<T, Rank>(p, at.batch, at.block * steps, steps, maps);
  __syncthreads();

  MapSums<T, Rank> dmaps0, dmaps1;
  dmaps0.clear();
  dmaps1.clear();
  const int per_split = (p.groups + p.splits - 1) / p.splits;
  const int last_group = min(p.groups, (split + 1) * per_split);
  for (at.group = split * per_split; at.group < last_group; ++at.group) {
    at.padded_channel = at.group * 32 + at.lane;
    at.active = at.padded_channel < p.channels;
    at.channel = at.active ? at.padded_channel : p.channels - 1;
    const int64_t offset = at.batch * p.length * p.channels + at.channel;
    Values<T> x, dy, dx_before;
    load_values<T>(p, p.x, offset, at.first, at.count, at.active, x);
    load_values<T>(p, p.dy, offset, at.first, at.count, at.active, dy);
    float dx[kSegment], dA0 = 0.f, dA1 = 0.f, dD = 0.f;
    if (p.pair == 0) {
      const float skip = p.skip[at.padded_channel];
#pragma unroll
      for (int t = 0; t < kSegment; ++t) dx[t] = skip * dy[t], dD = fmaf(x[t], dy[t], dD);
    } else {
      load_values<T>(p, p.y, offset, at.first, at.count, at.active, dx_before);
#pragma unroll
      for (int t = 0; t < kSegment; ++t) dx[t] = dx_before[t];
    }

    const int q = 2 * p.pair;
    float* to = sums + at.warp * outputs;
    at.rows = maps + at.warp * kSegment * columns, at.local = local, at.before = before;
    backward_route<T, Rank, false>(p, at, q, x, dy, dx, dA0, dmaps0);
    weight_sums<T, Rank>(at.tile, at.rows, to, at.lane);
    __syncwarp();
    at.rows += steps * columns, at.local += at.warps * 32, at.before += at.warps * 32;
    backward_route<T, Rank, SecondReversed>(p, at, q + 1, x, dy, dx, dA1, dmaps1);
    weight_sums<T, Rank>(at.tile, at.rows, to + 32 * out_columns, at.lane);

    Walk walk(p, min(at.first, p.length - 1));
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      if (at.active && t < at.count) static_cast<T*>(p.y)[offset + walk.pixel * p.channels] = from_float<T>(dx[t]);
      walk.next(p);
    }
    to += 64 * out_columns;
    to[at.lane] = dA0, to[32 + at.lane] = dA1, to[64 + at.lane] = dD;
    __syncthreads();
    float* partial = p.partial + ((at.batch * p.chain + at.block) * p.groups + at.group) * outputs;
    for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
      float sum = 0.f;
      for (int w = 0; w < at.warps; ++w) sum += sums[w * outputs + i];
      partial[i] = sum;
    }
    // The next group's first barrier comes before its sums are written, and after these are read.
  }

  const int first = at.first, count = at.count;
  const int64_t batch = at.batch;
#pragma unroll
  for (int route = 0; route < 2; ++route) {
    const int q = 2 * p.pair + route;
    (route ? dmaps1 : dmaps0).write(at.lane, [&](int pixel, int column, float v0, float v1) {
      if (pixel >= count) return;
      const int64_t index = (batch * p.length + Walk(p, first + pixel).pixel) * 4 + q;
      if constexpr (Rank == 0) {
        if (column == 6) {
          float* to = p.dmaps_part + split * p.batch * p.length * 8 + index * 2;
          to[0] = v0, to[1] = v1;
        }
      } else {
        T* to = static_cast<T*>(p.dmaps) + index * p.map_columns + column;
        to[0] = from_float<T>(v0), to[1] = from_float<T>(v1);
      }
    });
  }
}

template <typename T, int Rank> void run_backward(bool carries, int warps, const Args& args, cudaStream_t stream) {
  if (carries) {
    launch(args.second_reversed ? backward_carries_kernel<T, Rank, true> : backward_carries_kernel<T, Rank, false>,
           args.batch * args.chain * args.groups, warps, forward_shared<Rank>(warps), args, stream);
  } else {
    const int bytes =
        forward_shared<Rank>(warps) + warps * (kTileSize<T> * sizeof(T) + kPartialSize<Rank> * sizeof(float));
    launch(args.second_reversed ? backward_kernel<T, Rank, true> : backward_kernel<T, Rank, false>,
           args.batch * args.chain * args.splits, warps, bytes, args, stream);
  }
}

}  // namespace ss2d
}  // namespace mmvmamba
