// Floats of few bits on AVX-512, 64 at a time. One struct per instruction set; the primary template says that the plain
// loop serves.
#pragma once
#include "narrow.h"
#include "quant.h"

namespace ds {

template <class V, int F>
struct ShortFloats {
  static constexpr bool here = false;
};

#if defined(__x86_64__)

// [Note: rounding by the adder] With E the power of two below a magnitude v, at least the smallest normal number, the sum
// E 2^drop + v has steps as wide as v's code: the adder rounds v to them, to nearest even, and leaves their number in the lower
// half of the sum. The upper half is the exponent, 2^7 times it. One multiplication and addition of these halves gives
// 2^(7 - mantissa) times the code and a constant, for normal and subnormal codes alike; a carry into the next power of two
// is right by itself. The product E 2^drop is exact, so fusing it with the sum changes no bit.
template <int Exponent, int Mantissa>
struct Adder512 {
  using Ints = __m512i;
  static constexpr int bias = (1 << (Exponent - 1)) - 1, drop = 23 - Mantissa, least = 128 - bias;

  DS_AVX512 static inline Ints sums(__m512 v) {
    const Ints from = _mm512_max_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(least << 23));
    const __m512 power = _mm512_castsi512_ps(_mm512_and_si512(from, _mm512_set1_epi32(0x7f800000)));
    const __m512 sum = _mm512_fmadd_ps(power, _mm512_set1_ps(static_cast<float>(1 << drop)), v);
    return _mm512_madd_epi16(_mm512_castps_si512(sum), _mm512_set1_epi32(1 << 16 | 1 << (7 - Mantissa)));
  }
  // The codes of two vectors without their signs, in halves, in the order of _mm512_packs_epi32.
  DS_AVX512 static inline Ints halves(__m512 a, __m512 b) {
    const Ints both = _mm512_packs_epi32(sums(a), sums(b));
    return _mm512_srli_epi16(_mm512_sub_epi16(both, _mm512_set1_epi16((least + drop) << 7)), 7 - Mantissa);
  }
};

template <int F>
struct ShortFloats<Avx512, F> {
  static constexpr bool here = F >= kE4m3;
  using Ints = __m512i;

  // 64 magnitudes, scaled, and which values are negative.
  struct Group {
    __m512 v[4];
    __mmask32 negative[2];
  };
  template <class T>
  DS_AVX512 static inline Group read(const T* x, __m512 inverse) {
    Group out;
    __mmask32 signs[4];
    for (int i = 0; i < 4; ++i) {
      const __m512 v = _mm512_mul_ps(Avx512::load(x + 16 * i), inverse);
      signs[i] = _mm512_movepi32_mask(_mm512_castps_si512(v));
      out.v[i] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
    }
    for (int i = 0; i < 2; ++i) out.negative[i] = signs[2 * i] | signs[2 * i + 1] << 16;
    return out;
  }
  // bf16 is the upper half of fp32: unpacking is all there is to do, and packing undoes its order.
  DS_AVX512 static inline Group read(const bf16* x, __m512 inverse) {
    Group out;
    for (int i = 0; i < 2; ++i) {
      const Ints raw = _mm512_loadu_si512(x + 32 * i), size = _mm512_and_si512(raw, _mm512_set1_epi16(0x7fff));
      out.negative[i] = _mm512_movepi16_mask(raw);
      const Ints low = _mm512_unpacklo_epi16(_mm512_setzero_si512(), size);
      const Ints high = _mm512_unpackhi_epi16(_mm512_setzero_si512(), size);
      out.v[2 * i] = _mm512_mul_ps(_mm512_castsi512_ps(low), inverse);
      out.v[2 * i + 1] = _mm512_mul_ps(_mm512_castsi512_ps(high), inverse);
    }
    return out;
  }

  // A group of 64 values.
  template <class T>
  DS_AVX512 static inline void encode(const T* x, uint8_t* out, float inverse) {
    using Codes = Adder512<F == kE5m2 ? 5 : F == kE3m2 ? 3 : 4, F == kE4m3 ? 3 : F == kE4m7 ? 7 : 2>;
    const Group g = read(x, _mm512_set1_ps(inverse));
    const Ints a = Codes::halves(g.v[0], g.v[1]), b = Codes::halves(g.v[2], g.v[3]);
    if constexpr (F == kE4m7) {
      Narrow<Avx512>::join12(out, signed12<T>(a, g.negative[0]));
      Narrow<Avx512>::join12(out + 48, signed12<T>(b, g.negative[1]));
    } else {
      const Ints order = std::is_same_v<T, bf16> ? _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
                                                 : _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const Ints codes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b));
      const __mmask64 negative = g.negative[0] | static_cast<__mmask64>(g.negative[1]) << 32;
      const Ints sign = _mm512_set1_epi8(F == kE3m2 ? 0x20 : static_cast<char>(0x80));
      const Ints whole = _mm512_or_si512(codes, _mm512_maskz_mov_epi8(negative, sign));
      if (F == kE3m2) Narrow<Avx512>::join6(out, whole);
      else _mm512_storeu_si512(out, whole);
    }
  }

 private:
  template <class T>
  DS_AVX512 static inline Ints signed12(Ints codes, __mmask32 negative) {
    const Ints order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    if (!std::is_same_v<T, bf16>) codes = _mm512_permutexvar_epi64(order, codes);
    const Ints sign = _mm512_maskz_set1_epi16(negative, 0x800);
    return _mm512_or_si512(codes, sign);
  }
};

#endif

}  // namespace ds
