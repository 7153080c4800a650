// Between the signs of a vector of floats and bits, the first lane's lowest: a struct per instruction set.
#pragma once
#include "vector.h"

namespace ds {

// The definition, of 4 lanes. A bit is 1 unless the value is below 0: for zeros of both signs, and for NaN.
template <class V>
struct Signs {
  static constexpr int W = 4;
  typedef float F __attribute__((vector_size(16)));
  static inline uint32_t bits(F x) {
    uint32_t out = 0;
    for (int i = 0; i < W; ++i) out |= static_cast<uint32_t>(!(x[i] < 0)) << i;
    return out;
  }
  static inline F pick(uint32_t bits, F one, F zero) {
    F out;
    for (int i = 0; i < W; ++i) out[i] = bits >> i & 1 ? one[i] : zero[i];
    return out;
  }
};

#if defined(__x86_64__)

template <>
struct Signs<Avx2> {
  static constexpr int W = 8;
  using F = __m256;
  DS_AVX2 static inline uint32_t bits(F x) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLT_UQ)));
  }
  DS_AVX2 static inline F pick(uint32_t bits, F one, F zero) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i mine = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_blendv_ps(zero, one, _mm256_castsi256_ps(_mm256_cmpeq_epi32(mine, lane)));
  }
};

template <>
struct Signs<Avx512> {
  static constexpr int W = 16;
  using F = __m512;
  DS_AVX512 static inline uint32_t bits(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ); }
  DS_AVX512 static inline F pick(uint32_t bits, F one, F zero) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), zero, one);
  }
};

#endif

}  // namespace ds
