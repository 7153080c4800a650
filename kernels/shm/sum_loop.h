// Sums the same elements of several ranks, in rank order, each sum rounded to the output's dtype; once per instruction set.
#include <type_traits>

#include "lanes.h"

namespace ds {
namespace DS_SET {

// The bits of x as bf16 holds it, in the high halves; the low ones are 0.
DS_TARGET static inline Words near_bf16(Floats x) {
  const Words u = as<Words>(x);
  const Words near = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u, quiet = (u & 0xffff0000u) | 0x400000u;
  return x == x ? near : quiet;
}

// As T holds it: where sums are fp32 that is itself, else it is rounded.
template <class T>
DS_TARGET static inline Floats rounded(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same<T, bf16>::value) {
    return as<Floats>(near_bf16(x));
  } else {
    T held[W];
    store(held, x);
    return load(held);
  }
}

// Pairs of bf16 as words: the odd ones are floats with their low half cleared, the even ones with it shifted up. Half
// the work of widening and narrowing each of them.
DS_TARGET static int64_t add_pairs(bf16* out, void* const* also, int copies, const bf16* const* from, int ranks, int64_t begin,
                                   int64_t end) {
  int64_t i = begin;
  for (; i + 2 * W <= end; i += 2 * W) {
    const Words first = read<Words>(from[0] + i);
    Words odd = first & 0xffff0000u, even = first << 16;
    for (int r = 1; r < ranks; ++r) {
      const Words next = read<Words>(from[r] + i);
      odd = near_bf16(as<Floats>(odd) + as<Floats>(next & 0xffff0000u));
      even = near_bf16(as<Floats>(even) + as<Floats>(next << 16));
    }
    const Words both = odd | (even >> 16);
    write(out + i, both);
    for (int c = 0; c < copies; ++c) write(static_cast<bf16*>(also[c]) + i, both);
  }
  return i;
}

template <class To, class From, int kRanks>
DS_TARGET static void add(void* out, void* const* also, int copies, const void* const* in, int ranks, int64_t begin, int64_t end,
                          float factor) {
  const From* from[64];
  const int many = kRanks ? kRanks : ranks;
  for (int r = 0; r < many; ++r) from[r] = static_cast<const From*>(in[r]);
  To* to = static_cast<To*>(out);
  const bool scaled = factor != 1.0f;
  constexpr bool kExact = sizeof(To) == sizeof(float) || std::is_same<To, From>::value;  // a From is a To
  int64_t i = begin;
  if constexpr (std::is_same<To, bf16>::value && std::is_same<From, bf16>::value) {
    if (!scaled) i = add_pairs(to, also, copies, from, many, begin, end);
  }
  for (; i + W <= end; i += W) {
    Floats sum = load(from[0] + i);
    if constexpr (!kExact) sum = rounded<To>(sum);
    for (int r = 1; r < many; ++r) {
      Floats next = load(from[r] + i);
      if constexpr (!kExact) next = rounded<To>(next);
      sum = sum + next;
      if (scaled || r + 1 < many) sum = rounded<To>(sum);  // the last one is rounded as it is stored
    }
    if (scaled) sum = sum * factor;
    store(to + i, sum);
    for (int c = 0; c < copies; ++c) std::memcpy(static_cast<To*>(also[c]) + i, to + i, W * sizeof(To));
  }
  for (; i < end; ++i) {
    To held;
    from_float(to_float(from[0][i]), &held);
    for (int r = 1; r < many; ++r) {
      To next;
      from_float(to_float(from[r][i]), &next);
      from_float(to_float(held) + to_float(next), &held);
    }
    if (scaled) from_float(to_float(held) * factor, &held);
    to[i] = held;
    for (int c = 0; c < copies; ++c) static_cast<To*>(also[c])[i] = held;
  }
}

template <class To, class From>
static Sum pick_ranks(int ranks) {
  return ranks == 2 ? add<To, From, 2> : add<To, From, 0>;
}

template <class To>
static Sum pick_from(int dtype, int ranks) {
  if (dtype == kBf16) return pick_ranks<To, bf16>(ranks);
  if (dtype == kFp16) return pick_ranks<To, fp16>(ranks);
  return pick_ranks<To, float>(ranks);
}

static Sum pick(int to, int from, int ranks) {
  if (to == kBf16) return pick_from<bf16>(from, ranks);
  if (to == kFp16) return pick_from<fp16>(from, ranks);
  return pick_from<float>(from, ranks);
}

}  // namespace DS_SET
}  // namespace ds
