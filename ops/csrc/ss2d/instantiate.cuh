// Entry points of one element type: every instantiation file is one line of these.
#pragma once

#define MMVMAMBA_SS2D_ENTRY(function, suffix, run, type, carries)                              \
  void function##_##suffix(int rank, int warps, const Args& args, cudaStream_t stream) {       \
    switch (rank) {                                                                            \
      case 0: return run<type, 0>(carries, warps, args, stream);                               \
      case 6: return run<type, 6>(carries, warps, args, stream);                               \
      default: return run<type, 12>(carries, warps, args, stream);                             \
    }                                                                                          \
  }

#define MMVMAMBA_SS2D_BYTES(function, suffix, type)                \
  int function##_##suffix(int rank, int warps, const Args& args) { \
    switch (rank) {                                                \
      case 0: return function<type, 0>(warps, args);               \
      case 6: return function<type, 6>(warps, args);               \
      default: return function<type, 12>(warps, args);             \
    }                                                              \
  }

#define MMVMAMBA_SS2D_FORWARD(suffix, type)                               \
  namespace mmvmamba {                                                    \
  namespace ss2d {                                                        \
  MMVMAMBA_SS2D_ENTRY(forward_carries, suffix, run_forward, type, true)   \
  MMVMAMBA_SS2D_ENTRY(forward, suffix, run_forward, type, false)          \
  MMVMAMBA_SS2D_BYTES(forward_bytes, suffix, type)                        \
  }                                                                       \
  }

#define MMVMAMBA_SS2D_BACKWARD(suffix, type)                              \
  namespace mmvmamba {                                                    \
  namespace ss2d {                                                        \
  MMVMAMBA_SS2D_ENTRY(backward_carries, suffix, run_backward, type, true) \
  MMVMAMBA_SS2D_ENTRY(backward, suffix, run_backward, type, false)        \
  MMVMAMBA_SS2D_BYTES(backward_bytes, suffix, type)                       \
  }                                                                       \
  }
