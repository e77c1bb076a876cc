// Small kernels around the scans: parameters in, parameter gradients out. See the structs in ss2d_kernels.h.

#include <algorithm>

#include "ss2d_common.cuh"

namespace mmvmamba {
namespace ss2d {
namespace {

// Route of the op that pair-order index q stands for: (0, 2 | 1, 3).
__device__ __forceinline__ int route_of(int q) { return (q & 1) * 2 + (q >> 1); }

// One thread an element of the padded projections; the smaller outputs ride along. The same threads mark the carries.
template <typename T> __global__ void prepare_kernel(const __grid_constant__ Prepare p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < p.num_carries) p.carries[i] = make_uint2(~0u, ~0u);
  if (i >= 4ll * p.map_columns * p.padded) return;
  const int row = p.by_padded.quotient(i), channel = p.by_padded.remainder(i, row);
  const int q = p.by_columns.quotient(row), column = p.by_columns.remainder(row, q), route = route_of(q);
  const bool active = channel < p.channels;
  const float dt =
      active && column < p.dt_rank
          ? kLog2e * p.dt_proj[(static_cast<int64_t>(route) * p.channels + channel) * p.dt_rank + column]
          : 0.f;
  if (active) {
    const float* from = p.x_proj + static_cast<int64_t>(route) * (p.dt_rank + 2) * p.channels + channel;
    float value = 0.f;
    if (column < p.dt_rank) value = from[column * p.channels];
    if (column == p.map_columns - 2) value = kLn2 * from[p.dt_rank * p.channels];
    if (column == p.map_columns - 1) value = from[(p.dt_rank + 1) * p.channels];
    const int64_t to = (static_cast<int64_t>(q) * p.map_columns + column) * p.channels + channel;
    static_cast<T*>(p.projection)[to] = from_float<T>(value);
    if (p.dt_matrix != nullptr) static_cast<T*>(p.dt_matrix)[to] = from_float<T>(dt);
  }
  if (p.dt_operand != nullptr) {
    // [q][group] of 32 biases, then words of mma's b, two columns each, as the lanes want them: [8 columns]
    // [lane][tile of 8 channels].
    const int lane = channel % 8 * 4 + column % 8 / 2;
    const int word = (column / 8 * 32 + lane) * 4 + channel % 32 / 8;
    const int64_t bytes = 128 + 64 * p.map_columns;
    char* operand = static_cast<char*>(p.dt_operand) + (q * (p.padded / 32) + channel / 32) * bytes;
    reinterpret_cast<T*>(operand + 128)[word * 2 + column % 2] = from_float<T>(dt);
    if (column == 0) {
      reinterpret_cast<float*>(operand)[channel % 32] =
          active ? kLog2e * p.dt_bias[route * p.channels + channel] : 0.f;
    }
  }
  if (p.rank > 0) {
    if (column < p.rank) p.dt_weight[(q * p.rank + column) * p.padded + channel] = dt;
    static_cast<T*>(p.dt_fragment)[i] = from_float<T>(dt);
  }
  if (column == 0) {
    p.bias[q * p.padded + channel] = active ? kLog2e * p.dt_bias[route * p.channels + channel] : 0.f;
    p.A[q * p.padded + channel] = active ? -expf(p.A_logs[route * p.channels + channel]) : -1.f;
    if (q == 0) {
      float skip = 0.f;
      for (int k = 0; k < 4 && active; ++k) skip += p.Ds[k * p.channels + channel];
      p.skip[channel] = skip;
    }
  }
}

// A block adds 32 neighbouring partial sums over all blocks of the scan: 16 warps take every 16th, in a fixed order.
__global__ void __launch_bounds__(512) finish_sums_kernel(const __grid_constant__ Finish p) {
  __shared__ float sums[16][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pair = blockIdx.y;
  const int columns = p.rank == 0 ? 1 : p.rank == 6 ? 8 : 16, outputs = 32 * (2 * columns + 3);
  const int64_t stride = static_cast<int64_t>(p.groups) * outputs;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t block = warp; block < p.blocks; block += 16) sum += p.partial[pair][block * stride + at];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < 16; ++w) sum += sums[w][lane];

  const int output = at % outputs, group = at / outputs;
  const int rest = output - 64 * columns;
  const int channel = group * 32 + (rest < 0 ? output % (32 * columns) / columns : rest % 32);
  if (channel >= p.channels) return;
  const int which = rest < 0 ? output / (32 * columns) : rest / 32;  // route of the pair; 2 is dD
  const int q = 2 * pair + which % 2, route = route_of(q);
  if (rest < 0) {
    const int column = output % columns;
    if (column == p.rank) {
      p.ddt_bias[route * p.channels + channel] = kLog2e * sum;
    } else if (column < p.dt_rank) {
      p.ddt_proj[(static_cast<int64_t>(route) * p.channels + channel) * p.dt_rank + column] = kLog2e * sum;
    }
  } else if (which < 2) {
    p.dA_logs[route * p.channels + channel] = kLn2 * p.A[q * p.padded + channel] * sum;
  } else if (pair == 0) {
    for (int k = 0; k < 4; ++k) p.dDs[k * p.channels + channel] = sum;  // every route adds D x at every pixel
  }
}

// Unpack the gradients that GEMMs computed.
__global__ void finish_matrices_kernel(const __grid_constant__ Finish p) {
  const int rows = p.dt_rank + 2;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= 4ll * rows * p.channels) return;
  const int channel = i % p.channels, row = i / p.channels % rows, q = i / (static_cast<int64_t>(p.channels) * rows);
  const int route = route_of(q), column = row < p.dt_rank ? row : p.map_columns - 2 + row - p.dt_rank;
  const float value = p.dprojection[(static_cast<int64_t>(q) * p.map_columns + column) * p.channels + channel];
  p.dx_proj[(static_cast<int64_t>(route) * rows + row) * p.channels + channel] =
      row == p.dt_rank ? kLn2 * value : value;
  if (p.ddt_matrix != nullptr && row < p.dt_rank) {
    const int64_t matrix_row = static_cast<int64_t>(q) * p.map_columns + row;
    p.ddt_proj[(static_cast<int64_t>(route) * p.channels + channel) * p.dt_rank + row] =
        kLog2e * p.ddt_matrix[(matrix_row * 4 + q) * p.channels + channel];
  }
}

template <typename T> __global__ void add_parts_kernel(const __grid_constant__ Args p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t size = p.batch * p.length * 8;
  if (i >= size) return;
  float sum = 0.f;
  for (int s = 0; s < p.splits; ++s) sum += p.dmaps_part[s * size + i];
  static_cast<T*>(p.dmaps)[(i / 2 + 1) * p.map_columns - 2 + i % 2] = from_float<T>(sum);
}

// A block takes 32 channels of one route and image; its warps share the chain, in two passes.
__global__ void __launch_bounds__(512)
    combine_kernel(const __grid_constant__ Args p, bool first_reversed, bool second_reversed) {
  __shared__ Carry totals[16][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = blockIdx.x % p.groups;
  const int route = blockIdx.x / p.groups % 2;
  const int64_t batch = blockIdx.x / (2 * p.groups);
  const bool reversed = route == 0 ? first_reversed : second_reversed;
  const int share = (p.chain + 15) / 16, begin = min(p.chain, warp * share), end = min(p.chain, begin + share);
  const auto carry_of = [&](int i) {
    return block_carry(p, batch, reversed ? p.chain - 1 - i : i, route, group * 32 + lane);
  };
  Carry total = {1.f, 0.f};
#pragma unroll 4
  for (int i = begin; i < end; ++i) append(total, *carry_of(i));
  totals[warp][lane] = total;
  __syncthreads();
  float state = 0.f;
  for (int w = 0; w < warp; ++w) state = fmaf(totals[w][lane].product, state, totals[w][lane].end);
#pragma unroll 4
  for (int i = begin; i < end; ++i) {
    const Carry carry = *carry_of(i);
    *carry_of(i) = {0.f, state};
    state = fmaf(carry.product, state, carry.end);
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + 255) / 256); }

}  // namespace

void launch_prepare(Type type, const Prepare& args, cudaStream_t stream) {
  const unsigned blocks = blocks_for(std::max<int64_t>(4ll * args.map_columns * args.padded, args.num_carries));
  if (type == Type::kHalf) {
    prepare_kernel<__half><<<blocks, 256, 0, stream>>>(args);
  } else if (type == Type::kBfloat16) {
    prepare_kernel<__nv_bfloat16><<<blocks, 256, 0, stream>>>(args);
  } else {
    prepare_kernel<float><<<blocks, 256, 0, stream>>>(args);
  }
}

void launch_finish(const Finish& args, cudaStream_t stream) {
  const dim3 blocks(args.groups * partial_size(args.rank) / 32, 2);
  finish_sums_kernel<<<blocks, 512, 0, stream>>>(args);
  finish_matrices_kernel<<<blocks_for(4ll * (args.dt_rank + 2) * args.channels), 256, 0, stream>>>(args);
}

void launch_add_parts(Type type, const Args& args, cudaStream_t stream) {
  const unsigned blocks = blocks_for(args.batch * args.length * 8);
  if (type == Type::kHalf) {
    add_parts_kernel<__half><<<blocks, 256, 0, stream>>>(args);
  } else if (type == Type::kBfloat16) {
    add_parts_kernel<__nv_bfloat16><<<blocks, 256, 0, stream>>>(args);
  } else {
    add_parts_kernel<float><<<blocks, 256, 0, stream>>>(args);
  }
}

void launch_combine(const Args& args, bool first_reversed, bool second_reversed, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.batch * 2 * args.groups);
  combine_kernel<<<blocks, 512, 0, stream>>>(args, first_reversed, second_reversed);
}

int shared_bytes(Type type, int rank, int warps, const Args& args) {
  return type == Type::kHalf       ? shared_bytes_half(rank, warps, args)
         : type == Type::kBfloat16 ? shared_bytes_bfloat16(rank, warps, args)
                                   : shared_bytes_float(rank, warps, args);
}

#define MMVMAMBA_SS2D_DISPATCH(function)                                                               \
  void launch_##function(Type type, int rank, int warps, const Args& args, cudaStream_t stream) {      \
    if (type == Type::kHalf) {                                                                         \
      function##_half(rank, warps, args, stream);                                                      \
    } else if (type == Type::kBfloat16) {                                                              \
      function##_bfloat16(rank, warps, args, stream);                                                  \
    } else {                                                                                           \
      function##_float(rank, warps, args, stream);                                                     \
    }                                                                                                  \
  }
MMVMAMBA_SS2D_DISPATCH(forward_carries)
MMVMAMBA_SS2D_DISPATCH(forward)
MMVMAMBA_SS2D_DISPATCH(backward_carries)
MMVMAMBA_SS2D_DISPATCH(backward)
#undef MMVMAMBA_SS2D_DISPATCH

}  // namespace ss2d
}  // namespace mmvmamba
