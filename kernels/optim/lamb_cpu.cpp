// One LAMB step on the CPU over a list of tensors: plain C ABI, no torch and no Python header.
#include "optim.h"
#include "tensors.h"

namespace ds {

struct LambTensors {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  void* copy;
  const float* scale;  // 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};

struct LambNumbers {
  float grad_coef, lerp, beta2, square, eps, decay;
  bool stochastic;
  uint32_t seed[1 + kMaxStates];
  Kinds kinds;
};

}  // namespace ds

#define DS_LOOP "lamb_loop.h"
#include "each_set.h"

extern "C" {

DS_EXPORT int ds_lamb_step(const DsLambCall* call) {
  using namespace ds;
  if (!call || call->count < 0 || call->threads < 1) return kBadArgument;
  const Kinds& kinds = call->kinds;
  if (!known(kinds.param, kFp16) || !known(kinds.grad, kFp16) || !known(kinds.copy, kNone)) return kBadArgument;
  for (int32_t state : kinds.state) {
    if (!known(state, kFp16)) return kBadArgument;
  }
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const ChunkTable table(call->count, call->numels);
  if (!table.ok()) return kNoMemory;
  const size_t chunks = static_cast<size_t>(table.chunks()), count = static_cast<size_t>(call->count);
  double* norms = static_cast<double*>(std::malloc((2 * chunks + 1) * sizeof(double)));
  float* steps = static_cast<float*>(std::malloc((count + 1) * sizeof(float)));
  if (!norms || !steps) {
    std::free(norms);
    std::free(steps);
    return kNoMemory;
  }
  LambNumbers k{call->grad_coef, call->lerp, call->beta2, call->square, call->eps, call->decay, call->stochastic != 0, {}, kinds};
  std::memcpy(k.seed, call->seeds, sizeof k.seed);
  const auto measure = DS_PICK(isa, lamb_measure);
  const auto apply = DS_PICK(isa, lamb_apply);
  const auto tensors = [&](int64_t i) {
    return LambTensors{call->params[i], call->grads[i], {call->states[0][i], call->states[1][i]},
                       call->copies ? call->copies[i] : nullptr, call->scales + kScales * i};
  };

  table.over(call->threads, [&](int64_t i, int64_t begin, int64_t end, int64_t chunk) {
    measure(tensors(i), begin, end, k, norms + 2 * chunk);
  });
  for (int64_t i = 0; i < call->count; ++i) {  // in order: the sum does not depend on who measured what
    double weights = 0, changes = 0;
    for (int64_t chunk = table.first(i); chunk < table.first(i + 1); ++chunk) {
      weights += norms[2 * chunk];
      changes += norms[2 * chunk + 1];
    }
    double ratio = 1;
    if (weights > 0 && changes > 0) {
      ratio = std::min(std::max(__builtin_sqrt(weights) / __builtin_sqrt(changes), call->min_coeff), call->max_coeff);
    }
    steps[i] = static_cast<float>(call->lr * ratio);
  }
  table.over(call->threads, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    apply(tensors(i), begin, end, k, steps[i]);
  });
  std::free(norms);
  std::free(steps);
  return kOk;
}

}  // extern "C"
