// Shared pieces of the fused SS2D kernels: element types, activation functions, walking over pixels, carries.
//
// Vocabulary. A *pair* is two routes over one pixel order: cross2d has rows (forward, reversed) and columns (forward,
// reversed); bidi has rows twice; unidi has two pairs of forward rows. Routes are stored in pair order
// (0, 2 | 1, 3), index q = 2 * pair + r. A *segment* is kSegment consecutive pixels of the order: one thread scans it
// for one channel. A *block* holds S segments (one warp each) of 32 channels, called a *group*; an image is a chain
// of `chain` such blocks.
//
// Scaling. With u2 = log2(e) (Wdt dt + bias): d2 = log2(1 + 2^u2) = delta / ln 2, decay = 2^(A d2), and
// drive = d2 * (ln 2 * B) * x; the factors log2(e) and ln 2 are folded into the prepared weights (ss2d_parameters.cu).
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ss2d_kernels.h"

namespace mmvmamba {
namespace ss2d {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- element types --------------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two values as one 32-bit word of a 16-bit type: the unit of the tensor-core fragments.
template <typename T> __device__ __forceinline__ uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}

// ---- special functions ----------------------------------------------------------------------------------------------
__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float log2_fast(float v) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// log2(1 + 2^u) = max(u, 0) + log2(1 + z) with z = 2^-|u| in (0, 1], where log2(1 + z) / z is a minimax polynomial:
// relative error below 9e-6 for 16-bit inputs, 2e-7 for float, for the smallest arguments too.
template <typename T> __device__ __forceinline__ float softplus2(float u) {
  const float z = exp2_fast(-fabsf(u));
  float p;
  if constexpr (sizeof(T) == 4) {
    p = fmaf(z, -4.680115730e-3f, 2.863946506e-2f);
    p = fmaf(z, p, -8.217497915e-2f);
    p = fmaf(z, p, 1.529781073e-1f);
    p = fmaf(z, p, -2.208128273e-1f);
    p = fmaf(z, p, 2.838637233e-1f);
    p = fmaf(z, p, -3.600120246e-1f);
    p = fmaf(z, p, 4.808497131e-1f);
    p = fmaf(z, p, -7.213461399e-1f);
    p = fmaf(z, p, 1.442695022f);
  } else {
    p = fmaf(z, -3.443543985e-2f, 1.460308880e-1f);
    p = fmaf(z, p, -3.030335009e-1f);
    p = fmaf(z, p, 4.691725969e-1f);
    p = fmaf(z, p, -7.204258442e-1f);
    p = fmaf(z, p, 1.442682862f);
  }
  return fmaf(z, p, fmaxf(u, 0.f));
}

// The derivative of softplus2 expressed in its value: 1 - 2^-d2. For float a series where that would cancel.
template <typename T> __device__ __forceinline__ float softplus2_slope(float d2) {
  const float slope = 1.f - exp2_fast(-d2);
  if constexpr (sizeof(T) == 4) {
    constexpr float c1 = kLn2, c2 = -kLn2 * kLn2 / 2, c3 = kLn2 * kLn2 * kLn2 / 6, c4 = -kLn2 * kLn2 * kLn2 * kLn2 / 24;
    const float series = d2 * fmaf(d2, fmaf(d2, fmaf(d2, c4, c3), c2), c1);
    return d2 < 0.125f ? series : slope;
  }
  return slope;
}

// ---- walking the pixels ---------------------------------------------------------------------------------------------
// Memory index of step l of the pixel order.
__device__ __forceinline__ int pixel_of(const Args& p, int l) {
  return p.column_order ? (l % p.height) * p.width + l / p.height : l;
}

// Element offset of a step within an image that has `elements` a pixel; next() goes on without divisions and stays
// inside the image when it runs past its end.
struct Walk {
  uint32_t offset, step, total, wrap;
  __device__ __forceinline__ Walk(const Args& p, int l, int elements) {
    offset = static_cast<uint32_t>(pixel_of(p, l)) * elements;
    step = (p.column_order ? p.width : 1) * elements;
    total = static_cast<uint32_t>(p.length) * elements;
    wrap = p.column_order ? total - elements : total;
  }
  __device__ __forceinline__ void next() {
    offset += step;
    if (offset >= total) offset -= wrap;
  }
};

// The values of one thread's segment, two to a register for 16-bit types.
template <typename T> struct Values {
  uint32_t v[kSegment / 2];
  __device__ __forceinline__ float operator[](int t) const {
    const uint16_t bits = t % 2 ? v[t / 2] >> 16 : v[t / 2] & 0xffff;
    return to_float(*reinterpret_cast<const T*>(&bits));
  }
  __device__ __forceinline__ T raw(int t) const {
    const uint16_t bits = t % 2 ? v[t / 2] >> 16 : v[t / 2] & 0xffff;
    return *reinterpret_cast<const T*>(&bits);
  }
  // Two neighbours at once, t even.
  __device__ __forceinline__ void set_pair(int t, float low, float high) { v[t / 2] = pack2<T>(low, high); }
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
  __device__ __forceinline__ void keep_first(int count) {
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      if (i >= count) v[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
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
  __device__ __forceinline__ void keep_first(int count) {
#pragma unroll
    for (int i = 0; i < kSegment; ++i) {
      if (i >= count) v[i] = 0.f;
    }
  }
};

// Load a segment from `from`, the image's first pixel at this thread's channel. Steps beyond the image repeat other
// pixels of it.
template <typename T>
__device__ __forceinline__ Values<T> load_segment(const Args& p, const T* from, int first, int elements) {
  Walk walk(p, min(first, p.length - 1), elements);
  T raw[kSegment];
#pragma unroll
  for (int t = 0; t < kSegment; ++t) {
    raw[t] = from[walk.offset];
    walk.next();
  }
  Values<T> values;
  values.set_raw(raw);
  return values;
}

// Store the first `count` values of a segment.
template <typename T>
__device__ __forceinline__ void store_segment(const Args& p, T* to, int first, int count,
                                              const float (&values)[kSegment]) {
  Walk walk(p, min(first, p.length - 1), p.channels);
#pragma unroll
  for (int t = 0; t < kSegment; ++t) {
    if (t < count) to[walk.offset] = from_float<T>(values[t]);
    walk.next();
  }
}

// ---- carries --------------------------------------------------------------------------------------------------------
// A stretch of a scan maps its incoming state s to product * s + end.
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
constexpr int kInFlight = 4;  // carries that a warp asks for at once

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

// The carry of all warps of a block in scan order, from their carries in shared memory.
__device__ __forceinline__ Carry block_total(const Carry* local, bool reversed, int warps, int lane) {
  Carry carry = {1.f, 0.f};
  for (int w = 0; w < warps; ++w) append(carry, local[(reversed ? warps - 1 - w : w) * 32 + lane]);
  return carry;
}

// This warp's share of what enters its block: of the carries of the blocks before it in scan order, or the entering
// state itself, as the first warp's share.
__device__ __forceinline__ Carry share_of_chain(const Args& p, int64_t batch, int block, int route, int channel,
                                                bool reversed, int warp, int warps) {
  Carry carry = {1.f, 0.f};
  if (p.chaining == Chain::kPrefix) {
    if (warp == 0) carry = *block_carry(p, batch, block, route, channel);
    return carry;
  }
  const int count = reversed ? p.chain - 1 - block : block;
  const int share = (count + warps - 1) / warps;
  const int end = min(count, (warp + 1) * share);
  for (int i = warp * share; i < end; i += kInFlight) {
    const Carry* from[kInFlight];
    uint64_t bits[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int before = min(i + j, end - 1);
      from[j] = block_carry(p, batch, reversed ? p.chain - 1 - before : before, route, channel);
      bits[j] = peek(from[j]);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j < end) append(carry, await(from[j], bits[j]));
    }
  }
  return carry;
}

// State entering this warp's segment from the blocks before and the warps before, in scan order. `local` and
// `before` are [warps][32] carries of this route; `reversed` walks the warps from the end.
__device__ __forceinline__ float incoming(const Carry* local, const Carry* before, bool chained, bool reversed,
                                          int warp, int warps, int lane) {
  float state = 0.f;
  if (chained) {
    for (int w = 0; w < warps; ++w) state = fmaf(before[w * 32 + lane].product, state, before[w * 32 + lane].end);
  }
  for (int w = reversed ? warps - 1 : 0; w != warp; w += reversed ? -1 : 1) {
    state = fmaf(local[w * 32 + lane].product, state, local[w * 32 + lane].end);
  }
  return state;
}

}  // namespace ss2d
}  // namespace mmvmamba
