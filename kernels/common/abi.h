// What every library of kernels/ says in its plain C interface: codes for dtypes and outcomes, and the instruction sets.
//
// A family includes it in each *_cpu.cpp; Python's side is ds_kernels/native.py.
#pragma once
#include "half.h"

#define DS_EXPORT __attribute__((visibility("default")))

namespace ds {

enum Dtype { kFloat = 0, kBf16 = 1, kFp16 = 2, kNone = 3 };
enum Isa { kAuto = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3, kNeon = 4 };
enum Status { kOk = 0, kBadArgument = 1, kNoSuchIsa = 2, kNoMemory = 3 };

inline bool has_isa(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (isa == kAvx2) return avx2;
  if (isa == kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
#elif defined(__aarch64__)
  if (isa == kNeon) return true;
#endif
  return isa == kScalar;
}

inline int best_isa() {
  const int ranked[] = {kNeon, kAvx512, kAvx2};
  for (int isa : ranked) {
    if (has_isa(isa)) return isa;
  }
  return kScalar;
}

}  // namespace ds

extern "C" {
__attribute__((used)) DS_EXPORT inline int ds_best_isa() { return ds::best_isa(); }
__attribute__((used)) DS_EXPORT inline int ds_has_isa(int isa) { return ds::has_isa(isa); }
}
