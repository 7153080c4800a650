// Weight-only quantised linear and dequantising on the CPU: plain C ABI, no torch and no Python header.
#include "linear.h"

#include <atomic>
#include <cstdlib>

#include "chunks.h"

#define DS_LOOP "linear_loop.h"
#include "each_set.h"

namespace ds {

// Rows of weights in a piece of work: enough to make claiming one free, few enough that threads finish together.
constexpr int64_t kPieceRows = 32;
// Rows of x in a piece of work: a piece decodes its weights once, whatever its rows of x, and keeps sums for all of them.
constexpr int64_t kPieceBatch = 1024;

static bool over_pieces(const Job& job, Body body, int64_t batch, int threads) {
  const int64_t across = (job.n + kPieceRows - 1) / kPieceRows, parts = (batch + kPieceBatch - 1) / kPieceBatch;
  std::atomic<bool> done{true};
  over_chunks(across * parts, threads, [&](int64_t piece) {
    const int64_t n = piece % across * kPieceRows, part = piece / across;
    const int64_t n_end = std::min(n + kPieceRows, job.n), m = batch * part / parts, m_end = batch * (part + 1) / parts;
    if (!body(job, m, m_end, n, n_end)) done = false;
  });
  return done;
}

static void fill_x_plain(const void* x, int dtype, int64_t k, int64_t width, float* out) {
  for (int64_t i = 0; i < k; ++i) out[i] = load_as_float(x, dtype, i);
  std::fill(out + k, out + width, 0.0f);
}

// Gives the body x as it wants it: as it is when that will do, else a copy, which the caller frees.
static void* prepare_x(Job* job, int dtype, bool in_bf16, bool fast) {
  const int64_t block = fast ? block_codes(job->format) : 16;
  job->width = job->x_stride = (job->k + block - 1) / block * block;
  const int64_t element = in_bf16 ? 2 : 4;
  if (job->m > 2) job->x_stride = apart(job->width, element);
  const bool as_it_is = job->x_stride == job->k && (in_bf16 || (!fast && dtype == kFloat));
  if (as_it_is) return nullptr;
  const int64_t row = job->x_stride * element;
  char* made = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((job->m * row + 63) / 64 * 64)));
  if (!made) return nullptr;
  for (int64_t m = 0; m < job->m; ++m) {
    const char* from = static_cast<const char*>(job->x) + m * job->k * (dtype == kFloat ? 4 : 2);
    if (fast) {
      fill_x512(from, dtype, job->k, job->width, in_bf16, made + m * row);
    } else {
      fill_x_plain(from, dtype, job->k, job->width, reinterpret_cast<float*>(made + m * row));
    }
  }
  job->x = made;
  return made;
}

}  // namespace ds

extern "C" {

struct DsLinearCall {
  const void *x, *codes;
  const float* scales;
  const uint8_t* zeros;
  const float* bias;
  void* out;
  int64_t m, n, k, group;  // group: input channels to a scale, a multiple of 32; 0 for one scale per row
  int32_t format, x_dtype, isa, without_bf16, threads;  // without: for tests
};

static int job_of(const DsLinearCall* call, int* isa, ds::Job* job) {
  using namespace ds;
  if (!call || call->threads < 1 || call->m < 0 || call->n < 1 || call->k < 1) return kBadArgument;
  if (call->format < kPlain || call->format > kFp6 || (call->format != kPlain && !call->scales)) return kBadArgument;
  if (call->group < 0 || call->group % kChunkCodes) return kBadArgument;
  if (call->x_dtype < kFloat || call->x_dtype > kFp16) return kBadArgument;
  *isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(*isa)) return kNoSuchIsa;
  const int64_t chunks = (call->k + kChunkCodes - 1) / kChunkCodes;
  const int64_t width = call->group ? std::min(call->group / kChunkCodes, chunks) : chunks;
  *job = Job{call->x, call->k, call->k, static_cast<const uint8_t*>(call->codes), row_bytes(call->format, call->k),
             call->format == kPlain ? nullptr : call->scales, call->zeros, (chunks + width - 1) / width, width,
             call->bias, call->out, call->x_dtype, call->m, call->n, call->k, call->format};
  return kOk;
}

// out[m][n] = x[m][k] times the transposed weights [n][k], in x's dtype.
DS_EXPORT int ds_linear(const DsLinearCall* call) {
  using namespace ds;
  Job job;
  int isa = 0;
  if (const int status = job_of(call, &isa, &job)) return status;
  const bool bf16_in = call->x_dtype == kBf16;
  Body body = isa == kAvx512 && !call->without_bf16 ? pick_dot512(job.format, bf16_in, job.k) : nullptr;
  const bool fast = body != nullptr, in_bf16 = fast && bf16_in;
  if (!body) body = DS_PICK(isa, body);
  void* copy = prepare_x(&job, call->x_dtype, in_bf16, fast);
  if (!copy && (job.x_stride != job.k || (!in_bf16 && (fast || call->x_dtype != kFloat)))) return kNoMemory;
  const bool done = over_pieces(job, body, job.m, call->threads);
  std::free(copy);
  return done ? kOk : kNoMemory;
}

// out[n][k] = the weights in x_dtype; x, m and bias are not read.
DS_EXPORT int ds_linear_dequantize(const DsLinearCall* call) {
  using namespace ds;
  Job job;
  int isa = 0;
  if (const int status = job_of(call, &isa, &job)) return status;
  const int64_t block = block_codes(job.format);
  job.width = (job.k + block - 1) / block * block;
  const bool fast = isa == kAvx512 && !call->without_bf16;
  Body body = fast ? pick_dequantize512(job.format, call->x_dtype, job.k) : nullptr;
  if (!body) body = DS_PICK(isa, dequantize);
  return over_pieces(job, body, 1, call->threads) ? kOk : kNoMemory;
}

// Is the body with bf16 dot products for this processor?
DS_EXPORT int ds_linear_has_dot512() { return ds::pick_dot512(ds::kInt8, true, 64) != nullptr; }

}  // extern "C"
