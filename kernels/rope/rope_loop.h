// All heads of one token. Included once per instruction set; the compiler vectorises the loops.
#include "rows.h"

namespace ds {
namespace DS_SET {

template <class T>
DS_TARGET static void rotate(const DsRopeCall& call, int64_t batch, int64_t token) {
  const int64_t pairs = call.pairs, turned = 2 * pairs;
  const int64_t position = call.positions[batch * call.tokens + token];
  const float *c = call.cos + position * pairs, *given = call.sin + position * pairs;
  float s[kBlock / 2], wide[kBlock], made[kBlock];
  for (int64_t i = 0; i < pairs; ++i) s[i] = call.inverse ? -given[i] : given[i];
  const T* in = static_cast<const T*>(call.x) + batch * call.x_strides[0] + token * call.x_strides[1];
  T* out = static_cast<T*>(call.out) + batch * call.out_strides[0] + token * call.out_strides[1];
  for (int64_t head = 0; head < call.heads; ++head, in += call.x_strides[2], out += call.out_strides[2]) {
    const float* x = widened(in, wide, turned);
    float* y = target_of(out, made);
    if (call.interleaved) {
#pragma GCC ivdep
      for (int64_t i = 0; i < pairs; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = a * c[i] - b * s[i];
        y[2 * i + 1] = b * c[i] + a * s[i];
      }
    } else {
      const float* second = x + pairs;
      float* other = y + pairs;
#pragma GCC ivdep
      for (int64_t i = 0; i < pairs; ++i) {
        const float a = x[i], b = second[i];
        y[i] = a * c[i] - b * s[i];
        other[i] = b * c[i] + a * s[i];
      }
    }
    narrowed(y, out, turned);
    if (in != out) {
      for (int64_t i = turned; i < call.width; ++i) out[i] = in[i];
    }
  }
}

static Rotate pick(int dtype) {
  return dtype == kBf16 ? rotate<bf16> : dtype == kFp16 ? rotate<fp16> : rotate<float>;
}

}  // namespace DS_SET
}  // namespace ds
