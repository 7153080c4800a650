// Includes the file named by DS_LOOP once per instruction set of this processor family, each time with
//   DS_SET     the namespace its functions go to (scalar, avx2, avx512, neon),
//   DS_VEC     the struct of vector.h,
//   DS_TARGET  the attribute that each of its functions needs.
// Plain loops in such a file are vectorised for the set by the compiler; intrinsics only where that was measured to fall short.
// No include guard: a family may have several loops. DS_LOOP is undefined at the end.
//
// DS_PICK(isa, expression) gives the expression from the set's namespace: `DS_PICK(isa, pick(dtype))`.
#include "abi.h"
#include "vector.h"

#define DS_SET scalar
#define DS_VEC Scalar
#define DS_TARGET
#include DS_LOOP
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET

#if defined(__x86_64__)
#define DS_SET avx2
#define DS_VEC Avx2
#define DS_TARGET __attribute__((target("avx2,f16c")))
#include DS_LOOP
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET

#define DS_SET avx512
#define DS_VEC Avx512
#define DS_TARGET __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#include DS_LOOP
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET
#elif defined(__aarch64__)
#define DS_SET neon
#define DS_VEC Neon
#define DS_TARGET
#include DS_LOOP
#undef DS_SET
#undef DS_VEC
#undef DS_TARGET
#endif
#undef DS_LOOP

#ifndef DS_PICK
#if defined(__x86_64__)
#define DS_PICK(isa, expression) \
  ((isa) == ds::kAvx512 ? ds::avx512::expression : (isa) == ds::kAvx2 ? ds::avx2::expression : ds::scalar::expression)
#elif defined(__aarch64__)
#define DS_PICK(isa, expression) ((isa) == ds::kNeon ? ds::neon::expression : ds::scalar::expression)
#else
#define DS_PICK(isa, expression) (ds::scalar::expression)
#endif
#endif
