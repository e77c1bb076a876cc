// Forward scan kernels of the fused SS2D core, N = 1.
//
// ForwardKernel: a block takes 32 channels and S segments of one image, both routes of a pair. A thread scans its
//   channel's segment of kSegment pixels twice (once a route) from a zero state, in registers: y is the sum of C h,
//   and C * (product of decays) is kept, because y is affine in the entering state. The segments' carries meet in
//   shared memory, those of the chain's blocks in global memory; then y += C prod * state, and y is written once (the
//   second pair reads the first pair's y and adds).
//   Moves: x once, projections once a group (shared through L2), y once (twice for the second pair), states if
//   training.
// ForwardCarriesKernel: the same local scan without outputs; a block leaves one carry a route and channel. For chains
//   too long to wait for.
#pragma once

#include <algorithm>

#include "ss2d/forward_image.cuh"
#include "ss2d/with_rank.cuh"

namespace mmvmamba {
namespace ss2d {

// What the first pair of routes has left in y, float or T, of a segment: the second pair adds to it.
template <typename E>
__device__ __forceinline__ void load_output(const Args& p, const Place& at, const Segment<E>& segment, char* scratch) {
  const E* image = static_cast<const E*>(p.y) + at.batch * p.length * p.channels;
  segment.load(p, at, image, p.channels, reinterpret_cast<E*>(scratch));
}
template <typename E>
__device__ __forceinline__ void read_output(const Place& at, const char* scratch, float (&y)[kSegment]) {
  const Values<E> before = read_tile(reinterpret_cast<const E*>(scratch), at.lane);
#pragma unroll
  for (int t = 0; t < kSegment; ++t) y[t] = before[t];
}

// Shared memory of a block: carries, then the operands, then of each warp the input's tile (x, or dy for the carries of
// s), scratch (a tile of u2 or y), the pixels of its steps, and projections.
template <typename T, int Rank> struct ForwardMemory {
  Carry *local, *before;  // [2][warps][32] each
  char *operands, *scratch, *projections;
  T* input;
  int* pixels;

  static constexpr int kInput = Segment<T>::kSize * sizeof(T);
  static constexpr int kScratch = std::max<int>(Projected<T, Rank>::kTileBytes, Segment<float>::kSize * sizeof(float));
  __host__ __device__ static int carries(int warps) { return 4 * warps * 32 * sizeof(Carry); }
  __host__ __device__ static int warp_bytes(int projection_columns) {
    return kInput + kScratch + kSegment * sizeof(int) + Projections<T, Rank>::bytes(projection_columns);
  }
  static int bytes(const Args& p, int warps) {
    return carries(warps) + kept_bytes<T, Rank>(p.projection_columns) + warps * warp_bytes(p.projection_columns);
  }

  __device__ __forceinline__ ForwardMemory(const Args& p, const Place& at, void* shared)
      : local(static_cast<Carry*>(shared)),
        before(local + 2 * at.warps * 32),
        operands(static_cast<char*>(shared) + carries(at.warps)) {
    char* own = operands + kept_bytes<T, Rank>(p.projection_columns) + at.warp * warp_bytes(p.projection_columns);
    input = reinterpret_cast<T*>(own), scratch = own + kInput;
    pixels = reinterpret_cast<int*>(scratch + kScratch), projections = scratch + kScratch + kSegment * sizeof(int);
  }
};

// A block of 32 channels on one pair of routes: what its threads have at hand.
template <typename T, int Rank> struct ForwardBlock {
  const Args& p;
  Place at;
  const ForwardMemory<T, Rank> memory;
  const Projections<T, Rank> projections;
  const Segment<T> segment;

  __device__ __forceinline__ explicit ForwardBlock(const Args& args)
      : p(args),
        at(Place::of_group(p)),
        memory(p, at, shared_memory<void>()),
        projections(p, memory.projections),
        segment(p, at.tabulate(p, memory.pixels)) {}

  // Begin to load the segment's pixels of `map`, and what projects them.
  __device__ __forceinline__ void load(const void* map) const {
    segment.load(p, at, static_cast<const T*>(map) + at.batch * p.length * p.channels, p.channels, memory.input);
    projections.load(p, at);
    load_operands<T, Rank>(p, at, memory.operands);
  }
  __device__ __forceinline__ void await_loads() const {
    wait_for_copies();
    projections.convert(p, at.lane);
    __syncthreads();
  }
  __device__ __forceinline__ const float* A() const { return p.A + 2 * at.pair * p.padded + at.padded_channel; }
  __device__ __forceinline__ const char* operand(int route) const {
    return operand_at<T, Rank>(p, at, memory.operands, route);
  }
  __device__ __forceinline__ Carry* carries_of(int route) const { return memory.local + route * at.warps * 32; }
  __device__ __forceinline__ Carry total_of(int route, bool reversed) const {
    return block_total(carries_of(route), reversed, at.warps, at.lane);
  }

  // y before the scan: what the first pair left there, or D x.
  __device__ __forceinline__ void load_output_before() const {
    if (at.pair == 0) return;
    if (p.float_output) {
      load_output(p, at, Segment<float>(p, at), memory.scratch);
    } else {
      load_output(p, at, segment, memory.scratch);
    }
  }
  __device__ __forceinline__ void read_output_before(const Values<T>& x, float skip, float (&y)[kSegment]) const {
    if (at.pair == 0) {
#pragma unroll
      for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
    } else if (p.float_output) {
      read_output<float>(at, memory.scratch, y);
    } else {
      read_output<T>(at, memory.scratch, y);
    }
  }

  template <bool SecondReversed> __device__ __forceinline__ void publish_carries() const {
    for (int route = at.warp; route < 2; route += at.warps) {
      publish(block_carry(p, at.batch, at.block, route, at.padded_channel),
              total_of(route, route == 1 && SecondReversed));
    }
  }

  // The states that enter the segment on both routes, once the carries of the blocks before are there.
  template <bool SecondReversed> __device__ __forceinline__ float2 entering_states() const {
    const int warp = at.warp, warps = at.warps, lane = at.lane;
    Carry* before = memory.before;
    before[warp * 32 + lane] = share_of_chain(p, at.batch, at.block, 0, at.padded_channel, false, warp, warps);
    before[(warps + warp) * 32 + lane] =
        share_of_chain(p, at.batch, at.block, 1, at.padded_channel, SecondReversed, warp, warps);
    __syncthreads();
    const float enters0 = entering(before, warps, lane);
    const float enters1 = entering(before + warps * 32, warps, lane);
    return make_float2(incoming<kMaxWarps>(carries_of(0), enters0, false, warp, warps, lane),
                       incoming<kMaxWarps>(carries_of(1), enters1, SecondReversed, warp, warps, lane));
  }

  __device__ __forceinline__ void save(const float2& states) const {
    if (p.states == nullptr || !at.active || at.count <= 0) return;
    const int64_t number = at.batch * p.segments + at.block * at.warps + at.warp;
    float* to = p.states + (number * 4 + 2 * at.pair) * p.channels + at.channel;
    to[0] = states.x;
    to[p.channels] = states.y;
  }
  __device__ __forceinline__ void store(const float (&y)[kSegment]) const {
    if (p.float_output) {
      store_output(p, at, Segment<float>(p, at), memory.scratch, y);
    } else {
      store_output(p, at, segment, memory.scratch, y);
    }
  }
};

template <typename T, int Rank, bool SecondReversed> struct ForwardKernel {
  static constexpr int kThreads = kMaxWarps * 32, kBlocks = sizeof(T) == 2 ? 3 : 2;

  static __device__ __forceinline__ void run(const Args& p) {
    const ForwardBlock<T, Rank> block(p);
    const Place& at = block.at;
    block.load(p.x);
    block.load_output_before();
    const float A0 = block.A()[0], A1 = block.A()[p.padded], skip = p.skip[at.padded_channel];
    block.await_loads();
    const Values<T> x = read_tile(block.memory.input, at.lane);
    float y[kSegment];
    block.read_output_before(x, skip, y);

    Values<T> through0, through1;
    scan_pair<T, Rank, SecondReversed, true>(
        p, at, block.projections, block.segment, [&](int route) { return block.operand(route); }, block.memory.scratch,
        x, A0, A1, y, through0, through1, block.memory.local);
    __syncthreads();
    if (p.chaining == Chain::kLookBack) block.template publish_carries<SecondReversed>();
    const float2 states = block.template entering_states<SecondReversed>();
    block.save(states);
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = fmaf(through1[t], states.y, fmaf(through0[t], states.x, y[t]));
    block.store(y);
  }
};

template <typename T, int Rank, bool SecondReversed> struct ForwardCarriesKernel {
  static constexpr int kThreads = kMaxWarps * 32, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p) {
    const ForwardBlock<T, Rank> block(p);
    block.load(p.x);
    const float A0 = block.A()[0], A1 = block.A()[p.padded];
    block.await_loads();
    const Values<T> x = read_tile(block.memory.input, block.at.lane);
    float y[kSegment];
    Values<T> through0, through1;  // neither is touched
    scan_pair<T, Rank, SecondReversed, false>(
        p, block.at, block.projections, block.segment, [&](int route) { return block.operand(route); },
        block.memory.scratch, x, A0, A1, y, through0, through1, block.memory.local);
    __syncthreads();
    block.template publish_carries<SecondReversed>();
  }
};

// ---- host -----------------------------------------------------------------------------------------------------------
template <template <typename, int, bool> class Kernel, typename T, int Rank>
void launch_pair(int64_t blocks, int warps, int bytes, const Args& args, cudaStream_t stream) {
  if (args.second_reversed) {
    launch<Kernel<T, Rank, true>>(blocks, warps * 32, bytes, stream, args);
  } else {
    launch<Kernel<T, Rank, false>>(blocks, warps * 32, bytes, stream, args);
  }
}

template <typename T> int Forward<T>::shared_bytes(int rank, int warps, const Args& args) {
  return with_rank(rank, [&](auto constant) {
    constexpr int Rank = decltype(constant)::value;
    return args.chaining == Chain::kNone ? ImageMemory<T, Rank>::bytes(args, warps)
                                         : ForwardMemory<T, Rank>::bytes(args, warps);
  });
}

template <typename T> void Forward<T>::run_carries(int rank, int warps, const Args& args, cudaStream_t stream) {
  with_rank(rank, [&](auto constant) {
    launch_pair<ForwardCarriesKernel, T, decltype(constant)::value>(args.batch * args.chain * args.groups, warps,
                                                                    shared_bytes(rank, warps, args), args, stream);
  });
}

template <typename T> void Forward<T>::run(int rank, int warps, const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.chain * args.groups;
  const int bytes = shared_bytes(rank, warps, args);
  with_rank(rank, [&](auto constant) {
    constexpr int Rank = decltype(constant)::value;
    if (args.chaining != Chain::kNone) {
      launch_pair<ForwardKernel, T, Rank>(blocks, warps, bytes, args, stream);
    } else if (warps <= kMaxWarps) {
      launch_pair<SmallImageKernel, T, Rank>(blocks, warps, bytes, args, stream);
    } else {
      launch_pair<LargeImageKernel, T, Rank>(blocks, warps, bytes, args, stream);
    }
  });
}

}  // namespace ss2d
}  // namespace mmvmamba
