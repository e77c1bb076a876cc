// The kernels for several states a channel on the emulated GPU, in float, for ctypes.
#include <cuda_runtime.h>

#include "ss2d/states/backward.cuh"
#include "ss2d/states/backward_carries.cuh"
#include "ss2d/states/forward.cuh"
#include "ss2d/states/parameters.cuh"

namespace s = mmvmamba::ss2d::states;

namespace {

s::Args args_of(void** pointers, const int64_t* numbers) {
  s::Args a{};
  a.x = pointers[0], a.dy = pointers[1], a.projections = pointers[2], a.u = pointers[3];
  a.dt_weight = static_cast<float*>(pointers[4]), a.bias = static_cast<float*>(pointers[5]);
  a.A = static_cast<float*>(pointers[6]), a.skip = static_cast<float*>(pointers[7]), a.y = pointers[8];
  a.states = static_cast<float*>(pointers[9]), a.carries = static_cast<float*>(pointers[10]);
  a.sums = static_cast<float*>(pointers[11]), a.du = pointers[12], a.dprojections = pointers[13];
  a.parts = static_cast<float*>(pointers[14]), a.partial = static_cast<float*>(pointers[15]);
  a.batch = numbers[0];
  int* const fields[] = {&a.channels, &a.padded,   &a.groups, &a.height,       &a.width,
                         &a.length,   &a.segments, &a.rank,   &a.dt_columns,   &a.columns,
                         &a.chain,    &a.chunk,    &a.splits, &a.block_groups, &a.pair};
  for (int* field : fields) *field = static_cast<int>(*++numbers);
  a.column_order = *++numbers, a.second_reversed = *++numbers, a.float_output = true;
  return a;
}

template <int N> void scan(const s::Args& a, int which, unsigned seed) {
  const int forward = s::forward_bytes(N, 4, 4);
  const int64_t scans = a.batch * a.groups * a.chain;
  if (which == 0) emulated::launch<s::ForwardKernel<float, N>>(scans, 64, forward, seed, a);
  if (which == 1) emulated::launch<s::CarriesKernel<float, N>>(scans, 64, forward, seed, a);
  if (which == 2) emulated::launch<s::CombineKernel<N>>(a.batch * a.groups, 32, 0, seed, a, false, a.second_reversed);
  if (which == 3) {
    emulated::launch<s::BackwardKernel<float, N>>(a.batch * a.splits * a.chain, 64 * a.block_groups,
                                                  s::backward_bytes(N, 4, a.block_groups), seed, a);
  }
  if (which == 4) emulated::launch<s::BackwardCarriesKernel<float, N>>(scans, 64, forward, seed, a);
  if (which == 5) emulated::launch<s::CombineKernel<N>>(a.batch * a.groups, 32, 0, seed, a, true, !a.second_reversed);
  if (which == 6) {
    const int64_t values = a.batch * a.length * 4 * (a.columns - a.dt_columns);
    emulated::launch<s::AddPartsKernel<float, N>>((values + 255) / 256, 256, 0, seed, a);
  }
}

}  // namespace

extern "C" {

void run_scan(int states, int which, void** pointers, const int64_t* numbers, unsigned seed) {
  const s::Args args = args_of(pointers, numbers);
  switch (states) {
    case 2: return scan<2>(args, which, seed);
    case 4: return scan<4>(args, which, seed);
    case 8: return scan<8>(args, which, seed);
    default: return scan<16>(args, which, seed);
  }
}

void run_prepare(float** t, const int64_t* n) {
  s::Prepare p{};
  p.x_proj = t[0], p.dt_proj = t[1], p.dt_bias = t[2], p.A_logs = t[3], p.Ds = t[4];
  p.weight = t[5], p.dt_matrix = t[6], p.dt_weight = t[7], p.bias = t[8], p.A = t[9], p.skip = t[10];
  int* const fields[] = {&p.channels, &p.padded, &p.rank, &p.dt_columns, &p.columns, &p.states, &p.padded_states};
  for (int* field : fields) *field = static_cast<int>(*n++);
  emulated::launch<s::PrepareKernel<float>>((int64_t{4} * p.columns * p.padded + 255) / 256, 256, 0, 0u, p);
}

void run_finish(float** t, const int64_t* n) {
  s::Finish p{};
  p.partial = t[0], p.dweight = t[1], p.ddt = t[2], p.A = t[3];
  p.dx_proj = t[4], p.ddt_proj = t[5], p.ddt_bias = t[6], p.dA_logs = t[7], p.dDs = t[8];
  p.rows = *n++;
  int* const fields[] = {&p.weight_parts, &p.matrix_parts, &p.channels, &p.padded,       &p.rank,
                         &p.dt_columns,   &p.columns,      &p.states,   &p.padded_states};
  for (int* field : fields) *field = static_cast<int>(*n++);
  emulated::launch<s::FinishKernel<float>>((s::FinishKernel<float>::threads(p) + 255) / 256, 256, 0, 0u, p);
}

// The sizes in layout.h, for Python's own.
int64_t size_of(int which, int a, int b, int c, int d) {
  switch (which) {
    case 0: return s::columns(a, b);
    case 1: return s::forward_bytes(a, b, c);
    case 2: return s::backward_bytes(a, b, c);
    case 3: return s::backward_groups(a, b, c, d);
    default: return s::kSegment;
  }
}
}
