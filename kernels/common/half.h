// The two 16-bit float formats as plain bits, and their scalar conversions.
//
// Rounding is to nearest even. A NaN stays a NaN (it is made quiet, its sign and top payload bits kept), where plain
// rounding of the bits could carry it over into infinity or zero.
#pragma once
#include <cstdint>
#include <cstring>

namespace ds {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

static inline float to_float(float x) { return x; }

static inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

static inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  if (exponent) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // Subnormal: an integer number of steps of 2^-24, exact in fp32.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
  return float_of(sign | bits_of(magnitude));
}

static inline void from_float(float x, float* out) { *out = x; }

static inline void from_float(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((u >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline void from_float(float x, fp16* out) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // normal: 2^-14 and above
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  } else {
    // Subnormal: adding 0.5 leaves the result in steps of 2^-24 in the low bits, rounded by the adder itself.
    const float shifted = float_of(magnitude) + 0.5f;
    out->bits = static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
}

}  // namespace ds
