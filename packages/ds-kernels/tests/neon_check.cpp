// Runs under an emulator: the NEON bodies must write the same bits as the scalar ones, for all rules, dtypes and flags.
// Exit status: the number of differing combinations, at most 100.
#include <cstdio>

#include "optim.h"

static uint32_t state = 1;
static uint32_t bits() { return state = state * 1664525u + 1013904223u; }

// Every exponent, both signs, subnormals, infinities and NaN: raw random bits.
static void fill(void* out, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(out)[i] = static_cast<unsigned char>(bits() >> 24);
}

static float value(const float* part, int dtype, int64_t i) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(part);
  return dtype == 0 ? part[i] : dtype == 1 ? ds::to_float(ds::bf16{half[i]}) : ds::to_float(ds::fp16{half[i]});
}

constexpr int64_t kNumel = 4099;
enum { kParam, kGrad, kFirst, kSecond, kCopy, kParts };
static float start[kParts][kNumel], work[2][kParts][kNumel];

static bool same(const ds::Kinds& kinds) {
  const int dtypes[] = {kinds.param, kinds.grad, kinds.state[0], kinds.state[1], kinds.copy};
  for (int part = 0; part < kParts; ++part) {
    for (int64_t i = 0; i < kNumel && dtypes[part] < ds::kNone; ++i) {
      const float a = value(work[0][part], dtypes[part], i), b = value(work[1][part], dtypes[part], i);
      if (a != a ? b == b : ds::bits_of(a) != ds::bits_of(b)) return false;
    }
  }
  return true;
}

// Runs rule `rule` (the one after the last is LAMB) on work[k]; false if the library refuses.
static bool run(int k, int rule, int flags, int stochastic, const ds::Kinds& kinds) {
  std::memcpy(work[k], start, sizeof start);
  void *params[] = {work[k][kParam]}, *firsts[] = {work[k][kFirst]}, *seconds[] = {work[k][kSecond]};
  void* copies[] = {work[k][kCopy]};
  const void* grads[] = {work[k][kGrad]};
  const int64_t numels[] = {kNumel};
  const float scales[] = {0.01f, 1.5f};
  const int isa = k ? ds::kNeon : ds::kScalar;
  void* const* wanted = kinds.copy == ds::kNone ? nullptr : copies;
  if (rule == ds::kRules) {
    const DsLambCall call{1, params, grads, {firsts, seconds}, wanted, numels, scales, 0.1, 0.01, 10.0, 0.37f, 0.1f, 0.9f,
                          0.1f, 1e-8f, 0.1f, {1, 2, 3}, kinds, stochastic, isa, 1};
    return ds_lamb_step(&call) == ds::kOk;
  }
  const int states = rule == ds::kAdam ? 2 : rule == ds::kSgd ? 0 : 1;
  const DsOptimCall call{1, params, grads, {states > 0 ? firsts : nullptr, states > 1 ? seconds : nullptr}, wanted,
                         {nullptr, nullptr, nullptr}, numels, scales, 0.37f, {0.1f, 0.9f, 0.1f, 1e-8f, 0.999f, 0},
                         {1, 2, 3}, kinds, rule, flags, stochastic, isa, 1};
  return ds_optim_step(&call) == ds::kOk;
}

int main() {
  int bad = 0, runs = 0;
  for (int rule = 0; rule <= ds::kRules; ++rule)
    for (int kind = 0; kind < 108; ++kind) {
      const int p = kind % 3, g = kind / 3 % 3, s = kind / 9 % 3, c = kind / 27;
      const int flags = kind % 4, stochastic = kind % 2;
      const ds::Kinds kinds{p, g, {s, s}, c};
      fill(start, sizeof start);
      for (int64_t i = 0; i < kNumel; ++i) {
        if (s == 0) start[kSecond][i] = __builtin_fabsf(start[kSecond][i]);
        if (rule == ds::kRules) {  // finite norms: a tensor with a NaN has no length
          for (int part = 0; part < kParts; ++part) start[part][i] = ds::float_of((ds::bits_of(start[part][i]) & 0x07ff07ffu) | 0x38003800u);
        }
      }
      if (!run(0, rule, flags, stochastic, kinds) || !run(1, rule, flags, stochastic, kinds)) return 101;
      ++runs;
      if (!same(kinds) && ++bad) std::printf("differs: rule %d param %d grad %d state %d copy %d\n", rule, p, g, s, c);
    }
  std::printf("%d combinations, %d differ\n", runs, bad);
  return bad < 100 ? bad : 100;
}
