// Quantises rows of floats in blocks: plain C ABI, no torch and no Python header.
#include <type_traits>

#include "floats512.h"
#include "narrow.h"
#include "quant.h"

#define DS_LOOP "encode_loop.h"
#include "each_set.h"

namespace ds {

Encode pick_encode(int isa, int format, int dtype) { return DS_PICK(isa, pick(format, dtype)); }

}  // namespace ds

extern "C" DS_EXPORT int ds_quantize_blocks(const DsBlocks* call) {
  using namespace ds;
  if (const int status = refused(call, kFp16)) return status;
  const DsBlocks c = *call;
  const Encode encode = pick_encode(c.isa, c.format, c.dtype);
  const int64_t each = (c.numel + c.block - 1) / c.block;
  over_runs(c.rows, c.numel, c.block, c.threads, [&](int64_t row, int64_t k, int64_t start, int64_t numel) {
    const uint64_t number = static_cast<uint64_t>(c.first_block + row * each + k);
    const char* values = static_cast<const char*>(c.values) + (row * c.values_stride + start) * value_bytes(c.dtype);
    encode(values, numel, c.block, c.codes + row * c.codes_stride + code_bytes(c.format, start),
           c.scales + row * c.scales_stride + k, c.zeros ? c.zeros + row * c.zeros_stride + k : nullptr,
           {c.flag != 0, static_cast<uint64_t>(c.seed), number});
  });
  return kOk;
}
