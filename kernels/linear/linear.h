// What a weight-only quantised linear is on the CPU: the packed formats, one call, and the shape of a body that computes it.
//
// [Note: packed layouts]
// A row of weights is one output channel. Everything counts in chunks of 32 input channels, so that a group of scales ends
// where a chunk ends. Padding up to a whole block has codes of value zero.
//   bf16  row-major [out][in], as torch keeps it
//   int8  row-major [out][in], -127..127
//   int4  blocks of 128 codes = 32 words of 16 bits: word j has codes j, 32 + j, 64 + j, 96 + j from its low bits up
//   fp6   blocks of 256 codes = 96 words: words j, 32 + j, 64 + j hold codes (j, 32 + j), (64 + j, 96 + j) and
//         (128 + j, 160 + j) in their low 12 bits; code 192 + j is the top 4 bits of the first and the next 2 of the second,
//         code 224 + j is the top 2 bits of the second and the top 4 of the third
// A 16-bit word per lane means that one shift and one table look-up per chunk give 32 bf16 values, in order.
#pragma once
#include <algorithm>

#include "abi.h"

namespace ds {

enum Format { kPlain = 0, kInt8 = 1, kInt4 = 2, kFp6 = 3 };

constexpr int64_t kChunkCodes = 32;
constexpr int kSymmetricZero = 8;  // the int4 code of zero when there are no zero points

inline int64_t block_codes(int format) {
  return format == kPlain ? 32 : format == kInt8 ? 64 : format == kInt4 ? 128 : 256;
}

inline int64_t row_bytes(int format, int64_t k) {
  const int64_t block = block_codes(format), whole = (k + block - 1) / block * block;
  return format == kPlain ? 2 * k : format == kInt8 ? k : format == kInt4 ? whole / 2 : whole / 4 * 3;
}

// One fp6 (e3m2) value as a multiple of 1/16: exact in bf16 too. Sign, three bits of exponent, two of mantissa.
inline int fp6_sixteenths(int code) {
  const int exponent = (code >> 2) & 7, mantissa = code & 3;
  const int magnitude = exponent ? (4 + mantissa) << (exponent - 1) : mantissa;
  return code & 32 ? -magnitude : magnitude;
}

struct Job {
  const void* x;  // [m][x_stride], in the body's own type and order, zero from k to width
  int64_t x_stride, width;  // width: k up to a whole block
  const uint8_t* codes;
  int64_t row_bytes;
  const float* scales;   // [n][groups]; null for plain weights
  const uint8_t* zeros;  // [n][groups] for int4, or null
  int64_t groups, group_chunks;
  const float* bias;     // [n], or null
  void* out;  // [m][n]
  int out_dtype;
  int64_t m, n, k;
  int format;

  // Scales of a group are inside the sum; one scale per row is applied to the finished sum.
  bool grouped() const { return groups > 1; }
  int64_t group_of(int64_t chunk) const { return std::min(chunk / group_chunks, groups - 1); }
};

// Computes out[m0, m1) x [n0, n1); false when there is no memory for it.
using Body = bool (*)(const Job&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);

static inline float load_as_float(const void* values, int dtype, int64_t i) {
  if (dtype == kBf16) return to_float(static_cast<const bf16*>(values)[i]);
  if (dtype == kFp16) return to_float(static_cast<const fp16*>(values)[i]);
  return static_cast<const float*>(values)[i];
}

static inline void store_from_float(float value, void* out, int dtype, int64_t i) {
  if (dtype == kBf16) return from_float(value, static_cast<bf16*>(out) + i);
  if (dtype == kFp16) return from_float(value, static_cast<fp16*>(out) + i);
  static_cast<float*>(out)[i] = value;
}

// Scale and bias the finished sums of `count` neighbouring channels of one row, and round them once.
static inline void finish(const Job& job, int64_t m, int64_t n, const float* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float y = sums[i];
    if (job.scales && !job.grouped()) y *= job.scales[n + i];
    if (job.bias) y += job.bias[n + i];
    store_from_float(y, job.out, job.out_dtype, m * job.n + n + i);
  }
}

// A distance of rows, in elements, at which their beginnings do not meet in the same sets of the first-level cache.
inline int64_t apart(int64_t width, int64_t element) { return width * element % 1024 ? width : width + 64 / element; }

// The body with AVX-512's bf16 dot products and byte permutes, for x in bf16 or else in fp32 (see dot512_cpu.cpp).
// Null where it is not for this processor or these sizes.
Body pick_dot512(int format, bool in_bf16, int64_t k);

// The same for dequantising to a dtype.
Body pick_dequantize512(int format, int dtype, int64_t k);

// Fills one row of x for that body: fp32 goes as the 16 even, then the 16 odd elements of every chunk.
void fill_x512(const void* x, int dtype, int64_t k, int64_t width, bool in_bf16, void* out);

}  // namespace ds
