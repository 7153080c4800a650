// One row. Included once per instruction set; a row is walked in blocks that stay in L1, and vectorised by the compiler.
#include "rows.h"

namespace ds {
namespace DS_SET {

// The block of logits at `at` into `made`: scaled, masked; columns past `seen` do not count. One copy:
// inlined at its three calls it makes the build three times as long, and nothing faster.
template <class T>
DS_TARGET static __attribute__((noinline)) void logits_of(const DsSoftmaxCall& call, const T* x, int64_t mask, int64_t at,
                                                          int64_t count, int64_t seen, float* made) {
  float buffer[kBlock];
  const float *wide = widened(x + at, buffer, count), scale = call.scale;
  for (int64_t i = 0; i < count; ++i) made[i] = wide[i] * scale;
  if (call.mask && call.mask_bytes) {
    const uint8_t* stays = static_cast<const uint8_t*>(call.mask) + mask + at;
    for (int64_t i = 0; i < count; ++i) made[i] = stays[i] ? made[i] : -__builtin_inff();
  } else if (call.mask) {
    const float* added = static_cast<const float*>(call.mask) + mask + at;
    for (int64_t i = 0; i < count; ++i) made[i] += added[i];
  }
  for (int64_t i = seen > at ? seen - at : 0; i < count; ++i) made[i] = -__builtin_inff();
}

// e^(x - from), no x above `from`, and their sum in the order of Sum: in one loop, for which they are still in registers.
DS_TARGET static inline void exponentials(const float* x, float from, int64_t count, float* v, Sum& sum) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    float made[kLanes];
#pragma GCC ivdep
    for (int j = 0; j < kLanes; ++j) made[j] = exp_of<true>(x[i + j] - from);
    for (int j = 0; j < kLanes; ++j) v[i + j] = made[j];
    for (int j = 0; j < kLanes; ++j) sum.lane[j] += made[j];
  }
  for (int j = 0; i + j < count; ++j) {
    v[i + j] = exp_of<true>(x[i + j] - from);
    sum.lane[j] += v[i + j];
  }
}

constexpr int64_t kHeld = 4 * kBlock;  // elements of a row that are kept as fp32, in L1

template <class T>
DS_TARGET static void forward_row(const DsSoftmaxCall& call, int64_t row) {
  const int64_t cols = call.cols, i2 = row % call.inner, rest = row / call.inner;
  const int64_t mask = rest / call.middle * call.mask_strides[0] + rest % call.middle * call.mask_strides[1] +
                       i2 * call.mask_strides[2];
  // Causal: the last query sees all keys.
  const int64_t before = call.causal ? cols - call.inner + i2 + 1 : cols, seen = before < 0 ? 0 : before;
  const T* x = static_cast<const T*>(call.x) + row * cols;
  T* out = static_cast<T*>(call.out) + row * cols;
  const int64_t reach = seen < cols ? seen : cols;
  const bool fits = cols <= kHeld;  // else the logits are made thrice and the exponentials twice, to the same bits
  const bool plain = fits && call.scale == 1.0f && !call.mask && !call.causal;  // logits are what is given
  const bool x_is_v = plain && std::is_same_v<T, float>;
  float held[kHeld], results[kBlock];
  Largest largest;
  for (int64_t at = 0; at < reach; at += kBlock) {
    const int64_t count = cols - at < kBlock ? cols - at : kBlock;
    float* v = fits ? held + at : held;
    if (plain) {
      const float* wide = widened(x + at, v, count);
      largest.add(count, [=](int64_t i) DS_INLINE { return wide[i]; });
      continue;
    }
    logits_of(call, x, mask, at, count, seen, v);
    largest.add(count, [=](int64_t i) DS_INLINE { return v[i]; });
  }
  const float most = largest.total(), from = most == -__builtin_inff() ? 0.0f : most;
  Sum sum;
  for (int64_t at = 0; at < reach; at += kBlock) {
    const int64_t count = cols - at < kBlock ? cols - at : kBlock;
    float* v = fits ? held + at : held;
    if (!fits) logits_of(call, x, mask, at, count, seen, v);
    exponentials(x_is_v ? reinterpret_cast<const float*>(x + at) : v, from, count, v, sum);
  }
  const float total = sum.total(), share = total == 0.0f ? 0.0f : 1.0f / total;  // a row without any key is all zeros
  for (int64_t at = 0; at < cols; at += kBlock) {
    const int64_t count = cols - at < kBlock ? cols - at : kBlock;
    float *v = fits ? held + at : held, *y = target_of(out + at, results);
    if (at < reach) {
      if (!fits) {
        logits_of(call, x, mask, at, count, seen, v);
        Sum again;
        exponentials(v, from, count, v, again);
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) y[i] = v[i] * share;
    } else {
      for (int64_t i = 0; i < count; ++i) y[i] = 0.0f;
    }
    narrowed(y, out + at, count);
  }
}

template <class T>
DS_TARGET static void backward_row(const DsSoftmaxCall& call, int64_t row) {
  const int64_t cols = call.cols;
  const T *result = static_cast<const T*>(call.x) + row * cols, *up = static_cast<const T*>(call.dy) + row * cols;
  T* out = static_cast<T*>(call.out) + row * cols;
  float one[kBlock], two[kBlock], made[kBlock];
  Sum sum;
  for (int64_t at = 0; at < cols; at += kBlock) {
    const int64_t count = cols - at < kBlock ? cols - at : kBlock;
    const float *y = widened(result + at, one, count), *dy = widened(up + at, two, count);
    sum.add(count, [=](int64_t i) DS_INLINE { return y[i] * dy[i]; });
  }
  const float mean = sum.total(), scale = call.scale;
  for (int64_t at = 0; at < cols; at += kBlock) {
    const int64_t count = cols - at < kBlock ? cols - at : kBlock;
    const float *y = widened(result + at, one, count), *dy = widened(up + at, two, count);
    float* dx = target_of(out + at, made);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) dx[i] = y[i] * (dy[i] - mean) * scale;
    narrowed(dx, out + at, count);
  }
}

template <class T>
DS_TARGET static void row_of(const DsSoftmaxCall& call, int64_t row) {
  if (call.dy) {
    backward_row<T>(call, row);
  } else {
    forward_row<T>(call, row);
  }
}

static Row pick(int dtype) { return dtype == kBf16 ? row_of<bf16> : dtype == kFp16 ? row_of<fp16> : row_of<float>; }

}  // namespace DS_SET
}  // namespace ds
