// One row of logits: its loss, and its gradient while the row is still in the cache. Included once per instruction set.
#include "rows.h"

namespace ds {
namespace DS_SET {

template <class T>
DS_TARGET static void losses_of(const Call& call, int64_t row, const T* logits) {
  float buffer[kBlock];
  Largest largest;
  for (int64_t at = 0; at < call.cols; at += kBlock) {
    const int64_t count = call.cols - at < kBlock ? call.cols - at : kBlock;
    const float* x = widened(logits + at, buffer, count);
    largest.add(count, [=](int64_t i) DS_INLINE { return x[i]; });
  }
  const float most = largest.total();
  const float from = most == -__builtin_inff() ? 0.0f : most;  // nothing but -inf: its loss is NaN or inf, not an accident
  Sum sum, plain;
  for (int64_t at = 0; at < call.cols; at += kBlock) {
    const int64_t count = call.cols - at < kBlock ? call.cols - at : kBlock;
    const float* x = widened(logits + at, buffer, count);
    sum.add(count, [=](int64_t i) DS_INLINE { return exp_of<true>(x[i] - from); });
    if (call.smoothing != 0.0f) plain.add(count, [=](int64_t i) DS_INLINE { return x[i]; });
  }
  const float lse = from + std::log(sum.total());
  const int64_t target = call.target[row];
  call.lse[row] = lse;
  if (target == call.ignore_index) {
    call.losses[row] = 0.0f;
    return;
  }
  float loss = lse - (1.0f - call.smoothing) * to_float(logits[target]);
  if (call.smoothing != 0.0f) loss -= call.smoothing / static_cast<float>(call.cols) * plain.total();
  call.losses[row] = loss + call.z_loss * (lse * lse);
}

template <class T>
DS_TARGET static void row_of(const Call& call, int64_t row) {
  const T* logits = static_cast<const T*>(call.logits) + row * call.logits_stride;
  if (call.losses) losses_of(call, row, logits);
  if (!call.grad) return;
  T* grad = static_cast<T*>(call.grad) + row * call.grad_stride;
  const int64_t target = call.target[row];
  const bool counts = target != call.ignore_index;
  const float lse = call.lse[row], scale = counts ? call.scale[row] : 0.0f;
  const float weight = counts ? scale * (1.0f + 2.0f * call.z_loss * lse) : 0.0f;
  const float away = scale * (call.smoothing / static_cast<float>(call.cols));
  const float kept = counts ? to_float(logits[target]) : 0.0f;
  float buffer[kBlock], made[kBlock];
  for (int64_t at = 0; at < call.cols; at += kBlock) {
    const int64_t count = call.cols - at < kBlock ? call.cols - at : kBlock;
    float* g = target_of(grad + at, made);
    if (counts) {
      const float* x = widened(logits + at, buffer, count);
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) g[i] = exp_of<true>(x[i] - lse) * weight - away;
    } else {
      for (int64_t i = 0; i < count; ++i) g[i] = 0.0f;
    }
    narrowed(g, grad + at, count);
  }
  if (counts) from_float((exp_of<true>(kept - lse) * weight - away) - scale * (1.0f - call.smoothing), grad + target);
}

static Row pick(int dtype) {
  if (dtype == kBf16) return row_of<bf16>;
  if (dtype == kFp16) return row_of<fp16>;
  return row_of<float>;
}

}  // namespace DS_SET
}  // namespace ds
