// The loop, included once per instruction set with DS_VEC (a struct of vector.h), DS_SET (a namespace) and DS_TARGET defined.
// No include guard: that is the point.

namespace ds {
namespace DS_SET {

using V = DS_VEC;
using F = V::F;

// Elements between the one computed and the one asked for: half a page of fp32. The processor's own prefetcher stops at
// each page of each of the four streams; asking across the border is worth 4 % in fp32 and 10 % with bf16 in and out.
constexpr int64_t kAhead = 512;

struct Lanes {
  F grad_coef, lerp, beta2, square, eps, decay, step_size, denom_scale;
};

// One vector of elements: the whole of Adam. Order of operations: see [Note: same bits everywhere] in vector.h.
template <class P, class G, class C>
DS_TARGET static inline void adam_vector(P* p, const G* g, float* m, float* v, C* c, const Lanes& k, bool l2, bool stream) {
  __builtin_prefetch(p + kAhead, 1);
  __builtin_prefetch(g + kAhead, 0);
  __builtin_prefetch(m + kAhead, 1);
  __builtin_prefetch(v + kAhead, 1);
  F grad = V::mul(V::load(g), k.grad_coef), weight = V::load(p);
  if (l2) {
    grad = V::add(grad, V::mul(weight, k.decay));
  } else {
    weight = V::mul(weight, k.decay);
  }
  const F old = V::load(m);
  const F first = V::add(old, V::mul(V::sub(grad, old), k.lerp));
  const F second = V::add(V::mul(V::load(v), k.beta2), V::mul(V::mul(grad, grad), k.square));
  const F denom = V::add(V::mul(V::sqrt(second), k.denom_scale), k.eps);
  weight = V::sub(weight, V::mul(V::div(first, denom), k.step_size));
  V::store(m, first);
  V::store(v, second);
  V::store(p, weight);
  if constexpr (!std::is_same_v<C, Nothing>) {
    if (stream) {
      V::stream(c, weight);
    } else {
      V::store(c, weight);
    }
  }
}

template <class P, class G, class C>
DS_TARGET static void adam_range(const Tensors& t, int64_t begin, int64_t end, const Constants& k) {
  const Lanes lanes{V::set(k.grad_coef), V::set(k.lerp), V::set(k.beta2),     V::set(k.square),
                    V::set(k.eps),       V::set(k.decay), V::set(t.step_size), V::set(t.denom_scale)};
  constexpr int width = V::width;
  P* p = static_cast<P*>(t.param);
  const G* g = static_cast<const G*>(t.grad);
  C* c = static_cast<C*>(t.copy);
  const bool stream = k.stream && reinterpret_cast<uintptr_t>(c + begin) % (width * sizeof(C)) == 0;
  int64_t i = begin;
  for (; i + width <= end; i += width) {
    adam_vector(p + i, g + i, t.exp_avg + i, t.exp_avg_sq + i, c + i, lanes, k.l2, stream);
  }
  if (i < end) {
    // The tail goes through the same vector in padded buffers, so that no element's bits depend on where the range ends.
    P tail_p[width] = {};
    G tail_g[width] = {};
    C tail_c[width] = {};
    float tail_m[width] = {}, tail_v[width] = {};
    const size_t left = static_cast<size_t>(end - i);
    std::memcpy(tail_p, p + i, left * sizeof(P));
    std::memcpy(tail_g, g + i, left * sizeof(G));
    std::memcpy(tail_m, t.exp_avg + i, left * sizeof(float));
    std::memcpy(tail_v, t.exp_avg_sq + i, left * sizeof(float));
    adam_vector(tail_p, tail_g, tail_m, tail_v, tail_c, lanes, k.l2, false);
    std::memcpy(p + i, tail_p, left * sizeof(P));
    std::memcpy(t.exp_avg + i, tail_m, left * sizeof(float));
    std::memcpy(t.exp_avg_sq + i, tail_v, left * sizeof(float));
    if constexpr (!std::is_same_v<C, Nothing>) std::memcpy(c + i, tail_c, left * sizeof(C));
  }
  if (stream) V::fence();
}

template <class P, class G>
static Range pick_copy(int copy) {
  if (copy == kBf16) return adam_range<P, G, bf16>;
  if (copy == kFp16) return adam_range<P, G, fp16>;
  if (copy == kFloat) return adam_range<P, G, float>;
  return adam_range<P, G, Nothing>;
}

template <class P>
static Range pick_grad(int grad, int copy) {
  if (grad == kBf16) return pick_copy<P, bf16>(copy);
  if (grad == kFp16) return pick_copy<P, fp16>(copy);
  return pick_copy<P, float>(copy);
}

static Range pick(int param, int grad, int copy) {
  if (param == kBf16) return pick_grad<bf16>(grad, copy);
  if (param == kFp16) return pick_grad<fp16>(grad, copy);
  return pick_grad<float>(grad, copy);
}

}  // namespace DS_SET
}  // namespace ds
