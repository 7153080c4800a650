// Quantises one block, included once per instruction set.
#include "lanes.h"

namespace ds {
namespace DS_SET {

using N = Narrow<V>;

// -- the range of a block: on the bits of the values, as integers, in any order ------------------------------------------

constexpr uint32_t kMagnitude = 0x7fffffffu;

static inline float value_of(int32_t bits, const float*) { return float_of(static_cast<uint32_t>(bits)); }
static inline float value_of(int32_t bits, const bf16*) { return to_float(bf16{static_cast<uint16_t>(bits)}); }
static inline float value_of(int32_t bits, const fp16*) { return to_float(fp16{static_cast<uint16_t>(bits)}); }

// Plain loops, which the compiler vectorises to the horizontal steps.
template <class T>
DS_TARGET static float magnitude(const T* x, int64_t numel) {
  using One = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  constexpr One mask = static_cast<One>(sizeof(T) == 4 ? 0x7fffffff : 0x7fff);
  One best = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const One u = static_cast<One>(read<One>(x + i) & mask);
    best = u > best ? u : best;
  }
  return value_of(best, x);
}

template <class T>
DS_TARGET static void extremes(const T* x, int64_t numel, float* least, float* most) {
  using One = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  constexpr One mask = static_cast<One>(sizeof(T) == 4 ? 0x7fffffff : 0x7fff);
  One low = mask, high = static_cast<One>(~mask);
  for (int64_t i = 0; i < numel; ++i) {
    One u = read<One>(x + i);
    u = static_cast<One>(u ^ ((u >> (sizeof(One) * 8 - 1)) & mask));  // ordered as the floats are, NaNs outermost
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

// By chance: in parts of 2^-16 of a step, of which a draw of 16 bits is added before those bits are cut off.
template <bool Asymmetric, bool Stochastic>
DS_TARGET static inline Ints integer_codes(Floats x, const Coding& k, Ints drawn) {
  const Floats t = Asymmetric ? (x - k.zero) * k.inverse : x * k.inverse;
  if constexpr (Stochastic) return ((Ints)N::round((N::Floats)(t * 65536.0f)) + drawn) >> 16;
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

// [Note: draws] 16 hashes of 32 bits serve the 64 elements of a group: their lower halves, their upper halves, and 40503 times
// (2^16 by the golden ratio) each of both, modulo 2^16. Each draw is uniform, and the pairs (u, 40503 u) fill the square more
// evenly than chance would: a hash for every pair of elements took longer than all else. Its last shift is left out, too: the
// lower half of a product misses only bits that the step before has spread.
constexpr int kHashes = kGroup / 4;

DS_TARGET static inline void roll(uint32_t* dice, const Dice& from, int64_t group) {
  Words lane;
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int i = 0; i < kHashes; i += W) {
    Words x = lane + (from.first + static_cast<uint32_t>(group * kHashes + i));
    x = ((x ^ (x >> 16)) * 0x7feb352du) ^ from.second;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    write(dice + i, x);
    write(dice + kHashes + i, as<Halves>(x) * static_cast<uint16_t>(40503));
  }
}

DS_TARGET static inline Ints draw(const uint32_t* dice, int element) {
  const Words both = read<Words>(dice + element / (2 * kHashes) * kHashes + element % kHashes);
  return as<Ints>(element / kHashes % 2 ? both >> 16 : both & 0xffff);
}

template <int F, bool Stochastic>
DS_TARGET static inline Ints codes_of(Floats x, const Coding& k, Ints drawn) {
  if constexpr (F == kInt8 || F == kInt4) return integer_codes<false, Stochastic>(x, k, drawn);
  if constexpr (F == kUint8 || F == kUint4) return integer_codes<true, Stochastic>(x, k, drawn);
  if constexpr (F == kE4m3) return float_codes<4, 3>(x, k);
  if constexpr (F == kE5m2) return float_codes<5, 2>(x, k);
  if constexpr (F == kE3m2) return float_codes<3, 2>(x, k);
  if constexpr (F == kE4m7) return float_codes<4, 7>(x, k);
}

template <int F, class T, bool Stochastic>
DS_TARGET static inline void plain_group(const T* x, uint8_t* out, const Coding& k, const Dice& from, int64_t group) {
  alignas(64) uint32_t dice[2 * kHashes];
  if constexpr (Stochastic) roll(dice, from, group);
  for (int i = 0; i < kGroup; i += 4 * W) {
    N::Ints codes[4];
    for (int j = 0; j < 4; ++j) {
      const Ints drawn = Stochastic ? draw(dice, i + j * W) : Ints{};
      codes[j] = (N::Ints)codes_of<F, Stochastic>(load(x + i + j * W), k, drawn);
    }
    uint8_t* to = out + code_bytes(F, i);
    if constexpr (F == kInt4) N::template store4<-7, 7>(to, codes);
    if constexpr (F == kUint4) N::template store4<0, 15>(to, codes);
    if constexpr (F == kE3m2) N::store6(to, codes);
    if constexpr (F == kE4m7) N::store12(to, codes);
    if constexpr (F == kInt8) N::template store8<-127, 127>(to, codes);
    if constexpr (F == kUint8 || F == kE4m3 || F == kE5m2) N::template store8<0, 255>(to, codes);
  }
}

template <int F, class T, bool Stochastic>
DS_TARGET static inline void encode_group(const T* x, uint8_t* out, const Coding k, const Dice from, int64_t group) {
  if constexpr (ShortFloats<V, F>::here) {
    ShortFloats<V, F>::encode(x, out, k.inverse);
  } else {
    plain_group<F, T, Stochastic>(x, out, k, from, group);
  }
}

constexpr float top_of(int format) {
  constexpr float tops[] = {127, 255, 7, 15, 448, 57344, 28, 510};
  return tops[format];
}

template <int F, class T, bool Stochastic>
DS_TARGET static void encode_groups(const T* x, int64_t numel, uint8_t* codes, const Coding k, const Dice dice) {
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

// Ranges, then scales, then codes of some blocks, which are in the nearest cache meanwhile: block by block, each would wait
// for two divisions.
constexpr int kBatch = 16, kBatchNumel = 4096;

template <int F, class T>
DS_TARGET static void encode_batch(const T* x, int64_t numel, int64_t block, uint8_t* codes, float* scales, float* zeros,
                                   const Draw& draw) {
  constexpr bool asymmetric = F == kUint8 || F == kUint4, integer = F <= kUint4;
  const int count = static_cast<int>((numel + block - 1) / block);
  float size[kBatch], zero[kBatch] = {}, inverse[kBatch];
  for (int i = 0; i < count; ++i) {
    const int64_t start = i * block, length = numel - start < block ? numel - start : block;
    if (asymmetric) {
      float most;
      extremes(x + start, length, &zero[i], &most);
      size[i] = most - zero[i];
    } else {
      size[i] = magnitude(x + start, length);
    }
  }
  for (int i = 0; i < count; ++i) {
    const float quotient = size[i] / top_of(F), scale = quotient > kFloor ? quotient : kFloor;
    inverse[i] = 1.0f / scale;
    size[i] = size[i] < kLimit ? scale : __builtin_nanf("");
  }
  for (int i = 0; i < count; ++i) {
    const int64_t start = i * block, length = numel - start < block ? numel - start : block;
    const bool fits = size[i] == size[i];
    uint8_t* to = codes + code_bytes(F, start);
    scales[i] = size[i];
    if (asymmetric) zeros[i] = fits ? zero[i] : __builtin_nanf("");
    if (!fits) {
      std::memset(to, 0, static_cast<size_t>(code_bytes(F, length)));
    } else if (integer && draw.stochastic) {
      encode_groups<F, T, integer>(x + start, length, to, {inverse[i], zero[i], asymmetric},
                                   dice_of(draw.seed, draw.block + static_cast<uint64_t>(i)));
    } else {
      encode_groups<F, T, false>(x + start, length, to, {inverse[i], zero[i], asymmetric}, {});
    }
  }
}

template <int F, class T>
DS_TARGET static void encode_blocks(const void* values, int64_t numel, int64_t block, uint8_t* codes, float* scales, float* zeros,
                                    const Draw& draw) {
  const T* x = static_cast<const T*>(values);
  const int64_t fitting = kBatchNumel / block, batch = fitting < 1 ? 1 : fitting < kBatch ? fitting : kBatch;
  for (int64_t k = 0; k * block < numel; k += batch) {
    const int64_t start = k * block, rest = numel - start, length = rest < batch * block ? rest : batch * block;
    const Draw mine{draw.stochastic, draw.seed, draw.block + static_cast<uint64_t>(k)};
    encode_batch<F>(x + start, length, block, codes + code_bytes(F, start), scales + k, zeros ? zeros + k : nullptr, mine);
  }
}

template <class T>
static Encode pick_format(int format) {
  constexpr Encode table[] = {encode_blocks<kInt8, T>, encode_blocks<kUint8, T>, encode_blocks<kInt4, T>,
                              encode_blocks<kUint4, T>, encode_blocks<kE4m3, T>, encode_blocks<kE5m2, T>,
                              encode_blocks<kE3m2, T>, encode_blocks<kE4m7, T>};
  return table[format];
}

static Encode pick(int format, int dtype) {
  if (dtype == kBf16) return pick_format<bf16>(format);
  if (dtype == kFp16) return pick_format<fp16>(format);
  return pick_format<float>(format);
}

}  // namespace DS_SET
}  // namespace ds
