#include "fused/layer_norm/kernels.cuh"

template struct mmvmamba::norm::Kernels<__nv_bfloat16, __nv_bfloat16>;
