// Blocks of numbers of few bits: what the files of this folder, and ops/quant.py, say to each other.
#pragma once
#include <cstddef>

#include "abi.h"
#include "chunks.h"

namespace ds {

enum Format { kInt8, kUint8, kInt4, kUint4, kE4m3, kE5m2, kE3m2, kE4m7, kFormats };

// Codes of 64 elements fill whole bytes in every format; blocks are cut into groups of 64 and a shorter last one.
constexpr int kGroup = 64;

// [Note: scales] A scale is never below the smallest normal number, so that its reciprocal is finite. A block whose
// magnitude (asymmetric: range) is not below 2^127, or is NaN, has NaN for scale and zero, and codes 0: it decodes to NaN.
constexpr float kFloor = 1.17549435e-38f, kLimit = 1.70141183e38f;

// What stochastic rounding draws from, of a tensor and of a block.
struct Draw {
  bool stochastic;
  uint64_t seed, block;  // the number of the first block
};
struct Dice {
  uint32_t first, second;
};

// Consecutive blocks: `values` of the given dtype to `codes`, `scales` and (asymmetric) `zeros`.
using Encode = void (*)(const void* values, int64_t numel, int64_t block, uint8_t* codes, float* scales, float* zeros,
                        const Draw& draw);
// One block back. `zero` is null unless asymmetric.
using Decode = void (*)(const uint8_t* codes, int64_t numel, float scale, const float* zero, void* out);

Encode pick_encode(int isa, int format, int dtype);
Decode pick_decode(int isa, int format, int dtype, bool add);

static inline int64_t code_bytes(int format, int64_t numel) {
  if (format == kInt4 || format == kUint4) return (numel + 1) / 2;
  if (format == kE3m2) return (numel + 3) / 4 * 3;
  if (format == kE4m7) return (numel + 1) / 2 * 3;
  return numel;
}

static inline int64_t value_bytes(int dtype) { return dtype == kFloat ? 4 : 2; }

// A bijection of 32 bits in which every bit of the input moves half of the output's.
static inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

static inline Dice dice_of(uint64_t seed, uint64_t block) {
  uint32_t key = mix(static_cast<uint32_t>(block >> 32) ^ 0x9e3779b9u);
  key = mix(key ^ static_cast<uint32_t>(block));
  key = mix(key ^ static_cast<uint32_t>(seed >> 32));
  key = mix(key ^ static_cast<uint32_t>(seed));
  return {key, mix(key + 0x9e3779b9u)};
}

}  // namespace ds

// Rows of values and rows of blocks; strides in elements. `flag`: round stochastically, or add to `values`.
extern "C" struct DsBlocks {
  void* values;
  uint8_t* codes;
  float *scales, *zeros;
  int64_t values_stride, codes_stride, scales_stride, zeros_stride;
  int64_t rows, numel, block, seed, first_block;
  float factor;
  int32_t dtype, format, flag, isa, threads;
};

namespace ds {

static inline int refused(const DsBlocks* call, int last_dtype) {
  if (!call || call->rows < 0 || call->numel < 0 || call->threads < 1) return kBadArgument;
  if (call->block < 1 || call->block % 16) return kBadArgument;
  if (call->format < 0 || call->format >= kFormats || call->dtype < 0 || call->dtype > last_dtype) return kBadArgument;
  if ((call->format == kUint8 || call->format == kUint4) != (call->zeros != nullptr)) return kBadArgument;
  return has_isa(call->isa) ? kOk : kNoSuchIsa;
}

// `run(row, block of the row, elements before it, elements)` for runs of blocks of a row, over threads.
template <class Run>
static void over_runs(int64_t rows, int64_t numel, int64_t block, int threads, const Run& run) {
  const int64_t each = (numel + block - 1) / block;
  const int64_t piece = block < 32768 ? 32768 / block : 1;  // blocks that a thread claims at a time
  over_ranges(rows * each, piece, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / each, k = begin % each, stop = end < (row + 1) * each ? end : (row + 1) * each;
      const int64_t start = k * block, last = (stop - row * each) * block;
      run(row, k, start, (last < numel ? last : numel) - start);
      begin = stop;
    }
  });
}

// The same for every block.
template <class Run>
static void over_blocks(int64_t rows, int64_t numel, int64_t block, int threads, const Run& run) {
  over_runs(rows, numel, block, threads, [&](int64_t row, int64_t k, int64_t start, int64_t count) {
    for (int64_t end = start + count; start < end; start += block, ++k) run(row, k, start, end - start < block ? end - start : block);
  });
}

}  // namespace ds
