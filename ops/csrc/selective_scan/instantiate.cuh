// MMVMAMBA_SCAN_INSTANTIATE(suffix, type) defines the launch functions of one input type.
#pragma once

#include "selective_scan/backward.cuh"
#include "selective_scan/forward.cuh"

#define MMVMAMBA_SCAN_INSTANTIATE(suffix, type)                                                     \
  namespace mmvmamba {                                                                              \
  namespace scan {                                                                                  \
  void forward_##suffix(const Args& args, cudaStream_t stream) { forward<type>(args, stream); }     \
  void backward_##suffix(const Args& args, cudaStream_t stream) { backward<type>(args, stream); }   \
  void add_partial_##suffix(const Args& args, void* dB, void* dC, cudaStream_t stream) {            \
    add_partial<type>(args, dB, dC, stream);                                                        \
  }                                                                                                 \
  }                                                                                                 \
  }
