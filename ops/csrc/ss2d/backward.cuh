// Backward scan kernels of the fused SS2D core, N = 1.
//
// With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan.
//
// backward_kernel: a block takes S segments of one image, both routes of a pair, and loops over channel groups of 32.
//   A thread recomputes its channel's segment from the saved entering state (d2 and decay h_{t-1} in registers), and
//   with it the carry of s, takes the entering s from shared memory and the chain's blocks, and walks back for the
//   gradients. Sums over channels (dmaps) stay in registers over the groups; sums over pixels (weights, bias, A, D) are
//   added over the block's warps in a fixed order and leave as one partial sum a block. A thread has 128 registers, so
//   little is kept: what a group needs is prefetched to shared memory while the group before is worked on.
//   Moves: x, dy once a pair, dx once (twice for the second pair), states, maps and dmaps once a pair, partial sums.
//   With Rank = 0, du2 is written too, for the GEMMs after it (in the place of u, where float has one).
// backward_carries_kernel: the carries of s alone, one a block, route and channel (needs neither x nor states). For
//   chains too long to wait for.
#pragma once

#include "ss2d/forward.cuh"
#include "ss2d/reduce.cuh"

namespace mmvmamba {
namespace ss2d {

// ---- carries of s ---------------------------------------------------------------------------------------------------
template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ Carry scan_back(const Maps<T, Rank>& maps, int route, const Projected<T, Rank>& u,
                                           const Values<T>& dy, float A) {
  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float decay = exp2_fast(A * softplus2<T>(u[t]));
    carry.end = decay * fmaf(maps.bc(route, t).y, dy[t], carry.end);
    carry.product *= decay;
  }
  return carry;
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32) backward_carries_kernel(const __grid_constant__ Args p) {
  begin_kernel();
  extern __shared__ float4 shared[];
  int group;
  Place at(p, p.by_groups, group);
  at.select_group(p, group);
  const int lane = at.lane, warp = at.warp, warps = at.warps;
  const ForwardMemory<T, Rank> memory(p, at, shared);
  Carry* local = memory.local;
  char *operands = memory.operands, *scratch = memory.scratch;
  const Maps<T, Rank> maps(p, memory.maps);
  at.tabulate(p, memory.pixels);
  const Segment<T> segment(p, at);

  segment.load(p, at, static_cast<const T*>(p.dy) + at.batch * p.length * p.channels, p.channels, memory.input);
  maps.load(p, at);
  load_operands<T, Rank>(p, at, operands);
  const float* A = p.A + 2 * at.pair * p.padded + at.padded_channel;
  wait_for_copies();
  maps.convert(p, lane);
  __syncthreads();
  const Values<T> dy = read_tile(memory.input, lane);
  {
    const Projected<T, Rank> u(p, at, maps, segment, operand_at<T, Rank>(p, at, operands, 0), scratch, 0);
    local[warp * 32 + lane] = scan_back<T, Rank, false>(maps, 0, u, dy, A[0]);
  }
  {
    const Projected<T, Rank> u(p, at, maps, segment, operand_at<T, Rank>(p, at, operands, 1), scratch, 1);
    local[(warps + warp) * 32 + lane] = scan_back<T, Rank, SecondReversed>(maps, 1, u, dy, A[p.padded]);
  }
  __syncthreads();
  for (int route = warp; route < 2; route += warps) {
    *block_carry(p, at.batch, at.block, route, at.padded_channel) =
        block_total(local + route * warps * 32, !(route == 1 && SecondReversed), warps, lane);
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------------
// A lane's row of a tile, filled pixel by pixel, from the last one if Descending. Of 16-bit types 8 pixels are stored at
// once, which meets no bank conflicts.
template <typename T, bool Descending> struct TileRow {
  T* row;
  float previous;
  uint32_t words[4];

  __device__ __forceinline__ explicit TileRow(T* row) : row(row) {}
  // The i-th value of the walk.
  __device__ __forceinline__ void put(int i, float value) {
    const int t = Descending ? kSegment - 1 - i : i;
    if constexpr (sizeof(T) == 4) {
      row[t] = value;
    } else if (i % 2 == 0) {
      previous = value;
    } else {
      words[t / 2 % 4] = Descending ? pack2<T>(value, previous) : pack2<T>(previous, value);
      if (i % 8 == 7) *reinterpret_cast<uint4*>(row + t / 8 * 8) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

// The s that enters the block on one route, once the block's carries are there; publishes theirs.
__device__ __forceinline__ float entering_from_chain(const Args& p, const Place& at, int route, bool reversed,
                                                     const Carry* local, Carry* before) {
  if (p.chaining == Chain::kNone) return 0.f;
  if (p.chaining == Chain::kLookBack) {
    if (at.warp == 0) {
      publish(block_carry(p, at.batch, at.block, route, at.padded_channel),
              block_total(local, reversed, at.warps, at.lane));
    }
    if (p.chain <= kInFlight + 1) {  // few enough that each warp asks for all of them
      return look_back(p, at.batch, route, at.padded_channel, reversed, 0, blocks_before(p, at.block, reversed)).end;
    }
  }
  before[at.warp * 32 + at.lane] =
      share_of_chain(p, at.batch, at.block, route, at.padded_channel, reversed, at.warp, at.warps);
  __syncthreads();
  return entering(before, at.warps, at.lane);
}

// One route: adds to dx, dA, dbias and dmaps, and leaves the tiles of ss2d_reduce.cuh. `local` and `before` are the
// block's carries of this route; `state` enters the thread's segment.
template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ void backward_route(const Args& p, const Place& at, const Maps<T, Rank>& maps,
                                               const char* operand, int route, Values<T>& x, Values<T>& dy,
                                               float state, float A, T* tiles, Carry* local, Carry* before,
                                               float (&dx)[kSegment], float& dA, float& dbias,
                                               MapSums<T, Rank>& dmaps) {
  constexpr int tile_size = 32 * kTileStride<T>;
  const int q = 2 * at.pair + route;
  float d2[kSegment], carried[kSegment];  // decay times the state before
  x.stay_packed();
  dy.stay_packed();
  Carry carry = {1.f, 0.f};  // of s: its end is the sum of C_t dy_t, each times the decays up to t
  const bool works = at.count > 0;
  if (works) {
    __syncwarp();  // all lanes have read the tiles of the route before
    const Projected<T, Rank> u(p, at, maps, Segment<T>(p, at), operand, tiles, route);
    TileRow<T, Reversed> dC(tiles + 2 * tile_size + at.lane * kTileStride<T>);
    float4 two;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const int t = Reversed ? kSegment - 1 - i : i;
      const float2 bc = maps.bc_of_walk(route, i, t, two);
      d2[t] = softplus2<T>(u[t]);
      const float decay = exp2_fast(A * d2[t]);
      carried[t] = decay * state;
      state = fmaf(d2[t], x[t] * bc.x, carried[t]);
      dC.put(i, state * dy[t]);
      carry.product *= decay;
      carry.end = fmaf(carry.product, bc.y * dy[t], carry.end);
    }
  }
  local[at.warp * 32 + at.lane] = carry;
  __syncthreads();
  const float enters = entering_from_chain(p, at, route, !Reversed, local, before);
  if (!works) return;
  float s = incoming<kMaxWarps>(local, enters, !Reversed, at.warp, at.warps, at.lane);

  x.stay_packed();
  dy.stay_packed();
  const float A_ln2 = A * kLn2;
  TileRow<T, !Reversed> du_row(tiles + at.lane * kTileStride<T>), dB(tiles + tile_size + at.lane * kTileStride<T>);
  float4 two;
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float2 bc = maps.bc_of_walk(route, i, t, two);
    const float g = fmaf(bc.y, dy[t], s);
    s = exp2_fast(A * d2[t]) * g;
    const float g_d2 = g * d2[t];
    const float du = g * fmaf(A_ln2, carried[t], bc.x * x[t]) * softplus2_slope<T>(d2[t]);
    dx[t] = fmaf(g_d2, bc.x, dx[t]);
    dA = fmaf(g_d2, carried[t], dA);
    dB.put(i, g_d2 * x[t]);
    if constexpr (Rank == 0) {
      dbias += du;
      tiles[t * 32 + at.lane] = from_float<T>(du);
    } else {
      du_row.put(i, du);
    }
  }
  __syncwarp();
  if constexpr (Rank == 0) {
    T* image = static_cast<T*>(p.u) + (at.batch * p.length * 4 + q) * p.channels;
    Segment<T>(p, at).store(p, at, tiles, image, 4 * p.channels);
  }
  const T* fragment = static_cast<const T*>(p.dt_fragment) + q * kPartialColumns<Rank> * p.padded + at.group * 32;
  dmaps.add(tiles, fragment, p.padded, at.lane);
}

// What a thread reads of its channel, prefetched to shared memory: [5][32] of a warp, the states that enter the segment
// and A, both of two routes, and the skip.
struct ChannelValues {
  static constexpr int kBytes = 5 * 32 * sizeof(float);
  float state[2], A[2], skip;

  __device__ __forceinline__ static void load(const Args& p, const Place& at, float* shared) {
    const bool valid = at.active && at.count > 0;
    const int64_t segment = at.batch * p.segments + at.first / kSegment;
    const float* states = p.states + (valid ? (segment * 4 + 2 * at.pair) * p.channels + at.channel : 0);
    const float* A = p.A + 2 * at.pair * p.padded + at.padded_channel;
    float* to = shared + at.lane;
    copy_async<4>(to, states, valid);
    copy_async<4>(to + 32, states + (valid ? p.channels : 0), valid);
    copy_async<4>(to + 64, A, true);
    copy_async<4>(to + 96, A + p.padded, true);
    copy_async<4>(to + 128, p.skip + at.padded_channel, true);
  }
  // After the wait for copies, which are the thread's own.
  __device__ __forceinline__ ChannelValues(const float* shared, int lane)
      : state{shared[lane], shared[32 + lane]}, A{shared[64 + lane], shared[96 + lane]}, skip(shared[128 + lane]) {}
};

// Shared memory of a block: carries, two sets of operands, then of each warp x, dy, what is in dx, the tiles, values of
// the channels, the pixels of its steps, maps and sums.
template <typename T, int Rank> struct BackwardMemory {
  static constexpr int kTile = Segment<T>::kSize * sizeof(T), kSums = kPartialSize<Rank> * sizeof(float);
  static constexpr int kPixels = kSegment * sizeof(int);
  __host__ __device__ static int carries(int warps) { return 3 * warps * 32 * sizeof(Carry); }
  __host__ __device__ static int warp_bytes(int map_columns) {
    return 3 * kTile + kTilesBytes<T, Rank> + ChannelValues::kBytes + kPixels + Maps<T, Rank>::bytes(map_columns) +
           kSums;
  }
  __host__ __device__ static int bytes(int map_columns, int warps) {
    return carries(warps) + 2 * kept_bytes<T, Rank>(map_columns) + warps * warp_bytes(map_columns);
  }
};

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32, sizeof(T) == 2 ? 2 : 1)
    backward_kernel(const __grid_constant__ Args p) {
  begin_kernel();
  using Memory = BackwardMemory<T, Rank>;
  constexpr int out_columns = kPartialColumns<Rank>, outputs = kPartialSize<Rank>;
  extern __shared__ float4 memory[];
  int split;
  Place at(p, p.by_splits, split);
  const int warps = at.warps, operands_bytes = kept_bytes<T, Rank>(p.map_columns);
  Carry* local = reinterpret_cast<Carry*>(memory);  // [2][warps][32], of both routes
  Carry* before = local + 2 * warps * 32;           // [warps][32]
  char* operands = reinterpret_cast<char*>(memory) + Memory::carries(warps);  // those of this group and the next
  char* own = operands + 2 * operands_bytes + at.warp * Memory::warp_bytes(p.map_columns);
  T *x_tile = reinterpret_cast<T*>(own), *dy_tile = x_tile + Segment<T>::kSize, *dx_tile = dy_tile + Segment<T>::kSize;
  T* tiles = dx_tile + Segment<T>::kSize;
  float* values = reinterpret_cast<float*>(reinterpret_cast<char*>(tiles) + kTilesBytes<T, Rank>);
  int* pixels = reinterpret_cast<int*>(reinterpret_cast<char*>(values) + ChannelValues::kBytes);
  const Maps<T, Rank> maps(p, reinterpret_cast<char*>(pixels) + Memory::kPixels);
  const int sums_stride = Memory::warp_bytes(p.map_columns);  // bytes from a warp's sums to the next one's
  char* sums = operands + 2 * operands_bytes + sums_stride - Memory::kSums;
  float* own_sums = reinterpret_cast<float*>(sums + at.warp * sums_stride);
  const int64_t image = at.batch * p.length * p.channels;
  T* dx_image = static_cast<T*>(p.y) + image;

  const auto load = [&](int group, int which) {
    at.select_group(p, group);
    const Segment<T> segment(p, at);
    load_operands<T, Rank>(p, at, operands + which * operands_bytes);
    segment.load(p, at, static_cast<const T*>(p.x) + image, p.channels, x_tile);
    segment.load(p, at, static_cast<const T*>(p.dy) + image, p.channels, dy_tile);
    if (at.pair == 1) segment.load(p, at, dx_image, p.channels, dx_tile);
    ChannelValues::load(p, at, values);
  };
  const int per_split = (p.groups + p.splits - 1) / p.splits, first_group = split * per_split;
  const int last_group = min(p.groups, first_group + per_split);
  at.tabulate(p, pixels);
  maps.load(p, at);
  load(first_group, 0);

  const bool works = at.count > 0;  // a warp beyond the image only waits for the others
  if (!works) {
    for (int i = at.lane; i < outputs; i += 32) own_sums[i] = 0.f;
  }
  // The route comes first whose s has passed the fewest blocks before this one: when the other's turn comes, the blocks
  // before it have published their carries.
  const bool second_first = SecondReversed && blocks_before(p, at.block, true) > blocks_before(p, at.block, false);
  MapSums<T, Rank> dmaps0, dmaps1;
  dmaps0.clear();
  dmaps1.clear();
  for (int group = first_group; group < last_group; ++group) {
    const int which = (group ^ first_group) & 1;
    wait_for_copies();
    if (group == first_group) maps.convert(p, at.lane);
    __syncthreads();  // copies are there, and the sums of the group before are read
    Values<T> x = read_tile(x_tile, at.lane), dy = read_tile(dy_tile, at.lane);
    const ChannelValues own(values, at.lane);
    float dx[kSegment], dD = 0.f;
    if (at.pair == 1) {
      const Values<T> rows = read_tile(dx_tile, at.lane);
#pragma unroll
      for (int t = 0; t < kSegment; ++t) dx[t] = rows[t];
    }
    __syncwarp();
    if (group + 1 < last_group) load(group + 1, 1 - which);
    at.select_group(p, group);
    if (at.pair == 0) {
#pragma unroll
      for (int t = 0; t < kSegment; ++t) dx[t] = own.skip * dy[t], dD = fmaf(x[t], dy[t], dD);
    }

    const char* kept = operands + which * operands_bytes;
    float* others = own_sums + 64 * out_columns + at.lane;
    if (works) others[64] = dD;
    const auto run = [&](auto reversed, int route, MapSums<T, Rank>& dmaps) {
      float dA = 0.f, dbias = 0.f;
      backward_route<T, Rank, decltype(reversed)::value>(
          p, at, maps, operand_at<T, Rank>(p, at, kept, route), route, x, dy, own.state[route], own.A[route], tiles,
          local + route * warps * 32, before, dx, dA, dbias, dmaps);
      if (!works) return;
      weight_sums<T, Rank>(tiles, maps, route, dbias, own_sums + route * 32 * out_columns, at.lane);
      others[route * 32] = dA;
    };
    bool second = second_first;
#pragma unroll 1
    do {
      if (second) {
        run(std::bool_constant<SecondReversed>(), 1, dmaps1);
      } else {
        run(std::false_type(), 0, dmaps0);
      }
      second = !second;
    } while (second != second_first);
    if (works) {
      __syncwarp();
      write_tile(tiles, at.lane, dx);
      Segment<T>(p, at).store(p, at, tiles, dx_image, p.channels);
    }

    __syncthreads();
    float* partial = p.partial + ((at.batch * p.chain + at.block) * p.groups + group) * outputs;
    for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kMaxWarps; ++w) {
        if (w < warps) sum += reinterpret_cast<const float*>(sums + w * sums_stride)[i];
      }
      partial[i] = sum;
    }
  }

  const int count = at.count;
  const int64_t batch = at.batch;
#pragma unroll
  for (int route = 0; route < 2; ++route) {
    const int q = 2 * at.pair + route;
    (route ? dmaps1 : dmaps0).write(at.lane, [&](int pixel, int column, float v0, float v1) {
      if (pixel >= count) return;
      const int64_t index = (batch * p.length + at.pixel(p, pixel)) * 4 + q;
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

// Bytes that a block of either backward kernel needs at most.
template <typename T, int Rank> int backward_bytes(int warps, const Args& args) {
  return std::max(ForwardMemory<T, Rank>::bytes(args, warps), BackwardMemory<T, Rank>::bytes(args.map_columns, warps));
}

template <typename T, int Rank> void run_backward(bool carries, int warps, const Args& args, cudaStream_t stream) {
  if (carries) {
    launch(args.second_reversed ? backward_carries_kernel<T, Rank, true> : backward_carries_kernel<T, Rank, false>,
           args.batch * args.chain * args.groups, warps, ForwardMemory<T, Rank>::bytes(args, warps), args,
           stream);
  } else {
    const int bytes = BackwardMemory<T, Rank>::bytes(args.map_columns, warps);
    launch(args.second_reversed ? backward_kernel<T, Rank, true> : backward_kernel<T, Rank, false>,
           args.batch * args.chain * args.splits, warps, bytes, args, stream);
  }
}

}  // namespace ss2d
}  // namespace mmvmamba
