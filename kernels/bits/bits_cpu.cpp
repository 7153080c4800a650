// One bit per value with error feedback, and sums of buffers: plain C ABI, no torch and no Python header.
#include <cmath>

#include "abi.h"
#include "chunks.h"
#include "signs.h"

namespace ds {

// Of one dtype and instruction set; see bits_loop.h.
struct Pieces {
  double (*sign)(const void* values, float* error, int64_t numel, uint8_t* signs, bool squares);
  void (*error)(float* error, int64_t numel, float scale);
  void (*spread)(const uint8_t* signs, int64_t numel, float scale, float* sum, bool add);
  void (*gather)(const void* source, int64_t numel, float* sum, bool add);
  void (*finish)(const float* sum, int64_t numel, float factor, void* out, bool add);
};

}  // namespace ds

#define DS_LOOP "bits_loop.h"
#include "each_set.h"

namespace ds {

// Short enough that what one pass read is in the cache for the next, and a multiple of 16.
constexpr int64_t kPiece = 8192;

static Pieces pieces(int isa, int dtype) { return DS_PICK(isa, pick(dtype)); }

static int64_t value_bytes(int dtype) { return dtype == kFloat ? 4 : 2; }

static bool known(int dtype) { return dtype >= kFloat && dtype <= kFp16; }

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ds

extern "C" {

// Rows of values; strides in elements. The scale of a block is of l1 norm / n, or l2 norm / sqrt(n).
struct DsSigns {
  void* values;  // read to pack, written to unpack
  float* errors;  // may be null
  uint8_t* signs;
  float* scales;
  int64_t values_stride, errors_stride, signs_stride, scales_stride;
  int64_t rows, numel, block;
  float factor;
  int32_t dtype, flag, isa, threads;  // flag: l2, or add to values
};

DS_EXPORT int ds_pack_signs(const DsSigns* call) {
  using namespace ds;
  if (!call || call->threads < 1 || !known(call->dtype) || call->block < 16 || call->block % 16) return kBadArgument;
  if (!has_isa(call->isa)) return kNoSuchIsa;
  const DsSigns c = *call;
  const Pieces of = pieces(c.isa, c.dtype), floats = pieces(c.isa, kFloat);
  const int64_t blocks = ceil_div(c.numel, c.block), all = c.rows * blocks;
  const auto size = [&](int64_t k) { return c.numel - k * c.block < c.block ? c.numel - k * c.block : c.block; };
  const auto sign = [&](int64_t row, int64_t start, int64_t numel) {
    return of.sign(static_cast<const char*>(c.values) + (row * c.values_stride + start) * value_bytes(c.dtype),
                   c.errors ? c.errors + row * c.errors_stride + start : nullptr, numel,
                   c.signs + row * c.signs_stride + start / 8, c.flag != 0);
  };
  const auto scale_of = [&](double norm, int64_t numel) {
    const double n = static_cast<double>(numel);
    return static_cast<float>(c.flag ? std::sqrt(norm / n) : norm / n);
  };
  if (c.block <= kPiece) {  // one pass over memory
    over_ranges(all, ceil_div(kPiece, c.block), c.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / blocks, k = i % blocks, start = k * c.block;
        const float scale = scale_of(sign(row, start, size(k)), size(k));
        c.scales[row * c.scales_stride + k] = scale;
        if (c.errors) floats.error(c.errors + row * c.errors_stride + start, size(k), scale);
      }
    });
    return kOk;
  }
  // A block longer than a piece: the scale is known only when all of it was read, so errors are passed over twice.
  const int64_t each = ceil_div(c.block, kPiece), count = all * each;
  double* norms = static_cast<double*>(std::malloc(static_cast<size_t>(count + 1) * sizeof(double)));
  if (!norms) return kNoMemory;
  const auto over = [&](const auto& run) {
    over_chunks(count, c.threads, [&](int64_t piece) {
      const int64_t i = piece / each, row = i / blocks, k = i % blocks, offset = piece % each * kPiece;
      const int64_t rest = size(k) - offset;
      if (rest > 0) run(piece, row, k, k * c.block + offset, rest < kPiece ? rest : kPiece);
    });
  };
  over([&](int64_t piece, int64_t row, int64_t, int64_t start, int64_t numel) { norms[piece] = sign(row, start, numel); });
  for (int64_t i = 0; i < all; ++i) {
    const int64_t numel = size(i % blocks);
    double norm = 0;
    for (int64_t piece = 0; piece < ceil_div(numel, kPiece); ++piece) norm += norms[i * each + piece];
    c.scales[i / blocks * c.scales_stride + i % blocks] = scale_of(norm, numel);
  }
  if (c.errors) {
    over([&](int64_t, int64_t row, int64_t k, int64_t start, int64_t numel) {
      floats.error(c.errors + row * c.errors_stride + start, numel, c.scales[row * c.scales_stride + k]);
    });
  }
  std::free(norms);
  return kOk;
}

// values (+)= factor * sum over rows of scale * sign; values has one row.
DS_EXPORT int ds_unpack_signs(const DsSigns* call) {
  using namespace ds;
  if (!call || call->threads < 1 || !known(call->dtype) || call->block < 16 || call->block % 16) return kBadArgument;
  if (!has_isa(call->isa)) return kNoSuchIsa;
  const DsSigns c = *call;
  const Pieces of = pieces(c.isa, c.dtype);
  over_ranges(c.numel, kPiece, c.threads, [&](int64_t begin, int64_t end) {
    float sum[kPiece];
    if (!c.rows) std::memset(sum, 0, sizeof sum);
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t i = begin; i < end;) {
        const int64_t k = i / c.block, stop = (k + 1) * c.block < end ? (k + 1) * c.block : end;
        of.spread(c.signs + row * c.signs_stride + i / 8, stop - i, c.scales[row * c.scales_stride + k], sum + (i - begin),
                  row > 0);
        i = stop;
      }
    }
    of.finish(sum, end - begin, c.factor, static_cast<char*>(c.values) + begin * value_bytes(c.dtype), c.flag != 0);
  });
  return kOk;
}

// out = factor * sum of `count` sources, in order and in fp32, at any addresses.
DS_EXPORT int ds_sum_into(void* out, int32_t out_dtype, const void* const* sources, int32_t dtype, int64_t count,
                          int64_t numel, float factor, int32_t isa, int32_t threads) {
  using namespace ds;
  if (!known(out_dtype) || !known(dtype) || count < 0 || numel < 0 || threads < 1) return kBadArgument;
  if (!has_isa(isa)) return kNoSuchIsa;
  const Pieces from = pieces(isa, dtype), to = pieces(isa, out_dtype);
  over_ranges(numel, kPiece, threads, [&](int64_t begin, int64_t end) {
    float sum[kPiece];
    if (!count) std::memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < count; ++k) {
      from.gather(static_cast<const char*>(sources[k]) + begin * value_bytes(dtype), end - begin, sum, k > 0);
    }
    to.finish(sum, end - begin, factor, static_cast<char*>(out) + begin * value_bytes(out_dtype), false);
  });
  return kOk;
}

}  // extern "C"
