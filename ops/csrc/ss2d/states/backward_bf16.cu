#include "ss2d/states/run_backward.cuh"

template struct mmvmamba::ss2d::states::BackwardKernels<__nv_bfloat16>;
