#include "ss2d/states/run_forward.cuh"

template struct mmvmamba::ss2d::states::Kernels<__half>;
