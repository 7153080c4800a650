// One struct per instruction set with the dozen operations that the loop needs; the scalar one is the definition.
//
// [Note: same bits everywhere]
// No set uses a fused multiply-add: every product and every sum is rounded on its own, in the same order, and square root
// and division are the exact IEEE ones. So all sets, the torch reference, any chunking and any cut of a tensor over ranks
// give the same bits. The step waits for memory, so the extra instructions cost no time (README, measured).
// Compile with -ffp-contract=off: compilers fuse intrinsics too.
#pragma once
#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ds {

struct Scalar {
  using F = float;
  static constexpr int width = 1;
  static inline F set(float x) { return x; }
  template <class T>
  static inline F load(const T* x) {
    return to_float(*x);
  }
  template <class T>
  static inline void store(T* out, F x) {
    from_float(x, out);
  }
  template <class T>
  static inline void stream(T* out, F x) {
    from_float(x, out);
  }
  static inline void fence() {}
  static inline F add(F a, F b) { return a + b; }
  static inline F sub(F a, F b) { return a - b; }
  static inline F mul(F a, F b) { return a * b; }
  static inline F div(F a, F b) { return a / b; }
  static inline F sqrt(F a) { return __builtin_sqrtf(a); }
  static inline F sign(F a) { return static_cast<float>((a > 0.0f) - (a < 0.0f)); }  // 0 for NaN, as torch.sign
};

#if defined(__x86_64__)

#define DS_AVX2 __attribute__((target("avx2,f16c"), always_inline))
struct Avx2 {
  using F = __m256;
  static constexpr int width = 8;
  DS_AVX2 static inline F set(float x) { return _mm256_set1_ps(x); }
  DS_AVX2 static inline F load(const float* x) { return _mm256_loadu_ps(x); }
  DS_AVX2 static inline F load(const bf16* x) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  DS_AVX2 static inline F load(const fp16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  DS_AVX2 static inline __m128i narrow(const bf16*, F x) {
    const __m256i u = _mm256_castps_si256(x), top = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(u, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
  DS_AVX2 static inline __m128i narrow(const fp16*, F x) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  DS_AVX2 static inline void store(float* out, F x) { _mm256_storeu_ps(out, x); }
  DS_AVX2 static inline void stream(float* out, F x) { _mm256_stream_ps(out, x); }
  template <class T>
  DS_AVX2 static inline void store(T* out, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow(out, x));
  }
  template <class T>
  DS_AVX2 static inline void stream(T* out, F x) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), narrow(out, x));
  }
  DS_AVX2 static inline void fence() { _mm_sfence(); }
  DS_AVX2 static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
  DS_AVX2 static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  DS_AVX2 static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  DS_AVX2 static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
  DS_AVX2 static inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
  DS_AVX2 static inline F sign(F a) {
    const F one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
    return _mm256_sub_ps(_mm256_and_ps(_mm256_cmp_ps(a, zero, _CMP_GT_OQ), one),
                         _mm256_and_ps(_mm256_cmp_ps(a, zero, _CMP_LT_OQ), one));
  }
};

#define DS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), always_inline))
struct Avx512 {
  using F = __m512;
  static constexpr int width = 16;
  DS_AVX512 static inline F set(float x) { return _mm512_set1_ps(x); }
  DS_AVX512 static inline F load(const float* x) { return _mm512_loadu_ps(x); }
  DS_AVX512 static inline F load(const bf16* x) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  DS_AVX512 static inline F load(const fp16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  // Not vcvtneps2bf16: it takes subnormal inputs for zero, which torch and the other sets do not.
  DS_AVX512 static inline __m256i narrow(const bf16*, F x) {
    const __m512i u = _mm512_castps_si512(x), top = _mm512_srli_epi32(u, 16);
    const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_srli_epi32(sum, 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
  }
  DS_AVX512 static inline __m256i narrow(const fp16*, F x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  DS_AVX512 static inline void store(float* out, F x) { _mm512_storeu_ps(out, x); }
  DS_AVX512 static inline void stream(float* out, F x) { _mm512_stream_ps(out, x); }
  template <class T>
  DS_AVX512 static inline void store(T* out, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(out, x));
  }
  template <class T>
  DS_AVX512 static inline void stream(T* out, F x) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), narrow(out, x));
  }
  DS_AVX512 static inline void fence() { _mm_sfence(); }
  DS_AVX512 static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
  DS_AVX512 static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  DS_AVX512 static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  DS_AVX512 static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
  DS_AVX512 static inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
  DS_AVX512 static inline F sign(F a) {
    const F one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    return _mm512_sub_ps(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero, _CMP_GT_OQ), one),
                         _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero, _CMP_LT_OQ), one));
  }
};

#elif defined(__aarch64__)

struct Neon {
  using F = float32x4_t;
  static constexpr int width = 4;
  static inline F set(float x) { return vdupq_n_f32(x); }
  static inline F load(const float* x) { return vld1q_f32(x); }
  static inline F load(const bf16* x) {
    const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(x));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(h), 16));
  }
  static inline F load(const fp16* x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x))));
  }
  static inline uint16x4_t narrow(const bf16*, F x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x), top = vshrq_n_u32(u, 16);
    const uint32x4_t odd = vandq_u32(top, vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(u, vaddq_u32(vdupq_n_u32(0x7fff), odd));
    const uint32x4_t quiet = vorrq_u32(top, vdupq_n_u32(0x40));
    return vmovn_u32(vbslq_u32(vceqq_f32(x, x), vshrq_n_u32(sum, 16), quiet));
  }
  static inline uint16x4_t narrow(const fp16*, F x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
  static inline void store(float* out, F x) { vst1q_f32(out, x); }
  template <class T>
  static inline void store(T* out, F x) {
    vst1_u16(reinterpret_cast<uint16_t*>(out), narrow(out, x));
  }
  template <class T>
  static inline void stream(T* out, F x) {
    store(out, x);
  }
  static inline void fence() {}
  static inline F add(F a, F b) { return vaddq_f32(a, b); }
  static inline F sub(F a, F b) { return vsubq_f32(a, b); }
  static inline F mul(F a, F b) { return vmulq_f32(a, b); }
  static inline F div(F a, F b) { return vdivq_f32(a, b); }
  static inline F sqrt(F a) { return vsqrtq_f32(a); }
  static inline F sign(F a) {
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    return vsubq_f32(vreinterpretq_f32_u32(vandq_u32(vcgtzq_f32(a), one)),
                     vreinterpretq_f32_u32(vandq_u32(vcltzq_f32(a), one)));
  }
};

#endif

}  // namespace ds
