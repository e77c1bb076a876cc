// Backward scan kernels of the fused SS2D core, N = 1.
//
// With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan. The state before a step is
// never needed alone: decay h_{t-1} = h_t - drive_t.
//
// backward_kernel: a block takes S segments of one image, both routes of a pair, and loops over channel groups of 32.
//   A thread recomputes its channel's segment from the saved entering state (d2 and h in registers), scans s backwards
//   from zero for the carry, takes the entering s from shared memory and the chain's blocks, and walks back a second
//   time for the gradients. Sums over channels (dmaps) stay in registers over the groups; sums over pixels (weights,
//   bias, A, D) are added over the block's warps in a fixed order and leave as one partial sum a block.
//   Moves: x, dy once a pair, dx once (twice for the second pair), states, maps and dmaps once a pair, partial sums.
//   With u projected outside (Rank = 0), u is read and du2 written in its place.
// backward_carries_kernel: the carries of s alone, one a block, route and channel (needs neither x nor states). For
//   chains too long to wait for.
#pragma once

#include "ss2d_forward.cuh"
#include "ss2d_reduce.cuh"

namespace mmvmamba {
namespace ss2d {

// ---- carries of s ---------------------------------------------------------------------------------------------------
template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ Carry scan_back(const float* maps, const Values<T>& dy, const Projected<T, Rank>& u,
                                           const float (&weight)[Rank ? Rank : 1], float bias, float A) {
  constexpr int columns = Maps<Rank>::kColumns;
  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float* row = maps + t * columns;
    const float d2 = softplus2<T>(Rank ? project_dt<Rank>(row, weight, bias) : bias + u[t]);
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
  const int block = blockIdx.x % p.chain, group = blockIdx.x / p.chain % p.groups;
  const int64_t batch = blockIdx.x / (p.groups * p.chain);
  const int padded_channel = group * 32 + lane, channel = min(padded_channel, p.channels - 1);
  const int first = (block * warps + warp) * kSegment;
  const int steps = warps * kSegment;
  Carry* local = reinterpret_cast<Carry*>(maps + 2 * steps * Maps<Rank>::kColumns);

  Staging<T, Rank> staging;
  staging.load(p, batch, block * steps);
  const T* dy_from = static_cast<const T*>(p.dy) + batch * p.length * p.channels + channel;
  const Values<T> dy = load_segment(p, dy_from, first, p.channels);
  Projected<T, Rank> u0, u1;
  u0.load(p, batch, first, 2 * p.pair, channel);
  u1.load(p, batch, first, 2 * p.pair + 1, channel);
  staging.store(maps, steps);
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
    *block_carry(p, batch, block, route, padded_channel) =
        block_total(local + route * warps * 32, !(route == 1 && SecondReversed), warps, lane);
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------------
// Where a thread works, and its block's shared memory.
template <typename T> struct Place {
  int lane, warp, warps, block, group, channel, padded_channel, first, count;
  int64_t batch;
  bool active;
  const float* rows;  // staged maps of this warp's segment and the route
  Carry *local, *before;
  T* tile;
};

template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ void backward_route(const Args& p, const Place<T>& at, int q, const Values<T>& x,
                                               const Values<T>& dy, float state, float (&dx)[kSegment], float& dA,
                                               float& dbias,
                                               MapSums<T, Rank>& dmaps) {
  constexpr int columns = Maps<Rank>::kColumns;
  const float A = p.A[q * p.padded + at.padded_channel];
  float d2[kSegment], h[kSegment];
  {
    float weight[Rank ? Rank : 1];
    Projected<T, Rank> u;
    load_weight<Rank>(p, q, at.padded_channel, weight);
    u.load(p, at.batch, at.first, q, at.channel);
    const float bias = p.bias[q * p.padded + at.padded_channel];
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const int t = Reversed ? kSegment - 1 - i : i;
      const float* row = at.rows + t * columns;
      d2[t] = softplus2<T>(Rank ? project_dt<Rank>(row, weight, bias) : bias + u[t]);
      state = h[t] = fmaf(exp2_fast(A * d2[t]), state, d2[t] * x[t] * row[Maps<Rank>::kB]);
    }
  }

  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float decay = exp2_fast(A * d2[t]);
    carry.end = decay * fmaf(at.rows[t * columns + Maps<Rank>::kB + 1], dy[t], carry.end);
    carry.product *= decay;
  }
  at.local[at.warp * 32 + at.lane] = carry;
  __syncthreads();
  const bool chained = p.chaining != Chain::kNone;
  if (chained) {
    if (at.warp == 0 && p.chaining == Chain::kLookBack) {
      publish(block_carry(p, at.batch, at.block, q % 2, at.padded_channel),
              block_total(at.local, !Reversed, at.warps, at.lane));
    }
    at.before[at.warp * 32 + at.lane] =
        share_of_chain(p, at.batch, at.block, q % 2, at.padded_channel, !Reversed, at.warp, at.warps);
    __syncthreads();
  }
  float s = incoming(at.local, at.before, chained, !Reversed, at.warp, at.warps, at.lane);
  if (!at.active) s = 0.f;

  const float A_ln2 = A * kLn2;
  T* tile = at.tile + at.lane * kTileStride<T>;
  float previous[3];
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float2 bc = *reinterpret_cast<const float2*>(at.rows + t * columns + Maps<Rank>::kB);
    const float g = fmaf(bc.y, dy[t], s);
    s = exp2_fast(A * d2[t]) * g;
    const float g_d2 = g * d2[t], B_x = bc.x * x[t];
    const float carried = fmaf(-d2[t], B_x, h[t]);  // decay times the state before
    const float du = g * fmaf(A_ln2, carried, B_x) * softplus2_slope<T>(d2[t]);
    dx[t] = fmaf(g_d2, bc.x, dx[t]);
    dA = fmaf(g_d2, carried, dA);
    if (Rank == 0) dbias += du;
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
    T* to = static_cast<T*>(p.u) + (at.batch * p.length * 4 + q) * p.channels + at.channel;
    const int count = at.active ? at.count : 0;
    Walk walk(p, min(at.first, p.length - 1), 4 * p.channels);
#pragma unroll
    for (int t = 0; t < kSegment; ++t) {
      if (t < count) to[walk.offset] = tile[t];
      walk.next();
    }
  }
  const T* fragment = static_cast<const T*>(p.dt_fragment) + q * kPartialColumns<Rank> * p.padded + at.group * 32;
  dmaps.add(at.tile, fragment, p.padded, at.lane);
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32, sizeof(T) == 2 ? 2 : 1)
    backward_kernel(const __grid_constant__ Args p) {
  constexpr int columns = Maps<Rank>::kColumns, out_columns = kPartialColumns<Rank>, outputs = kPartialSize<Rank>;
  extern __shared__ float4 shared[];
  Place<T> at;
  at.lane = threadIdx.x & 31, at.warp = threadIdx.x >> 5, at.warps = blockDim.x >> 5;
  at.block = blockIdx.x % p.chain;
  const int split = blockIdx.x / p.chain % p.splits;
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
  {
    Staging<T, Rank> staging;
    staging.load(p, at.batch, at.block * steps);
    staging.store(maps, steps);
  }
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
    const int64_t image = at.batch * p.length * p.channels + at.channel;
    Values<T> x = load_segment(p, static_cast<const T*>(p.x) + image, at.first, p.channels);
    Values<T> dy = load_segment(p, static_cast<const T*>(p.dy) + image, at.first, p.channels);
    float state0 = 0.f, state1 = 0.f;
    if (at.active && at.count > 0) {
      const int64_t segment = at.batch * p.segments + at.block * at.warps + at.warp;
      const float* from = p.states + (segment * 4 + 2 * p.pair) * p.channels + at.channel;
      state0 = from[0], state1 = from[p.channels];
    }
    float dx[kSegment], dA0 = 0.f, dA1 = 0.f, dbias0 = 0.f, dbias1 = 0.f, dD = 0.f;
    if (p.pair == 1) {
      const Values<T> before_columns = load_segment(p, static_cast<const T*>(p.y) + image, at.first, p.channels);
#pragma unroll
      for (int t = 0; t < kSegment; ++t) dx[t] = before_columns[t];
    }
    if (!at.active || at.count < kSegment) {
      x.keep_first(at.active ? at.count : 0);
      dy.keep_first(at.active ? at.count : 0);
    }
    if (p.pair == 0) {
      const float skip = p.skip[at.padded_channel];
#pragma unroll
      for (int t = 0; t < kSegment; ++t) dx[t] = skip * dy[t], dD = fmaf(x[t], dy[t], dD);
    }

    const int q = 2 * p.pair;
    float* to = sums + at.warp * outputs;
    at.rows = maps + at.warp * kSegment * columns, at.local = local, at.before = before;
    backward_route<T, Rank, false>(p, at, q, x, dy, state0, dx, dA0, dbias0, dmaps0);
    weight_sums<T, Rank>(at.tile, at.rows, dbias0, to, at.lane);
    __syncwarp();
    at.rows += steps * columns, at.local += at.warps * 32, at.before += at.warps * 32;
    backward_route<T, Rank, SecondReversed>(p, at, q + 1, x, dy, state1, dx, dA1, dbias1, dmaps1);
    weight_sums<T, Rank>(at.tile, at.rows, dbias1, to + 32 * out_columns, at.lane);
    store_segment(p, static_cast<T*>(p.y) + image, at.first, at.active ? at.count : 0, dx);

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
      const int64_t index = (batch * p.length + pixel_of(p, first + pixel)) * 4 + q;
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
