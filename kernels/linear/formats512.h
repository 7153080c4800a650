// The three packed formats and the two arithmetics of dot512_cpu.cpp, as it includes them: tables, decoding, multiplying.
#pragma once
#include <immintrin.h>

#include "linear.h"

#define DS_FAST \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,prefer-vector-width=512")))
#define DS_INLINE DS_FAST __attribute__((always_inline)) static inline

namespace ds {
namespace {

using V = __m512i;

// -- tables ----------------------------------------------------------------------------------------------------------------

struct Tables {
  alignas(64) uint8_t int8_low[128], int8_high[128];  // the two bytes of bf16(i)
  alignas(64) uint16_t int4[16][32];                  // [zero point][code, twice]: bf16(code - zero point)
  alignas(64) uint16_t fp6[64];                       // bf16(code)
  alignas(64) float int4_codes[16], fp6_values[64];
  alignas(64) uint64_t order[8];

  Tables() {
    const auto bits = [](float value) {
      bf16 out;
      from_float(value, &out);
      return out.bits;
    };
    for (int i = 0; i < 128; ++i) {
      int8_low[i] = static_cast<uint8_t>(bits(static_cast<float>(i)));
      int8_high[i] = static_cast<uint8_t>(bits(static_cast<float>(i)) >> 8);
    }
    for (int zero = 0; zero < 16; ++zero) {
      for (int i = 0; i < 32; ++i) int4[zero][i] = bits(static_cast<float>(i % 16 - zero));
    }
    for (int i = 0; i < 16; ++i) int4_codes[i] = static_cast<float>(i);
    for (int i = 0; i < 64; ++i) {
      fp6_values[i] = static_cast<float>(fp6_sixteenths(i)) * 0.0625f;
      fp6[i] = bits(fp6_values[i]);
    }
    const uint64_t mine[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    std::copy(mine, mine + 8, order);
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

// -- formats: a block of codes, then 32 bf16 values per chunk; `at` is where a row's group has its scale ------------------------------------------------------------------

// Multiplies 32 bf16 values by a scale, in order, each rounded to bf16.
DS_INLINE V scaled(V w, float scale) {
  const __m512 s = _mm512_set1_ps(scale);
  const V low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(w));
  const V high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1));
  const __m512 a = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), s);
  const __m512 b = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(high, 16)), s);
  return (V)_mm512_cvtne2ps_pbh(b, a);
}

struct Int8 {
  static constexpr int kChunks = 2, kBytes = 64;
  struct Constants {
    V low[2], high[2], order, sign;
  };
  struct Group {
    float scale;
  };
  struct Raw {
    V low, high;
  };
  DS_INLINE Constants constants() {
    const Tables& t = tables();
    return {{_mm512_load_si512(t.int8_low), _mm512_load_si512(t.int8_low + 64)},
            {_mm512_load_si512(t.int8_high), _mm512_load_si512(t.int8_high + 64)},
            _mm512_load_si512(t.order), _mm512_set1_epi8(-128)};
  }
  DS_INLINE Group exact(const Job&, int64_t) { return {1.0f}; }
  DS_INLINE Group folded(const Job& job, int64_t at) { return {job.scales[at]}; }
  DS_INLINE Raw raw(const uint8_t* codes, const Constants& c) {
    const V value = _mm512_permutexvar_epi64(c.order, _mm512_loadu_si512(codes)), magnitude = _mm512_abs_epi8(value);
    const V low = _mm512_permutex2var_epi8(c.low[0], magnitude, c.low[1]);
    const V high = _mm512_permutex2var_epi8(c.high[0], magnitude, c.high[1]);
    const V with_sign = _mm512_ternarylogic_epi64(high, value, c.sign, 0xf8);  // high | (value & sign)
    return {_mm512_unpacklo_epi8(low, with_sign), _mm512_unpackhi_epi8(low, with_sign)};
  }
  template <bool Fold>
  DS_INLINE V chunk(const Raw& raw, int i, const Constants&, const Group& group) {
    const V w = i ? raw.high : raw.low;
    return Fold ? scaled(w, group.scale) : w;
  }
};

struct Int4 {
  static constexpr int kChunks = 4, kBytes = 64;
  struct Constants {};
  struct Group {
    V table;
  };
  using Raw = V;
  DS_INLINE Constants constants() { return {}; }
  DS_INLINE int zero(const Job& job, int64_t at) {
    return job.zeros ? job.zeros[at] & 15 : kSymmetricZero;
  }
  DS_INLINE Group exact(const Job& job, int64_t at) {
    return {_mm512_load_si512(tables().int4[zero(job, at)])};
  }
  DS_INLINE Group folded(const Job& job, int64_t at) {
    const __m512 from = _mm512_set1_ps(static_cast<float>(zero(job, at)));
    const __m512 codes = _mm512_sub_ps(_mm512_load_ps(tables().int4_codes), from);
    const __m512 values = _mm512_mul_ps(codes, _mm512_set1_ps(job.scales[at]));
    return {(V)_mm512_cvtne2ps_pbh(values, values)};
  }
  DS_INLINE Raw raw(const uint8_t* codes, const Constants&) { return _mm512_loadu_si512(codes); }
  // The look-up takes five bits; the table holds its 16 entries twice, so the fifth does not matter.
  template <bool Fold>
  DS_INLINE V chunk(const Raw& raw, int i, const Constants&, const Group& group) {
    return _mm512_permutexvar_epi16(i ? _mm512_srli_epi16(raw, 4 * i) : raw, group.table);
  }
};

struct Fp6 {
  static constexpr int kChunks = 8, kBytes = 192;
  struct Constants {};
  struct Group {
    V low, high;
  };
  struct Raw {
    V words[3];
  };
  DS_INLINE Constants constants() { return {}; }
  DS_INLINE Group exact(const Job&, int64_t) {
    return {_mm512_load_si512(tables().fp6), _mm512_load_si512(tables().fp6 + 32)};
  }
  DS_INLINE Group folded(const Job& job, int64_t at) {
    const __m512 s = _mm512_set1_ps(job.scales[at]);
    const float* v = tables().fp6_values;
    const __m512 a = _mm512_mul_ps(_mm512_load_ps(v), s), b = _mm512_mul_ps(_mm512_load_ps(v + 16), s);
    const __m512 c = _mm512_mul_ps(_mm512_load_ps(v + 32), s), d = _mm512_mul_ps(_mm512_load_ps(v + 48), s);
    return {(V)_mm512_cvtne2ps_pbh(b, a), (V)_mm512_cvtne2ps_pbh(d, c)};
  }
  DS_INLINE Raw raw(const uint8_t* codes, const Constants&) {
    return {{_mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64), _mm512_loadu_si512(codes + 128)}};
  }
  // The look-up takes six bits, so what stands above them does not matter.
  template <bool Fold>
  DS_INLINE V chunk(const Raw& raw, int i, const Constants&, const Group& group) {
    V index;
    if (i < 6) {
      index = i % 2 ? _mm512_srli_epi16(raw.words[i / 2], 6) : raw.words[i / 2];
    } else if (i == 6) {
      const V top = _mm512_and_si512(_mm512_srli_epi16(raw.words[1], 8), _mm512_set1_epi16(0x30));
      index = _mm512_or_si512(_mm512_srli_epi16(raw.words[0], 12), top);
    } else {
      const V top = _mm512_and_si512(_mm512_srli_epi16(raw.words[2], 10), _mm512_set1_epi16(0x3c));
      index = _mm512_or_si512(_mm512_srli_epi16(raw.words[1], 14), top);
    }
    return _mm512_permutex2var_epi16(group.low, index, group.high);
  }
};

// -- arithmetics: what x is, and how a chunk of weights meets it -----------------------------------------------------------------

struct InBf16 {
  using T = uint16_t;
  static constexpr int kLanes = 32;
  static constexpr bool kFold = true;  // scales of groups go into the buffer's bf16 values
  DS_INLINE __m512 dot(__m512 sum, const T* x, V w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)w);
  }
  DS_INLINE void put(T* out, V w, float) { _mm512_store_si512(out, w); }
  // One vector of the buffer against one of x.
  DS_INLINE V load(const T* values) { return _mm512_loadu_si512(values); }
  DS_INLINE __m512 add(__m512 sum, V x, V w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
};

struct InFloat {
  using T = float;
  static constexpr int kLanes = 16;
  static constexpr bool kFold = false;  // fp32 holds code times scale well enough to multiply here
  DS_INLINE __m512 even(V w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  DS_INLINE __m512 odd(V w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(~0xffff))); }
  DS_INLINE __m512 dot(__m512 sum, const T* x, V w) {
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(x), even(w), sum);
    return _mm512_fmadd_ps(_mm512_loadu_ps(x + 16), odd(w), sum);
  }
  DS_INLINE void put(T* out, V w, float scale) {
    const __m512 s = _mm512_set1_ps(scale);
    _mm512_store_ps(out, _mm512_mul_ps(even(w), s));
    _mm512_store_ps(out + 16, _mm512_mul_ps(odd(w), s));
  }
  DS_INLINE V load(const T* values) { return _mm512_castps_si512(_mm512_loadu_ps(values)); }
  DS_INLINE __m512 add(__m512 sum, V x, V w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

}  // namespace
}  // namespace ds
