// Adam and AdamW on the CPU over a list of tensors: plain C ABI, no torch and no Python header.
#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "vector.h"

namespace ds {

enum Dtype { kFloat = 0, kBf16 = 1, kFp16 = 2, kNone = 3 };
enum Isa { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3, kNeon = 4 };
enum Status { kOk = 0, kBadArgument = 1, kNoSuchIsa = 2, kNoMemory = 3 };

struct Nothing {};  // the element type of a copy that is not wanted

struct Tensors {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  void* copy;
  float step_size, denom_scale;
};

struct Constants {
  float grad_coef, lerp, beta2, square, eps, decay;
  bool l2, stream;
};

using Range = void (*)(const Tensors&, int64_t begin, int64_t end, const Constants&);

}  // namespace ds

#define DS_SET scalar
#define DS_VEC Scalar
#define DS_TARGET
#include "adam_loop.h"
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET

#if defined(__x86_64__)
#define DS_SET avx2
#define DS_VEC Avx2
#define DS_TARGET __attribute__((target("avx2,f16c")))
#include "adam_loop.h"
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET

#define DS_SET avx512
#define DS_VEC Avx512
#define DS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
#include "adam_loop.h"
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET
#elif defined(__aarch64__)
#define DS_SET neon
#define DS_VEC Neon
#define DS_TARGET
#include "adam_loop.h"
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET
#endif

namespace ds {

static bool has(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (isa == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
#elif defined(__aarch64__)
  if (isa == kNeon) return true;
#endif
  return isa == kScalar;
}

static int best() {
  const int ranked[] = {kNeon, kAvx512, kAvx2};
  for (int isa : ranked) {
    if (has(isa)) return isa;
  }
  return kScalar;
}

static Range pick(int isa, int param, int grad, int copy) {
#if defined(__x86_64__)
  if (isa == kAvx512) return avx512::pick(param, grad, copy);
  if (isa == kAvx2) return avx2::pick(param, grad, copy);
#elif defined(__aarch64__)
  if (isa == kNeon) return neon::pick(param, grad, copy);
#endif
  return scalar::pick(param, grad, copy);
}

// A chunk is long enough that claiming it costs nothing and short enough that threads finish together.
constexpr int64_t kChunk = 32768;

// Streaming stores skip reading the lines they overwrite, but leave the copy outside the caches: only for what would not fit there.
constexpr int64_t kStreamNumel = 4 << 20;

// Each thread owns a run of chunks and helps the others when done: memory stays with the thread that first touched it,
// and a core taken away by another process does not hold up the step.
struct alignas(64) Cursor {
  std::atomic<int64_t> next;
  int64_t end;
};

}  // namespace ds

extern "C" {

struct DsAdamCall {
  int64_t count;
  void* const* params;
  const void* const* grads;
  float* const* exp_avgs;
  float* const* exp_avg_sqs;
  void* const* copies;  // read only when copy_dtype is not kNone
  const int64_t* numels;
  const float* step_sizes;    // lr / (1 - beta1^t), one per tensor
  const float* denom_scales;  // 1 / sqrt(1 - beta2^t), one per tensor
  float grad_coef, lerp, beta2, square, eps, decay;
  int32_t param_dtype, grad_dtype, copy_dtype, l2, isa, threads;
};

#define DS_EXPORT __attribute__((visibility("default")))

DS_EXPORT int ds_adam_abi() { return 1; }

DS_EXPORT int ds_adam_best_isa() { return ds::best(); }

DS_EXPORT int ds_adam_has_isa(int isa) { return ds::has(isa); }

DS_EXPORT int ds_adam_step(const DsAdamCall* call) {
  using namespace ds;
  if (!call || call->count < 0 || call->threads < 1) return kBadArgument;
  const auto known = [](int dtype, int last) { return dtype >= kFloat && dtype <= last; };
  if (!known(call->param_dtype, kFp16) || !known(call->grad_dtype, kFp16)) return kBadArgument;
  if (!known(call->copy_dtype, kNone)) return kBadArgument;
  const int isa = call->isa == kAuto ? best() : call->isa;
  if (!has(isa)) return kNoSuchIsa;
  if (call->count == 0) return kOk;

  const size_t count = static_cast<size_t>(call->count);
  int64_t* first = static_cast<int64_t*>(std::malloc((count + 1) * sizeof(int64_t)));  // chunks before tensor i
  if (!first) return kNoMemory;
  int64_t numel = 0;
  first[0] = 0;
  for (size_t i = 0; i < count; ++i) {
    numel += call->numels[i];
    first[i + 1] = first[i] + (call->numels[i] + kChunk - 1) / kChunk;
  }
  const int64_t chunks = first[count];
  const bool copying = call->copy_dtype != kNone;
  const Range run = pick(isa, call->param_dtype, call->grad_dtype, call->copy_dtype);
  const Constants constants{call->grad_coef, call->lerp,  call->beta2,   call->square,
                            call->eps,       call->decay, call->l2 != 0, copying && numel >= kStreamNumel};

  auto run_chunk = [&](int64_t chunk, size_t& i) {
    if (chunk < first[i]) i = 0;
    while (chunk >= first[i + 1]) ++i;
    const Tensors t{call->params[i],       call->grads[i],        call->exp_avgs[i],    call->exp_avg_sqs[i],
                    copying ? call->copies[i] : nullptr, call->step_sizes[i], call->denom_scales[i]};
    const int64_t begin = (chunk - first[i]) * kChunk, rest = call->numels[i] - begin;
    run(t, begin, begin + (rest < kChunk ? rest : kChunk), constants);
  };

  const int threads = static_cast<int>(call->threads < chunks ? call->threads : chunks);
  Cursor* cursors = threads > 1 ? static_cast<Cursor*>(std::aligned_alloc(64, sizeof(Cursor) * threads)) : nullptr;
  if (!cursors) {
    size_t i = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run_chunk(chunk, i);
    std::free(first);
    return kOk;
  }
  for (int t = 0; t < threads; ++t) {
    new (&cursors[t].next) std::atomic<int64_t>(chunks * t / threads);
    cursors[t].end = chunks * (t + 1) / threads;
  }
#pragma omp parallel num_threads(threads)
  {
    size_t i = 0;
    const int self = omp_get_thread_num();
    for (int k = 0; k < threads; ++k) {
      Cursor& cursor = cursors[(self + k) % threads];
      for (int64_t chunk; (chunk = cursor.next.fetch_add(1, std::memory_order_relaxed)) < cursor.end;) run_chunk(chunk, i);
    }
  }
  std::free(cursors);
  std::free(first);
  return kOk;
}

}  // extern "C"
