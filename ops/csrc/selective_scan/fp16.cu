#include "selective_scan/instantiate.cuh"

MMVMAMBA_SCAN_INSTANTIATE(half, __half)
