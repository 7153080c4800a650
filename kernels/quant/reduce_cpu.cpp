// Sums the same block of several quantised chunks, to floats or to a block again, while it is in the cache.
#include "quant.h"

namespace ds {

using Finish = void (*)(const float* sum, int64_t numel, float factor, void* out);

}  // namespace ds

#define DS_LOOP "reduce_loop.h"
#include "each_set.h"

// `in`: a row for each chunk. `out`: one row, of values, or when it has codes of blocks.
extern "C" DS_EXPORT int ds_reduce_blocks(const DsBlocks* in, const DsBlocks* out) {
  using namespace ds;
  if (const int status = refused(in, kFp16)) return status;
  if (!out || out->block != in->block || out->numel != in->numel) return kBadArgument;
  if (out->codes) {
    if (const int status = refused(out, kFp16)) return status;
  } else if (!out->values || out->dtype < 0 || out->dtype > kFp16) {
    return kBadArgument;
  }
  const DsBlocks a = *in, b = *out;
  const Decode first = pick_decode(a.isa, a.format, kFloat, false), more = pick_decode(a.isa, a.format, kFloat, true);
  const Finish finish = DS_PICK(a.isa, pick(b.codes ? static_cast<int>(kFloat) : b.dtype));
  const Encode encode = b.codes ? pick_encode(a.isa, b.format, kFloat) : nullptr;
  const int64_t longest = a.block < a.numel ? a.block : a.numel;
  float* room = static_cast<float*>(std::malloc(static_cast<size_t>(a.threads * longest + 1) * sizeof(float)));
  if (!room) return kNoMemory;
  over_blocks(1, a.numel, a.block, a.threads, [&](int64_t, int64_t k, int64_t start, int64_t numel) {
    float* sum = room + omp_get_thread_num() % a.threads * longest;
    if (!a.rows) std::memset(sum, 0, static_cast<size_t>(numel) * sizeof(float));
    for (int64_t row = 0; row < a.rows; ++row) {
      (row ? more : first)(a.codes + row * a.codes_stride + code_bytes(a.format, start), numel,
                           a.scales[row * a.scales_stride + k], a.zeros ? a.zeros + row * a.zeros_stride + k : nullptr, sum);
    }
    if (!encode) {
      finish(sum, numel, a.factor, static_cast<char*>(b.values) + start * value_bytes(b.dtype));
      return;
    }
    finish(sum, numel, a.factor, sum);
    encode(sum, numel, b.block, b.codes + code_bytes(b.format, start), b.scales + k, b.zeros ? b.zeros + k : nullptr,
           {b.flag != 0, static_cast<uint64_t>(b.seed), static_cast<uint64_t>(b.first_block + k)});
  });
  std::free(room);
  return kOk;
}
