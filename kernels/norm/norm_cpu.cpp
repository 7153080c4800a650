// RMSNorm and LayerNorm over rows on the CPU, forward and backward: plain C ABI, no torch and no Python header.
#include <cstdint>
#include <cstdlib>

#include "abi.h"
#include "chunks.h"

extern "C" {

// All rows are contiguous and of one dtype; weight, bias and the statistics are fp32. Null is what is not there.
struct DsNormCall {
  const void *x, *residual;
  const float *weight, *bias;
  void *y, *total;
  float *mean, *rstd;  // a mean makes it a LayerNorm
  int64_t rows, cols;
  float eps;
  int32_t dtype, isa, threads;
};

struct DsNormBackwardCall {
  const void *dy, *dtotal, *x;
  const float *weight, *mean, *rstd;
  void* dx;
  float *dweight, *dbias;
  int64_t rows, cols;
  int32_t dtype, isa, threads;
};
}

namespace ds {

using Forward = void (*)(const DsNormCall&, int64_t begin, int64_t end);
// `sums`: two rows of fp32 that gather dweight and dbias over the range, or null.
using Backward = void (*)(const DsNormBackwardCall&, int64_t begin, int64_t end, float* sums);

}  // namespace ds

#define DS_LOOP "norm_loop.h"
#include "each_set.h"

namespace ds {

constexpr int64_t kChunk = 16384;  // elements, so that claiming a chunk costs nothing

// The sums of dweight and dbias are made of at most 64 partial ones, each over at least 32 rows, whatever the threads.
constexpr int64_t kParts = 64, kPartRows = 32;

static bool fits(int64_t rows, int64_t cols, int dtype, int threads) {
  return rows >= 0 && cols >= 1 && threads >= 1 && dtype >= kFloat && dtype <= kFp16;
}

}  // namespace ds

extern "C" {

DS_EXPORT int ds_norm(const DsNormCall* call) {
  using namespace ds;
  if (!call || !fits(call->rows, call->cols, call->dtype, call->threads)) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Forward run = DS_PICK(isa, pick_forward(call->dtype));
  const int64_t size = call->cols < kChunk ? kChunk / call->cols : 1;
  over_ranges(call->rows, size, call->threads, [&](int64_t begin, int64_t end) { run(*call, begin, end); });
  return kOk;
}

DS_EXPORT int ds_norm_backward(const DsNormBackwardCall* call) {
  using namespace ds;
  if (!call || !fits(call->rows, call->cols, call->dtype, call->threads)) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Backward run = DS_PICK(isa, pick_backward(call->dtype));
  const int64_t rows = call->rows, cols = call->cols;
  const bool summing = call->dweight || call->dbias;
  if (!summing) {
    const int64_t size = cols < kChunk ? kChunk / cols : 1;
    over_ranges(rows, size, call->threads, [&](int64_t begin, int64_t end) { run(*call, begin, end, nullptr); });
    return kOk;
  }
  int64_t parts = rows / kPartRows;
  parts = parts < 1 ? 1 : parts > kParts ? kParts : parts;
  float* sums = static_cast<float*>(std::calloc(static_cast<size_t>(parts) * 2 * static_cast<size_t>(cols), sizeof(float)));
  if (!sums) return kNoMemory;
  over_chunks(parts, call->threads, [&](int64_t part) {
    run(*call, rows * part / parts, rows * (part + 1) / parts, sums + part * 2 * cols);
  });
  for (int64_t which = 0; which < 2; ++which) {
    float* out = which ? call->dbias : call->dweight;
    if (!out) continue;
    for (int64_t j = 0; j < cols; ++j) out[j] = sums[which * cols + j];
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = sums + (part * 2 + which) * cols;
      for (int64_t j = 0; j < cols; ++j) out[j] += more[j];
    }
  }
  std::free(sums);
  return kOk;
}
}
