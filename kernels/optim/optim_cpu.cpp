// One step of an element-wise optimizer on the CPU over a list of tensors: plain C ABI, no torch and no Python header.
#include <type_traits>

#include "optim.h"
#include "tensors.h"

#define DS_LOOP "optim_loop.h"
#include "each_set.h"

extern "C" {

DS_EXPORT int ds_optim_step(const DsOptimCall* call) {
  using namespace ds;
  if (!call || call->count < 0 || call->threads < 1 || call->rule < 0 || call->rule >= kRules) return kBadArgument;
  const Kinds& kinds = call->kinds;
  if (!known(kinds.param, kFp16) || !known(kinds.grad, kFp16) || !known(kinds.copy, kNone)) return kBadArgument;
  for (int32_t state : kinds.state) {
    if (!known(state, kFp16)) return kBadArgument;
  }
  const int isa = call->isa == kAuto ? best_isa() : call->isa;
  if (!has_isa(isa)) return kNoSuchIsa;
  const ChunkTable table(call->count, call->numels);
  if (!table.ok()) return kNoMemory;

  Constants constants{};
  constants.grad_coef = call->grad_coef;
  std::memcpy(constants.of_rule, call->constants, sizeof constants.of_rule);
  std::memcpy(constants.seed, call->seeds, sizeof constants.seed);
  constants.flags = call->flags;
  constants.stream = table.numel() >= kStreamNumel;
  constants.stochastic = call->stochastic != 0;
  constants.kinds = kinds;
  const Range run = DS_PICK(isa, pick(call->rule, kinds));
  const Keep keep = DS_PICK(isa, keep);

  table.over(call->threads, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    Tensors t{};
    t.param = call->params[i];
    t.grad = call->grads[i];
    t.copy = call->copies ? call->copies[i] : nullptr;
    t.scale = call->scales + kScales * i;
    for (int s = 0; s < kMaxStates; ++s) t.state[s] = call->states[s] ? call->states[s][i] : nullptr;
    // Kept in pieces that the first-level cache holds, so that the step finds there what was read for keeping.
    const int64_t piece = call->saved[0] ? 2048 : end - begin;
    for (int64_t from = begin; from < end; from += piece) {
      const int64_t to = end - from < piece ? end : from + piece;
      for (int s = 0; call->saved[0] && s <= kMaxStates; ++s) {
        const int32_t dtype = s ? kinds.state[s - 1] : kinds.param;
        void* source = s ? t.state[s - 1] : t.param;
        if (source) keep(at(call->saved[s][i], from, dtype), at(source, from, dtype), (to - from) * size_of(dtype), constants.stream);
      }
      run(t, from, to, constants);
    }
  });
  return kOk;
}

}  // extern "C"
