// Layer normalisation over a short last dimension: mmvmamba::layer_norm and its backward on CUDA.
//
// torch's kernel gives a whole block to each row, which starves for rows of 48 to 1024 channels, and under autocast it
// writes float. Here `Lanes` lanes own a row, values stay in registers, and the output has the dtype that its reader
// wants. Forward moves x in and y out; backward x and dy in, dx out. The sums over rows for weight and bias are kept in
// registers over all rows of a thread, added over the block in a fixed order, and leave as one partial sum a block.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <algorithm>

namespace mmvmamba {
namespace {

using at::Tensor;

constexpr int kThreads = 256;

__device__ __forceinline__ void load4(const float* from, float (&v)[4]) {
  const float4 raw = *reinterpret_cast<const float4*>(from);
  v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
}
__device__ __forceinline__ void load4(const __half* from, float (&v)[4]) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  const float2 a = __half22float2(reinterpret_cast<const __half2&>(raw.x));
  const float2 b = __half22float2(reinterpret_cast<const __half2&>(raw.y));
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
}
__device__ __forceinline__ void load4(const __nv_bfloat16* from, float (&v)[4]) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  const float2 a = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.x));
  const float2 b = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(raw.y));
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
}
__device__ __forceinline__ void store4(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store4(__half* to, const float (&v)[4]) {
  const __half2 a = __floats2half2_rn(v[0], v[1]), b = __floats2half2_rn(v[2], v[3]);
  *reinterpret_cast<uint2*>(to) =
      make_uint2(reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b));
}
__device__ __forceinline__ void store4(__nv_bfloat16* to, const float (&v)[4]) {
  const __nv_bfloat162 a = __floats2bfloat162_rn(v[0], v[1]), b = __floats2bfloat162_rn(v[2], v[3]);
  *reinterpret_cast<uint2*>(to) =
      make_uint2(reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b));
}

template <int Lanes> __device__ __forceinline__ float sum_over_row(float v) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// A thread holds `Chunks` times 4 channels of a row: chunk i at channel 4 * (lane + i * Lanes).
template <typename In, typename Out, int Lanes, int Chunks>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const In* x, const float* weight, const float* bias, Out* y, float2* statistics, int64_t rows,
                   int channels, float eps) {
  const int lane = threadIdx.x % Lanes;
  float w[Chunks][4], b[Chunks][4];
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
    const int channel = 4 * (lane + i * Lanes);
    if (channel < channels) load4(weight + channel, w[i]), load4(bias + channel, b[i]);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Lanes);
  // All lanes of a warp take part in the shuffles; a row beyond the last repeats it and isn't stored.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes); first < rows; first += stride) {
    const int64_t row = first + threadIdx.x / Lanes;
    const In* from = x + (row < rows ? row : rows - 1) * channels;
    float v[Chunks][4], sum = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
        load4(from + channel, v[i]);
        sum += v[i][0] + v[i][1] + v[i][2] + v[i][3];
      }
    }
    const float mean = sum_over_row<Lanes>(sum) / channels;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      if (4 * (lane + i * Lanes) < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) squares = fmaf(v[i][j] - mean, v[i][j] - mean, squares);
      }
    }
    const float scale = rsqrtf(sum_over_row<Lanes>(squares) / channels + eps);
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i][j] = fmaf((v[i][j] - mean) * scale, w[i][j], b[i][j]);
        store4(y + row * channels + channel, v[i]);
      }
    }
    if (lane == 0 && statistics != nullptr) statistics[row] = make_float2(mean, scale);
  }
}

template <typename In, typename Out, int Lanes, int Chunks>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Out* dy, const In* x, const float* weight, const float2* statistics, In* dx, float* partial,
                    int64_t rows, int channels) {
  extern __shared__ float sums[];  // [2][channels]
  const int lane = threadIdx.x % Lanes;
  float w[Chunks][4], dw[Chunks][4] = {}, db[Chunks][4] = {};
#pragma unroll
  for (int i = 0; i < Chunks; ++i) {
    const int channel = 4 * (lane + i * Lanes);
    if (channel < channels) load4(weight + channel, w[i]);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Lanes);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / Lanes); first < rows; first += stride) {
    const int64_t row = first + threadIdx.x / Lanes, valid = row < rows ? row : rows - 1;
    const float2 mean_scale = statistics[valid];
    float normal[Chunks][4], grad[Chunks][4], dot = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
        load4(x + valid * channels + channel, normal[i]);
        load4(dy + valid * channels + channel, grad[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          normal[i][j] = (normal[i][j] - mean_scale.x) * mean_scale.y;
          if (row < rows) {
            dw[i][j] = fmaf(grad[i][j], normal[i][j], dw[i][j]);
            db[i][j] += grad[i][j];
          }
          grad[i][j] *= w[i][j];
          dot = fmaf(grad[i][j], normal[i][j], dot);
          sum += grad[i][j];
        }
      }
    }
    dot = sum_over_row<Lanes>(dot) / channels;
    sum = sum_over_row<Lanes>(sum) / channels;
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < Chunks; ++i) {
      const int channel = 4 * (lane + i * Lanes);
      if (channel < channels) {
#pragma unroll
        for (int j = 0; j < 4; ++j) grad[i][j] = mean_scale.y * (grad[i][j] - sum - normal[i][j] * dot);
        store4(dx + row * channels + channel, grad[i]);
      }
    }
  }
  for (int owner = 0; owner < kThreads / Lanes; ++owner) {
    if (threadIdx.x / Lanes == owner) {
#pragma unroll
      for (int i = 0; i < Chunks; ++i) {
        const int channel = 4 * (lane + i * Lanes);
        if (channel < channels) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[channel + j] = owner ? sums[channel + j] + dw[i][j] : dw[i][j];
            sums[channels + channel + j] = owner ? sums[channels + channel + j] + db[i][j] : db[i][j];
          }
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < 2 * channels; i += kThreads) partial[blockIdx.x * 2 * channels + i] = sums[i];
}

int64_t blocks_for(int64_t rows, int lanes, int blocks_a_processor) {
  const int processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  const int64_t whole = (rows * lanes + kThreads - 1) / kThreads;
  return std::max<int64_t>(1, std::min<int64_t>(whole, processors * blocks_a_processor));
}

// Call f(lanes, chunks) with compile-time numbers that hold `channels`.
template <typename F> void with_shape(int64_t channels, F f) {
  using std::integral_constant;
  if (channels <= 64) return f(integral_constant<int, 16>(), integral_constant<int, 1>());
  if (channels <= 128) return f(integral_constant<int, 32>(), integral_constant<int, 1>());
  if (channels <= 256) return f(integral_constant<int, 32>(), integral_constant<int, 2>());
  if (channels <= 512) return f(integral_constant<int, 32>(), integral_constant<int, 4>());
  return f(integral_constant<int, 32>(), integral_constant<int, 8>());
}

// Call f(In(), Out()) for x and an output of the same type, or either of them float.
template <typename F> void with_types(at::ScalarType in, at::ScalarType out, F f) {
  if (in == at::kFloat && out == at::kFloat) return f(float(), float());
  if (in == at::kFloat && out == at::kHalf) return f(float(), __half());
  if (in == at::kFloat && out == at::kBFloat16) return f(float(), __nv_bfloat16());
  if (in == at::kHalf && out == at::kFloat) return f(__half(), float());
  if (in == at::kBFloat16 && out == at::kFloat) return f(__nv_bfloat16(), float());
  if (in == at::kHalf && out == at::kHalf) return f(__half(), __half());
  if (in == at::kBFloat16 && out == at::kBFloat16) return f(__nv_bfloat16(), __nv_bfloat16());
  TORCH_CHECK(false, "layer_norm: x is ", in, " and the output ", out, ", expected one type, or one of them float32");
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t channels = x.size(-1);
  TORCH_CHECK(channels % 4 == 0 && channels <= 1024, "layer_norm: ", channels,
              " channels, expected a multiple of 4 up to 1024");
  TORCH_CHECK(x.is_contiguous(), "layer_norm: x must be contiguous");
  for (const Tensor* t : {&weight, &bias}) {
    TORCH_CHECK(t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == channels && t->is_cuda(),
                "layer_norm: weight and bias must be contiguous float32 CUDA tensors of ", channels, " elements");
  }
}

std::tuple<Tensor, Tensor> layer_norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                              at::ScalarType out_dtype, bool save) {
  const c10::cuda::CUDAGuard guard(x.device());
  check(x, weight, bias);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  Tensor y = at::empty_like(x, x.options().dtype(out_dtype));
  Tensor statistics = at::empty({save ? rows : 0, 2}, weight.options());
  with_types(x.scalar_type(), out_dtype, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    with_shape(channels, [&](auto lanes, auto chunks) {
      forward_kernel<In, Out, lanes, chunks>
          <<<blocks_for(rows, lanes, 8), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
              static_cast<const In*>(x.data_ptr()), weight.data_ptr<float>(), bias.data_ptr<float>(),
              static_cast<Out*>(y.data_ptr()), save ? reinterpret_cast<float2*>(statistics.data_ptr()) : nullptr, rows,
              static_cast<int>(channels), static_cast<float>(eps));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_in, const Tensor& x, const Tensor& weight,
                                                       const Tensor& statistics) {
  const c10::cuda::CUDAGuard guard(x.device());
  check(x, weight, weight);
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  TORCH_CHECK(statistics.size(0) == rows, "layer_norm_backward: the forward was run without saving its statistics");
  const Tensor dy = dy_in.contiguous();
  Tensor dx = at::empty_like(x), partial;
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    with_shape(channels, [&](auto lanes, auto chunks) {
      const int64_t blocks = blocks_for(rows, lanes, 4);
      partial = at::empty({blocks, 2, channels}, weight.options());
      backward_kernel<In, Out, lanes, chunks>
          <<<blocks, kThreads, 2 * channels * sizeof(float), at::cuda::getCurrentCUDAStream()>>>(
              static_cast<const Out*>(dy.data_ptr()), static_cast<const In*>(x.data_ptr()), weight.data_ptr<float>(),
              reinterpret_cast<const float2*>(statistics.data_ptr()), static_cast<In*>(dx.data_ptr()),
              partial.data_ptr<float>(), rows, static_cast<int>(channels));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  const Tensor sums = at::sum(partial, {0});
  return {dx, sums[0], sums[1]};
}

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CUDA, m) {
  m.impl("layer_norm", &mmvmamba::layer_norm_forward);
  m.impl("layer_norm_backward", &mmvmamba::layer_norm_backward);
}
