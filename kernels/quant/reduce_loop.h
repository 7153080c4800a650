// The last step of a sum: times a factor, rounded once. Included once per instruction set.
#include "lanes.h"

namespace ds {
namespace DS_SET {

template <class T>
DS_TARGET static void finish(const float* sum, int64_t numel, float factor, void* to) {
  T* out = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + W <= numel; i += W) store(out + i, load(sum + i) * factor);
  for (; i < numel; ++i) from_float(sum[i] * factor, out + i);
}

static Finish pick(int dtype) {
  if (dtype == kBf16) return finish<bf16>;
  if (dtype == kFp16) return finish<fp16>;
  return finish<float>;
}

}  // namespace DS_SET
}  // namespace ds
