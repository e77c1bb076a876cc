#include "fused/depthwise_conv/cpu_rows.h"

namespace mmvmamba {
namespace depthwise {
namespace {

MMVMAMBA_INLINE void load_taps(const Map& map, int64_t vector, Floats (&taps)[kTaps], Floats& bias) {
  const float* from = map.taps + vector * (kTaps + 1) * kVector;
  for (int tap = 0; tap < kTaps; ++tap) load(from + tap * kVector, taps[tap]);
  load(from + kTaps * kVector, bias);
}

template <typename T> MMVMAMBA_INLINE void pad(const Map& map, const T* x, float* row) {
  for (int64_t vector = 0; vector < map.vectors; ++vector) {
    const int64_t first = vector * kVector, count = map.channels - first;
    float* to = row + vector * (map.width + 2) * kVector;
    for (int64_t w = 0; w < map.width; ++w) {
      Floats value;
      load(x + w * map.channels + first, count, value);
      store(value, to += kVector);
    }
  }
}

// Where the pixels of a vector begin in each of three padded rows; the pixel left of pixel w is w times kVector on.
struct Window {
  const float* row[3];

  Window(const Map& map, const float* const* rows, int64_t vector) {
    for (int i = 0; i < 3; ++i) row[i] = rows[i] + vector * (map.width + 2) * kVector;
  }
  MMVMAMBA_INLINE void value(int tap, int64_t w, Floats& to) const { load(row[tap / 3] + (w + tap % 3) * kVector, to); }
};

template <typename T> MMVMAMBA_INLINE void forward(const Map& map, const float* const* rows, T* y) {
  for (int64_t vector = 0; vector < map.vectors; ++vector) {
    const int64_t first = vector * kVector, count = map.channels - first;
    const Window window(map, rows, vector);
    Floats taps[kTaps], bias;
    load_taps(map, vector, taps, bias);
    for (int64_t w = 0; w < map.width; ++w) {
      Floats z = bias, x;
      for (int tap = 0; tap < kTaps; ++tap) window.value(tap, w, x), z += taps[tap] * x;
      Floats share = z;
      to_sigmoid(share);
      store(z * share, count, y + w * map.channels + first);
    }
  }
}

template <typename T>
MMVMAMBA_INLINE void backward(const Map& map, const float* const* rows, const T* dy, float* dz, float* dtaps) {
  for (int64_t vector = 0; vector < map.vectors; ++vector) {
    const int64_t first = vector * kVector, count = map.channels - first;
    const Window window(map, rows, vector);
    float *to = dz + vector * (map.width + 2) * kVector, *sums = dtaps + vector * (kTaps + 1) * kVector;
    Floats taps[kTaps], bias, dtap[kTaps], dbias;
    load_taps(map, vector, taps, bias);
    for (int tap = 0; tap < kTaps; ++tap) load(sums + tap * kVector, dtap[tap]);
    load(sums + kTaps * kVector, dbias);
    for (int64_t w = 0; w < map.width; ++w) {
      Floats z = bias, x, slope;
      for (int tap = 0; tap < kTaps; ++tap) window.value(tap, w, x), z += taps[tap] * x;
      Floats share = z;
      to_sigmoid(share);
      load(dy + w * map.channels + first, count, slope);
      slope = slope * (share * (1.f + z * (1.f - share)));
      dbias += slope;
      for (int tap = 0; tap < kTaps; ++tap) window.value(tap, w, x), dtap[tap] += slope * x;
      store(slope, to += kVector);
    }
    for (int tap = 0; tap < kTaps; ++tap) store(dtap[tap], sums + tap * kVector);
    store(dbias, sums + kTaps * kVector);
  }
}

template <typename T> MMVMAMBA_INLINE void input(const Map& map, const float* const* dz, T* dx) {
  for (int64_t vector = 0; vector < map.vectors; ++vector) {
    const int64_t first = vector * kVector, count = map.channels - first;
    const Window window(map, dz, vector);
    Floats taps[kTaps], bias;
    load_taps(map, vector, taps, bias);
    for (int64_t w = 0; w < map.width; ++w) {
      Floats sum = {}, value;
      for (int tap = 0; tap < kTaps; ++tap) window.value(kTaps - 1 - tap, w, value), sum += taps[tap] * value;
      store(sum, count, dx + w * map.channels + first);
    }
  }
}

}  // namespace

// Function clones want names without templates.
#define MMVMAMBA_DEPTHWISE(T)                                                                                         \
  MMVMAMBA_CLONES void run_pad(const Map& map, const T* x, float* row) { pad(map, x, row); }                          \
  MMVMAMBA_CLONES void run_forward(const Map& map, const float* const* rows, T* y) { forward(map, rows, y); }         \
  MMVMAMBA_CLONES void run_backward(const Map& map, const float* const* rows, const T* dy, float* dz, float* dtaps) { \
    backward(map, rows, dy, dz, dtaps);                                                                               \
  }                                                                                                                   \
  MMVMAMBA_CLONES void run_input(const Map& map, const float* const* dz, T* dx) { input(map, dz, dx); }               \
  template <> void pad_row(const Map& map, const T* x, float* row) { run_pad(map, x, row); }                          \
  template <> void forward_row(const Map& map, const float* const* rows, T* y) { run_forward(map, rows, y); }         \
  template <>                                                                                                         \
  void backward_row(const Map& map, const float* const* rows, const T* dy, float* dz, float* dtaps) {                 \
    run_backward(map, rows, dy, dz, dtaps);                                                                           \
  }                                                                                                                   \
  template <> void input_row(const Map& map, const float* const* dz, T* dx) { run_input(map, dz, dx); }

MMVMAMBA_DEPTHWISE(float)
MMVMAMBA_DEPTHWISE(Bfloat16)

}  // namespace depthwise
}  // namespace mmvmamba
