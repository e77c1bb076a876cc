// Selective scan on CPU. A task owns a few channels over all of time (forward), or a fixed block of one group's
// channels (backward, whose sums over channels then do not depend on the number of threads). States are kept in float
// (double for double inputs); a state is saved every kChunk steps, and backward recomputes the others chunk by chunk.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/constants.h"
#include "common/dtypes.h"
#include "selective_scan/arguments.h"
#include "selective_scan/cpu_chunk.h"

namespace mmvmamba {
namespace {

constexpr int64_t kChannelBlock = 32;  // channels whose dB and dC are added up by one task of backward

struct Sizes {
  int64_t batch, dim, length, states, groups, channels, chunks;  // channels: of one group

  Sizes(const at::Tensor& u, const at::Tensor& A, const at::Tensor& B)
      : batch(u.size(0)),
        dim(u.size(1)),
        length(u.size(2)),
        states(A.size(1)),
        groups(B.size(1)),
        channels(dim / groups),
        chunks((length + kChunk - 1) / kChunk) {}
};

// Up to kRows channels of one chunk as rows of kChunk steps; missing rows stay zero and do no harm.
template <typename T>
struct Tile {
  T values[kRows * kChunk] = {};
  T* row(int r) { return values + r * kChunk; }
};

template <typename acc_t, typename scalar_t>
void load(const scalar_t* from, int64_t stride, int rows, int steps, Tile<acc_t>& to) {
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < steps; ++t) to.row(r)[t] = static_cast<acc_t>(from[r * stride + t]);
  }
}

template <typename acc_t, typename out_t>
void store(Tile<acc_t>& from, int64_t stride, int rows, int steps, out_t* to) {
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < steps; ++t) to[r * stride + t] = static_cast<out_t>(from.row(r)[t]);
  }
}

// Step sizes; raw keeps them before softplus, whose derivative backward needs.
template <typename acc_t, typename scalar_t>
void load_dt(const scalar_t* delta, const acc_t* bias, bool use_softplus, int64_t stride, int rows, int steps,
             Tile<acc_t>& raw, Tile<acc_t>& dt) {
  for (int r = 0; r < rows; ++r) {
    const acc_t offset = bias ? bias[r] : acc_t(0);
    for (int t = 0; t < steps; ++t) {
      dt.row(r)[t] = raw.row(r)[t] = static_cast<acc_t>(delta[r * stride + t]) + offset;
    }
    if (use_softplus) softplus(dt.row(r), steps);
  }
}

template <typename scalar_t, typename out_t, typename acc_t>
void forward_kernel(const Sizes& n, const scalar_t* u, const scalar_t* delta, const acc_t* A, const acc_t* B,
                    const acc_t* C, const acc_t* D, const acc_t* bias, bool use_softplus, out_t* out, acc_t* states) {
  const int64_t quads = (n.channels + kRows - 1) / kRows;  // of a group
  at::parallel_for(0, n.batch * n.groups * quads, 1, [&](int64_t begin, int64_t end) {
    Tile<acc_t> u_, raw, dt, y;
    std::vector<acc_t> h(n.states * kRows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / quads, first = task % quads * kRows;  // group counts over the batch
      const int rows = static_cast<int>(std::min<int64_t>(kRows, n.channels - first));
      const int64_t d = group % n.groups * n.channels + first, row = group / n.groups * n.dim + d;
      std::fill(h.begin(), h.end(), acc_t(0));
      for (int r = 0; r < rows; ++r) std::fill_n(states + (row + r) * (n.chunks + 1) * n.states, n.states, acc_t(0));
      for (int64_t chunk = 0; chunk < n.chunks; ++chunk) {
        const int64_t start = chunk * kChunk, at = row * n.length + start;
        const int steps = static_cast<int>(std::min<int64_t>(kChunk, n.length - start));
        load(u + at, n.length, rows, steps, u_);
        load_dt(delta + at, bias ? bias + d : nullptr, use_softplus, n.length, rows, steps, raw, dt);
        for (int r = 0; r < rows; ++r) {
          for (int t = 0; t < steps; ++t) y.row(r)[t] = D ? D[d + r] * u_.row(r)[t] : acc_t(0);
        }
        for (int64_t s = 0; s < n.states; ++s) {
          const int64_t shared = (group * n.states + s) * n.length + start;
          acc_t A_[kRows] = {};
          for (int r = 0; r < rows; ++r) A_[r] = A[(d + r) * n.states + s];
          scan_chunk(dt.values, u_.values, B + shared, C + shared, A_, &h[s * kRows], y.values, steps);
          for (int r = 0; r < rows; ++r) {
            states[((row + r) * (n.chunks + 1) + chunk + 1) * n.states + s] = h[s * kRows + r];
          }
        }
        store(y, n.length, rows, steps, out + at);
      }
    }
  });
}

// The pointers of backward; partial sums have a leading dimension that is added up afterwards.
template <typename scalar_t, typename acc_t>
struct Backward {
  const scalar_t *u, *delta;
  const acc_t *dout, *A, *B, *C, *D, *bias, *states;
  scalar_t *du, *ddelta;
  acc_t *dA, *dB, *dC, *dD, *dbias;  // dA (batch, dim, N); dB, dC (blocks, batch, groups, N, L); dD, dbias (batch, dim)
};

// Channels d .. d + rows of one group, over all of time. dB and dC point at the partial sums of this block of channels.
template <typename scalar_t, typename acc_t>
void backward_rows(const Sizes& n, const Backward<scalar_t, acc_t>& p, bool use_softplus, int64_t group, int64_t d,
                   int rows, acc_t* dB, acc_t* dC, std::vector<acc_t>& flow) {
  Tile<acc_t> u, raw, dt, dy, du, ddt;
  const int64_t row = group / n.groups * n.dim + d;
  acc_t dD[kRows] = {}, dbias[kRows] = {};
  std::fill(flow.begin(), flow.end(), acc_t(0));
  for (int64_t chunk = n.chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, at = row * n.length + start;
    const int steps = static_cast<int>(std::min<int64_t>(kChunk, n.length - start));
    load(p.dout + at, n.length, rows, steps, dy);
    load(p.u + at, n.length, rows, steps, u);
    load_dt(p.delta + at, p.bias ? p.bias + d : nullptr, use_softplus, n.length, rows, steps, raw, dt);
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < steps; ++t) {
        du.row(r)[t] = p.D ? p.D[d + r] * dy.row(r)[t] : acc_t(0);
        ddt.row(r)[t] = 0;
        dD[r] += dy.row(r)[t] * u.row(r)[t];
      }
    }
    for (int64_t s = 0; s < n.states; ++s) {
      const int64_t shared = (group * n.states + s) * n.length + start, own = s * n.length + start;
      acc_t A[kRows] = {}, h0[kRows] = {}, dA[kRows] = {};
      for (int r = 0; r < rows; ++r) {
        A[r] = p.A[(d + r) * n.states + s];
        h0[r] = p.states[((row + r) * (n.chunks + 1) + chunk) * n.states + s];
      }
      scan_chunk_backward(dt.values, u.values, p.B + shared, p.C + shared, dy.values, A, h0, &flow[s * kRows],
                          du.values, ddt.values, dB + own, dC + own, dA, steps);
      for (int r = 0; r < rows; ++r) p.dA[(row + r) * n.states + s] += dA[r];
    }
    for (int r = 0; r < rows; ++r) {
      if (use_softplus) mul_sigmoid(raw.row(r), ddt.row(r), steps);
      for (int t = 0; t < steps; ++t) dbias[r] += ddt.row(r)[t];
    }
    store(du, n.length, rows, steps, p.du + at);
    store(ddt, n.length, rows, steps, p.ddelta + at);
  }
  std::copy(dD, dD + rows, p.dD + row);
  std::copy(dbias, dbias + rows, p.dbias + row);
}

template <typename scalar_t, typename acc_t>
void backward_kernel(const Sizes& n, const Backward<scalar_t, acc_t>& p, bool use_softplus) {
  const int64_t blocks = (n.channels + kChannelBlock - 1) / kChannelBlock, pairs = n.batch * n.groups;
  at::parallel_for(0, pairs * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> flow(n.states * kRows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, block = task % blocks,
                    offset = (block * pairs + group) * n.states * n.length;
      const int64_t base = group % n.groups * n.channels, last = std::min((block + 1) * kChannelBlock, n.channels);
      for (int64_t c = block * kChannelBlock; c < last; c += kRows) {
        backward_rows(n, p, use_softplus, group, base + c, static_cast<int>(std::min<int64_t>(kRows, last - c)),
                      p.dB + offset, p.dC + offset, flow);
      }
    }
  });
}

// Outputs of many megabytes cost more in page faults than in arithmetic: ask for huge pages before the first touch.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto tensor = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kPage = 1 << 21;
  const auto begin = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(tensor.data_ptr()) + tensor.nbytes()) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure is harmless
#endif
  return tensor;
}

at::Tensor as_state(const at::Tensor& tensor, at::ScalarType dtype) { return tensor.to(dtype).contiguous(); }

template <typename acc_t>
const acc_t* pointer_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<acc_t>() : nullptr;
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
}

at::ScalarType state_type(const at::Tensor& u) { return u.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

std::tuple<at::Tensor, at::Tensor> selective_scan_forward(const at::Tensor& u_, const at::Tensor& delta_,
                                                          const at::Tensor& A_, const at::Tensor& B_,
                                                          const at::Tensor& C_, const std::optional<at::Tensor>& D_,
                                                          const std::optional<at::Tensor>& bias_, bool use_softplus,
                                                          bool float_output, const std::optional<at::Tensor>& z,
                                                          const std::optional<at::Tensor>& initial_state) {
  check_supported(u_, delta_, z, initial_state);
  const auto out_dtype = output_dtype(u_, float_output);
  const Sizes n(u_, A_, B_);
  const auto state = state_type(u_);
  const auto u = u_.contiguous(), delta = delta_.contiguous(), A = A_.contiguous();
  const auto B = as_state(B_, state), C = as_state(C_, state);
  const auto D = contiguous(D_), bias = contiguous(bias_);
  auto out = empty_output(u.sizes(), u.options().dtype(out_dtype));
  auto states = at::empty({n.batch, n.dim, n.chunks + 1, n.states}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "selective_scan", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto run = [&](auto* out_pointer) {
      forward_kernel(n, u.const_data_ptr<scalar_t>(), delta.const_data_ptr<scalar_t>(), A.const_data_ptr<acc_t>(),
                     B.const_data_ptr<acc_t>(), C.const_data_ptr<acc_t>(), pointer_or_null<acc_t>(D),
                     pointer_or_null<acc_t>(bias), use_softplus, out_pointer, states.data_ptr<acc_t>());
    };
    if (out_dtype == u.scalar_type()) {
      run(out.data_ptr<scalar_t>());
    } else {
      run(out.data_ptr<acc_t>());
    }
  });
  return {out, states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> selective_scan_backward(
    const at::Tensor& dout_, const at::Tensor& u_, const at::Tensor& delta_, const at::Tensor& A_, const at::Tensor& B_,
    const at::Tensor& C_, const std::optional<at::Tensor>& D_, const std::optional<at::Tensor>& bias_,
    const at::Tensor& states_, bool use_softplus) {
  const Sizes n(u_, A_, B_);
  const auto state = state_type(u_);
  const auto u = u_.contiguous(), delta = delta_.contiguous(), A = A_.contiguous(), states = states_.contiguous();
  const auto B = as_state(B_, state), C = as_state(C_, state), dout = as_state(dout_, state);
  const auto D = contiguous(D_), bias = contiguous(bias_);
  const int64_t blocks = (n.channels + kChannelBlock - 1) / kChannelBlock;
  auto du = empty_output(u.sizes(), u.options()), ddelta = empty_output(u.sizes(), u.options());
  auto dA = at::zeros({n.batch, n.dim, n.states}, A.options());
  auto dB = at::zeros({blocks, n.batch, n.groups, n.states, n.length}, A.options()),
       dC = at::zeros(dB.sizes(), A.options());
  auto dD = at::empty({n.batch, n.dim}, A.options()), dbias = at::empty({n.batch, n.dim}, A.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, u.scalar_type(), "selective_scan_backward", [&] {
    using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const Backward<scalar_t, acc_t> p{u.const_data_ptr<scalar_t>(),   delta.const_data_ptr<scalar_t>(),
                                      dout.const_data_ptr<acc_t>(),   A.const_data_ptr<acc_t>(),
                                      B.const_data_ptr<acc_t>(),      C.const_data_ptr<acc_t>(),
                                      pointer_or_null<acc_t>(D),      pointer_or_null<acc_t>(bias),
                                      states.const_data_ptr<acc_t>(), du.data_ptr<scalar_t>(),
                                      ddelta.data_ptr<scalar_t>(),    dA.data_ptr<acc_t>(),
                                      dB.data_ptr<acc_t>(),           dC.data_ptr<acc_t>(),
                                      dD.data_ptr<acc_t>(),           dbias.data_ptr<acc_t>()};
    backward_kernel(n, p, use_softplus);
  });
  const auto type = u.scalar_type();
  return {du,
          ddelta,
          dA.sum(0),
          dB.sum(0).to(type),
          dC.sum(0).to(type),
          D ? dD.sum(0) : at::empty({0}, A.options()),
          bias ? dbias.sum(0) : at::empty({0}, A.options())};
}

const AddConstants add_chunk({{"selective_scan.cpu.chunk", {kChunk}}});

}  // namespace
}  // namespace mmvmamba

TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("selective_scan", &mmvmamba::selective_scan_forward);
  m.impl("selective_scan_backward", &mmvmamba::selective_scan_backward);
}
