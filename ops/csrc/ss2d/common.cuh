// Shared pieces of the fused SS2D kernels: the values of a segment, carries.
//
// Vocabulary. A *pair* is two routes over one pixel order: cross2d has rows (forward, reversed) and columns (forward,
// reversed); bidi has rows twice; unidi has two pairs of forward rows. Routes are stored in pair order
// (0, 2 | 1, 3), index q = 2 * pair + r. A *segment* is kSegment consecutive pixels of the order: one thread scans it
// for one channel. A *block* holds S segments (one warp each) of 32 channels, called a *group*; an image is a chain
// of `chain` such blocks.
//
// Scaling. With u2 = log2(e) (Wdt dt + bias): d2 = log2(1 + 2^u2) = delta / ln 2, decay = 2^(A d2), and
// drive = d2 * (ln 2 * B) * x; the factors log2(e) and ln 2 are folded into the prepared weights (parameters.cu).
#pragma once

#include <cstdint>

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/softplus.cuh"
#include "ss2d/kernels.h"

namespace mmvmamba {
namespace ss2d {

// ---- values of a segment --------------------------------------------------------------------------------------------
// The values of one thread's segment, two to a register for 16-bit types.
template <typename T> struct Values {
  uint32_t v[kSegment / 2];
  __device__ __forceinline__ float operator[](int t) const {
    const uint16_t bits = t % 2 ? v[t / 2] >> 16 : v[t / 2] & 0xffff;
    return widen(*reinterpret_cast<const T*>(&bits));
  }
  __device__ __forceinline__ T raw(int t) const {
    const uint16_t bits = t % 2 ? v[t / 2] >> 16 : v[t / 2] & 0xffff;
    return *reinterpret_cast<const T*>(&bits);
  }
  // Two neighbours at once, t even.
  __device__ __forceinline__ void set_pair(int t, float low, float high) { v[t / 2] = pack<T>(low, high); }
  // Let the compiler convert again what it would else keep as floats, in twice the registers.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (int i = 0; i < kSegment / 2; ++i) asm volatile("" : "+r"(v[i]));
  }
  __device__ __forceinline__ void set_raw(const T (&from)[kSegment]) {
#pragma unroll
    for (int i = 0; i < kSegment; i += 2) {
      const uint32_t low = *reinterpret_cast<const uint16_t*>(from + i);
      const uint32_t high = *reinterpret_cast<const uint16_t*>(from + i + 1);
      v[i / 2] = __byte_perm(low, high, 0x5410);
    }
  }
};
template <> struct Values<float> {
  float v[kSegment];
  __device__ __forceinline__ float operator[](int t) const { return v[t]; }
  __device__ __forceinline__ float raw(int t) const { return v[t]; }
  __device__ __forceinline__ void set_pair(int t, float low, float high) { v[t] = low, v[t + 1] = high; }
  __device__ __forceinline__ void stay_packed() {}
  __device__ __forceinline__ void set_raw(const float (&from)[kSegment]) {
#pragma unroll
    for (int i = 0; i < kSegment; ++i) v[i] = from[i];
  }
};

// ---- carries --------------------------------------------------------------------------------------------------------
// A stretch of a scan turns its incoming state s in to product * s + end.
struct Carry {
  float product, end;
};
__device__ __forceinline__ void append(Carry& carry, const Carry& next) {
  carry.end = fmaf(next.product, carry.end, next.end);
  carry.product *= next.product;
}

// Block carries lie as [batch][block of chain][route of pair][padded channel].
__device__ __forceinline__ Carry* block_carry(const Args& p, int64_t batch, int block, int route, int channel) {
  return static_cast<Carry*>(p.block_carries) + ((batch * p.chain + block) * 2 + route) * p.padded + channel;
}

// Carries of 8 bytes are published whole, so the value is its own flag: all bits set until it is there.
constexpr uint64_t kUnpublished = ~0ull;
constexpr int kInFlight = 4;  // carries that a thread asks for at once

__device__ __forceinline__ void publish(Carry* to, const Carry& carry) {
  uint64_t bits = static_cast<uint64_t>(__float_as_uint(carry.end)) << 32 | __float_as_uint(carry.product);
  if (bits == kUnpublished) bits = 0x7fffffff7fffffffull;  // not a number either
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}

__device__ __forceinline__ uint64_t peek(const Carry* from) {
  uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
  return bits;
}

__device__ __forceinline__ Carry await(const Carry* from, uint64_t bits) {
  while (bits == kUnpublished) bits = peek(from);
  return {__uint_as_float(static_cast<uint32_t>(bits)), __uint_as_float(static_cast<uint32_t>(bits >> 32))};
}

// The carry of all warps of a block, in scan order, from their carries in shared memory.
__device__ __forceinline__ Carry block_total(const Carry* local, bool reversed, int warps, int lane) {
  Carry carry = {1.f, 0.f};
  const Carry* first = local + (reversed ? (warps - 1) * 32 : 0) + lane;
#pragma unroll
  for (int w = 0; w < kMaxWarps; ++w) {
    if (w < warps) append(carry, first[(reversed ? -w : w) * 32]);
  }
  return carry;
}

// Blocks of the chain before this one in scan order.
__device__ __forceinline__ int blocks_before(const Args& p, int block, bool reversed) {
  return reversed ? p.chain - 1 - block : block;
}

// What the blocks from `begin` to `end` in scan order have published, as one carry.
__device__ __forceinline__ Carry look_back(const Args& p, int64_t batch, int route, int channel, bool reversed,
                                           int begin, int end) {
  Carry carry = {1.f, 0.f};
  const Carry* first = block_carry(p, batch, reversed ? p.chain - 1 : 0, route, channel);
  const int stride = (reversed ? -2 : 2) * p.padded;
  for (int i = begin; i < end; i += kInFlight) {
    const Carry* from[kInFlight];
    uint64_t bits[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      from[j] = first + min(i + j, end - 1) * stride;
      bits[j] = peek(from[j]);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < end) append(carry, await(from[j], bits[j]));
    }
  }
  return carry;
}

// This warp's share of what enters its block: of the carries of the blocks before it in scan order, or the entering
// state itself, as the first warp's share.
__device__ __forceinline__ Carry share_of_chain(const Args& p, int64_t batch, int block, int route, int channel,
                                                bool reversed, int warp, int warps) {
  if (p.chaining == Chain::kPrefix) {
    return warp == 0 ? *block_carry(p, batch, block, route, channel) : Carry{1.f, 0.f};
  }
  const int count = blocks_before(p, block, reversed), share = p.by_warps.div(count + warps - 1);
  return look_back(p, batch, route, channel, reversed, warp * share, min(count, (warp + 1) * share));
}

// State entering the block, from the shares of its warps: [warps][32].
__device__ __forceinline__ float entering(const Carry* shares, int warps, int lane) {
  float state = 0.f;
  shares += lane;
#pragma unroll
  for (int w = 0; w < kMaxWarps; ++w) {
    if (w < warps) state = fmaf(shares[w * 32].product, state, shares[w * 32].end);
  }
  return state;
}

// State entering this warp's segment: `state`, which enters the block, after the warps before, at most `Most` in a
// block, in scan order. `local` are [warps][32] carries of this route; `reversed` walks the warps from the end.
template <int Most>
__device__ __forceinline__ float incoming(const Carry* local, float state, bool reversed, int warp, int warps,
                                          int lane) {
  const int warps_before = reversed ? warps - 1 - warp : warp;
  const Carry* first = local + (reversed ? (warps - 1) * 32 : 0) + lane;
#pragma unroll
  for (int i = 0; i < Most - 1; ++i) {
    if (i < warps_before) {
      const Carry carry = first[(reversed ? -i : i) * 32];
      state = fmaf(carry.product, state, carry.end);
    }
  }
  return state;
}

}  // namespace ss2d
}  // namespace mmvmamba
