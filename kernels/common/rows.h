// What loops over rows share, for each instruction set: blocks of a row as fp32, sums in a fixed order, the exponential.
//
// Included by a loop (see each_set.h) before its own functions; no include guard: that is the point.
// Everything here gives the same bits for every set, thread count and chunking: sums go to 32 lanes by position in the row and
// end in one fixed tree; products and sums are rounded one by one. The loops are plain; the compiler vectorises them.
#include <type_traits>

namespace ds {
namespace DS_SET {

constexpr int64_t kBlock = 1024;  // elements of a row that are in the works at once: a few such blocks of fp32 fit L1
constexpr int kLanes = 32;        // divides kBlock

#define DS_INLINE __attribute__((always_inline)) DS_TARGET

// The elements as fp32: where they are if that is what they are, else written to `buffer`.
template <class T>
DS_TARGET static inline const float* widened(const T* in, float* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return in;
  } else {
    using V = DS_VEC;
    int64_t i = 0;
    for (; i + V::width <= count; i += V::width) V::store(buffer + i, V::load(in + i));
    for (; i < count; ++i) buffer[i] = to_float(in[i]);
    return buffer;
  }
}

// Where to compute fp32 results that go to `out`: there if it is fp32, else in `buffer`, until `narrowed`.
template <class T>
DS_TARGET static inline float* target_of(T* out, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return out;
  } else {
    return buffer;
  }
}

template <class T>
DS_TARGET static inline void narrowed(const float* in, T* out, int64_t count) {
  if constexpr (!std::is_same_v<T, float>) {
    using V = DS_VEC;
    int64_t i = 0;
    for (; i + V::width <= count; i += V::width) V::store(out + i, V::load(in + i));
    for (; i < count; ++i) from_float(in[i], out + i);
  }
}

// A sum over a row, a block at a time.
struct Sum {
  alignas(64) float lane[kLanes] = {};

  template <class Term>
  DS_INLINE inline void add(int64_t count, const Term& term) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lane[j] += term(i + j);
    }
    for (int j = 0; i + j < count; ++j) lane[j] += term(i + j);
  }

  DS_INLINE inline float total() const {
    float part[kLanes];
    for (int j = 0; j < kLanes; ++j) part[j] = lane[j];
    for (int half = kLanes / 2; half; half /= 2) {
      for (int j = 0; j < half; ++j) part[j] += part[j + half];
    }
    return part[0];
  }
};

// The largest of a row; NaN are passed over, and show in whatever is summed afterwards.
struct Largest {
  alignas(64) float lane[kLanes];

  DS_INLINE inline Largest() {
    for (int j = 0; j < kLanes; ++j) lane[j] = -__builtin_inff();
  }

  template <class Term>
  DS_INLINE inline void add(int64_t count, const Term& term) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float x = term(i + j);
        lane[j] = x > lane[j] ? x : lane[j];
      }
    }
    for (int j = 0; i + j < count; ++j) {
      const float x = term(i + j);
      lane[j] = x > lane[j] ? x : lane[j];
    }
  }

  DS_INLINE inline float total() const {
    float most = lane[0];
    for (int j = 1; j < kLanes; ++j) most = lane[j] > most ? lane[j] : most;
    return most;
  }
};

// e^x within 2 ulp, for every x; NaN stays NaN, results under 2^-126 are rounded once more, as subnormals are.
// x = n ln2 + r with ln2 in two parts, the first exact in 10 bits: |r| <= 0.3467 is off by less than 2^-25.5. The polynomial is
// within 2^-28.3 of (e^r - 1 - r) / r^2 as it counts in e^r; its last two sums round by 2^-24 of at most 1.42 and of 0.42.
// `low` says that x is not above 60, which is shorter: 2^n is then 2^(n + 64) 2^-64, of which the first is never out of range.
// Either way one product is exact and the other is rounded once, if it is subnormal, so the bits are the same.
template <bool low = false>
DS_INLINE static inline float exp_of(float x) {
  x = x < -104.0f ? -104.0f : x;
  if constexpr (!low) x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is now in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.3814571e-3f;
  p = p * r + 8.368731e-3f;
  p = p * r + 4.166839e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 0.49999994f;
  p = (p * r) * r + r;
  p = p + 1.0f;
  if constexpr (low) return (p * float_of((bits_of(shifted) - 0x4b400000u + 64 + 127) << 23)) * 0x1p-64f;
  const int32_t power = static_cast<int32_t>(bits_of(shifted) - 0x4b400000u), half = power >> 1;
  const float scale = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float rest = float_of(static_cast<uint32_t>(power - half + 127) << 23);
  return (p * scale) * rest;
}

}  // namespace DS_SET
}  // namespace ds
