// Adam and AdamW on the CPU over a list of tensors: plain C ABI, no torch and no Python header.
#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "abi.h"
#include "chunks.h"

namespace ds {

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

#define DS_LOOP "adam_loop.h"
#include "each_set.h"

namespace ds {

// A chunk is long enough that claiming it costs nothing and short enough that threads finish together.
constexpr int64_t kChunk = 32768;

// Streaming stores skip reading the lines they overwrite, but leave the copy outside the caches: only for what would not fit there.
constexpr int64_t kStreamNumel = 4 << 20;

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

DS_EXPORT int ds_adam_step(const DsAdamCall* call) {
  using namespace ds;
  if (!call || call->count < 0 || call->threads < 1) return kBadArgument;
  const auto known = [](int dtype, int last) { return dtype >= kFloat && dtype <= last; };
  if (!known(call->param_dtype, kFp16) || !known(call->grad_dtype, kFp16)) return kBadArgument;
  if (!known(call->copy_dtype, kNone)) return kBadArgument;
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
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
  const Range run = DS_PICK(isa, pick(call->param_dtype, call->grad_dtype, call->copy_dtype));
  const Constants constants{call->grad_coef, call->lerp,  call->beta2,   call->square,
                            call->eps,       call->decay, call->l2 != 0, copying && numel >= kStreamNumel};

  over_chunks(chunks, call->threads, [&](int64_t chunk) {
    const int64_t* after = std::upper_bound(first, first + count + 1, chunk);
    const size_t i = static_cast<size_t>(after - first) - 1;
    const Tensors t{call->params[i],       call->grads[i],        call->exp_avgs[i],    call->exp_avg_sqs[i],
                    copying ? call->copies[i] : nullptr, call->step_sizes[i], call->denom_scales[i]};
    const int64_t begin = (chunk - first[i]) * kChunk, rest = call->numels[i] - begin;
    run(t, begin, begin + (rest < kChunk ? rest : kChunk), constants);
  });
  std::free(first);
  return kOk;
}

}  // extern "C"
