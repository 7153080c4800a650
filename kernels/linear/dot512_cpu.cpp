// The body for processors with AVX-512 bf16 dot products and byte permutes (Zen 4 and 5, Sapphire Rapids and later).
//
// Codes are integers that bf16 holds exactly, so a product of a bf16 activation and a code is exact: only sums round. With x
// in fp32 or fp16 the same codes go to fp32 multiply-adds. For up to two rows of x the weights are decoded in registers; for
// more, a few rows of them to a buffer in the first-level cache, with the groups' scales multiplied in (rounded to bf16).
// Each sum has 16 lanes added in the order of k, then a fixed tree: bits depend on neither threads nor neighbours.
#include "linear.h"

#include <cstdlib>

#if defined(__x86_64__)
#include "formats512.h"

namespace ds {
namespace {

// [Note: asking ahead]
// Rows of packed codes are short, and several are read at once: the processor's own prefetcher, which starts anew for each, does
// not keep up. Asking for the rows that come after these ones makes one row of x 1.3 to 2.5 times as fast, and eight 1.7 times:
// the memory is then at work while the sums are (README, measured). One row of x against bf16 weights does better with a single
// stream (see `stream`).

// -- sums --------------------------------------------------------------------------------------------------------------------

// The sums of four vectors' lanes; every vector's by the same tree.
DS_INLINE __m128 sums4(const __m512* v) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 e = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  const __m256 f = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
  return _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
}

// Scales, biases, rounds and stores the sums of four neighbouring channels.
DS_INLINE void finish4(const Job& job, int64_t m, int64_t n, __m128 y) {
  if (job.scales && !job.grouped()) y = _mm_mul_ps(y, _mm_loadu_ps(job.scales + n));
  if (job.bias) y = _mm_add_ps(y, _mm_loadu_ps(job.bias + n));
  const int64_t at = m * job.n + n;
  if (job.out_dtype == kFloat) {
    _mm_storeu_ps(static_cast<float*>(job.out) + at, y);
  } else if (job.out_dtype == kFp16) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<fp16*>(job.out) + at), _mm_cvtps_ph(y, 0));
  } else {  // not vcvtneps2bf16: it takes subnormal numbers for zero
    const __m128i u = _mm_castps_si128(y), top = _mm_srli_epi32(u, 16);
    const __m128i up = _mm_add_epi32(_mm_set1_epi32(0x7fff), _mm_and_si128(top, _mm_set1_epi32(1)));
    const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(u, up), 16);
    const __mmask8 nan = _mm_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    const __m128i wide = _mm_mask_or_epi32(rounded, nan, top, _mm_set1_epi32(0x40));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<bf16*>(job.out) + at), _mm_cvtepi32_epi16(wide));
  }
}

// Where the sums over a part of k go. Sums over all of it are finished at once.
struct Partial {
  float* sums = nullptr;  // [rows of x][stride] from (m0, n0); null when there is one part only
  int64_t stride = 0, m0 = 0, n0 = 0;
  bool first = true, last = true;
};

template <int N, int M>
DS_INLINE void write(const Job& job, int64_t m, int64_t n, int64_t rows, const __m512 (&sum)[M][N],
                     const Partial& partial = Partial()) {
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; j += 4) {
      __m128 four = sums4(sum[i] + j);
      if (partial.sums) {
        float* at = partial.sums + (m + i - partial.m0) * partial.stride + n + j - partial.n0;
        if (!partial.first) four = _mm_add_ps(four, _mm_loadu_ps(at));
        if (!partial.last) {
          _mm_storeu_ps(at, four);
          continue;
        }
      }
      if (rows >= j + 4) {
        finish4(job, m + i, n + j, four);
      } else if (rows > j) {
        alignas(16) float sums[4];
        _mm_store_ps(sums, four);
        finish(job, m + i, n + j, sums, rows - j);
      }
    }
  }
}

// -- one pass over N rows of weights, decoded in registers, for M rows of x -------------------------------------------------------

// Step: chunks between two looks at the group's scale; 0 when there are no groups.
template <class F, class A, int N, int M, int Step>
DS_FAST static void direct(const Job& job, int64_t m, int64_t n, int64_t rows) {
  const typename F::Constants constants = F::constants();
  const typename A::T* x = static_cast<const typename A::T*>(job.x) + m * job.x_stride;
  const int64_t blocks = (job.k + 32 * F::kChunks - 1) / (32 * F::kChunks);
  const uint8_t* at[N];
  int64_t first[N];  // of the row's groups
  for (int j = 0; j < N; ++j) {
    const int64_t row = n + std::min<int64_t>(j, rows - 1);
    first[j] = row * job.groups;
    at[j] = job.codes + row * job.row_bytes;
  }
  const int64_t ahead = N * job.row_bytes;  // see [Note: asking ahead]
  __m512 sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M * N; ++i) sum[i / N][i % N] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t groups[F::kChunks] = {};
#pragma GCC unroll 8
    for (int c = 0; Step && c < F::kChunks; c += Step ? Step : 1) groups[c] = job.group_of(b * F::kChunks + c);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const uint8_t* codes = at[j] + b * F::kBytes;
#pragma GCC unroll 3
      for (int line = 0; line < F::kBytes / 64; ++line) _mm_prefetch(codes + ahead + 64 * line, _MM_HINT_T0);
      const typename F::Raw raw = F::raw(codes, constants);
      __m512 part[M];
      float scale = 1.0f;
      typename F::Group group = F::exact(job, first[j]);
#pragma GCC unroll 8
      for (int c = 0; c < F::kChunks; ++c) {
        if (Step && c % (Step ? Step : 1) == 0) {
          scale = job.scales[first[j] + groups[c]];
          group = F::exact(job, first[j] + groups[c]);
#pragma GCC unroll 2
          for (int i = 0; i < M; ++i) part[i] = _mm512_setzero_ps();
        }
        const V w = F::template chunk<false>(raw, c, constants, group);
        const typename A::T* from = x + (b * F::kChunks + c) * 32;
#pragma GCC unroll 2
        for (int i = 0; i < M; ++i) {
          __m512& to = Step ? part[i] : sum[i][j];
          to = A::dot(to, from + i * job.x_stride, w);
          const bool last = Step && (c % (Step ? Step : 1) == Step - 1 || c == F::kChunks - 1);
          if (last) sum[i][j] = _mm512_fmadd_ps(part[i], _mm512_set1_ps(scale), sum[i][j]);
        }
      }
    }
  }
  write<N, M>(job, m, n, rows, sum);
}

// -- eight rows of weights in bf16 or fp32 already, for M rows of x --------------------------------------------------------------

// Wide in weights and narrow in x: the weights stay in the first-level cache while x comes from the second, and 8 x 3 sums ask the
// second for half of what 4 x 6 do (9 % faster at 96 rows).
constexpr int kTileRows = 8, kTileBatch = 3;

// Rows of weights [row], `stride` apart, for the part [k, k + width) of x.
template <class A>
struct Panel {
  const typename A::T* w;
  int64_t stride, k, width;
  Partial partial;
};

// Ahead: w comes from memory. See [Note: asking ahead].
template <class A, int M, bool Ahead>
DS_FAST static void tile(const Job& job, const Panel<A>& panel, int64_t m, int64_t n, int64_t rows) {
  constexpr int N = kTileRows;
  const typename A::T* x = static_cast<const typename A::T*>(job.x) + m * job.x_stride + panel.k;
  const int64_t steps = panel.width / A::kLanes;
  const typename A::T* at[N];
  for (int j = 0; j < N; ++j) at[j] = panel.w + std::min<int64_t>(j, rows - 1) * panel.stride;
  __m512 sum[M][N];
#pragma GCC unroll 32
  for (int i = 0; i < M * N; ++i) sum[i / N][i % N] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
    V values[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) values[i] = A::load(x + i * job.x_stride + s * A::kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const V weights = A::load(at[j] + s * A::kLanes);
      if (Ahead) _mm_prefetch(at[j] + s * A::kLanes + N * panel.stride, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] = A::add(sum[i][j], values[i], weights);
    }
  }
  write<N, M>(job, m, n, rows, sum, panel.partial);
}

// Up to kTileRows rows of weights for all of [m0, m1), in tiles of nearly the same height.
template <class A, bool Ahead>
DS_FAST static void tiles(const Job& job, const Panel<A>& panel, int64_t m0, int64_t m1, int64_t n, int64_t rows) {
  const int64_t count = (m1 - m0 + kTileBatch - 1) / kTileBatch;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t m = m0 + (m1 - m0) * t / count, batch = m0 + (m1 - m0) * (t + 1) / count - m;
    if (t == 0 && batch == 3) tile<A, 3, Ahead>(job, panel, m, n, rows);
    if (t == 0 && batch == 2) tile<A, 2, Ahead>(job, panel, m, n, rows);
    if (t && batch == 3) tile<A, 3, false>(job, panel, m, n, rows);
    if (t && batch == 2) tile<A, 2, false>(job, panel, m, n, rows);
    if (batch == 1) tile<A, 1, Ahead>(job, panel, m, n, rows);
  }
}

// -- rows of weights into the buffer ---------------------------------------------------------------------------------------------

template <class F, class A, bool Grouped>
DS_FAST static void decode(const Job& job, int64_t row, int64_t k, int64_t width, typename A::T* out) {
  constexpr bool fold = Grouped && A::kFold;
  const typename F::Constants constants = F::constants();
  const int64_t first = k / 32, blocks = width / (32 * F::kChunks);
  const uint8_t* codes = job.codes + row * job.row_bytes + first / F::kChunks * F::kBytes;
  const int64_t ahead = kTileRows * job.row_bytes;  // see [Note: asking ahead]
  typename F::Group group = F::exact(job, row * job.groups);
  int64_t next = first / job.group_chunks, left = 0;  // the group after this one, and chunks until then
  float scale = 1.0f;
  for (int64_t b = 0; b < blocks; ++b, codes += F::kBytes) {
#pragma GCC unroll 3
    for (int line = 0; line < F::kBytes / 64; ++line) _mm_prefetch(codes + ahead + 64 * line, _MM_HINT_T0);
    const typename F::Raw raw = F::raw(codes, constants);
#pragma GCC unroll 8
    for (int c = 0; c < F::kChunks; ++c) {
      if (Grouped && left-- == 0) {
        const int64_t at = row * job.groups + std::min(next++, job.groups - 1);
        group = fold ? F::folded(job, at) : F::exact(job, at);
        scale = job.scales[at];
        left = job.group_chunks - 1 - (b == 0 && c == 0 ? first % job.group_chunks : 0);
      }
      A::put(out + (b * F::kChunks + c) * 32, F::template chunk<fold>(raw, c, constants, group), scale);
    }
  }
}

constexpr int64_t kDepthBytes = 4096;       // of a row at a time: eight rows fit in the first-level cache
constexpr int64_t kBatchBytes = 512 << 10;  // of x at a time: fit in the second-level cache
constexpr int64_t kFewRows = kBatchBytes / kDepthBytes;  // of x: decode eight rows of weights at a time, else all

// The buffer and the partial sums of one piece of work.
template <class T>
struct Scratch {
  T* weights = nullptr;
  float* sums = nullptr;
  ~Scratch() {
    std::free(weights);
    std::free(sums);
  }
  bool make(int64_t elements, int64_t partial) {
    weights = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(elements) * sizeof(T)));
    if (partial) sums = static_cast<float*>(std::malloc(static_cast<size_t>(partial) * sizeof(float)));
    return weights && (sums || !partial);
  }
};

template <class F, class A, bool Grouped>
DS_FAST static bool buffered(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  using T = typename A::T;
  const int64_t depth = std::min<int64_t>(kDepthBytes / static_cast<int64_t>(sizeof(T)), job.width);
  const int64_t stride = apart(depth, sizeof(T)), batch = kBatchBytes / kDepthBytes;
  const int64_t height = m1 - m0 <= kFewRows ? kTileRows : (n1 - n0 + kTileRows - 1) / kTileRows * kTileRows;
  Scratch<T> scratch;
  if (!scratch.make(height * stride, depth < job.width ? (m1 - m0) * height : 0)) return false;
  for (int64_t top = n0; top < n1; top += height) {
    const int64_t bottom = std::min(top + height, n1);
    for (int64_t k = 0; k < job.width; k += depth) {
      const int64_t width = std::min(depth, job.width - k);
      for (int64_t n = top; n < bottom; ++n) decode<F, A, Grouped>(job, n, k, width, scratch.weights + (n - top) * stride);
      const Partial partial{scratch.sums, height, m0, top, k == 0, k + width == job.width};
      for (int64_t m = m0; m < m1; m += batch) {
        for (int64_t n = top; n < bottom; n += kTileRows) {
          const Panel<A> panel{scratch.weights + (n - top) * stride, stride, k, width, partial};
          tiles<A, false>(job, panel, m, std::min(m + batch, m1), n, std::min<int64_t>(kTileRows, bottom - n));
        }
      }
    }
  }
  return true;
}

template <class F, class A, int Step>
DS_FAST static void directly(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (m1 - m0 == 1) {
    for (int64_t n = n0; n < n1; n += 8) direct<F, A, 8, 1, Step>(job, m0, n, n1 - n);
  } else {
    for (int64_t n = n0; n < n1; n += 4) direct<F, A, 4, 2, Step>(job, m0, n, n1 - n);
  }
}

template <class F, class A>
DS_FAST static bool quantised(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  if (m1 - m0 > 2) {
    return (job.grouped() ? buffered<F, A, true> : buffered<F, A, false>)(job, m0, m1, n0, n1);
  }
  if (!job.grouped()) {
    directly<F, A, 0>(job, m0, m1, n0, n1);
  } else if (job.group_chunks % F::kChunks == 0) {
    directly<F, A, F::kChunks>(job, m0, m1, n0, n1);
  } else if (job.group_chunks % 4 == 0) {
    directly<F, A, 4>(job, m0, m1, n0, n1);
  } else {
    directly<F, A, 1>(job, m0, m1, n0, n1);
  }
  return true;
}

// One row of x against rows of weights one after the other: a single stream from memory, which the processor foresees best.
DS_FAST static void stream(const Job& job, const uint16_t* w, int64_t m, int64_t n, int64_t rows) {
  using A = InBf16;
  const uint16_t* x = static_cast<const uint16_t*>(job.x) + m * job.x_stride;
  __m512 sum[1][kTileRows];
  for (int64_t j = 0; j < kTileRows; ++j) {
    const uint16_t* at = w + std::min(j, rows - 1) * job.k;
    __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 128 <= job.k; i += 128) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) part[u] = A::dot(part[u], x + i + 32 * u, A::load(at + i + 32 * u));
    }
    for (; i < job.k; i += 32) part[0] = A::dot(part[0], x + i, A::load(at + i));
    sum[0][j] = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
  }
  write<kTileRows, 1>(job, m, n, rows, sum);
}

// Rows of the weights in bf16. Numbers below 2^-126 become zero.
template <class F>
DS_FAST static bool dequantised(const Job& job, int64_t, int64_t, int64_t n0, int64_t n1) {
  Scratch<uint16_t> scratch;
  if (!scratch.make(job.width, 0)) return false;
  for (int64_t n = n0; n < n1; ++n) {
    decode<F, InBf16, true>(job, n, 0, job.width, scratch.weights);
    std::memcpy(static_cast<uint16_t*>(job.out) + n * job.k, scratch.weights, static_cast<size_t>(job.k) * 2);
  }
  return true;
}

DS_FAST static bool plain(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(job.codes);
  for (int64_t n = n0; n < n1; n += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, n1 - n);
    if (m1 - m0 == 1) {
      stream(job, weights + n * job.k, m0, n, rows);
    } else {
      tiles<InBf16, true>(job, Panel<InBf16>{weights + n * job.k, job.k, 0, job.k, Partial()}, m0, m1, n, rows);
    }
  }
  return true;
}

bool here() {
  __builtin_cpu_init();
  return has_isa(kAvx512) && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("fma");
}

}  // namespace

Body pick_dot512(int format, bool in_bf16, int64_t k) {
  static const bool fits = here();
  if (!fits) return nullptr;
  if (format == kPlain) return in_bf16 && k % 32 == 0 ? plain : nullptr;
  if (format == kInt8 && k % 64) return nullptr;  // rows are not padded
  if (format == kInt8) return in_bf16 ? quantised<Int8, InBf16> : quantised<Int8, InFloat>;
  if (format == kInt4) return in_bf16 ? quantised<Int4, InBf16> : quantised<Int4, InFloat>;
  return in_bf16 ? quantised<Fp6, InBf16> : quantised<Fp6, InFloat>;
}

Body pick_dequantize512(int format, int dtype, int64_t k) {
  if (dtype != kBf16 || !pick_dot512(format, true, k)) return nullptr;
  return format == kInt8 ? dequantised<Int8> : format == kInt4 ? dequantised<Int4> : dequantised<Fp6>;
}

void fill_x512(const void* x, int dtype, int64_t k, int64_t width, bool in_bf16, void* out) {
  if (in_bf16) {
    std::memcpy(out, x, static_cast<size_t>(k) * 2);
    std::memset(static_cast<uint16_t*>(out) + k, 0, static_cast<size_t>(width - k) * 2);
    return;
  }
  float* to = static_cast<float*>(out);
  for (int64_t chunk = 0; chunk < width; chunk += 32) {
    for (int64_t i = 0; i < 32; ++i) {
      to[chunk + i / 2 + i % 2 * 16] = chunk + i < k ? load_as_float(x, dtype, chunk + i) : 0.0f;
    }
  }
}

}  // namespace ds

#else

namespace ds {

Body pick_dot512(int, bool, int64_t) { return nullptr; }
Body pick_dequantize512(int, int, int64_t) { return nullptr; }
void fill_x512(const void*, int, int64_t, int64_t, bool, void*) {}

}  // namespace ds

#endif
