// Backward scan kernels of the fused SS2D core, N = 1.
//
// With g_t = dL/dh_t: g_t = C_t dy_t + s_{t+1}, s_t = decay_t g_t; s runs against the scan.
//
// BackwardKernel: a block takes S segments of one image, both routes of a pair, and loops over channel groups of 32.
//   A thread recomputes its channel's segment from the saved entering state (d2 and decay h_{t-1} in registers), and
//   with it the carry of s, takes the entering s from shared memory and the chain's blocks, and walks back for the
//   gradients. Sums over channels (dprojections) stay in registers over the groups; sums over pixels (weights, bias, A,
//   D) are added over the block's warps in a fixed order and leave as one partial sum a block. A thread has 128
//   registers, so little is kept: what a group needs is prefetched to shared memory during the group before.
//   Moves: x, dy once a pair, dx once (twice for the second pair), states, projections and dprojections once a pair,
//   partial sums. With Rank = 0, du2 is written too, for the GEMMs after it (in the place of u, where float has one).
#pragma once

#include "common/ceil_div.h"
#include "ss2d/backward_carries.cuh"
#include "ss2d/reduce.cuh"

namespace mmvmamba {
namespace ss2d {

// A lane's row of a tile, filled pixel by pixel, from the last one if Descending. Of 16-bit types 8 pixels are stored
// at once, which meets no bank conflicts.
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
      words[t / 2 % 4] = Descending ? pack<T>(value, previous) : pack<T>(previous, value);
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

// A thread's segment on one route of a pair.
template <typename T, int Rank, bool Reversed> struct BackwardRoute {
  static constexpr int kTile = 32 * kTileStride<T>;
  const Args& p;
  const Place& at;
  const Projections<T, Rank>& projections;
  const int route;
  const float A;
  T* tiles;
  float d2[kSegment], carried[kSegment];  // carried: decay times the state before

  // Scan again from `state`, which enters the segment; leaves the tile of dC. Returns the carry of s: its end is the
  // sum of C_t dy_t, each times the decays up to t.
  __device__ __forceinline__ Carry rescan(const char* operand, const Values<T>& x, const Values<T>& dy, float state) {
    Carry carry = {1.f, 0.f};
    __syncwarp();  // all lanes have read the tiles of the route before
    const Projected<T, Rank> u(p, at, projections, Segment<T>(p, at), operand, tiles, route);
    TileRow<T, Reversed> dC(tiles + 2 * kTile + at.lane * kTileStride<T>);
    float4 two;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const int t = Reversed ? kSegment - 1 - i : i;
      const float2 bc = projections.bc_of_walk(route, i, t, two);
      d2[t] = softplus2<T>(u[t]);
      const float decay = exp2_fast(A * d2[t]);
      carried[t] = decay * state;
      state = fmaf(d2[t], x[t] * bc.x, carried[t]);
      dC.put(i, state * dy[t]);
      carry.product *= decay;
      carry.end = fmaf(carry.product, bc.y * dy[t], carry.end);
    }
    return carry;
  }

  // Walk back with `s`, which enters from behind: adds to dx, dA and dbias, and leaves the tiles of du2 and dB.
  __device__ __forceinline__ void adjoint(const Values<T>& x, const Values<T>& dy, float s, float (&dx)[kSegment],
                                          float& dA, float& dbias) const {
    const float A_ln2 = A * kLn2;
    TileRow<T, !Reversed> du_row(tiles + at.lane * kTileStride<T>), dB(tiles + kTile + at.lane * kTileStride<T>);
    float4 two;
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      const int t = Reversed ? i : kSegment - 1 - i;
      const float2 bc = projections.bc_of_walk(route, i, t, two);
      const float g = fmaf(bc.y, dy[t], s);
      s = exp2_fast(A * d2[t]) * g;
      const float g_d2 = g * d2[t];
      const float du = g * fmaf(A_ln2, carried[t], bc.x * x[t]) * softplus2_slope<T>(d2[t]);
      dx[t] = fmaf(g_d2, bc.x, dx[t]);
      dA = fmaf(g_d2, carried[t], dA);
      dB.put(i, g_d2 * x[t]);
      if constexpr (Rank == 0) {
        dbias += du;
        tiles[t * 32 + at.lane] = narrow<T>(du);
      } else {
        du_row.put(i, du);
      }
    }
    __syncwarp();
  }
};

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
// the channels, the pixels of its steps, projections and sums.
template <typename T, int Rank> struct BackwardMemory {
  static constexpr int kTile = Segment<T>::kSize * sizeof(T), kSums = kPartialSize<Rank> * sizeof(float);
  static constexpr int kPixels = kSegment * sizeof(int);
  __host__ __device__ static int carries(int warps) { return 3 * warps * 32 * sizeof(Carry); }
  __host__ __device__ static int warp_bytes(int projection_columns) {
    return 3 * kTile + kTilesBytes<T, Rank> + ChannelValues::kBytes + kPixels +
           Projections<T, Rank>::bytes(projection_columns) + kSums;
  }
  __host__ __device__ static int bytes(int projection_columns, int warps) {
    return carries(warps) + 2 * kept_bytes<T, Rank>(projection_columns) + warps * warp_bytes(projection_columns);
  }
};

// A block: where its memory lies, and what it does with a group of channels.
template <typename T, int Rank> struct BackwardBlock {
  using Memory = BackwardMemory<T, Rank>;
  static constexpr int kColumns = kPartialColumns<Rank>, kOutputs = kPartialSize<Rank>;
  const Args& p;
  int split;
  Place at;
  const int operands_bytes, sums_stride;  // bytes of a group's operands, and from a warp's sums to the next one's
  Carry *local, *before;                  // [2][warps][32] of both routes; [warps][32]
  char *operands, *sums;                  // operands: those of this group and the next
  T *x_tile, *dy_tile, *dx_tile, *tiles;
  float *values, *own_sums;
  int* pixels;
  const Projections<T, Rank> projections;
  const bool works;  // a warp beyond the image only waits for the others

  __device__ __forceinline__ explicit BackwardBlock(const Args& args)
      : p(args),
        at(p, p.by_splits, split),
        operands_bytes(kept_bytes<T, Rank>(p.projection_columns)),
        sums_stride(Memory::warp_bytes(p.projection_columns)),
        local(shared_memory<Carry>()),
        before(local + 2 * at.warps * 32),
        operands(shared_memory<char>() + Memory::carries(at.warps)),
        sums(operands + 2 * operands_bytes + sums_stride - Memory::kSums),
        x_tile(reinterpret_cast<T*>(operands + 2 * operands_bytes + at.warp * sums_stride)),
        dy_tile(x_tile + Segment<T>::kSize),
        dx_tile(dy_tile + Segment<T>::kSize),
        tiles(dx_tile + Segment<T>::kSize),
        values(reinterpret_cast<float*>(reinterpret_cast<char*>(tiles) + kTilesBytes<T, Rank>)),
        own_sums(reinterpret_cast<float*>(sums + at.warp * sums_stride)),
        pixels(reinterpret_cast<int*>(reinterpret_cast<char*>(values) + ChannelValues::kBytes)),
        projections(p, reinterpret_cast<char*>(pixels) + Memory::kPixels),
        works(at.count > 0) {}

  __device__ __forceinline__ T* dx_image() const { return static_cast<T*>(p.y) + at.batch * p.length * p.channels; }

  // Begin to load what a group needs, the operands into one of two places.
  __device__ __forceinline__ void load(int group, int which) {
    at.select_group(p, group);
    const Segment<T> segment(p, at);
    const int64_t image = at.batch * p.length * p.channels;
    load_operands<T, Rank>(p, at, operands + which * operands_bytes);
    segment.load(p, at, static_cast<const T*>(p.x) + image, p.channels, x_tile);
    segment.load(p, at, static_cast<const T*>(p.dy) + image, p.channels, dy_tile);
    if (at.pair == 1) segment.load(p, at, dx_image(), p.channels, dx_tile);
    ChannelValues::load(p, at, values);
  }

  // The s that enters the segment on a route, from the carries in `local`.
  __device__ __forceinline__ float entering_s(int route, bool reversed) const {
    const Carry* carries = local + route * at.warps * 32;
    const float enters = entering_from_chain(p, at, route, reversed, carries, before);
    return works ? incoming<kMaxWarps>(carries, enters, reversed, at.warp, at.warps, at.lane) : 0.f;
  }

  // One route: adds to dx and dprojections, and leaves the sums of the weights and dA in the warp's sums. `state`
  // enters the segment.
  template <bool Reversed>
  __device__ __forceinline__ void run_route(const char* kept, int route, Values<T>& x, Values<T>& dy, float state,
                                            float A, float (&dx)[kSegment],
                                            ProjectionSums<T, Rank>& dprojections) const {
    const int q = 2 * at.pair + route;
    BackwardRoute<T, Rank, Reversed> pass{p, at, projections, route, A, tiles};
    x.stay_packed();
    dy.stay_packed();
    Carry carry = {1.f, 0.f};
    if (works) carry = pass.rescan(operand_at<T, Rank>(p, at, kept, route), x, dy, state);
    local[(route * at.warps + at.warp) * 32 + at.lane] = carry;
    __syncthreads();
    const float s = entering_s(route, !Reversed);
    if (!works) return;
    x.stay_packed();
    dy.stay_packed();
    float dA = 0.f, dbias = 0.f;
    pass.adjoint(x, dy, s, dx, dA, dbias);
    if constexpr (Rank == 0) {
      T* image = static_cast<T*>(p.u) + (at.batch * p.length * 4 + q) * p.channels;
      Segment<T>(p, at).store(p, at, tiles, image, 4 * p.channels);
    }
    const T* fragment = static_cast<const T*>(p.dt_fragment) + q * kColumns * p.padded + at.group * 32;
    dprojections.add(tiles, fragment, p.padded, at.lane);
    weight_sums<T, Rank>(tiles, projections, route, dbias, own_sums + route * 32 * kColumns, at.lane);
    own_sums[64 * kColumns + route * 32 + at.lane] = dA;
  }

  // dx of the group to memory.
  __device__ __forceinline__ void store_dx(const float (&dx)[kSegment]) const {
    if (!works) return;
    __syncwarp();
    write_tile(tiles, at.lane, dx);
    Segment<T>(p, at).store(p, at, tiles, dx_image(), p.channels);
  }

  // The sums of the group over the block's warps, in their order.
  __device__ __forceinline__ void reduce(int group) const {
    __syncthreads();
    float* partial = p.partial + ((at.batch * p.chain + at.block) * p.groups + group) * kOutputs;
    for (int i = threadIdx.x; i < kOutputs; i += blockDim.x) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kMaxWarps; ++w) {
        if (w < at.warps) sum += reinterpret_cast<const float*>(sums + w * sums_stride)[i];
      }
      partial[i] = sum;
    }
  }

  // The gradients of a route's projections, summed over all groups.
  __device__ __forceinline__ void store_projections(const ProjectionSums<T, Rank>& dprojections, int route) const {
    const int q = 2 * at.pair + route;
    dprojections.write(at.lane, [&](int pixel, int column, float v0, float v1) {
      if (pixel >= at.count) return;
      const int64_t index = (at.batch * p.length + at.pixel(p, pixel)) * 4 + q;
      if constexpr (Rank == 0) {
        if (column == 6) {
          float* to = p.dprojections_part + split * p.batch * p.length * 8 + index * 2;
          to[0] = v0, to[1] = v1;
        }
      } else {
        T* to = static_cast<T*>(p.dprojections) + index * p.projection_columns + column;
        to[0] = narrow<T>(v0), to[1] = narrow<T>(v1);
      }
    });
  }
};

template <typename T, int Rank, bool SecondReversed> struct BackwardKernel {
  static constexpr int kThreads = kMaxWarps * 32, kBlocks = sizeof(T) == 2 ? 2 : 1;

  static __device__ __forceinline__ void run(const Args& p) {
    BackwardBlock<T, Rank> block(p);
    Place& at = block.at;
    const int per_split = ceil_div(p.groups, p.splits), first_group = block.split * per_split;
    const int last_group = min(p.groups, first_group + per_split);
    at.tabulate(p, block.pixels);
    block.projections.load(p, at);
    block.load(first_group, 0);
    if (!block.works) {
      for (int i = at.lane; i < block.kOutputs; i += 32) block.own_sums[i] = 0.f;
    }
    // The route comes first whose s has passed the fewest blocks before this one: when the other's turn comes, the
    // blocks before it have published their carries.
    const bool second_first = SecondReversed && blocks_before(p, at.block, true) > blocks_before(p, at.block, false);
    ProjectionSums<T, Rank> dprojections0, dprojections1;
    dprojections0.clear();
    dprojections1.clear();
    for (int group = first_group; group < last_group; ++group) {
      const int which = (group ^ first_group) & 1;
      wait_for_copies();
      if (group == first_group) block.projections.convert(p, at.lane);
      __syncthreads();  // copies are there, and the sums of the group before are read
      Values<T> x = read_tile(block.x_tile, at.lane), dy = read_tile(block.dy_tile, at.lane);
      const ChannelValues own(block.values, at.lane);
      float dx[kSegment], dD = 0.f;
      if (at.pair == 1) {
        const Values<T> rows = read_tile(block.dx_tile, at.lane);
#pragma unroll
        for (int t = 0; t < kSegment; ++t) dx[t] = rows[t];
      }
      __syncwarp();
      if (group + 1 < last_group) block.load(group + 1, 1 - which);
      at.select_group(p, group);
      if (at.pair == 0) {
#pragma unroll
        for (int t = 0; t < kSegment; ++t) dx[t] = own.skip * dy[t], dD = fmaf(x[t], dy[t], dD);
      }
      if (block.works) block.own_sums[64 * block.kColumns + 64 + at.lane] = dD;

      const char* kept = block.operands + which * block.operands_bytes;
      bool second = second_first;
#pragma unroll 1
      do {
        if (second) {
          block.template run_route<SecondReversed>(kept, 1, x, dy, own.state[1], own.A[1], dx, dprojections1);
        } else {
          block.template run_route<false>(kept, 0, x, dy, own.state[0], own.A[0], dx, dprojections0);
        }
        second = !second;
      } while (second != second_first);
      block.store_dx(dx);
      block.reduce(group);
    }
    block.store_projections(dprojections0, 0);
    block.store_projections(dprojections1, 1);
  }
};

// ---- host -----------------------------------------------------------------------------------------------------------
template <typename T> int Backward<T>::shared_bytes(int rank, int warps, const Args& args) {
  return with_rank(rank, [&](auto constant) {
    constexpr int Rank = decltype(constant)::value;
    return std::max(ForwardMemory<T, Rank>::bytes(args, warps),
                    BackwardMemory<T, Rank>::bytes(args.projection_columns, warps));
  });
}

template <typename T> void Backward<T>::run_carries(int rank, int warps, const Args& args, cudaStream_t stream) {
  with_rank(rank, [&](auto constant) {
    constexpr int Rank = decltype(constant)::value;
    launch_pair<BackwardCarriesKernel, T, Rank>(args.batch * args.chain * args.groups, warps,
                                                ForwardMemory<T, Rank>::bytes(args, warps), args, stream);
  });
}

template <typename T> void Backward<T>::run(int rank, int warps, const Args& args, cudaStream_t stream) {
  with_rank(rank, [&](auto constant) {
    constexpr int Rank = decltype(constant)::value;
    launch_pair<BackwardKernel, T, Rank>(args.batch * args.chain * args.splits, warps,
                                         BackwardMemory<T, Rank>::bytes(args.projection_columns, warps), args, stream);
  });
}

}  // namespace ss2d
}  // namespace mmvmamba
