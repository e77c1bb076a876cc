#include "selective_scan_instantiate.cuh"

MMVMAMBA_SCAN_INSTANTIATE(half, __half)
