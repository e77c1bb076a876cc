// Shared pieces of the fused SS2D kernels: launch arguments, element types, activation functions, staging of the maps.
//
// Vocabulary. A *pair* is two routes over one pixel order: cross2d has rows (forward, reversed) and columns (forward,
// reversed); bidi has rows twice; unidi has two pairs of forward rows. Routes are stored in pair order
// (0, 2 | 1, 3), index q = 2 * pair + r. A *segment* is kSegment consecutive pixels of the order: one thread scans it
// for one channel. A *block* holds S segments (one warp each) of 32 channels, called a *group*; an image is a chain
// of `chain` such blocks.
//
// Scaling. With u2 = log2(e) (Wdt dt + bias): d2 = log2(1 + 2^u2) = delta / ln 2, decay = 2^(A d2), and
// drive = d2 * (ln 2 * B) * x; the factors log2(e) and ln 2 are folded into the prepared weights (ss2d_prepare.cu).
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

// Eight consecutive values, 16-byte aligned (32-byte for float).
template <typename T> __device__ __forceinline__ void load8(const T* from, float (&to)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const T* v = reinterpret_cast<const T*>(&raw);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = to_float(v[i]);
}
template <> __device__ __forceinline__ void load8<float>(const float* from, float (&to)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
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

// log2(1 + 2^u). The logarithm unit has an absolute error near 1, so a small argument takes a series instead:
// two terms for 16-bit inputs (relative error below 3e-5), six for float (below 1e-6).
template <typename T> __device__ __forceinline__ float softplus2(float u) {
  const float z = exp2_fast(-fabsf(u));
  float series, limit;
  if constexpr (sizeof(T) == 4) {
    limit = 0.0625f;
    series = fmaf(z, fmaf(z, fmaf(z, fmaf(z, fmaf(z, -kLog2e / 6, kLog2e / 5), -kLog2e / 4), kLog2e / 3), -kLog2e / 2),
                  kLog2e);
  } else {
    limit = 0.0078125f;
    series = fmaf(z, -kLog2e / 2, kLog2e);
  }
  const float part = z < limit ? series * z : log2_fast(1.f + z);
  return part + fmaxf(u, 0.f);
}

// The derivative of softplus2 expressed in its value: 1 - 2^-d2, by a series where that would cancel.
template <typename T> __device__ __forceinline__ float softplus2_slope(float d2) {
  constexpr float c1 = kLn2, c2 = -kLn2 * kLn2 / 2, c3 = kLn2 * kLn2 * kLn2 / 6, c4 = -kLn2 * kLn2 * kLn2 * kLn2 / 24;
  if constexpr (sizeof(T) == 4) {
    const float series = d2 * fmaf(d2, fmaf(d2, fmaf(d2, c4, c3), c2), c1);
    return d2 < 0.125f ? series : 1.f - exp2_fast(-d2);
  } else {
    const float series = d2 * fmaf(d2, c2, c1);
    return d2 < 0.015625f ? series : 1.f - exp2_fast(-d2);
  }
}

// ---- walking the pixels ---------------------------------------------------------------------------------------------
// Memory index of step l of the pixel order, and the next one, without divisions.
struct Walk {
  int pixel;
  __device__ __forceinline__ Walk(const Args& p, int l) {
    pixel = p.column_order ? (l % p.height) * p.width + l / p.height : l;
  }
  __device__ __forceinline__ void next(const Args& p) {
    if (p.column_order) {
      pixel += p.width;
      pixel -= pixel >= p.length ? p.length - 1 : 0;
    } else {
      ++pixel;
    }
  }
};

// Columns of the staged maps: dt (Rank, zero padded), B, C; only B and C if dt was projected by a GEMM (Rank = 0).
template <int Rank> struct Maps {
  static constexpr int kColumns = Rank == 0 ? 2 : Rank <= 6 ? 8 : 16;
  static constexpr int kB = kColumns - 2;
  static_assert(Rank <= 14, "in-kernel dt projection: rank at most 14");
};

// Stage the pair's maps of `pixels` steps from `first` as float [2][pixels][kColumns]; zero beyond the image, which
// makes the steps there inert (no drive, no output, no gradient).
template <typename T, int Rank>
__device__ __forceinline__ void stage_maps(const Args& p, int64_t batch, int first, int pixels, float* maps) {
  constexpr int columns = Maps<Rank>::kColumns;
  constexpr int chunks = columns < 8 ? 1 : columns / 8;
  const T* from = static_cast<const T*>(p.maps) + batch * p.length * 4 * p.map_columns;
  for (int i = threadIdx.x; i < pixels * 2 * chunks; i += blockDim.x) {
    const int chunk = i % chunks, route = i / chunks % 2, pixel = i / (2 * chunks);
    float* to = maps + (route * pixels + pixel) * columns;
    const bool valid = first + pixel < p.length;
    const T* source =
        from + (static_cast<int64_t>(valid ? Walk(p, first + pixel).pixel : 0) * 4 + 2 * p.pair + route) * p.map_columns;
    if constexpr (Rank == 0) {
      to[0] = valid ? to_float(source[p.map_columns - 2]) : 0.f;
      to[1] = valid ? to_float(source[p.map_columns - 1]) : 0.f;
    } else {
      float v[8];
      load8<T>(source + chunk * 8, v);
      float4* target = reinterpret_cast<float4*>(to + chunk * 8);
      target[0] = valid ? make_float4(v[0], v[1], v[2], v[3]) : make_float4(0.f, 0.f, 0.f, 0.f);
      target[1] = valid ? make_float4(v[4], v[5], v[6], v[7]) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
}

// u2 of one step: the dt projection in registers. `row` is the step's staged map row.
template <int Rank> __device__ __forceinline__ float project_dt(const float* row, const float (&weight)[Rank ? Rank : 1],
                                                                float bias) {
  float u = bias;
#pragma unroll
  for (int i = 0; i < Rank; i += 2) {
    const float2 dt = *reinterpret_cast<const float2*>(row + i);
    u = fmaf(weight[i], dt.x, u);
    u = fmaf(weight[i + 1], dt.y, u);
  }
  return u;
}

template <int Rank> __device__ __forceinline__ void load_weight(const Args& p, int route, int channel,
                                                                float (&weight)[Rank ? Rank : 1]) {
#pragma unroll
  for (int i = 0; i < Rank; ++i) weight[i] = p.dt_weight[(route * Rank + i) * p.padded + channel];
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
__device__ __forceinline__ int64_t carry_index(const Args& p, int64_t batch, int block, int route) {
  return ((batch * p.chain + block) * 2 + route) * p.padded;
}

// State entering this warp's segment from the blocks before and the warps before, in scan order. `local` and
// `before` are [warps][32] carries of this route; `reversed` walks blocks and warps from the end.
__device__ __forceinline__ float incoming(const Carry* local, const Carry* before, bool chained, bool reversed,
                                          int warp, int warps, int lane) {
  float state = 0.f;
  if (chained) {
    for (int w = 0; w < warps; ++w) state = fmaf(before[w * 32 + lane].product, state, before[w * 32 + lane].end);
  }
  if (reversed) {
    for (int w = warps - 1; w > warp; --w) state = fmaf(local[w * 32 + lane].product, state, local[w * 32 + lane].end);
  } else {
    for (int w = 0; w < warp; ++w) state = fmaf(local[w * 32 + lane].product, state, local[w * 32 + lane].end);
  }
  return state;
}

// This warp's share of the blocks before this one in scan order, combined.
__device__ __forceinline__ Carry share_of_chain(const Args& p, int64_t batch, int block, int route, int channel,
                                                bool reversed, int warp, int warps) {
  const int count = reversed ? p.chain - 1 - block : block;
  const int share = (count + warps - 1) / warps;
  const int end = min(count, (warp + 1) * share);
  const Carry* carries = static_cast<const Carry*>(p.block_carries);
  Carry carry = {1.f, 0.f};
#pragma unroll 4
  for (int i = warp * share; i < end; ++i) {
    append(carry, carries[carry_index(p, batch, reversed ? p.chain - 1 - i : i, route) + channel]);
  }
  return carry;
}

}  // namespace ss2d
}  // namespace mmvmamba
