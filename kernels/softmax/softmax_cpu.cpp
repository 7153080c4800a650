// Scaled and masked softmax over rows on the CPU, forward and backward: plain C ABI, no torch and no Python header.
#include <cstdint>

#include "abi.h"
#include "chunks.h"

extern "C" {

// x [outer, middle, inner, cols], contiguous; the mask has strides of its own, 0 where it is repeated, elements beside each other.
struct DsSoftmaxCall {
  const void* x;     // or y in the backward
  const void* dy;    // not null: the backward
  const void* mask;  // null, bytes (not 0: stays), or fp32 added after the scale
  void* out;
  int64_t outer, middle, inner, cols;
  int64_t mask_strides[3];
  float scale;
  int32_t mask_bytes, causal, dtype, isa, threads;
};
}

namespace ds {
using Row = void (*)(const DsSoftmaxCall&, int64_t row);
}  // namespace ds

#define DS_LOOP "softmax_loop.h"
#include "each_set.h"

namespace ds {
constexpr int64_t kChunk = 4096;  // elements, so that claiming a chunk costs nothing
}  // namespace ds

extern "C" DS_EXPORT int ds_softmax(const DsSoftmaxCall* call) {
  using namespace ds;
  if (!call || call->outer < 0 || call->middle < 0 || call->inner < 0 || call->cols < 1) return kBadArgument;
  if (call->dtype < kFloat || call->dtype > kFp16 || call->threads < 1) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Row run = DS_PICK(isa, pick(call->dtype));
  const int64_t rows = call->outer * call->middle * call->inner;
  over_ranges(rows, call->cols < kChunk ? kChunk / call->cols : 1, call->threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(*call, row);
  });
  return kOk;
}
