// Sums the same elements of several ranks, in rank order, each sum rounded to the output's dtype; once per instruction set.
#include "lanes.h"

namespace ds {
namespace DS_SET {

// As T holds it: where sums are fp32 that is itself, else it is rounded.
template <class T>
DS_TARGET static inline Floats rounded(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    T held[W];
    store(held, x);
    return load(held);
  }
}

template <class To, class From, int kRanks>
DS_TARGET static void add(void* out, void* const* also, int copies, const void* const* in, int ranks, int64_t begin, int64_t end,
                          float factor) {
  const From* from[64];
  const int many = kRanks ? kRanks : ranks;
  for (int r = 0; r < many; ++r) from[r] = static_cast<const From*>(in[r]);
  To* to = static_cast<To*>(out);
  const bool scaled = factor != 1.0f;
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    Floats sum = rounded<To>(load(from[0] + i));
    for (int r = 1; r < many; ++r) {
      Floats next = load(from[r] + i);
      if constexpr (sizeof(From) != sizeof(To)) next = rounded<To>(next);
      sum = rounded<To>(sum + next);
    }
    if (scaled) sum = sum * factor;
    store(to + i, sum);
    for (int c = 0; c < copies; ++c) store(static_cast<To*>(also[c]) + i, sum);
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
