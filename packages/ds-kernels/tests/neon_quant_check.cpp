// Compares the NEON bodies of quant and bits with the scalar ones, bit for bit; built and run by test_neon.py.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "quant.h"

extern "C" int ds_quantize_blocks(const DsBlocks*);
extern "C" int ds_dequantize_blocks(const DsBlocks*);

struct DsSigns {
  void* values;
  float* errors;
  uint8_t* signs;
  float* scales;
  int64_t values_stride, errors_stride, signs_stride, scales_stride;
  int64_t rows, numel, block;
  float factor;
  int32_t dtype, flag, isa, threads;
};
extern "C" int ds_pack_signs(const DsSigns*);
extern "C" int ds_unpack_signs(const DsSigns*);

constexpr int64_t kNumel = 1007, kBlock = 128, kBlocks = (kNumel + kBlock - 1) / kBlock;

template <class T>
static bool differ(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) != 0;
}

struct Made {
  std::vector<uint8_t> codes, back = std::vector<uint8_t>(4 * kNumel);
  std::vector<float> scales = std::vector<float>(kBlocks), zeros = std::vector<float>(kBlocks);
  std::vector<float> errors = std::vector<float>(kNumel);
};

static std::vector<uint8_t> values(int dtype) {
  std::vector<uint8_t> bytes(4 * kNumel);
  for (int64_t i = 0; i < kNumel; ++i) {
    const float x = i % 7 ? static_cast<float>(std::rand() % 20001 - 10000) * 1.37e-3f : 0.0f;
    uint8_t* at = bytes.data() + i * ds::value_bytes(dtype);
    if (dtype == ds::kFloat) ds::from_float(x, reinterpret_cast<float*>(at));
    if (dtype == ds::kBf16) ds::from_float(x, reinterpret_cast<ds::bf16*>(at));
    if (dtype == ds::kFp16) ds::from_float(x, reinterpret_cast<ds::fp16*>(at));
  }
  return bytes;
}

static Made quantised(std::vector<uint8_t> x, int dtype, int format, int stochastic, int isa) {
  Made made;
  made.codes.resize(static_cast<size_t>(ds::code_bytes(format, kNumel)));
  const bool asymmetric = format == ds::kUint8 || format == ds::kUint4;
  DsBlocks call{x.data(), made.codes.data(), made.scales.data(), asymmetric ? made.zeros.data() : nullptr,
                kNumel, 0, 0, 0, 1, kNumel, kBlock, 99, 3, 1.0f, dtype, format, stochastic, isa, 1};
  if (ds_quantize_blocks(&call)) std::abort();
  call.values = made.back.data();
  call.flag = 0;
  if (ds_dequantize_blocks(&call)) std::abort();
  call.flag = 1;
  if (ds_dequantize_blocks(&call)) std::abort();
  return made;
}

static Made packed(std::vector<uint8_t> x, int dtype, int l2, int isa) {
  Made made;
  made.codes.resize((kNumel + 7) / 8);
  for (int64_t i = 0; i < kNumel; ++i) made.errors[i] = static_cast<float>(i % 13) * 0.1f - 0.6f;
  DsSigns call{x.data(), made.errors.data(), made.codes.data(), made.scales.data(), kNumel, kNumel, 0, 0,
               1, kNumel, kBlock, 0.7f, dtype, l2, isa, 1};
  if (ds_pack_signs(&call)) std::abort();
  call.values = made.back.data();
  if (ds_unpack_signs(&call)) std::abort();
  return made;
}

int main() {
  int count = 0, wrong = 0;
  const auto compare = [&](const Made& a, const Made& b) {
    ++count;
    wrong += differ(a.codes, b.codes) || differ(a.scales, b.scales) || differ(a.zeros, b.zeros) || differ(a.back, b.back) ||
             differ(a.errors, b.errors);
  };
  for (int dtype = 0; dtype < 3; ++dtype) {
    const std::vector<uint8_t> x = values(dtype);
    for (int format = 0; format < ds::kFormats; ++format) {
      for (int stochastic = 0; stochastic < (format <= ds::kUint4 ? 2 : 1); ++stochastic) {
        compare(quantised(x, dtype, format, stochastic, ds::kScalar), quantised(x, dtype, format, stochastic, ds::kNeon));
      }
    }
    for (int l2 = 0; l2 < 2; ++l2) compare(packed(x, dtype, l2, ds::kScalar), packed(x, dtype, l2, ds::kNeon));
  }
  std::printf("%d combinations, %d differ\n", count, wrong);
  return 0;
}
