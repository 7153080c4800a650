// Dequantises one block, included once per instruction set.
#include "lanes.h"

namespace ds {
namespace DS_SET {

using N = Narrow<V>;

// -- a vector of values ----------------------------------------------------------------------------------------------------

// No subnormal fp32 on the way: a processor may be set to take them for 0.
template <int Exponent, int Mantissa, int Largest>
DS_TARGET static inline Floats float_values(Words code) {
  constexpr int drop = 23 - Mantissa, bias = (1 << (Exponent - 1)) - 1, sign = Exponent + Mantissa;
  constexpr uint32_t least = (128 - bias) << 23;  // the smallest normal number of the format
  const Ints size = as<Ints>(code & ((1u << sign) - 1));
  const Ints normal = (size << drop) + ((127 - bias) << 23);
  const Floats subnormal = as<Floats>((size << drop) + static_cast<int32_t>(least)) - float_of(least);
  Ints bits = size < (1 << Mantissa) ? as<Ints>(subnormal) : normal;
  if constexpr (Largest + 1 < (1 << sign)) bits = size > Largest ? 0x7fc00000 - Ints{} : bits;
  return as<Floats>(as<Words>(bits) | ((code >> sign) << 31));
}

template <int F>
DS_TARGET static inline Floats values_of(const uint8_t* codes) {
  if constexpr (F == kInt8) {
    return __builtin_convertvector((Ints)N::load8(reinterpret_cast<const int8_t*>(codes)), Floats);
  } else if constexpr (F == kUint8) {
    return __builtin_convertvector((Ints)N::load8(codes), Floats);
  } else if constexpr (F == kInt4) {
    return __builtin_convertvector(((Ints)N::load4(codes) ^ 8) - 8, Floats);
  } else if constexpr (F == kUint4) {
    return __builtin_convertvector((Ints)N::load4(codes), Floats);
  } else if constexpr (F == kE4m3) {
    return float_values<4, 3, 0x7e>((Words)N::load8(codes));
  } else if constexpr (F == kE5m2) {
    return float_values<5, 2, 0x7b>((Words)N::load8(codes));
  } else if constexpr (F == kE3m2) {
    return float_values<3, 2, 0x1f>((Words)N::load6(codes));
  } else {
    return float_values<4, 7, 0x7ff>((Words)N::load12(codes));
  }
}

// -- a group, a block --------------------------------------------------------------------------------------------------------

template <int F, class T, bool Add>
DS_TARGET static inline void decode_group(const uint8_t* in, float scale, float zero, T* out) {
  constexpr bool asymmetric = F == kUint8 || F == kUint4;
  for (int i = 0; i < kGroup; i += 2 * W) {
    Floats value[2];
    for (int j = 0; j < 2; ++j) {
      value[j] = values_of<F>(in + code_bytes(F, i + j * W)) * scale;
      if constexpr (asymmetric) value[j] = value[j] + zero;
      if constexpr (Add) value[j] = load(out + i + j * W) + value[j];
    }
    if constexpr (std::is_same_v<T, bf16> && !Add) {
      N::store_bf16(out + i, (N::Floats)value[0], (N::Floats)value[1]);
    } else {
      for (int j = 0; j < 2; ++j) store(out + i + j * W, value[j]);
    }
  }
}

// A NaN without what it may carry: see store_bf16.
static inline float plain(float x) { return x == x ? x : __builtin_nanf(""); }

template <int F, class T, bool Add>
DS_TARGET static void decode_block(const uint8_t* codes, int64_t numel, float scale, const float* zero, void* to) {
  T* out = static_cast<T*>(to);
  const float offset = zero ? plain(*zero) : 0.0f;
  scale = plain(scale);
  const int64_t groups = numel / kGroup, left = numel % kGroup, bytes = code_bytes(F, kGroup);
  for (int64_t g = 0; g < groups; ++g) decode_group<F, T, Add>(codes + g * bytes, scale, offset, out + g * kGroup);
  if (!left) return;
  T tail[kGroup] = {};
  uint8_t tail_codes[kGroup * 3 / 2] = {};
  std::memcpy(tail_codes, codes + groups * bytes, static_cast<size_t>(code_bytes(F, left)));
  if constexpr (Add) std::memcpy(tail, out + groups * kGroup, static_cast<size_t>(left) * sizeof(T));
  decode_group<F, T, Add>(tail_codes, scale, offset, tail);
  std::memcpy(out + groups * kGroup, tail, static_cast<size_t>(left) * sizeof(T));
}

template <class T, bool Add>
static Decode pick_format(int format) {
  constexpr Decode table[] = {decode_block<kInt8, T, Add>, decode_block<kUint8, T, Add>, decode_block<kInt4, T, Add>,
                              decode_block<kUint4, T, Add>, decode_block<kE4m3, T, Add>, decode_block<kE5m2, T, Add>,
                              decode_block<kE3m2, T, Add>, decode_block<kE4m7, T, Add>};
  return table[format];
}

template <bool Add>
static Decode pick_dtype(int format, int dtype) {
  if (dtype == kBf16) return pick_format<bf16, Add>(format);
  if (dtype == kFp16) return pick_format<fp16, Add>(format);
  return pick_format<float, Add>(format);
}

static Decode pick(int format, int dtype, bool add) {
  return add ? pick_dtype<true>(format, dtype) : pick_dtype<false>(format, dtype);
}

}  // namespace DS_SET
}  // namespace ds
