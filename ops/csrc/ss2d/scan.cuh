// What the forward kernels of the fused SS2D core share: the scan of a segment, and its output.
#pragma once

#include "ss2d/maps.cuh"

namespace mmvmamba {
namespace ss2d {

// Scan one segment of one route from a zero state. A is that of the channel.
template <typename T, int Rank, bool Reversed, bool WithOutput>
__device__ __forceinline__ Carry scan_segment(const Maps<T, Rank>& maps, int route, const Projected<T, Rank>& u,
                                              const Values<T>& x, float A, float (&y)[kSegment], Values<T>& through) {
  Carry carry = {1.f, 0.f};
  float previous = 0.f;
  float4 two;
#pragma unroll
  for (int i = 0; i < kSegment; ++i) {
    const int t = Reversed ? kSegment - 1 - i : i;
    const float2 bc = maps.bc_of_walk(route, i, t, two);
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
