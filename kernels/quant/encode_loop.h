// Quantises one block, included once per instruction set.
#include "lanes.h"

namespace ds {
namespace DS_SET {

using N = Narrow<V>;

// -- the range of a block: on the bits of the values, as integers, in any order ------------------------------------------

constexpr uint32_t kMagnitude = 0x7fffffffu;

// Ordered as integers as the floats are, NaNs beyond the infinities.
template <class Int>
DS_TARGET static inline Int ordered(Int x) {
  constexpr int top = sizeof(x[0]) * 8 - 1;
  return x ^ ((x >> top) & static_cast<decltype(+x[0])>((1u << top) - 1));
}

template <class Int>
DS_TARGET static inline Int larger(Int a, Int b) {
  return a > b ? a : b;
}

template <class Int>
DS_TARGET static inline Int smaller(Int a, Int b) {
  return a < b ? a : b;
}

static inline float value_of(int32_t bits, const float*) { return float_of(static_cast<uint32_t>(bits)); }
static inline float value_of(int32_t bits, const bf16*) { return to_float(bf16{static_cast<uint16_t>(bits)}); }
static inline float value_of(int32_t bits, const fp16*) { return to_float(fp16{static_cast<uint16_t>(bits)}); }

template <class T>
DS_TARGET static float magnitude(const T* x, int64_t numel) {
  using Int = std::conditional_t<sizeof(T) == 4, Ints, Shorts>;
  using One = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  constexpr int lanes = sizeof(Int) / sizeof(One);
  constexpr One mask = static_cast<One>(sizeof(T) == 4 ? 0x7fffffff : 0x7fff);
  Int a{}, b{};
  int64_t i = 0;
  for (; i + 2 * lanes <= numel; i += 2 * lanes) {
    a = larger<Int>(a, read<Int>(x + i) & mask);
    b = larger<Int>(b, read<Int>(x + i + lanes) & mask);
  }
  a = larger<Int>(a, b);
  One best = 0;
  for (int k = 0; k < lanes; ++k) best = a[k] > best ? a[k] : best;
  for (; i < numel; ++i) {
    const One u = static_cast<One>(read<One>(x + i) & mask);
    best = u > best ? u : best;
  }
  return value_of(best, x);
}

template <class T>
DS_TARGET static void extremes(const T* x, int64_t numel, float* least, float* most) {
  using Int = std::conditional_t<sizeof(T) == 4, Ints, Shorts>;
  using One = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  constexpr int lanes = sizeof(Int) / sizeof(One);
  constexpr One mask = static_cast<One>(sizeof(T) == 4 ? 0x7fffffff : 0x7fff);
  One low = mask, high = static_cast<One>(~mask);
  int64_t i = 0;
  if (numel >= lanes) {
    Int a = ordered<Int>(read<Int>(x)), b = a;
    for (i = lanes; i + lanes <= numel; i += lanes) {
      const Int u = ordered<Int>(read<Int>(x + i));
      a = smaller<Int>(a, u);
      b = larger<Int>(b, u);
    }
    for (int k = 0; k < lanes; ++k) low = a[k] < low ? a[k] : low, high = b[k] > high ? b[k] : high;
  }
  for (; i < numel; ++i) {
    One u = read<One>(x + i);
    u = static_cast<One>(u ^ ((u >> (sizeof(One) * 8 - 1)) & mask));
    low = u < low ? u : low;
    high = u > high ? u : high;
  }
  const auto back = [](One u) { return static_cast<One>(u < 0 ? u ^ mask : u); };
  *least = value_of(back(low), x) + 0.0f;  // no -0
  *most = value_of(back(high), x);
}

// -- a vector of codes ---------------------------------------------------------------------------------------------------

struct Coding {
  float inverse, zero;
  bool asymmetric;
};

template <bool Asymmetric, bool Stochastic>
DS_TARGET static inline Ints integer_codes(Floats x, const Coding& k, float top, const uint16_t* dice) {
  Floats t = Asymmetric ? (x - k.zero) * k.inverse : x * k.inverse;
  if constexpr (Stochastic) {
    const float low = Asymmetric ? 0.0f : -top;
    t = t < low ? low - Floats{} : t;
    t = t > top ? top - Floats{} : t;
    const Ints drawn = __builtin_convertvector(read<NarrowWords>(dice), Ints);
    t += __builtin_convertvector(drawn, Floats) * 0x1p-16f + (0x1p-17f - 0.5f);
  }
  return (Ints)N::round((N::Floats)t);
}

// A float of few bits, as fp32's own rounding would make it: by carry where it is normal, by the adder where it is not.
// The scale leaves nothing above the largest value but what rounding errors add, a few units of fp32: it rounds down to it.
template <int Exponent, int Mantissa>
DS_TARGET static inline Ints float_codes(Floats x, const Coding& k) {
  constexpr int drop = 23 - Mantissa, bias = (1 << (Exponent - 1)) - 1, sign = Exponent + Mantissa;
  constexpr int32_t shift = (128 - bias - Mantissa + 23) << 23;
  const Words u = as<Words>(x * k.inverse);
  const Ints bits = as<Ints>(u & kMagnitude);
  const Ints normal = (bits + ((1 << (drop - 1)) - 1 - ((127 - bias) << 23)) + ((bits >> drop) & 1)) >> drop;
  const Ints subnormal = as<Ints>(as<Floats>(bits) + float_of(shift)) - shift;
  const Ints code = bits < ((128 - bias) << 23) ? subnormal : normal;
  return code | (as<Ints>(u >> (31 - sign)) & (1 << sign));
}

// -- a group, a block ----------------------------------------------------------------------------------------------------

DS_TARGET static inline void roll(uint16_t* dice, const Dice& from, int64_t group) {
  constexpr int pairs = kGroup / 2;
  Words lane;
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int i = 0; i < pairs; i += W) {
    Words x = lane + (from.first + static_cast<uint32_t>(group * pairs + i));
    x = ((x ^ (x >> 16)) * 0x7feb352du) ^ from.second;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    write(dice + 2 * i, x ^ (x >> 16));
  }
}

template <int F, bool Stochastic>
DS_TARGET static inline Ints codes_of(Floats x, const Coding& k, const uint16_t* dice) {
  if constexpr (F == kInt8) return integer_codes<false, Stochastic>(x, k, 127, dice);
  if constexpr (F == kUint8) return integer_codes<true, Stochastic>(x, k, 255, dice);
  if constexpr (F == kInt4) return integer_codes<false, Stochastic>(x, k, 7, dice);
  if constexpr (F == kUint4) return integer_codes<true, Stochastic>(x, k, 15, dice);
  if constexpr (F == kE4m3) return float_codes<4, 3>(x, k);
  if constexpr (F == kE5m2) return float_codes<5, 2>(x, k);
  if constexpr (F == kE3m2) return float_codes<3, 2>(x, k);
  if constexpr (F == kE4m7) return float_codes<4, 7>(x, k);
}

template <int F, class T, bool Stochastic>
DS_TARGET static inline void encode_group(const T* x, uint8_t* out, const Coding& k, const Dice& from, int64_t group) {
  alignas(64) uint16_t dice[kGroup];
  if constexpr (Stochastic) roll(dice, from, group);
  for (int i = 0; i < kGroup; i += 4 * W) {
    N::Ints codes[4];
    for (int j = 0; j < 4; ++j) {
      codes[j] = (N::Ints)codes_of<F, Stochastic>(load(x + i + j * W), k, dice + i + j * W);
    }
    uint8_t* to = out + code_bytes(F, i);
    if constexpr (F == kInt4 || F == kUint4) {
      N::store4(to, codes);
    } else if constexpr (F == kE3m2) {
      N::store6(to, codes);
    } else if constexpr (F == kE4m7) {
      N::store12(to, codes);
    } else {
      N::template store8<F == kInt8>(to, codes);
    }
  }
}

constexpr float top_of(int format) {
  constexpr float tops[] = {127, 255, 7, 15, 448, 57344, 28, 510};
  return tops[format];
}

template <int F, class T, bool Stochastic>
DS_TARGET static void encode_groups(const T* x, int64_t numel, uint8_t* codes, const Coding& k, const Dice& dice) {
  const int64_t groups = numel / kGroup, left = numel % kGroup, bytes = code_bytes(F, kGroup);
  for (int64_t g = 0; g < groups; ++g) encode_group<F, T, Stochastic>(x + g * kGroup, codes + g * bytes, k, dice, g);
  if (!left) return;
  // The rest is filled up with what has code 0: 0, or the least of the block (which is its zero, and so one of its values).
  T tail[kGroup];
  uint8_t tail_codes[kGroup * 3 / 2];
  for (int i = 0; i < kGroup; ++i) from_float(k.asymmetric ? k.zero : 0.0f, tail + i);
  std::memcpy(tail, x + groups * kGroup, static_cast<size_t>(left) * sizeof(T));
  encode_group<F, T, Stochastic>(tail, tail_codes, k, dice, groups);
  std::memcpy(codes + groups * bytes, tail_codes, static_cast<size_t>(code_bytes(F, left)));
}

template <int F, class T>
DS_TARGET static void encode_block(const void* values, int64_t numel, uint8_t* codes, float* scale, float* zero, const Dice& dice) {
  const T* x = static_cast<const T*>(values);
  Coding k{0, 0, F == kUint8 || F == kUint4};
  float size;
  if (k.asymmetric) {
    float most;
    extremes(x, numel, &k.zero, &most);
    size = most - k.zero;
  } else {
    size = magnitude(x, numel);
  }
  const bool fits = size < kLimit;
  const float quotient = size / top_of(F);
  *scale = fits ? (quotient > kFloor ? quotient : kFloor) : __builtin_nanf("");
  if (k.asymmetric) *zero = fits ? k.zero : __builtin_nanf("");
  if (!fits) {
    std::memset(codes, 0, static_cast<size_t>(code_bytes(F, numel)));
    return;
  }
  k.inverse = 1.0f / *scale;
  constexpr bool integer = F <= kUint4;
  if (integer && dice.stochastic) {
    encode_groups<F, T, integer>(x, numel, codes, k, dice);
  } else {
    encode_groups<F, T, false>(x, numel, codes, k, dice);
  }
}

template <class T>
static Encode pick_format(int format) {
  constexpr Encode table[] = {encode_block<kInt8, T>, encode_block<kUint8, T>, encode_block<kInt4, T>,
                              encode_block<kUint4, T>, encode_block<kE4m3, T>, encode_block<kE5m2, T>,
                              encode_block<kE3m2, T>, encode_block<kE4m7, T>};
  return table[format];
}

static Encode pick(int format, int dtype) {
  if (dtype == kBf16) return pick_format<bf16>(format);
  if (dtype == kFp16) return pick_format<fp16>(format);
  return pick_format<float>(format);
}

}  // namespace DS_SET
}  // namespace ds
