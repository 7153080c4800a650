// LAMB on one chunk of a tensor, in blocks of fp32 in the first-level cache; included once per instruction set.
// Plain loops, which the compiler vectorises. Order of operations: see [Note: same bits everywhere] in vector.h.
#include "stage_loop.h"

namespace ds {
namespace DS_SET {

// Sixteen running sums whatever the instruction set, each of every sixteenth element: the same bits everywhere.
constexpr int kLanes = 16;

DS_TARGET static void add_squares(const float* x, int64_t n, double* sums) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  }
  for (int l = 0; i < n; ++i, ++l) sums[l] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
}

DS_TARGET static double sum_of(const double* sums) {
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += sums[l];
  return sum;
}

DS_TARGET static void moments(const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n, const LambNumbers& k) {
  const float coef = k.grad_coef, lerp = k.lerp, beta2 = k.beta2, square = k.square;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * coef;
    m[i] = m[i] + (grad - m[i]) * lerp;
    v[i] = v[i] * beta2 + (grad * grad) * square;
  }
}

DS_TARGET static void change(const float* __restrict p, const float* __restrict m, const float* __restrict v, float* __restrict u,
                             int64_t n, const LambNumbers& k, const float* scale) {
  const float first = scale[0], second = scale[1], eps = k.eps, decay = k.decay;
  for (int64_t i = 0; i < n; ++i) u[i] = (m[i] * first) / (__builtin_sqrtf(v[i]) * second + eps) + p[i] * decay;
}

DS_TARGET static void apply(const float* __restrict p, const float* __restrict u, float* __restrict out, int64_t n, float step) {
  for (int64_t i = 0; i < n; ++i) out[i] = p[i] - u[i] * step;
}

// First pass: new moments, and the squared norms of the weights and of the change.
DS_TARGET static void lamb_measure(const LambTensors& t, int64_t begin, int64_t end, const LambNumbers& k, double* norms) {
  alignas(64) float room[5][kBlock];
  double weights[kLanes] = {}, changes[kLanes] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    const float* p = widen(at(t.param, i, k.kinds.param), k.kinds.param, n, room[0]);
    const float* g = widen(const_cast<void*>(at(t.grad, i, k.kinds.grad)), k.kinds.grad, n, room[1]);
    float* state[kMaxStates];
    for (int s = 0; s < kMaxStates; ++s) state[s] = widen(at(t.state[s], i, k.kinds.state[s]), k.kinds.state[s], n, room[2 + s]);
    moments(g, state[0], state[1], n, k);
    for (int s = 0; s < kMaxStates; ++s) {
      void* kept = at(t.state[s], i, k.kinds.state[s]);
      narrow(state[s], n, kept, k.kinds.state[s], k.stochastic, k.seed[1 + s]);
      state[s] = widen(kept, k.kinds.state[s], n, room[2 + s]);  // as the second pass will read them
    }
    change(p, state[0], state[1], room[4], n, k, t.scale);
    add_squares(p, n, weights);
    add_squares(room[4], n, changes);
  }
  norms[0] = sum_of(weights);
  norms[1] = sum_of(changes);
}

// Second pass: the change once more, from the moments, and the weights less `step` times it.
DS_TARGET static void lamb_apply(const LambTensors& t, int64_t begin, int64_t end, const LambNumbers& k, float step) {
  alignas(64) float room[5][kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = end - i < kBlock ? end - i : kBlock;
    void* param = at(t.param, i, k.kinds.param);
    const float* p = widen(param, k.kinds.param, n, room[0]);
    const float* state[kMaxStates];
    for (int s = 0; s < kMaxStates; ++s) state[s] = widen(at(t.state[s], i, k.kinds.state[s]), k.kinds.state[s], n, room[2 + s]);
    change(p, state[0], state[1], room[4], n, k, t.scale);
    apply(p, room[4], room[1], n, step);
    if (t.copy) narrow(room[1], n, at(t.copy, i, k.kinds.copy), k.kinds.copy, false, 0);
    narrow(room[1], n, param, k.kinds.param, k.stochastic, k.seed[0]);
  }
}

}  // namespace DS_SET
}  // namespace ds
