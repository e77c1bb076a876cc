// Small kernels around the scans: parameters in, parameter gradients out. See the structs in kernels.h.

#include <algorithm>

#include "common/ceil_div.h"
#include "ss2d/common.cuh"

namespace mmvmamba {
namespace ss2d {
namespace {

// Route of the op that pair-order index q stands for: (0, 2 | 1, 3).
__device__ __forceinline__ int route_of(int q) { return (q & 1) * 2 + (q >> 1); }

// One thread an element of the padded projections; the smaller outputs ride along. The same threads mark the carries.
template <typename T> struct PrepareKernel {
  static constexpr int kThreads = 256, kBlocks = 0;

  static __device__ __forceinline__ void run(const Prepare& p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.num_carries) p.carries[i] = make_uint2(~0u, ~0u);
    if (i >= 4ll * p.projection_columns * p.padded) return;
    const auto place = p.by_padded.divmod(i), in_route = p.by_columns.divmod(place.div);
    const int channel = place.mod, q = in_route.div, column = in_route.mod, route = route_of(q);
    const bool active = channel < p.channels;
    const float dt = active && column < p.dt_rank
                         ? kLog2e * p.dt_proj[(static_cast<int64_t>(route) * p.channels + channel) * p.dt_rank + column]
                         : 0.f;
    if (active) {
      const float* from = p.x_proj + static_cast<int64_t>(route) * (p.dt_rank + 2) * p.channels + channel;
      float value = 0.f;
      if (column < p.dt_rank) value = from[column * p.channels];
      if (column == p.projection_columns - 2) value = kLn2 * from[p.dt_rank * p.channels];
      if (column == p.projection_columns - 1) value = from[(p.dt_rank + 1) * p.channels];
      const int64_t to = (static_cast<int64_t>(q) * p.projection_columns + column) * p.channels + channel;
      static_cast<T*>(p.weight)[to] = narrow<T>(value);
      if (p.dt_matrix != nullptr) static_cast<T*>(p.dt_matrix)[to] = narrow<T>(dt);
    }
    if (p.dt_operand != nullptr) {
      // [q][group] of 32 biases, as [4 lanes][tile of 8 channels][2], then words of mma's b, two columns each, as the
      // lanes want them: of 8 columns [lane][tile], of more [16 columns][two tiles][lane][tile][8 columns].
      const int lane = channel % 8 * 4 + column % 8 / 2, tile = channel % 32 / 8;
      const int word = p.projection_columns == 8
                           ? lane * 4 + tile
                           : ((column / 16 * 2 + tile / 2) * 32 + lane) * 4 + tile % 2 * 2 + column / 8 % 2;
      const int64_t bytes = 128 + 64 * p.projection_columns;
      char* operand = static_cast<char*>(p.dt_operand) + (q * (p.padded / 32) + channel / 32) * bytes;
      reinterpret_cast<T*>(operand + 128)[word * 2 + column % 2] = narrow<T>(dt);
      if (column == 0) {
        reinterpret_cast<float*>(operand)[channel % 8 / 2 * 8 + tile * 2 + channel % 2] =
            active ? kLog2e * p.dt_bias[route * p.channels + channel] : 0.f;
      }
    }
    if (p.rank > 0) {
      if (column < p.rank) p.dt_weight[(q * p.rank + column) * p.padded + channel] = dt;
      static_cast<T*>(p.dt_fragment)[i] = narrow<T>(dt);
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
};

// ---- gradients of the parameters ------------------------------------------------------------------------------------
constexpr int kFinishWarps = 16;  // of a block
constexpr int kAtOnce = 9;        // rows that a thread asks for at once: as many parts as ddt_matrix has
constexpr int kPartWarps = 4;     // that share the parts of the same values of dweight

// What a lane reads at once: a float or two neighbours of a 16-bit type.
template <typename T> struct FourBytes {
  using Type = typename Pair<T>::Type;
};
template <> struct FourBytes<float> {
  using Type = float;
};

__device__ __forceinline__ void add(float& sum, float value) { sum += value; }
__device__ __forceinline__ void add(float2& sum, const float2& value) { sum.x += value.x, sum.y += value.y; }

// In float: rows `first`, `first` + `step` and so on of those that begin at `from`, one after the other.
template <typename Word>
__device__ __forceinline__ auto add_rows(const Word* from, int64_t stride, int rows, int first, int step) {
  decltype(widen(*from)) sum = {};
  const int64_t ahead = step * stride;
  from += first * stride;
#pragma unroll 1  // 32 registers, so that a processor holds 4 blocks
  for (int row = first; row < rows; row += kAtOnce * step) {
    Word words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, from += ahead) words[i] = row + i * step < rows ? *from : Word{};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) add(sum, widen(words[i]));
  }
  return sum;
}

// A block adds neighbouring values over rows, 32 words to a warp: `Warps` warps take every such row of the same words,
// in a fixed order. `from` is the thread's word. Thread i gets the sum of the i-th value, if there are as many.
template <int Warps, typename Word>
__device__ __forceinline__ float add_rows_of_block(const Word* from, int64_t stride, int rows) {
  using Sum = decltype(widen(*from));
  constexpr int values = 32 * sizeof(Sum) / sizeof(float);  // of a warp
  __shared__ Sum sums[kFinishWarps][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  sums[warp][lane] = add_rows(from, stride, rows, warp % Warps, Warps);
  __syncthreads();
  float sum = 0.f;
  if (threadIdx.x < kFinishWarps / Warps * values) {
    const float* of = reinterpret_cast<const float*>(sums[threadIdx.x / values * Warps]) + threadIdx.x % values;
#pragma unroll
    for (int w = 0; w < Warps; ++w) sum += of[w * values];
  }
  return sum;
}

// The sums that the blocks of the scan left: 32 neighbours a block.
__device__ __forceinline__ void finish_sums(const Finish& p, int block) {
  const int columns = p.rank == 0 ? 1 : p.rank == 6 ? 8 : 16, outputs = 32 * (2 * columns + 3);
  const int size = p.groups * outputs, pair = block >= size / 32, at = (block - pair * (size / 32)) * 32;
  const float* from = p.partial + static_cast<int64_t>(pair) * p.blocks * size + at + threadIdx.x % 32;
  const float sum = add_rows_of_block<kFinishWarps>(from, size, p.blocks);
  if (threadIdx.x >= 32) return;

  const int group = at / outputs, output = at % outputs + threadIdx.x, rest = output - 64 * columns;
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

// Values of dweight that a block of the finish kernel adds.
template <typename T> constexpr int kWeightValues = kFinishWarps / kPartWarps * 32 * 4 / sizeof(T);

// The parts of dweight, without the rows that only pad the projections.
template <typename T> __device__ __forceinline__ void finish_weight(const Finish& p, int block) {
  using Word = typename FourBytes<T>::Type;
  constexpr int width = sizeof(Word) / sizeof(T);
  const int size = 4 * p.projection_columns * p.channels, first = block * kWeightValues<T>;
  const auto wanted = [&](int value) {
    const int column = p.by_columns.mod(p.by_channels.div(value));
    return value < size && (column < p.dt_rank || column >= p.projection_columns - 2);
  };
  const int own = first + (threadIdx.x / (32 * kPartWarps) * 32 + threadIdx.x % 32) * width;
  const bool read = wanted(own) || wanted(own + width - 1);
  const Word* from = static_cast<const Word*>(p.dweight) + own / width;
  const float sum = add_rows_of_block<kPartWarps>(from, size / width, read ? p.weight_parts : 0);

  const int value = first + threadIdx.x;
  if (threadIdx.x >= kWeightValues<T> || !wanted(value)) return;
  const auto place = p.by_channels.divmod(value), in_route = p.by_columns.divmod(place.div);
  const int channel = place.mod, q = in_route.div, column = in_route.mod;
  const int to = column < p.dt_rank ? column : column - (p.projection_columns - 2) + p.dt_rank;
  p.dx_proj[(static_cast<int64_t>(route_of(q)) * (p.dt_rank + 2) + to) * p.channels + channel] =
      to == p.dt_rank ? kLn2 * sum : sum;
}

// The parts of ddt_matrix, of which there are few: a thread adds those of a value, on the diagonal of the routes.
template <typename T> __device__ __forceinline__ void finish_matrix(const Finish& p, int block) {
  const int value = block * kFinishWarps * 32 + threadIdx.x;
  if (value >= 4 * p.dt_rank * p.channels) return;
  const auto place = p.by_channels.divmod(value);
  const int channel = place.mod, q = static_cast<int>(place.div) / p.dt_rank,
            row = static_cast<int>(place.div) % p.dt_rank;
  const int64_t stride = 16ll * p.projection_columns * p.channels;
  const T* from =
      static_cast<const T*>(p.ddt_matrix) + ((int64_t{q} * p.projection_columns + row) * 4 + q) * p.channels + channel;
  p.ddt_proj[(static_cast<int64_t>(route_of(q)) * p.channels + channel) * p.dt_rank + row] =
      kLog2e * add_rows(from, stride, p.matrix_parts, 0, 1);
}

// The first `sums` blocks add the partial sums, the next `weights` blocks dweight, the others ddt_matrix.
template <typename T> struct FinishKernel {
  static constexpr int kThreads = kFinishWarps * 32, kBlocks = 0;

  static __device__ __forceinline__ void run(const Finish& p, int sums, int weights) {
    const int block = blockIdx.x;
    if (block < sums) {
      finish_sums(p, block);
    } else if (block < sums + weights) {
      finish_weight<T>(p, block - sums);
    } else {
      finish_matrix<T>(p, block - sums - weights);
    }
  }
};

template <typename T> void run_finish(const Finish& args, cudaStream_t stream) {
  const int sums = 2 * args.groups * partial_size(args.rank) / 32;
  const int64_t weights = ceil_div(4ll * args.projection_columns * args.channels, kWeightValues<T>);
  const int64_t matrices =
      args.ddt_matrix != nullptr ? ceil_div(4ll * args.dt_rank * args.channels, kFinishWarps * 32) : 0;
  launch<FinishKernel<T>>(sums + weights + matrices, kFinishWarps * 32, 0, stream, args, sums,
                          static_cast<int>(weights));
}

// ---- around the scans -----------------------------------------------------------------------------------------------
template <typename T> struct AddPartsKernel {
  static constexpr int kThreads = 256, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t size = p.batch * p.length * 8;
    if (i >= size) return;
    float sum = 0.f;
    for (int s = 0; s < p.splits; ++s) sum += p.dprojections_part[s * size + i];
    static_cast<T*>(p.dprojections)[(i / 2 + 1) * p.projection_columns - 2 + i % 2] = narrow<T>(sum);
  }
};

// A block takes 32 channels of one route and image; its warps share the chain, in two passes.
struct CombineKernel {
  static constexpr int kWarps = 16, kThreads = 32 * kWarps, kBlocks = 0;

  static __device__ __forceinline__ void run(const Args& p, bool first_reversed, bool second_reversed) {
    __shared__ Carry totals[kWarps][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = blockIdx.x % p.groups;
    const int route = blockIdx.x / p.groups % 2;
    const int64_t batch = blockIdx.x / (2 * p.groups);
    const bool reversed = route == 0 ? first_reversed : second_reversed;
    const int share = ceil_div(p.chain, kWarps), begin = min(p.chain, warp * share), end = min(p.chain, begin + share);
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
};

}  // namespace

void launch_prepare(Type type, const Prepare& args, cudaStream_t stream) {
  const int64_t threads = std::max<int64_t>(4ll * args.projection_columns * args.padded, args.num_carries);
  with_type(type, [&](auto t) { launch<PrepareKernel<decltype(t)>>(ceil_div(threads, 256), 256, 0, stream, args); });
}

void launch_finish(Type type, const Finish& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { run_finish<decltype(t)>(args, stream); });
}

void launch_add_parts(Type type, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) {
    launch<AddPartsKernel<decltype(t)>>(ceil_div(args.batch * args.length * 8, 256), 256, 0, stream, args);
  });
}

void launch_combine(const Args& args, bool first_reversed, bool second_reversed, cudaStream_t stream) {
  launch<CombineKernel>(args.batch * 2 * args.groups, CombineKernel::kThreads, 0, stream, args, first_reversed,
                        second_reversed);
}

// ---- the scans, which lie in a file a type --------------------------------------------------------------------------
void launch_forward_carries(Type type, int rank, int warps, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Forward<decltype(t)>::run_carries(rank, warps, args, stream); });
}
void launch_forward(Type type, int rank, int warps, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Forward<decltype(t)>::run(rank, warps, args, stream); });
}
void launch_backward_carries(Type type, int rank, int warps, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Backward<decltype(t)>::run_carries(rank, warps, args, stream); });
}
void launch_backward(Type type, int rank, int warps, const Args& args, cudaStream_t stream) {
  with_type(type, [&](auto t) { Backward<decltype(t)>::run(rank, warps, args, stream); });
}
int shared_bytes(Type type, int rank, int warps, bool backward, const Args& args) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return backward ? Backward<T>::shared_bytes(rank, warps, args) : Forward<T>::shared_bytes(rank, warps, args);
  });
}

}  // namespace ss2d
}  // namespace mmvmamba
