// Dequantises rows of blocks to floats: plain C ABI, no torch and no Python header.
#include <type_traits>

#include "narrow.h"
#include "quant.h"

#define DS_LOOP "decode_loop.h"
#include "each_set.h"

namespace ds {

Decode pick_decode(int isa, int format, int dtype, bool add) { return DS_PICK(isa, pick(format, dtype, add)); }

}  // namespace ds

extern "C" DS_EXPORT int ds_dequantize_blocks(const DsBlocks* call) {
  using namespace ds;
  if (const int status = refused(call, kFp16)) return status;
  const DsBlocks c = *call;
  const Decode decode = pick_decode(c.isa, c.format, c.dtype, c.flag != 0);
  over_blocks(c.rows, c.numel, c.block, c.threads, [&](int64_t row, int64_t k, int64_t start, int64_t numel) {
    decode(c.codes + row * c.codes_stride + code_bytes(c.format, start), numel, c.scales[row * c.scales_stride + k],
           c.zeros ? c.zeros + row * c.zeros_stride + k : nullptr,
           static_cast<char*>(c.values) + (row * c.values_stride + start) * value_bytes(c.dtype));
  });
  return kOk;
}
