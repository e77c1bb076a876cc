// What the forward kernels of the fused SS2D core share: the scan of a segment, and its output.
#pragma once

#include "ss2d/projections.cuh"

namespace mmvmamba {
namespace ss2d {

// Scan one segment of one route from a zero state. A is that of the channel.
template <typename T, int Rank, bool Reversed, bool WithOutput>
__device__ __forceinline__ Carry scan_segment(const Projections<T, Rank>& projections, int route,
                                              const Projected<T, Rank>& u, const Values<T>& x, float A,
                                              float (&y)[kSegment], Values<T>& through) {
  Carry carry = {1.f, 0.f};
  float previous = 0.f;
  float4 two;
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? kSegment - 1 - i : i;
    const float2 bc = projections.bc_of_walk(route, i, t, two);
    const float d2 = softplus2<T>(u[t]);
    const float decay = exp2_fast(A * d2);
    carry.end = fmaf(decay, carry.end, d2 * x[t] * bc.x);
    carry.product *= decay;
    if constexpr (WithOutput) {
      y[t] = fmaf(bc.y, carry.end, y[t]);
      const float gain = bc.y * carry.product;
      if (i % 2) through.set_pair(t & ~1, Reversed ? gain : previous, Reversed ? previous : gain);
      previous = gain;
    }
  }
  return carry;
}

// Scan the segment from a zero state on both routes of the pair; their carries go to `local`, [2][warps][32].
// `operand` gives what the tensor cores need of a route.
template <typename T, int Rank, bool SecondReversed, bool WithOutput, typename Operand>
__device__ __forceinline__ void scan_pair(const Args& p, const Place& at, const Projections<T, Rank>& projections,
                                          const Segment<T>& segment, Operand operand, char* scratch, const Values<T>& x,
                                          float A0, float A1, float (&y)[kSegment], Values<T>& through0,
                                          Values<T>& through1, Carry* local) {
  {
    const Projected<T, Rank> u(p, at, projections, segment, operand(0), scratch, 0);
    local[at.warp * 32 + at.lane] = scan_segment<T, Rank, false, WithOutput>(projections, 0, u, x, A0, y, through0);
  }
  {
    const Projected<T, Rank> u(p, at, projections, segment, operand(1), scratch, 1);
    local[(at.warps + at.warp) * 32 + at.lane] =
        scan_segment<T, Rank, SecondReversed, WithOutput>(projections, 1, u, x, A1, y, through1);
  }
}

// y of a segment, float or T, from registers to memory by way of scratch.
template <typename E>
__device__ __forceinline__ void store_output(const Args& p, const Place& at, const Segment<E>& segment, char* scratch,
                                             const float (&y)[kSegment]) {
  write_tile(reinterpret_cast<E*>(scratch), at.lane, y);
  E* image = static_cast<E*>(p.y) + at.batch * p.length * p.channels;
  segment.store(p, at, reinterpret_cast<const E*>(scratch), image, p.channels);
}

}  // namespace ss2d
}  // namespace mmvmamba
