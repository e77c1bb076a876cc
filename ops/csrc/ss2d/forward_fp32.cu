#include "ss2d/forward.cuh"

template struct mmvmamba::ss2d::Forward<float>;
