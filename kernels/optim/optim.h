// What the loops of this family are given: codes, pointers of one tensor, constants of one call.
#pragma once
#include <cstdint>

#include "abi.h"

namespace ds {

enum Rule { kAdam = 0, kAdagrad = 1, kLion = 2, kSgd = 3, kMomentum = 4, kRules = 5 };
enum Flags { kL2 = 1, kNesterov = 2 };  // weight decay joins the gradient; momentum looks ahead

struct Nothing {};  // the element type of a copy that is not wanted

constexpr int kMaxStates = 2, kConstants = 6, kScales = 2;

// How each part of a tensor is held: dtype codes of abi.h.
struct Kinds {
  int32_t param, grad, state[kMaxStates], copy;
};

struct Tensors {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  void* copy;
  const float* scale;  // kScales numbers that depend on how many steps this tensor has made
};

struct Constants {
  float grad_coef, of_rule[kConstants];
  int flags;
  bool stream;      // stores of what is not read again go past the caches
  bool stochastic;  // how bf16 parameters and states are rounded
  uint32_t seed[1 + kMaxStates];
  Kinds kinds;
};

using Range = void (*)(const Tensors&, int64_t begin, int64_t end, const Constants&);
using Keep = void (*)(void* to, const void* from, int64_t bytes, bool stream);

// A chunk is long enough that claiming it costs nothing and short enough that threads finish together.
constexpr int64_t kChunk = 32768;

// Streaming stores skip reading the lines they overwrite, but leave the copy outside the caches: only for what would not fit there.
constexpr int64_t kStreamNumel = 4 << 20;

inline int64_t size_of(int32_t dtype) { return dtype == kFloat ? 4 : 2; }

inline void* at(void* start, int64_t index, int32_t dtype) {
  return start ? static_cast<char*>(start) + index * size_of(dtype) : nullptr;
}

inline const void* at(const void* start, int64_t index, int32_t dtype) {
  return static_cast<const char*>(start) + index * size_of(dtype);
}

inline bool known(int32_t dtype, int last) { return dtype >= kFloat && dtype <= last; }

}  // namespace ds

// What Python calls; ops/optim/ has the same structs, field by field.
extern "C" {

struct DsOptimCall {
  int64_t count;
  void* const* params;
  const void* const* grads;
  void* const* states[ds::kMaxStates];     // null where the rule has none
  void* const* copies;                     // null when none are wanted
  void* const* saved[1 + ds::kMaxStates];  // where to keep parameters and states as they were, or null
  const int64_t* numels;
  const float* scales;  // ds::kScales for each tensor
  float grad_coef, constants[ds::kConstants];
  uint32_t seeds[1 + ds::kMaxStates];
  ds::Kinds kinds;
  int32_t rule, flags, stochastic, isa, threads;
};

struct DsLambCall {
  int64_t count;
  void* const* params;
  const void* const* grads;
  void* const* states[ds::kMaxStates];
  void* const* copies;  // null when none are wanted
  const int64_t* numels;
  const float* scales;  // ds::kScales for each tensor
  double lr, min_coeff, max_coeff;
  float grad_coef, lerp, beta2, square, eps, decay;
  uint32_t seeds[1 + ds::kMaxStates];
  ds::Kinds kinds;
  int32_t stochastic, isa, threads;
};

DS_EXPORT int ds_optim_step(const DsOptimCall* call);
DS_EXPORT int ds_lamb_step(const DsLambCall* call);

}  // extern "C"
