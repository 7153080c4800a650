// Activations, gated or with a bias, and dropout onto a residual, forward and backward, on the CPU: plain C ABI.
#include <cstdint>

#include "abi.h"
#include "chunks.h"

extern "C" {

// Rows of one dtype, each contiguous, `*_stride` elements apart; the bias is fp32. Null is what is not there.
struct DsActivationCall {
  const void *x, *up, *dy;  // with `dy` it is the backward; with `up` f(x) * up, else f(x + bias)
  const float* bias;
  void *out, *dup;          // the result or dx; the gradient of `up`
  int64_t rows, cols, x_stride, up_stride, dy_stride, out_stride, dup_stride;
  int32_t kind, dtype, isa, threads;
};

// out = residual + dropped(x + bias), or dropped(x); all contiguous.
struct DsDropoutCall {
  const void *x, *residual;
  const float* bias;
  void* out;
  int64_t numel, cols;
  uint64_t seed, threshold;  // a word below the threshold, which is at most 2^32, drops its element
  float scale;
  int32_t dtype, isa, threads;
};
}

namespace ds {

enum Kind { kSilu = 0, kGelu = 1, kGeluTanh = 2 };
using Activate = void (*)(const DsActivationCall&, int64_t row, int64_t begin, int64_t end);
using Drop = void (*)(const DsDropoutCall&, int64_t begin, int64_t end);

}  // namespace ds

#define DS_LOOP "activation_loop.h"
#include "each_set.h"

namespace ds {

constexpr int64_t kPiece = 4096;  // elements of a row, or of a tensor: what a thread claims at once

}  // namespace ds

extern "C" {

DS_EXPORT int ds_activation(const DsActivationCall* call) {
  using namespace ds;
  if (!call || call->rows < 0 || call->cols < 1 || call->threads < 1) return kBadArgument;
  if (call->dtype < kFloat || call->dtype > kFp16 || call->kind < kSilu || call->kind > kGeluTanh) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Activate run = DS_PICK(isa, pick(call->dtype, call->kind));
  const int64_t cols = call->cols, pieces = (cols + kPiece - 1) / kPiece;
  if (pieces > 1) {
    over_chunks(call->rows * pieces, call->threads, [&](int64_t chunk) {
      const int64_t begin = chunk % pieces * kPiece;
      run(*call, chunk / pieces, begin, begin + kPiece < cols ? begin + kPiece : cols);
    });
  } else {
    over_ranges(call->rows, kPiece / cols, call->threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) run(*call, row, 0, cols);
    });
  }
  return kOk;
}

DS_EXPORT int ds_dropout(const DsDropoutCall* call) {
  using namespace ds;
  if (!call || call->numel < 0 || call->cols < 1 || call->threads < 1) return kBadArgument;
  if (call->dtype < kFloat || call->dtype > kFp16) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Drop run = DS_PICK(isa, pick_drop(call->dtype));
  over_ranges(call->numel, kPiece, call->threads, [&](int64_t begin, int64_t end) { run(*call, begin, end); });
  return kOk;
}
}
