// One range of rows, forward and backward. Included once per instruction set; a row is walked in blocks that stay in L1.
#include "rows.h"

namespace ds {
namespace DS_SET {

#define DS_EACH_BLOCK(at, count) \
  for (int64_t at = 0, count; at < cols && (count = cols - at < kBlock ? cols - at : kBlock); at += kBlock)

constexpr int64_t kHeld = 4 * kBlock;  // elements of a 16-bit row that are kept as fp32, in L1, from the first pass to the last

template <class T>
DS_TARGET static void add_rows(const T* x, const T* residual, T* total, int64_t cols) {
  using V = DS_VEC;
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, float>) {
    for (; i + V::width <= cols; i += V::width) V::store(total + i, V::add(V::load(x + i), V::load(residual + i)));
  }
#pragma GCC ivdep
  for (; i < cols; ++i) from_float(to_float(x[i]) + to_float(residual[i]), total + i);
}

template <class T>
DS_TARGET static void forward_row(const DsNormCall& call, int64_t row) {
  const int64_t cols = call.cols;
  const T* source = static_cast<const T*>(call.x) + row * cols;
  if (call.residual) {
    T* total = static_cast<T*>(call.total) + row * cols;
    add_rows(source, static_cast<const T*>(call.residual) + row * cols, total, cols);
    source = total;
  }
  float buffer[kBlock], made[kBlock], held[std::is_same_v<T, float> ? 1 : kHeld];
  const float* wide = nullptr;
  if (!std::is_same_v<T, float> && cols <= kHeld) wide = widened(source, held, cols);
  const auto values = [&](int64_t at, int64_t count) DS_INLINE { return wide ? wide + at : widened(source + at, buffer, count); };
  float mean = 0.0f;
  if (call.mean) {
    Sum sum;
    DS_EACH_BLOCK(at, count) {
      const float* x = values(at, count);
      sum.add(count, [=](int64_t i) DS_INLINE { return x[i]; });
    }
    mean = sum.total() / static_cast<float>(cols);
    call.mean[row] = mean;
  }
  Sum squares;
  DS_EACH_BLOCK(at, count) {
    const float* x = values(at, count);
    squares.add(count, [=](int64_t i) DS_INLINE { return (x[i] - mean) * (x[i] - mean); });
  }
  const float rstd = 1.0f / __builtin_sqrtf(squares.total() / static_cast<float>(cols) + call.eps);
  call.rstd[row] = rstd;
  T* out = static_cast<T*>(call.y) + row * cols;
  DS_EACH_BLOCK(at, count) {
    const float *x = values(at, count), *weight = call.weight + at, *bias = call.bias + at;
    float* y = target_of(out + at, made);
    if (call.weight && call.bias) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
    } else if (call.weight) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * rstd * weight[i];
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * rstd;
      for (int64_t i = 0; call.bias && i < count; ++i) y[i] += bias[i];
    }
    narrowed(y, out + at, count);
  }
}

template <class T>
DS_TARGET static void forward(const DsNormCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) forward_row<T>(call, row);
}

// `made` = dy * weight, or dy itself.
DS_TARGET static inline const float* weighted(const float* dy, const float* weight, float* made, int64_t count) {
  if (!weight) return dy;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) made[i] = dy[i] * weight[i];
  return made;
}

template <class T>
DS_TARGET static void backward_row(const DsNormBackwardCall& call, int64_t row, float* sums) {
  const int64_t cols = call.cols;
  const T *up = static_cast<const T*>(call.dy) + row * cols, *in = static_cast<const T*>(call.x) + row * cols;
  const float mean = call.mean ? call.mean[row] : 0.0f, rstd = call.rstd[row];
  float one[kBlock], two[kBlock], three[kBlock], made[kBlock];
  Sum plain, product;
  DS_EACH_BLOCK(at, count) {
    const float *x = widened(in + at, one, count), *dy = widened(up + at, two, count);
    const float* g = weighted(dy, call.weight ? call.weight + at : nullptr, three, count);
    product.add(count, [=](int64_t i) DS_INLINE { return g[i] * ((x[i] - mean) * rstd); });
    if (call.mean) plain.add(count, [=](int64_t i) DS_INLINE { return g[i]; });
    if (sums) {
      float *dweight = sums + at, *dbias = sums + cols + at;
      if (call.dweight) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) dweight[i] += dy[i] * ((x[i] - mean) * rstd);
      }
      if (call.dbias) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) dbias[i] += dy[i];
      }
    }
  }
  const float shift = call.mean ? plain.total() / static_cast<float>(cols) : 0.0f;
  const float slope = product.total() / static_cast<float>(cols);
  T* out = static_cast<T*>(call.dx) + row * cols;
  DS_EACH_BLOCK(at, count) {
    const float *x = widened(in + at, one, count), *dy = widened(up + at, two, count);
    const float* g = weighted(dy, call.weight ? call.weight + at : nullptr, three, count);
    float* dx = target_of(out + at, made);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) dx[i] = rstd * ((g[i] - shift) - (x[i] - mean) * rstd * slope);
    if (call.dtotal) {
      const float* more = widened(static_cast<const T*>(call.dtotal) + row * cols + at, two, count);
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) dx[i] += more[i];
    }
    narrowed(dx, out + at, count);
  }
}

template <class T>
DS_TARGET static void backward(const DsNormBackwardCall& call, int64_t begin, int64_t end, float* sums) {
  for (int64_t row = begin; row < end; ++row) backward_row<T>(call, row, sums);
}

#undef DS_EACH_BLOCK

static Forward pick_forward(int dtype) {
  return dtype == kBf16 ? forward<bf16> : dtype == kFp16 ? forward<fp16> : forward<float>;
}

static Backward pick_backward(int dtype) {
  return dtype == kBf16 ? backward<bf16> : dtype == kFp16 ? backward<fp16> : backward<float>;
}

}  // namespace DS_SET
}  // namespace ds
