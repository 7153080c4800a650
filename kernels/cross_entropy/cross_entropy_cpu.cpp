// Cross entropy over rows of logits on the CPU, loss and gradient: plain C ABI, no torch and no Python header.
#include <cmath>
#include <cstdint>

#include "abi.h"
#include "chunks.h"

extern "C" {

struct DsCrossEntropyCall {
  const void* logits;
  void* grad;             // of the same dtype, may be `logits`; null: losses only
  const int64_t* target;
  const float* scale;     // what a row's loss counts in the gradient; read only when there is one
  float* losses;          // null: `lse` is known, only the gradient is wanted
  float* lse;             // log of the sum of exponentials of each row
  int64_t rows, cols, logits_stride, grad_stride, ignore_index;
  float smoothing, z_loss;
  int32_t dtype, isa, threads;
};
}

namespace ds {
using Call = DsCrossEntropyCall;
using Row = void (*)(const Call&, int64_t row);
}  // namespace ds

#define DS_LOOP "cross_entropy_loop.h"
#include "each_set.h"

extern "C" DS_EXPORT int ds_cross_entropy(const DsCrossEntropyCall* call) {
  using namespace ds;
  if (!call || call->rows < 0 || call->cols < 1 || call->threads < 1) return kBadArgument;
  if (call->dtype < kFloat || call->dtype > kFp16) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Row run = DS_PICK(isa, pick(call->dtype));
  over_chunks(call->rows, call->threads, [&](int64_t row) { run(*call, row); });
  return kOk;
}
