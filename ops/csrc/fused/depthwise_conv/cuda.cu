// SiLU of a depthwise 3x3 convolution of channel-last maps: mmvmamba::depthwise_conv_silu and its backward on CUDA.
//
// A thread owns 4 channels of one column and slides down a tile of rows, so that a row is loaded once a tile; the
// threads of a warp lie side by side in memory. It keeps its channels, and so the 36 weights, over all its tiles.
// Arithmetic is float. Forward moves x in and y out. Backward computes the convolution again: one kernel moves x and dy
// in and dz, the gradient before SiLU, out, and keeps the sums for weight and bias in registers over all tiles of a
// thread; they are added over the block in a fixed order, and leave as one partial sum a block. The forward kernel with
// flipped weights then makes dx of dz. Tasks are taken from the last to the first, where what the kernel before wrote
// last is still in the L2 cache, and those of dx from the first, where dz is.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "common/allocate.h"
#include "common/ceil_div.h"
#include "common/dense.h"
#include "common/launch.cuh"
#include "common/type_of.h"
#include "common/vector.cuh"
#include "fused/common/column_sum.h"

namespace mmvmamba {
namespace {

using at::Tensor;

constexpr int kConvThreads = 192;
constexpr int kMostLanes = 64;
constexpr int kTaps = 9;
constexpr int kRowsAhead = 5;  // of the prefetch into L2: its latency is many steps long
constexpr int kMostRows = 64;  // of a tile

// ---- four channels in memory ----------------------------------------------------------------------------------------
template <typename T> struct Packed {
  using Type = uint2;
  static __device__ __forceinline__ void widen4(const uint2& raw, float (&v)[4]) {
    using Two = typename Pair<T>::Type;
    const float2 a = widen(reinterpret_cast<const Two&>(raw.x)), b = widen(reinterpret_cast<const Two&>(raw.y));
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
  }
  static __device__ __forceinline__ uint2 narrow4(const float (&v)[4]) {
    const auto a = Pair<T>::round(v[0], v[1]), b = Pair<T>::round(v[2], v[3]);
    return make_uint2(reinterpret_cast<const unsigned&>(a), reinterpret_cast<const unsigned&>(b));
  }
};
template <> struct Packed<float> {
  using Type = uint4;
  static __device__ __forceinline__ void widen4(const uint4& raw, float (&v)[4]) {
    v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
  }
  static __device__ __forceinline__ uint4 narrow4(const float (&v)[4]) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  }
};

// Four channels, or zeros outside the map.
template <typename T> __device__ __forceinline__ typename Packed<T>::Type fetch(const T* from, bool inside) {
  typename Packed<T>::Type raw{};
  if (inside) raw = __ldg(reinterpret_cast<const typename Packed<T>::Type*>(from));
  return raw;
}

// One store of 8 or 16 bytes.
template <typename T> __device__ __forceinline__ void keep(T* to, const float (&v)[4]) {
  *reinterpret_cast<typename Packed<T>::Type*>(to) = Packed<T>::narrow4(v);
}

// Left, middle and right of one row.
template <typename T> struct Row {
  typename Packed<T>::Type raw[3];

  __device__ __forceinline__ void fetch_from(const T* middle, int channels, bool inside, bool left, bool right) {
    raw[0] = fetch(middle - channels, inside && left);
    raw[1] = fetch(middle, inside);
    raw[2] = fetch(middle + channels, inside && right);
  }
  __device__ __forceinline__ void unpack(float (&v)[3][4]) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) Packed<T>::widen4(raw[i], v[i]);
  }
};

__device__ __forceinline__ void prefetch(const void* from, bool inside) {
  if (inside) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.f, 1.f + __expf(-z)); }

// ---- who does what --------------------------------------------------------------------------------------------------
// A task is one column of a tile of rows. A block takes `columns` neighbouring tasks of `lanes` groups of 4 channels.
struct Walk {
  int height, width, groups;  // of the map; 4 channels a group
  int lanes, columns;         // of a block
  int tiles, rows;            // tiles of an image, rows of a tile
  unsigned tasks;
  int lane_blocks, task_blocks;

  dim3 grid() const { return dim3(static_cast<unsigned>(lane_blocks), static_cast<unsigned>(task_blocks)); }
};

struct Place {
  int lane, owner, group, channels;
  bool active;
  unsigned first_task, stride;
  int row_stride;

  __device__ __forceinline__ explicit Place(const Walk& walk) {
    lane = threadIdx.x % walk.lanes, owner = threadIdx.x / walk.lanes;
    group = blockIdx.x * walk.lanes + lane, channels = 4 * walk.groups;
    active = owner < walk.columns && group < walk.groups;
    first_task = blockIdx.y * walk.columns + owner, stride = gridDim.y * walk.columns;
    row_stride = walk.width * channels;
  }
};

struct Tile {
  int first, last;   // its rows: first <= row < last
  bool left, right;  // whether the map goes on there
  int64_t offset;    // of the thread's channels in row 0 of its column

  __device__ __forceinline__ Tile(const Walk& walk, const Place& place, unsigned task) {
    const unsigned column = task % walk.width, rest = task / walk.width;
    const unsigned image = rest / walk.tiles;
    first = static_cast<int>(rest % walk.tiles) * walk.rows, last = min(walk.height, first + walk.rows);
    left = column > 0, right = column + 1 < walk.width;
    offset = static_cast<int64_t>(image) * walk.height * place.row_stride +
             static_cast<int64_t>(column) * place.channels + 4 * place.group;
  }
};

__device__ __forceinline__ void load_parameters(const float* weight, const float* bias, int group,
                                                float (&w)[4 * kTaps], float (&b)[4]) {
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    float v[4];
    load(weight + 4 * (kTaps * group + i), v);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[4 * i + j] = v[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) b[j] = 0.f;
  if (bias != nullptr) load(bias + 4 * group, b);
}

// ---- y = silu(conv(x) + bias), or with flipped weights and without SiLU the gradient of conv's input ----------------
template <typename T, bool Gradient>
struct ConvKernel {
  static constexpr int kThreads = kConvThreads, kBlocks = 3;

  static __device__ __forceinline__ void run(const Walk& walk, const T* __restrict__ x,
                                             const float* __restrict__ weight, const float* __restrict__ bias,
                                             T* __restrict__ y) {
    const Place place(walk);
    if (!place.active) return;
    float w[4 * kTaps], b[4];
    load_parameters(weight, bias, place.group, w, b);
    for (unsigned task = place.first_task; task < walk.tasks; task += place.stride) {
      const Tile tile(walk, place, Gradient ? task : walk.tasks - 1 - task);
      const int end = min(walk.height, tile.last + 1);  // of the rows that the tile reads
      const int64_t start = tile.offset + static_cast<int64_t>(tile.first) * place.row_stride;
      const T* from = x + start;
      T* to = y + start;
      Row<T> row;
      row.fetch_from(from - place.row_stride, place.channels, tile.first > 0, tile.left, tile.right);
#pragma unroll
      for (int i = 1; i <= kRowsAhead; ++i) prefetch(from + i * place.row_stride, tile.first + i < end);
      // Row r adds to the outputs of row r - 1, which it completes, of row r, and of row r + 1.
      float above[4], here[4], below[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) above[j] = here[j] = below[j] = b[j];
#pragma unroll 3
      for (int r = tile.first - 1; r <= tile.last; ++r) {
        float v[3][4];
        row.unpack(v);
        row.fetch_from(from, place.channels, r + 1 < end, tile.left, tile.right);
        prefetch(from + (kRowsAhead + 1) * place.row_stride, r + 2 + kRowsAhead < end);
        from += place.row_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            above[j] = fmaf(w[kTaps * j + (Gradient ? 2 - i : 6 + i)], v[i][j], above[j]);
            here[j] = fmaf(w[kTaps * j + (Gradient ? 5 - i : 3 + i)], v[i][j], here[j]);
            below[j] = fmaf(w[kTaps * j + (Gradient ? 8 - i : i)], v[i][j], below[j]);
          }
        }
        if (r > tile.first) {
          if (!Gradient) {
#pragma unroll
            for (int j = 0; j < 4; ++j) above[j] *= sigmoid(above[j]);
          }
          keep(to, above);
          to += place.row_stride;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) above[j] = here[j], here[j] = below[j], below[j] = b[j];
      }
    }
  }
};

// ---- dz = dy silu'(z), and the sums of dz times the input at each tap -----------------------------------------------
template <typename T>
struct BackwardKernel {
  static constexpr int kThreads = kConvThreads, kBlocks = 2;

  static __device__ __forceinline__ void run(const Walk& walk, const T* __restrict__ dy, const T* __restrict__ x,
                                             const float* __restrict__ weight, const float* __restrict__ bias,
                                             T* __restrict__ dz, float* __restrict__ weight_sums,
                                             float* __restrict__ bias_sums) {
    __shared__ float4 sums[(kTaps + 1) * kMostLanes];  // 36 floats a lane for the weights, then 4 a lane for the bias
    const Place place(walk);
    float dw[4 * kTaps] = {}, db[4] = {};
    if (place.active) {
      float w[4 * kTaps], b[4];
      load_parameters(weight, bias, place.group, w, b);
      for (unsigned task = place.first_task; task < walk.tasks; task += place.stride) {
        const Tile tile(walk, place, walk.tasks - 1 - task);
        const int end = min(walk.height, tile.last + 1);
        const int64_t start = tile.offset + static_cast<int64_t>(tile.first) * place.row_stride;
        const T *from = x + start, *grad = dy + start;
        T* to = dz + start;
        float window[3][3][4];  // rows r - 1, r and r + 1
        Row<T> next;
        next.fetch_from(from - place.row_stride, place.channels, tile.first > 0, tile.left, tile.right);
        next.unpack(window[0]);
        next.fetch_from(from, place.channels, true, tile.left, tile.right);
        next.unpack(window[1]);
        from += place.row_stride;
        next.fetch_from(from, place.channels, tile.first + 1 < end, tile.left, tile.right);
        typename Packed<T>::Type next_grad = fetch(grad, true);
#pragma unroll
        for (int i = 1; i <= kRowsAhead; ++i) {
          prefetch(from + i * place.row_stride, tile.first + 1 + i < end);
          prefetch(grad + i * place.row_stride, tile.first + i < tile.last);
        }
#pragma unroll 3
        for (int r = tile.first; r < tile.last; ++r) {
          float g[4];
          next.unpack(window[2]);
          Packed<T>::widen4(next_grad, g);
          from += place.row_stride, grad += place.row_stride;
          next.fetch_from(from, place.channels, r + 2 < end, tile.left, tile.right);
          next_grad = fetch(grad, r + 1 < tile.last);
          prefetch(from + kRowsAhead * place.row_stride, r + 2 + kRowsAhead < end);
          prefetch(grad + kRowsAhead * place.row_stride, r + 1 + kRowsAhead < tile.last);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float z = b[j];
#pragma unroll
            for (int k = 0; k < kTaps; ++k) z = fmaf(w[kTaps * j + k], window[k / 3][k % 3][j], z);
            const float s = sigmoid(z);
            g[j] *= s * fmaf(z, 1.f - s, 1.f);
            db[j] += g[j];
#pragma unroll
            for (int k = 0; k < kTaps; ++k) dw[kTaps * j + k] = fmaf(g[j], window[k / 3][k % 3][j], dw[kTaps * j + k]);
          }
          keep(to, g);
          to += place.row_stride;
#pragma unroll
          for (int i = 0; i < 3; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) window[0][i][j] = window[1][i][j], window[1][i][j] = window[2][i][j];
          }
        }
      }
    }
    for (int owner = 0; owner < walk.columns; ++owner) {
      if (place.active && place.owner == owner) {
#pragma unroll
        for (int i = 0; i <= kTaps; ++i) {
          float4& sum = sums[i < kTaps ? kTaps * place.lane + i : kTaps * walk.lanes + place.lane];
          const float* own = i < kTaps ? dw + 4 * i : db;
          const float4 old = owner ? sum : make_float4(0.f, 0.f, 0.f, 0.f);
          sum = make_float4(old.x + own[0], old.y + own[1], old.z + own[2], old.w + own[3]);
        }
      }
      __syncthreads();
    }
    const int first = blockIdx.x * walk.lanes, groups = min(walk.lanes, walk.groups - first);
    const float* flat = reinterpret_cast<const float*>(sums);
    float* weight_to = weight_sums + 4ll * kTaps * (static_cast<int64_t>(blockIdx.y) * walk.groups + first);
    for (int i = threadIdx.x; i < 4 * kTaps * groups; i += kConvThreads) weight_to[i] = flat[i];
    if (bias_sums == nullptr) return;
    float* bias_to = bias_sums + 4ll * (static_cast<int64_t>(blockIdx.y) * walk.groups + first);
    for (int i = threadIdx.x; i < 4 * groups; i += kConvThreads) bias_to[i] = flat[4 * kTaps * walk.lanes + i];
  }
};

// ---- host -----------------------------------------------------------------------------------------------------------
// The tiles with the shortest time, in steps of one row: a tile costs its rows, two around it, and a start. No more
// than `resident` blocks a processor, which all run at once.
Walk plan(const Tensor& x, int resident) {
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), groups = x.size(3) / 4;
  TORCH_CHECK(batch * height * width < (int64_t{1} << 31) && width * groups < (1 << 26),
              "depthwise_conv_silu: a map of shape ", x.sizes(), " is too large");
  Walk walk{};
  walk.height = static_cast<int>(height), walk.width = static_cast<int>(width), walk.groups = static_cast<int>(groups);
  walk.lane_blocks = static_cast<int>(ceil_div(groups, kMostLanes));
  walk.lanes = static_cast<int>(ceil_div(groups, walk.lane_blocks));
  walk.columns = kConvThreads / walk.lanes;
  const int64_t most = std::max<int64_t>(
      1, int64_t{resident} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount / walk.lane_blocks);
  int64_t best = -1;
  for (int64_t rows = std::min<int64_t>(height, kMostRows); rows > 0; --rows) {
    const int64_t tiles = ceil_div(height, rows), blocks = ceil_div(batch * tiles * width, walk.columns);
    const int64_t rounds = ceil_div(blocks, most), cost = rounds * (rows + 3);
    if (best >= 0 && cost >= best) continue;
    best = cost;
    walk.rows = static_cast<int>(rows), walk.tiles = static_cast<int>(tiles);
    walk.tasks = static_cast<unsigned>(batch * tiles * width);
    walk.task_blocks = static_cast<int>(ceil_div(blocks, rounds));
  }
  return walk;
}

template <bool Gradient>
void launch_conv(const Tensor& x, const Tensor& weight, const float* bias, const Tensor& y) {
  with_type(type_of("depthwise_conv_silu", x.scalar_type()), [&](auto type) {
    using T = decltype(type);
    const Walk walk = plan(x, 3);
    launch<ConvKernel<T, Gradient>>(walk.grid(), kConvThreads, 0, at::cuda::getCurrentCUDAStream(), walk,
                                    static_cast<const T*>(x.data_ptr()), weight.data_ptr<float>(), bias,
                                    static_cast<T*>(y.data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

struct Inputs {
  Tensor x, weight, bias;

  Inputs(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
    TORCH_CHECK(x_in.dim() == 4 && x_in.size(3) % 4 == 0 && x_in.numel() > 0,
                "depthwise_conv_silu: x must have the shape (B, H, W, C), C a multiple of 4, got ", x_in.sizes());
    const int64_t channels = x_in.size(3);
    for (const Tensor* t : {&weight_in, bias_in ? &*bias_in : &weight_in}) {
      TORCH_CHECK(t->scalar_type() == at::kFloat && t->device() == x_in.device(),
                  "depthwise_conv_silu: weight and bias must be float32 and on the device of x");
    }
    TORCH_CHECK(weight_in.numel() == kTaps * channels && (!bias_in || bias_in->numel() == channels),
                "depthwise_conv_silu: weight must have 9 elements a channel and bias one, got ", weight_in.sizes());
    x = dense(x_in), weight = dense(weight_in);
    if (bias_in) bias = dense(*bias_in);
  }
  const float* bias_data() const { return bias.defined() ? bias.data_ptr<float>() : nullptr; }
};

Tensor depthwise_conv_silu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Inputs inputs(x, weight, bias);
  const Tensor y = allocate_like(x);
  launch_conv<false>(inputs.x, inputs.weight, inputs.bias_data(), y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv_silu_backward(const Tensor& dy_in, const Tensor& x,
                                                                const Tensor& weight,
                                                                const std::optional<Tensor>& bias) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Inputs inputs(x, weight, bias);
  TORCH_CHECK(dy_in.scalar_type() == x.scalar_type() && dy_in.sizes() == x.sizes(),
              "depthwise_conv_silu_backward: dy has another dtype or shape than x");
  const Tensor dy = dense(dy_in), dz = allocate_like(x), dx = allocate_like(x);
  const int64_t channels = x.size(3);
  const Walk walk = plan(inputs.x, 2);
  const Tensor weight_sums = allocate({walk.task_blocks, kTaps * channels}, weight.options());
  const Tensor bias_sums = allocate({walk.task_blocks, bias ? channels : 0}, weight.options());
  with_type(type_of("depthwise_conv_silu", x.scalar_type()), [&](auto type) {
    using T = decltype(type);
    launch<BackwardKernel<T>>(walk.grid(), kConvThreads, 0, at::cuda::getCurrentCUDAStream(), walk,
                              static_cast<const T*>(dy.data_ptr()), static_cast<const T*>(inputs.x.data_ptr()),
                              inputs.weight.template data_ptr<float>(), inputs.bias_data(),
                              static_cast<T*>(dz.data_ptr()), weight_sums.template data_ptr<float>(),
                              bias ? bias_sums.template data_ptr<float>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  launch_conv<true>(dz, inputs.weight, nullptr, dx);
  std::vector<Columns> sums = {{weight_sums, 0, kTaps * channels}};
  if (bias) sums.push_back({bias_sums, 0, channels});
  const std::vector<Tensor> grads = add_rows(sums);
  return {dx, grads[0].view(weight.sizes()), bias ? grads[1] : allocate({0}, weight.options())};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("depthwise_conv_silu", &mmvmamba::depthwise_conv_silu);
  m.impl("depthwise_conv_silu_backward", &mmvmamba::depthwise_conv_silu_backward);
}
