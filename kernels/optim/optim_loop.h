// The element-wise rules and the loop they share, included once per instruction set with DS_VEC, DS_SET and DS_TARGET defined.
// No include guard: that is the point. Order of operations: see [Note: same bits everywhere] in vector.h.
#include "stage_loop.h"

namespace ds {
namespace DS_SET {

using V = DS_VEC;
using F = V::F;

// Elements between the one computed and the one asked for: half a page of fp32. The processor's own prefetcher stops at
// each page of each of the four streams; asking across the border is worth 4 % in fp32 and 10 % with bf16 in and out.
constexpr int64_t kAhead = 512;

struct Adam {
  static constexpr int states = 2;
  F lerp, beta2, square, eps, decay, step_size, denom_scale;
  bool l2;
  DS_TARGET explicit Adam(const Constants& k, const float* scale)
      : lerp(V::set(k.of_rule[0])), beta2(V::set(k.of_rule[1])), square(V::set(k.of_rule[2])), eps(V::set(k.of_rule[3])),
        decay(V::set(k.of_rule[4])), step_size(V::set(scale[0])), denom_scale(V::set(scale[1])), l2(k.flags & kL2) {}
  DS_TARGET inline F step(F weight, F grad, F& m, F& v) const {
    if (l2) {
      grad = V::add(grad, V::mul(weight, decay));
    } else {
      weight = V::mul(weight, decay);
    }
    m = V::add(m, V::mul(V::sub(grad, m), lerp));
    v = V::add(V::mul(v, beta2), V::mul(V::mul(grad, grad), square));
    const F denom = V::add(V::mul(V::sqrt(v), denom_scale), eps);
    return V::sub(weight, V::mul(V::div(m, denom), step_size));
  }
};

struct Adagrad {
  static constexpr int states = 1;
  F eps, decay, step_size;
  bool l2;
  DS_TARGET explicit Adagrad(const Constants& k, const float* scale)
      : eps(V::set(k.of_rule[0])), decay(V::set(k.of_rule[1])), step_size(V::set(scale[0])), l2(k.flags & kL2) {}
  DS_TARGET inline F step(F weight, F grad, F& sum, F&) const {
    if (l2) grad = V::add(grad, V::mul(weight, decay));
    sum = V::add(sum, V::mul(grad, grad));
    return V::sub(weight, V::mul(V::div(grad, V::add(V::sqrt(sum), eps)), step_size));
  }
};

struct Lion {
  static constexpr int states = 1;
  F lerp1, lerp2, decay, lr;
  DS_TARGET explicit Lion(const Constants& k, const float*)
      : lerp1(V::set(k.of_rule[0])), lerp2(V::set(k.of_rule[1])), decay(V::set(k.of_rule[2])), lr(V::set(k.of_rule[3])) {}
  DS_TARGET inline F step(F weight, F grad, F& m, F&) const {
    const F change = V::sub(grad, m), ahead = V::add(m, V::mul(change, lerp1));
    m = V::add(m, V::mul(change, lerp2));
    return V::sub(V::mul(weight, decay), V::mul(V::sign(ahead), lr));
  }
};

struct Sgd {
  static constexpr int states = 0;
  F decay, lr;
  bool l2;
  DS_TARGET explicit Sgd(const Constants& k, const float*)
      : decay(V::set(k.of_rule[0])), lr(V::set(k.of_rule[1])), l2(k.flags & kL2) {}
  DS_TARGET inline F step(F weight, F grad, F&, F&) const {
    if (l2) grad = V::add(grad, V::mul(weight, decay));
    return V::sub(weight, V::mul(grad, lr));
  }
};

struct Momentum {
  static constexpr int states = 1;
  F decay, lr, momentum, damped;
  bool l2, nesterov;
  DS_TARGET explicit Momentum(const Constants& k, const float* scale)
      : decay(V::set(k.of_rule[0])), lr(V::set(k.of_rule[1])), momentum(V::set(k.of_rule[2])), damped(V::set(scale[0])),
        l2(k.flags & kL2), nesterov(k.flags & kNesterov) {}
  DS_TARGET inline F step(F weight, F grad, F& buffer, F&) const {
    if (l2) grad = V::add(grad, V::mul(weight, decay));
    buffer = V::add(V::mul(buffer, momentum), V::mul(grad, damped));
    grad = nesterov ? V::add(grad, V::mul(buffer, momentum)) : buffer;
    return V::sub(weight, V::mul(grad, lr));
  }
};

// One vector of elements.
template <class R, class G, class C>
DS_TARGET static inline void step_vector(const R& rule, float* p, const G* g, float* s0, float* s1, C* c, F coef, bool stream) {
  F first = coef, second = coef;
  if constexpr (R::states > 0) first = V::load(s0);
  if constexpr (R::states > 1) second = V::load(s1);
  const F weight = rule.step(V::load(p), V::mul(V::load(g), coef), first, second);
  if constexpr (R::states > 0) V::store(s0, first);
  if constexpr (R::states > 1) V::store(s1, second);
  V::store(p, weight);
  if constexpr (!std::is_same_v<C, Nothing>) {
    if (stream) {
      V::stream(c, weight);
    } else {
      V::store(c, weight);
    }
  }
}

// fp32 parameters and states, read and written where they are.
template <class R, class G, class C>
DS_TARGET static void direct(const Tensors& t, int64_t begin, int64_t end, const Constants& k) {
  const R rule(k, t.scale);
  const F coef = V::set(k.grad_coef);
  constexpr int width = V::width;
  float *p = static_cast<float*>(t.param), *s0 = static_cast<float*>(t.state[0]), *s1 = static_cast<float*>(t.state[1]);
  const G* g = static_cast<const G*>(t.grad);
  C* c = static_cast<C*>(t.copy);
  const bool stream = k.stream && reinterpret_cast<uintptr_t>(c + begin) % (width * sizeof(C)) == 0;
  int64_t i = begin;
  for (; i + width <= end; i += width) {
    __builtin_prefetch(p + i + kAhead, 1);
    __builtin_prefetch(g + i + kAhead, 0);
    if constexpr (R::states > 0) __builtin_prefetch(s0 + i + kAhead, 1);
    if constexpr (R::states > 1) __builtin_prefetch(s1 + i + kAhead, 1);
    step_vector(rule, p + i, g + i, s0 + i, s1 + i, c + i, coef, stream);
  }
  if (i < end) {
    // The tail goes through the same vector in padded buffers, so that no element's bits depend on where the range ends.
    float tail_p[width] = {}, tail_0[width] = {}, tail_1[width] = {};
    G tail_g[width] = {};
    C tail_c[width] = {};
    const size_t left = static_cast<size_t>(end - i);
    std::memcpy(tail_p, p + i, left * sizeof(float));
    std::memcpy(tail_g, g + i, left * sizeof(G));
    if constexpr (R::states > 0) std::memcpy(tail_0, s0 + i, left * sizeof(float));
    if constexpr (R::states > 1) std::memcpy(tail_1, s1 + i, left * sizeof(float));
    step_vector(rule, tail_p, tail_g, tail_0, tail_1, tail_c, coef, false);
    std::memcpy(p + i, tail_p, left * sizeof(float));
    if constexpr (R::states > 0) std::memcpy(s0 + i, tail_0, left * sizeof(float));
    if constexpr (R::states > 1) std::memcpy(s1 + i, tail_1, left * sizeof(float));
    if constexpr (!std::is_same_v<C, Nothing>) std::memcpy(c + i, tail_c, left * sizeof(C));
  }
  if (stream) V::fence();
}

// Any dtypes: a block at a time becomes fp32 in the first-level cache, is stepped there, and goes back rounded.
template <class R>
DS_TARGET static void staged(const Tensors& t, int64_t begin, int64_t end, const Constants& k) {
  alignas(64) float room[2 + kMaxStates][kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    void* param = at(t.param, i, k.kinds.param);
    Tensors block{};
    block.scale = t.scale;
    block.param = widen(param, k.kinds.param, n, room[0]);
    block.grad = widen(const_cast<void*>(at(t.grad, i, k.kinds.grad)), k.kinds.grad, n, room[1]);
    for (int s = 0; s < R::states; ++s) {
      block.state[s] = widen(at(t.state[s], i, k.kinds.state[s]), k.kinds.state[s], n, room[2 + s]);
    }
    direct<R, float, Nothing>(block, 0, n, k);
    const float* weight = static_cast<const float*>(block.param);
    if (t.copy) narrow(weight, n, at(t.copy, i, k.kinds.copy), k.kinds.copy, false, 0);
    narrow(weight, n, param, k.kinds.param, k.stochastic, k.seed[0]);
    for (int s = 0; s < R::states; ++s) {
      void* state = at(t.state[s], i, k.kinds.state[s]);
      narrow(static_cast<const float*>(block.state[s]), n, state, k.kinds.state[s], k.stochastic, k.seed[1 + s]);
    }
  }
}

// Bytes that a step is about to overwrite, to where they are kept for undoing it.
DS_TARGET static void keep(void* to, const void* from, int64_t bytes, bool stream) {
  int64_t done = 0;
  if constexpr (V::width > 1) {
    float* out = static_cast<float*>(to);
    const float* in = static_cast<const float*>(from);
    constexpr int64_t step = sizeof(F);
    if (stream && reinterpret_cast<uintptr_t>(to) % step == 0) {
      for (; done + step <= bytes; done += step) {
        __builtin_prefetch(in + done / 4 + kAhead, 1);
        V::stream(out + done / 4, V::load(in + done / 4));
      }
      V::fence();
    }
  }
  std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, static_cast<size_t>(bytes - done));
}

template <class R, class G>
static Range pick_copy(int copy) {
  if (copy == kBf16) return direct<R, G, bf16>;
  if (copy == kFp16) return direct<R, G, fp16>;
  return direct<R, G, Nothing>;
}

// The usual dtypes have loops of their own; the others go through blocks.
template <class R>
static Range pick_kinds(const Kinds& kinds) {
  bool usual = kinds.param == kFloat && kinds.copy != kFloat;
  for (int s = 0; s < R::states; ++s) usual = usual && kinds.state[s] == kFloat;
  if (!usual) return staged<R>;
  if (kinds.grad == kBf16) return pick_copy<R, bf16>(kinds.copy);
  if (kinds.grad == kFp16) return pick_copy<R, fp16>(kinds.copy);
  return pick_copy<R, float>(kinds.copy);
}

static Range pick(int rule, const Kinds& kinds) {
  if (rule == kAdam) return pick_kinds<Adam>(kinds);
  if (rule == kAdagrad) return pick_kinds<Adagrad>(kinds);
  if (rule == kLion) return pick_kinds<Lion>(kinds);
  if (rule == kSgd) return pick_kinds<Sgd>(kinds);
  return pick_kinds<Momentum>(kinds);
}

}  // namespace DS_SET
}  // namespace ds
