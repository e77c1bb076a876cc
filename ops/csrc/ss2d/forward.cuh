// Forward scan kernels of the fused SS2D core, N = 1.
//
// forward_kernel: a block takes 32 channels and S segments of one image, both routes of a pair. A thread scans its
//   channel's segment of kSegment pixels twice (once a route) from a zero state, in registers: y is the sum of C h,
//   and C * (product of decays) is kept, because y is affine in the entering state. The segments' carries meet in
//   shared memory, those of the chain's blocks in global memory; then y += C prod * state, and y is written once (the
//   second pair reads the first pair's y and adds).
//   Moves: x once, maps once a group (shared through L2), y once (twice for the second pair), states if training.
// forward_carries_kernel: the same local scan without outputs; a block leaves one carry a route and channel. For chains
//   too long to wait for.
#pragma once

#include <algorithm>

#include "ss2d/forward_image.cuh"

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
// s), scratch (a tile of u2 or y), the pixels of its steps, and maps.
template <typename T, int Rank> struct ForwardMemory {
  Carry *local, *before;  // [2][warps][32] each
  char *operands, *scratch, *maps;
  T* input;
  int* pixels;

  static constexpr int kInput = Segment<T>::kSize * sizeof(T);
  static constexpr int kScratch = std::max<int>(Projected<T, Rank>::kTileBytes, Segment<float>::kSize * sizeof(float));
  __host__ __device__ static int carries(int warps) { return 4 * warps * 32 * sizeof(Carry); }
  __host__ __device__ static int warp_bytes(int map_columns) {
    return kInput + kScratch + kSegment * sizeof(int) + Maps<T, Rank>::bytes(map_columns);
  }
  static int bytes(const Args& p, int warps) {
    return carries(warps) + kept_bytes<T, Rank>(p.map_columns) + warps * warp_bytes(p.map_columns);
  }

  __device__ __forceinline__ ForwardMemory(const Args& p, const Place& at, void* shared)
      : local(static_cast<Carry*>(shared)), before(local + 2 * at.warps * 32),
        operands(static_cast<char*>(shared) + carries(at.warps)) {
    char* own = operands + kept_bytes<T, Rank>(p.map_columns) + at.warp * warp_bytes(p.map_columns);
    input = reinterpret_cast<T*>(own), scratch = own + kInput;
    pixels = reinterpret_cast<int*>(scratch + kScratch), maps = scratch + kScratch + kSegment * sizeof(int);
  }
};

template <typename T, int Rank, bool SecondReversed, bool WithOutput>
__device__ __forceinline__ void forward_body(const Args& p, void* shared) {
  int group;
  Place at(p, p.by_groups, group);
  at.select_group(p, group);
  const int lane = at.lane, warp = at.warp, warps = at.warps;
  const ForwardMemory<T, Rank> memory(p, at, shared);
  Carry *local = memory.local, *before = memory.before;
  char *operands = memory.operands, *scratch = memory.scratch;
  const Maps<T, Rank> maps(p, memory.maps);
  at.tabulate(p, memory.pixels);
  const Segment<T> segment(p, at);

  segment.load(p, at, static_cast<const T*>(p.x) + at.batch * p.length * p.channels, p.channels, memory.input);
  maps.load(p, at);
  load_operands<T, Rank>(p, at, operands);
  if (WithOutput && at.pair == 1) {
    if (p.float_output) {
      load_output(p, at, Segment<float>(p, at), scratch);
    } else {
      load_output(p, at, segment, scratch);
    }
  }
  const float* A = p.A + 2 * at.pair * p.padded + at.padded_channel;
  const float A0 = A[0], A1 = A[p.padded], skip = p.skip[at.padded_channel];
  wait_for_copies();
  maps.convert(p, lane);
  __syncthreads();
  const Values<T> x = read_tile(memory.input, lane);
  float y[kSegment];
  if (WithOutput && at.pair == 1) {
    if (p.float_output) {
      read_output<float>(at, scratch, y);
    } else {
      read_output<T>(at, scratch, y);
    }
  } else if (WithOutput) {
#pragma unroll
    for (int t = 0; t < kSegment; ++t) y[t] = skip * x[t];
  }

  Values<T> through0, through1;
  {
    const Projected<T, Rank> u(p, at, maps, segment, operand_at<T, Rank>(p, at, operands, 0), scratch, 0);
    local[warp * 32 + lane] = scan_segment<T, Rank, false, WithOutput>(maps, 0, u, x, A0, y, through0);
  }
  {
    const Projected<T, Rank> u(p, at, maps, segment, operand_at<T, Rank>(p, at, operands, 1), scratch, 1);
    local[(warps + warp) * 32 + lane] =
        scan_segment<T, Rank, SecondReversed, WithOutput>(maps, 1, u, x, A1, y, through1);
  }
  __syncthreads();
  if (!WithOutput || p.chaining == Chain::kLookBack) {
    for (int route = warp; route < 2; route += warps) {
      publish(block_carry(p, at.batch, at.block, route, at.padded_channel),
              block_total(local + route * warps * 32, route == 1 && SecondReversed, warps, lane));
    }
  }
  if constexpr (!WithOutput) return;
  before[warp * 32 + lane] = share_of_chain(p, at.batch, at.block, 0, at.padded_channel, false, warp, warps);
  before[(warps + warp) * 32 + lane] =
      share_of_chain(p, at.batch, at.block, 1, at.padded_channel, SecondReversed, warp, warps);
  __syncthreads();
  const float enters0 = entering(before, warps, lane);
  const float enters1 = entering(before + warps * 32, warps, lane);
  const float state0 = incoming<kMaxWarps>(local, enters0, false, warp, warps, lane);
  const float state1 = incoming<kMaxWarps>(local + warps * 32, enters1, SecondReversed, warp, warps, lane);
  if (p.states != nullptr && at.active && at.count > 0) {
    const int64_t number = at.batch * p.segments + at.block * warps + warp;
    float* to = p.states + (number * 4 + 2 * at.pair) * p.channels + at.channel;
    to[0] = state0;
    to[p.channels] = state1;
  }
#pragma unroll
  for (int t = 0; t < kSegment; ++t) y[t] = fmaf(through1[t], state1, fmaf(through0[t], state0, y[t]));
  if (p.float_output) {
    store_output(p, at, Segment<float>(p, at), scratch, y);
  } else {
    store_output(p, at, segment, scratch, y);
  }
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32, sizeof(T) == 2 ? 3 : 2)
    forward_kernel(const __grid_constant__ Args p) {
  begin_kernel();
  extern __shared__ float4 shared[];
  forward_body<T, Rank, SecondReversed, true>(p, shared);
}

template <typename T, int Rank, bool SecondReversed>
__global__ void __launch_bounds__(kMaxWarps * 32) forward_carries_kernel(const __grid_constant__ Args p) {
  begin_kernel();
  extern __shared__ float4 shared[];
  forward_body<T, Rank, SecondReversed, false>(p, shared);
}

// Launch `kernel` with a dynamic shared memory that may exceed the default limit.
inline void launch(void (*kernel)(const Args), int64_t blocks, int warps, int bytes, const Args& args,
                   cudaStream_t stream) {
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  mmvmamba::launch(kernel, static_cast<unsigned>(blocks), warps * 32, bytes, stream, args);
}

// Bytes that a block of any of the forward kernels for the chaining needs at most.
template <typename T, int Rank> int forward_bytes(int warps, const Args& args) {
  return args.chaining == Chain::kNone ? ImageMemory<T, Rank>::bytes(args, warps)
                                       : ForwardMemory<T, Rank>::bytes(args, warps);
}

template <typename T, int Rank> void run_forward(bool carries, int warps, const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.chain * args.groups;
  const int bytes = forward_bytes<T, Rank>(warps, args);
  const bool reversed = args.second_reversed;
  if (args.chaining == Chain::kNone && warps <= kMaxWarps) {
    launch(reversed ? forward_image_kernel<T, Rank, kMaxWarps, true> : forward_image_kernel<T, Rank, kMaxWarps, false>,
           blocks, warps, bytes, args, stream);
  } else if (args.chaining == Chain::kNone) {
    launch(reversed ? forward_image_kernel<T, Rank, kMaxImageWarps, true>
                    : forward_image_kernel<T, Rank, kMaxImageWarps, false>,
           blocks, warps, bytes, args, stream);
  } else if (carries) {
    launch(reversed ? forward_carries_kernel<T, Rank, true> : forward_carries_kernel<T, Rank, false>, blocks, warps,
           bytes, args, stream);
  } else {
    launch(reversed ? forward_kernel<T, Rank, true> : forward_kernel<T, Rank, false>, blocks, warps, bytes, args,
           stream);
  }
}

}  // namespace ss2d
}  // namespace mmvmamba
