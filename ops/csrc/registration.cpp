// Raw entry points of the compiled backends, torch.ops.mmvmamba_C.*; ops/library.py gives them schemas, fakes and
// gradients. The CUDA sources, when built, add theirs to the same library.
#include <torch/library.h>

#include "cpu_ops.h"

TORCH_LIBRARY(mmvmamba_C, m) {
  m.def("selective_scan_fwd_cpu(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
        "bool delta_softplus, ScalarType out_dtype) -> (Tensor, Tensor)",
        &mmvmamba::selective_scan_fwd_cpu);
  m.def("selective_scan_bwd_cpu(Tensor dout, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? delta_bias, Tensor carries, bool delta_softplus) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        &mmvmamba::selective_scan_bwd_cpu);
  m.def("cross_scan_cpu(Tensor x, int scan_mode, bool channel_last) -> Tensor", &mmvmamba::cross_scan_cpu);
  m.def("cross_merge_cpu(Tensor y, int height, int width, int scan_mode, bool channel_last) -> Tensor",
        &mmvmamba::cross_merge_cpu);
}
