// Blocks of a row through an activation or a dropout. Included once per instruction set; the compiler vectorises the loops.
#include "rows.h"

namespace ds {
namespace DS_SET {

struct Slope {
  float value, slope;  // f(x), f'(x)
};

// x times a logistic function of x: s is off by at most 4 + 2 units, from the exponential, a sum and a quotient.
DS_INLINE static inline Slope silu(float x) {
  const float s = 1.0f / (1.0f + exp_of(-x)), f = x * s;
  return {f, s + f * (1.0f - s)};
}

// Hendrycks and Gimpel 2016: 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), which does not cancel for negative x.
DS_INLINE static inline Slope gelu_tanh(float x) {
  const float square = x * x;
  const float u = 1.59576912f * x * (1.0f + 0.044715f * square);
  const float s = 1.0f / (1.0f + exp_of(-u)), f = x * s;
  return {f, s + f * (1.0f - s) * (1.59576912f * (1.0f + 0.134145f * square))};
}

// x times the normal distribution function P. For z = |x|: P(-z) = e^(-z^2 / 2) t Q(t), t = 1 / (1 + 0.4 z / sqrt(2)); the
// coefficients of Q are a minimax fit on t in [0.19, 1], within 2^-23.8 of P(-z), down to where fp32 ends. One exponential
// serves the function and its slope. Beside the fit: e^ is off by 4 units and by z^2 / 2 from its argument, Q and t by 12.
DS_INLINE static inline Slope gelu(float x) {
  const float z = x < 0.0f ? -x : x;
  const float e = exp_of<true>(-0.5f * (z * z)), t = 1.0f / (1.0f + 0.282842712f * z);
  float q = 0.021184833720326424f;
  q = q * t + -0.07288750261068344f;
  q = q * t + 0.047657426446676254f;
  q = q * t + 0.03747323155403137f;
  q = q * t + 0.04439357668161392f;
  q = q * t + 0.09476622194051743f;
  q = q * t + 0.10143901407718658f;
  q = q * t + 0.11315203458070755f;
  q = q * t + 0.11282119899988174f;
  const float tail = e * (t * q);
  const float p = x < 0.0f ? tail : 1.0f - tail;
  return {x * p, p + x * (e * 0.398942280f)};
}

template <int kind>
DS_INLINE static inline Slope function_of(float x) {
  if constexpr (kind == kSilu) {
    return silu(x);
  } else if constexpr (kind == kGelu) {
    return gelu(x);
  } else {
    return gelu_tanh(x);
  }
}

template <class T>
DS_TARGET static inline const float* part(const void* base, int64_t at, float* buffer, int64_t count) {
  return base ? widened(static_cast<const T*>(base) + at, buffer, count) : nullptr;
}

template <class T, int kind>
DS_TARGET static void activate(const DsActivationCall& call, int64_t row, int64_t begin, int64_t end) {
  float one[kBlock], two[kBlock], three[kBlock], made[kBlock], more[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const float* x = part<T>(call.x, row * call.x_stride + at, one, count);
    const float* up = part<T>(call.up, row * call.up_stride + at, two, count);
    const float* dy = part<T>(call.dy, row * call.dy_stride + at, three, count);
    T* to = static_cast<T*>(call.out) + row * call.out_stride + at;
    float* out = target_of(to, made);
    if (call.bias) {
      const float* bias = call.bias + at;
      for (int64_t i = 0; i < count; ++i) more[i] = x[i] + bias[i];
      x = more;
    }
    if (!dy && !up) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = function_of<kind>(x[i]).value;
    } else if (!dy) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = function_of<kind>(x[i]).value * up[i];
    } else if (!up) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = dy[i] * function_of<kind>(x[i]).slope;
    } else {
      T* other = static_cast<T*>(call.dup) + row * call.dup_stride + at;
      float* dup = target_of(other, more);
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const Slope f = function_of<kind>(x[i]);
        const float g = dy[i];
        out[i] = g * up[i] * f.slope;
        dup[i] = g * f.value;
      }
      narrowed(dup, other, count);
    }
    narrowed(out, to, count);
  }
}

// Philox4x32 with 7 rounds (Salmon et al. 2011) of the group's number under the seed: a word for each of its 4 elements.
template <class T>
DS_TARGET static void drop(const DsDropoutCall& call, int64_t begin, int64_t end) {
  constexpr int64_t groups = kBlock / 4;
  const uint32_t threshold = call.threshold >> 32 ? 0xFFFFFFFFu : static_cast<uint32_t>(call.threshold);  // p = 1: scale is 0
  uint32_t words[4][groups];
  float keep[kBlock], one[kBlock], two[kBlock], made[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {  // `begin` is a multiple of 4
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const uint64_t first = static_cast<uint64_t>(at) / 4;
#pragma GCC ivdep
    for (int64_t g = 0; g < groups; ++g) {
      const uint64_t number = first + static_cast<uint64_t>(g);
      uint32_t c0 = static_cast<uint32_t>(number), c1 = static_cast<uint32_t>(number >> 32), c2 = 0, c3 = 0;
      uint32_t k0 = static_cast<uint32_t>(call.seed), k1 = static_cast<uint32_t>(call.seed >> 32);
      for (int round = 0; round < 7; ++round) {
        const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      words[0][g] = c0, words[1][g] = c1, words[2][g] = c2, words[3][g] = c3;
    }
#pragma GCC ivdep
    for (int64_t g = 0; g < groups; ++g) {
      keep[4 * g] = words[0][g] >= threshold ? call.scale : 0.0f;
      keep[4 * g + 1] = words[1][g] >= threshold ? call.scale : 0.0f;
      keep[4 * g + 2] = words[2][g] >= threshold ? call.scale : 0.0f;
      keep[4 * g + 3] = words[3][g] >= threshold ? call.scale : 0.0f;
    }
    const float *x = part<T>(call.x, at, one, count), *residual = part<T>(call.residual, at, two, count);
    if (call.bias) {
      for (int64_t i = 0, column = at % call.cols, run; i < count; i += run, column = 0) {
        run = call.cols - column < count - i ? call.cols - column : count - i;
        const float *from = x + i, *bias = call.bias + column;
        float* sum = one + i;
#pragma GCC ivdep
        for (int64_t j = 0; j < run; ++j) sum[j] = from[j] + bias[j];
      }
      x = one;
    }
    float* out = target_of(static_cast<T*>(call.out) + at, made);
    if (residual) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = residual[i] + (keep[i] != 0.0f ? x[i] * keep[i] : 0.0f);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = keep[i] != 0.0f ? x[i] * keep[i] : 0.0f;
    }
    narrowed(out, static_cast<T*>(call.out) + at, count);
  }
}

template <class T>
static Activate pick_kind(int kind) {
  return kind == kSilu ? activate<T, kSilu> : kind == kGelu ? activate<T, kGelu> : activate<T, kGeluTanh>;
}

static Activate pick(int dtype, int kind) {
  return dtype == kBf16 ? pick_kind<bf16>(kind) : dtype == kFp16 ? pick_kind<fp16>(kind) : pick_kind<float>(kind);
}

static Drop pick_drop(int dtype) { return dtype == kBf16 ? drop<bf16> : dtype == kFp16 ? drop<fp16> : drop<float>; }

}  // namespace DS_SET
}  // namespace ds
