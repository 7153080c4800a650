// The body for every instruction set in plain loops: a few rows of weights decoded to fp32, then dot products in fp32.
// Each sum has 16 lanes of its own, added in the order of k, then a fixed tree: the same bits in every set.
// No include guard: see each_set.h.

namespace ds {
namespace DS_SET {

constexpr int64_t kRows = 4;

DS_TARGET static void decode_int4(const uint8_t* codes, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, codes += 64, out += 128) {
    uint16_t words[32];
    std::memcpy(words, codes, sizeof words);
    for (int part = 0; part < 4; ++part) {
      for (int j = 0; j < 32; ++j) out[32 * part + j] = static_cast<float>((words[j] >> (4 * part)) & 15);
    }
  }
}

DS_TARGET static void decode_fp6(const uint8_t* codes, int64_t blocks, float* out) {
  for (int64_t b = 0; b < blocks; ++b, codes += 192, out += 256) {
    uint16_t words[96];
    uint8_t parts[256];
    std::memcpy(words, codes, sizeof words);
    const uint16_t *u = words, *v = words + 32, *w = words + 64;
    for (int j = 0; j < 32; ++j) {
      for (int part = 0; part < 3; ++part) {
        parts[64 * part + j] = words[32 * part + j] & 63;
        parts[64 * part + 32 + j] = (words[32 * part + j] >> 6) & 63;
      }
      parts[192 + j] = static_cast<uint8_t>((u[j] >> 12) | ((v[j] >> 8) & 0x30));
      parts[224 + j] = static_cast<uint8_t>((v[j] >> 14) | ((w[j] >> 10) & 0x3c));
    }
    for (int i = 0; i < 256; ++i) {
      const int code = parts[i], exponent = (code >> 2) & 7, mantissa = code & 3;
      const int magnitude = exponent ? (4 + mantissa) << (exponent - 1) : mantissa;
      out[i] = static_cast<float>(code & 32 ? -magnitude : magnitude) * 0.0625f;
    }
  }
}

// One row's weights in fp32 without the row's own scale; with the groups' scales and zero points. [block-padded k]
DS_TARGET static void decode_row(const Job& job, int64_t row, float* out) {
  const uint8_t* codes = job.codes + row * job.row_bytes;
  if (job.format == kInt8) {
    const int8_t* values = reinterpret_cast<const int8_t*>(codes);
    for (int64_t i = 0; i < job.k; ++i) out[i] = static_cast<float>(values[i]);
  } else if (job.format == kInt4) {
    decode_int4(codes, (job.k + 127) / 128, out);
  } else {
    decode_fp6(codes, (job.k + 255) / 256, out);
  }
  if (job.format != kInt4 && !job.grouped()) return;
  const int64_t width = std::min(job.group_chunks * kChunkCodes, job.k);
  for (int64_t g = 0; g < job.groups; ++g) {
    const int64_t begin = g * width, end = std::min(begin + width, job.k);
    const float scale = job.grouped() ? job.scales[row * job.groups + g] : 1.0f;
    const int code = job.zeros ? job.zeros[row * job.groups + g] : kSymmetricZero;
    const float zero = job.format == kInt4 ? static_cast<float>(code) : 0.0f;
    for (int64_t i = begin; i < end; ++i) out[i] = (out[i] - zero) * scale;
  }
}

// Sums of kRows rows of w against one of x; `steps` times 16 elements. w rows are `stride` apart.
DS_TARGET static void dot_rows(const float* x, const float* w, int64_t stride, int64_t steps, float* sums) {
  typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
  Lanes total[kRows] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const Lanes value = *reinterpret_cast<const Lanes*>(x + 16 * s);
    for (int64_t r = 0; r < kRows; ++r) total[r] += *reinterpret_cast<const Lanes*>(w + r * stride + 16 * s) * value;
  }
  for (int64_t r = 0; r < kRows; ++r) {
    float lanes[16];
    std::memcpy(lanes, &total[r], sizeof lanes);
    for (int half = 8; half; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    sums[r] = lanes[0];
  }
}

DS_TARGET static bool body(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t stride = (job.k + 255) / 256 * 256;
  float* w = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(kRows * stride) * sizeof(float)));
  if (!w) return false;
  std::memset(w, 0, static_cast<size_t>(kRows * stride) * sizeof(float));
  for (int64_t n = n0; n < n1; n += kRows) {
    const int64_t rows = std::min(kRows, n1 - n);
    for (int64_t r = 0; r < rows; ++r) decode_row(job, n + r, w + r * stride);
    for (int64_t m = m0; m < m1; ++m) {
      float sums[kRows];
      dot_rows(static_cast<const float*>(job.x) + m * job.x_stride, w, stride, (job.k + 15) / 16, sums);
      finish(job, m, n, sums, rows);
    }
  }
  std::free(w);
  return true;
}

template <class T>
DS_TARGET static void scaled_row(const float* w, float scale, int64_t k, T* out) {
  for (int64_t i = 0; i < k; ++i) from_float(w[i] * scale, out + i);
}

// Rows [n0, n1) of the weights as floats, each rounded once to the output's dtype; m is not used.
DS_TARGET static bool dequantize(const Job& job, int64_t, int64_t, int64_t n0, int64_t n1) {
  const int64_t stride = (job.k + 255) / 256 * 256;
  float* w = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(stride) * sizeof(float)));
  if (!w) return false;
  for (int64_t n = n0; n < n1; ++n) {
    decode_row(job, n, w);
    const float scale = job.grouped() || !job.scales ? 1.0f : job.scales[n];
    if (job.out_dtype == kBf16) {
      scaled_row(w, scale, job.k, static_cast<bf16*>(job.out) + n * job.k);
    } else if (job.out_dtype == kFp16) {
      scaled_row(w, scale, job.k, static_cast<fp16*>(job.out) + n * job.k);
    } else {
      scaled_row(w, scale, job.k, static_cast<float*>(job.out) + n * job.k);
    }
  }
  std::free(w);
  return true;
}

}  // namespace DS_SET
}  // namespace ds
