// The carries of s alone, for the backward scan of chains too long to wait for: one a block, route and channel. Needs
// neither x nor states.
#pragma once

#include "ss2d/forward.cuh"

namespace mmvmamba {
namespace ss2d {

template <typename T, int Rank, bool Reversed>
__device__ __forceinline__ Carry scan_back(const Projections<T, Rank>& projections, int route,
                                           const Projected<T, Rank>& u, const Values<T>& dy, float A) {
  Carry carry = {1.f, 0.f};
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? i : kSegment - 1 - i;
    const float decay = exp2_fast(A * softplus2<T>(u[t]));
    carry.end = decay * fmaf(projections.bc(route, t).y, dy[t], carry.end);
    carry.product *= decay;
  }
  return carry;
}

template <typename T, int Rank, bool SecondReversed> struct BackwardCarriesKernel {
  static constexpr int kThreads = kMaxWarps * 32, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p) {
    const ForwardBlock<T, Rank> block(p);
    const Place& at = block.at;
    char* scratch = block.memory.scratch;
    block.load(p.dy);
    const float* A = block.A();
    block.await_loads();
    const Values<T> dy = read_tile(block.memory.input, at.lane);
    {
      const Projected<T, Rank> u(p, at, block.projections, block.segment, block.operand(0), scratch, 0);
      block.carries_of(0)[at.warp * 32 + at.lane] = scan_back<T, Rank, false>(block.projections, 0, u, dy, A[0]);
    }
    {
      const Projected<T, Rank> u(p, at, block.projections, block.segment, block.operand(1), scratch, 1);
      block.carries_of(1)[at.warp * 32 + at.lane] =
          scan_back<T, Rank, SecondReversed>(block.projections, 1, u, dy, A[p.padded]);
    }
    __syncthreads();
    for (int route = at.warp; route < 2; route += at.warps) {
      *block_carry(p, at.batch, at.block, route, at.padded_channel) =
          block.total_of(route, !(route == 1 && SecondReversed));
    }
  }
};

}  // namespace ss2d
}  // namespace mmvmamba
