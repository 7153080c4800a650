// Rotary position embedding on the CPU: plain C ABI, no torch and no Python header.
#include <cstdint>

#include "abi.h"
#include "chunks.h"

extern "C" {

// x and out: [batches, tokens, heads, width], elements of a head beside each other; out may be x.
struct DsRopeCall {
  const void* x;
  void* out;
  const float *cos, *sin;    // [known positions, pairs]
  const int64_t* positions;  // [batches, tokens]
  int64_t batches, tokens, heads, width, pairs;
  int64_t x_strides[3], out_strides[3];
  int32_t interleaved, inverse, dtype, isa, threads;
};
}

namespace ds {
using Rotate = void (*)(const DsRopeCall&, int64_t batch, int64_t token);
}  // namespace ds

#define DS_LOOP "rope_loop.h"
#include "each_set.h"

namespace ds {
constexpr int64_t kChunk = 8192;  // elements, so that claiming a chunk costs nothing
}  // namespace ds

extern "C" DS_EXPORT int ds_rope(const DsRopeCall* call) {
  using namespace ds;
  if (!call || call->batches < 0 || call->tokens < 0 || call->heads < 0 || call->threads < 1) return kBadArgument;
  if (call->dtype < kFloat || call->dtype > kFp16 || call->width > scalar::kBlock || 2 * call->pairs > call->width) {
    return kBadArgument;
  }
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Rotate run = DS_PICK(isa, pick(call->dtype));
  const int64_t each = call->heads * call->width, size = each < 1 ? 1 : each < kChunk ? kChunk / each : 1;
  over_ranges(call->batches * call->tokens, size, call->threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(*call, i / call->tokens, i % call->tokens);
  });
  return kOk;
}
