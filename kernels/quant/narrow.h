// Between lanes of 32 bits and packed codes of 4, 6, 8 and 12 bits, the lowest bits first: shuffles, which compilers do
// not find by themselves. One struct per instruction set; the primary template is the definition.
//
// W is the number of lanes. `storeN` takes four vectors, in order; `loadN` gives one. `round` is to nearest even. Integers are
// held within [Low, High] while they are stored, when they are short: rounding by chance may carry them a step beyond.
#pragma once
#include "vector.h"

namespace ds {

template <class V>
struct Narrow {
  static constexpr int W = 4;
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(16)));

  static inline Ints round(Floats x) {
#if defined(__x86_64__)
    return (Ints)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
    return (Ints)vcvtnq_s32_f32((float32x4_t)x);
#else
    Ints out;
    for (int i = 0; i < W; ++i) out[i] = static_cast<int32_t>(__builtin_lrintf(x[i]));
    return out;
#endif
  }

  template <int Low, int High>
  static inline void store8(uint8_t* out, const Ints* x) {
    for (int i = 0; i < 4 * W; ++i) out[i] = static_cast<uint8_t>(held<Low, High>(at(x, i)));
  }
  template <int Low, int High>
  static inline void store4(uint8_t* out, const Ints* x) {
    for (int i = 0; i < 2 * W; ++i) {
      const int32_t low = held<Low, High>(at(x, 2 * i)), high = held<Low, High>(at(x, 2 * i + 1));
      out[i] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
    }
  }
  static inline void store6(uint8_t* out, const Ints* x) {
    for (int i = 0; i < W; ++i) {
      const int whole = at(x, 4 * i) | at(x, 4 * i + 1) << 6 | at(x, 4 * i + 2) << 12 | at(x, 4 * i + 3) << 18;
      for (int k = 0; k < 3; ++k) out[3 * i + k] = static_cast<uint8_t>(whole >> (8 * k));
    }
  }
  static inline void store12(uint8_t* out, const Ints* x) {
    for (int i = 0; i < 2 * W; ++i) {
      const int whole = at(x, 2 * i) | at(x, 2 * i + 1) << 12;
      for (int k = 0; k < 3; ++k) out[3 * i + k] = static_cast<uint8_t>(whole >> (8 * k));
    }
  }
  // Two vectors to bf16, to nearest even. A NaN must have nothing in its lower half: rounding carries.
  static inline void store_bf16(bf16* out, Floats a, Floats b) {
    for (int i = 0; i < W; ++i) from_float(a[i], out + i), from_float(b[i], out + W + i);
  }
  static inline Ints load8(const uint8_t* in) { return Ints{in[0], in[1], in[2], in[3]}; }
  static inline Ints load8(const int8_t* in) { return Ints{in[0], in[1], in[2], in[3]}; }
  static inline Ints load4(const uint8_t* in) { return Ints{in[0] & 15, in[0] >> 4, in[1] & 15, in[1] >> 4}; }
  static inline Ints load6(const uint8_t* in) {
    const int whole = in[0] | in[1] << 8 | in[2] << 16;
    return Ints{whole & 63, whole >> 6 & 63, whole >> 12 & 63, whole >> 18};
  }
  static inline Ints load12(const uint8_t* in) {
    const int one = in[0] | in[1] << 8 | in[2] << 16, two = in[3] | in[4] << 8 | in[5] << 16;
    return Ints{one & 0xfff, one >> 12, two & 0xfff, two >> 12};
  }

 private:
  static inline int32_t at(const Ints* x, int i) { return x[i / W][i % W]; }
  template <int Low, int High>
  static inline int32_t held(int32_t x) {
    return x < Low ? Low : x > High ? High : x;
  }
};

#if defined(__x86_64__)

template <>
struct Narrow<Avx2> {
  static constexpr int W = 8;
  using Ints = __m256i;
  using Floats = __m256;

  DS_AVX2 static inline Ints round(Floats x) { return _mm256_cvtps_epi32(x); }

  // 32 codes, one per byte. Packing works on halves of a vector; the last step puts them in order.
  template <bool Signed>
  DS_AVX2 static inline Ints bytes(const Ints* x) {
    const Ints ab = _mm256_packs_epi32(x[0], x[1]), cd = _mm256_packs_epi32(x[2], x[3]);
    const Ints all = Signed ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
    return _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  // The low 24 bits of each lane.
  DS_AVX2 static inline void store24(uint8_t* out, Ints x) {
    const Ints three = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const Ints halves = _mm256_shuffle_epi8(x, three);
    const Ints joined = _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(joined));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 16), _mm256_extracti128_si256(joined, 1));
  }
  DS_AVX2 static inline Ints both(Ints x, Ints low, int shift, Ints high) {
    return _mm256_or_si256(_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi32(x, shift), high));
  }
  template <int Low, int High>  // packing has stopped them at -128 and 127, or 0 and 255
  DS_AVX2 static inline void store8(uint8_t* out, const Ints* x) {
    const Ints codes = bytes<(Low < 0)>(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), Low < 0 ? _mm256_max_epi8(codes, _mm256_set1_epi8(Low)) : codes);
  }
  template <int Low, int High>
  DS_AVX2 static inline void store4(uint8_t* out, const Ints* x) {
    Ints codes = _mm256_min_epi8(bytes<true>(x), _mm256_set1_epi8(High));
    if (Low < 0) codes = _mm256_max_epi8(codes, _mm256_set1_epi8(Low));
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    const Ints pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));  // low + 16 high
    const Ints packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
  DS_AVX2 static inline void store6(uint8_t* out, const Ints* x) {
    const Ints pairs = _mm256_maddubs_epi16(bytes<false>(x), _mm256_set1_epi16(0x4001));  // low + 64 high
    store24(out, _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x10000001)));                // low + 4096 high
  }
  DS_AVX2 static inline void store12(uint8_t* out, const Ints* x) {
    for (int i = 0; i < 4; i += 2) {
      const Ints halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(x[i], x[i + 1]), 0xd8);
      store24(out + 12 * i, both(halves, _mm256_set1_epi32(0xfff), 4, _mm256_set1_epi32(0xfff000)));
    }
  }
  DS_AVX2 static inline Ints rounded(Floats x) {
    const Ints u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  }
  DS_AVX2 static inline void store_bf16(bf16* out, Floats a, Floats b) {
    const Ints halves = _mm256_packus_epi32(rounded(a), rounded(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(halves, 0xd8));
  }
  DS_AVX2 static inline Ints load8(const uint8_t* in) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
  }
  DS_AVX2 static inline Ints load8(const int8_t* in) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
  }
  DS_AVX2 static inline Ints load4(const uint8_t* in) {
    int four;
    std::memcpy(&four, in, 4);
    const Ints x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    return _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi64(x, 28)), _mm256_set1_epi32(15));
  }
  DS_AVX2 static inline Ints load6(const uint8_t* in) {
    uint32_t low;
    uint16_t high;
    std::memcpy(&low, in, 4);
    std::memcpy(&high, in + 4, 2);
    const int64_t six = low | static_cast<int64_t>(high) << 32;
    const Ints spots = _mm256_setr_epi8(0, 1, -1, -1, 0, 1, -1, -1, 1, 2, -1, -1, 2, 3, -1, -1,  //
                                        3, 4, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1, 5, -1, -1, -1);
    const Ints x = _mm256_shuffle_epi8(_mm256_broadcastq_epi64(_mm_cvtsi64_si128(six)), spots);
    return _mm256_and_si256(_mm256_srlv_epi32(x, _mm256_setr_epi32(0, 6, 4, 2, 0, 6, 4, 2)), _mm256_set1_epi32(63));
  }
  DS_AVX2 static inline Ints load12(const uint8_t* in) {
    int last;
    std::memcpy(&last, in + 8, 4);
    const __m128i twelve = _mm_insert_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)), last, 2);
    const Ints spots = _mm256_setr_epi8(0, 1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1,  //
                                        6, 7, -1, -1, 7, 8, -1, -1, 9, 10, -1, -1, 10, 11, -1, -1);
    const Ints x = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(twelve), spots);
    return _mm256_and_si256(_mm256_srlv_epi32(x, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4)), _mm256_set1_epi32(0xfff));
  }
};

template <>
struct Narrow<Avx512> {
  static constexpr int W = 16;
  using Ints = __m512i;
  using Floats = __m512;

  DS_AVX512 static inline Ints round(Floats x) { return _mm512_cvtps_epi32(x); }

  template <bool Signed>
  DS_AVX512 static inline Ints bytes(const Ints* x) {
    const Ints ab = _mm512_packs_epi32(x[0], x[1]), cd = _mm512_packs_epi32(x[2], x[3]);
    const Ints all = Signed ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
    const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, all);
  }
  DS_AVX512 static inline void store24(uint8_t* out, Ints x) {
    const Ints three = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const Ints order = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    _mm512_mask_storeu_epi32(out, 0xfff, _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(x, three)));
  }
  DS_AVX512 static inline Ints both(Ints x, Ints low, int shift, Ints high) {
    const __m128i by = _mm_cvtsi32_si128(shift);
    return _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srl_epi32(x, by), high));
  }
  template <int Low, int High>  // packing has stopped them at -128 and 127, or 0 and 255
  DS_AVX512 static inline void store8(uint8_t* out, const Ints* x) {
    const Ints codes = bytes<(Low < 0)>(x);
    _mm512_storeu_si512(out, Low < 0 ? _mm512_max_epi8(codes, _mm512_set1_epi8(Low)) : codes);
  }
  template <int Low, int High>
  DS_AVX512 static inline void store4(uint8_t* out, const Ints* x) {
    Ints codes = _mm512_min_epi8(bytes<true>(x), _mm512_set1_epi8(High));
    if (Low < 0) codes = _mm512_max_epi8(codes, _mm512_set1_epi8(Low));
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    const Ints pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));  // low + 16 high
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
  }
  DS_AVX512 static inline void join6(uint8_t* out, Ints bytes) {
    const Ints pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x4001));  // low + 64 high
    store24(out, _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x10000001)));      // low + 4096 high
  }
  DS_AVX512 static inline void join12(uint8_t* out, Ints halves) {
    store24(out, both(halves, _mm512_set1_epi32(0xfff), 4, _mm512_set1_epi32(0xfff000)));
  }
  DS_AVX512 static inline void store6(uint8_t* out, const Ints* x) { join6(out, bytes<false>(x)); }
  DS_AVX512 static inline void store12(uint8_t* out, const Ints* x) {
    const Ints order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    for (int i = 0; i < 4; i += 2) join12(out + 24 * i, _mm512_permutexvar_epi64(order, _mm512_packus_epi32(x[i], x[i + 1])));
  }
  DS_AVX512 static inline Ints rounded(Floats x) {  // in the upper half
    const Ints u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  DS_AVX512 static inline void store_bf16(bf16* out, Floats a, Floats b) {
    const Ints twice = _mm512_set1_epi32(0x00200020);
    const Ints steps = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015,
                                         0x001b0019, 0x001f001d, 0x00030001, 0x00070005, 0x000b0009, 0x000f000d,
                                         0x00130011, 0x00170015, 0x001b0019, 0x001f001d);
    const Ints spots = _mm512_mask_or_epi32(steps, 0xff00, steps, twice);  // the odd words of a, then those of b
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(rounded(a), spots, rounded(b)));
  }
  DS_AVX512 static inline Ints load8(const uint8_t* in) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  }
  DS_AVX512 static inline Ints load8(const int8_t* in) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  }
  DS_AVX512 static inline Ints load4(const uint8_t* in) {
    const Ints x = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
    return _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi64(x, 28)), _mm512_set1_epi32(15));
  }
  // Not a masked load: measured to be slower.
  DS_AVX512 static inline __m128i twelve(const uint8_t* in) {
    int last;
    std::memcpy(&last, in + 8, 4);
    return _mm_insert_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)), last, 2);
  }
  DS_AVX512 static inline Ints load6(const uint8_t* in) {
    const Ints spots = _mm512_setr_epi32(0x80800100, 0x80800100, 0x80800201, 0x80800302, 0x80800403, 0x80800403,  //
                                         0x80800504, 0x80800605, 0x80800706, 0x80800706, 0x80800807, 0x80800908,
                                         0x80800a09, 0x80800a09, 0x80800b0a, 0x8080800b);
    const Ints shift = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 6, 4, 2));
    const Ints x = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(twelve(in)), spots);
    return _mm512_and_si512(_mm512_srlv_epi32(x, shift), _mm512_set1_epi32(63));
  }
  DS_AVX512 static inline Ints load12(const uint8_t* in) {
    // Each quarter of the vector gets the 6 bytes of its 4 codes: two words of 32 bits, the odd quarters' 2 bytes in.
    const Ints words = _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 3, 4, 0, 0, 4, 5, 0, 0);
    const Ints spots = _mm512_setr_epi32(0x80800100, 0x80800201, 0x80800403, 0x80800504, 0x80800302, 0x80800403,  //
                                         0x80800605, 0x80800706, 0x80800100, 0x80800201, 0x80800403, 0x80800504,
                                         0x80800302, 0x80800403, 0x80800605, 0x80800706);
    const Ints shift = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 0, 4));
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + 16));
    const Ints wide = _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
    const Ints x = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, wide), spots);
    return _mm512_and_si512(_mm512_srlv_epi32(x, shift), _mm512_set1_epi32(0xfff));
  }
};

#endif

}  // namespace ds
