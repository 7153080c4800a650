// Signs, sums of signs, and sums of buffers, over one piece of memory; included once per instruction set.
#include "lanes.h"

namespace ds {
namespace DS_SET {

using S = Signs<V>;

constexpr int kStep = 16;  // elements that are handled together: whole bytes of signs, one vector of the widest set

DS_TARGET static inline Floats all(float x) { return x - Floats{}; }

// -- signs ---------------------------------------------------------------------------------------------------------------

// Sums of 16 lanes in double: the order of additions is the same in every set, and squares are exact.
struct Norm {
  double lane[kStep];
};

DS_TARGET static inline void add_norm(Norm& norm, const float* x, bool squares) {
  typedef double Doubles __attribute__((vector_size(8 * W)));
  for (int i = 0; i < kStep; i += W) {
    const Floats value = read<Floats>(x + i);
    const Words size = as<Words>(value) & 0x7fffffffu;
    const Doubles wide = __builtin_convertvector(as<Floats>(size), Doubles);
    write(norm.lane + i, read<Doubles>(norm.lane + i) + (squares ? wide * wide : wide));
  }
}

template <class T>
DS_TARGET static inline void sign_step(const T* value, float* error, uint8_t* signs, Norm& norm, bool squares) {
  alignas(64) float sum[kStep];
  uint32_t bits = 0;
  for (int i = 0; i < kStep; i += W) {
    Floats x = load(value + i);
    if (error) {
      x = x + load(error + i);
      store(error + i, x);
    }
    write(sum + i, x);
    bits |= S::bits((S::F)x) << i;
  }
  add_norm(norm, sum, squares);
  const uint16_t both = static_cast<uint16_t>(bits);
  std::memcpy(signs, &both, 2);
}

// value (+ error, which then holds the sum) to signs and the sum of magnitudes or squares.
template <class T>
DS_TARGET static double sign_piece(const void* values, float* error, int64_t numel, uint8_t* signs, bool squares) {
  const T* value = static_cast<const T*>(values);
  Norm norm{};
  int64_t i = 0;
  for (; i + kStep <= numel; i += kStep) sign_step(value + i, error ? error + i : nullptr, signs + i / 8, norm, squares);
  if (i < numel) {
    T tail[kStep] = {};
    float tail_error[kStep] = {};
    uint8_t tail_signs[2];
    const size_t left = static_cast<size_t>(numel - i);
    std::memcpy(tail, value + i, left * sizeof(T));
    if (error) std::memcpy(tail_error, error + i, left * sizeof(float));
    sign_step(tail, error ? tail_error : nullptr, tail_signs, norm, squares);
    if (error) std::memcpy(error + i, tail_error, left * sizeof(float));
    if (left < 8) tail_signs[0] &= static_cast<uint8_t>((1u << left) - 1);
    if (left > 8) tail_signs[1] &= static_cast<uint8_t>((1u << (left - 8)) - 1);
    std::memcpy(signs + i / 8, tail_signs, (left + 7) / 8);
  }
  double total = 0;
  for (double lane : norm.lane) total += lane;
  return total;
}

// error - scale * sign, where `error` holds value + error.
DS_TARGET static void error_piece(float* error, int64_t numel, float scale) {
  int64_t i = 0;
  for (; i + W <= numel; i += W) {
    const Floats x = load(error + i);
    store(error + i, x - (Floats)S::pick(S::bits((S::F)x), (S::F)all(scale), (S::F)all(-scale)));
  }
  for (; i < numel; ++i) error[i] = error[i] - (error[i] < 0 ? -scale : scale);
}

// sum += or = scale * sign
DS_TARGET static void spread_piece(const uint8_t* signs, int64_t numel, float scale, float* sum, bool add) {
  int64_t i = 0;
  for (; i + kStep <= numel; i += kStep) {
    uint16_t both;
    std::memcpy(&both, signs + i / 8, 2);
    for (int k = 0; k < kStep; k += W) {
      const uint32_t bits = static_cast<uint32_t>(both) >> k & ((1u << W) - 1);
      const Floats x = (Floats)S::pick(bits, (S::F)all(scale), (S::F)all(-scale));
      store(sum + i + k, add ? load(sum + i + k) + x : x);
    }
  }
  for (; i < numel; ++i) {
    const float x = signs[i / 8] >> (i % 8) & 1 ? scale : -scale;
    sum[i] = add ? sum[i] + x : x;
  }
}

// -- buffers ---------------------------------------------------------------------------------------------------------------

template <class T>
DS_TARGET static void gather_piece(const void* source, int64_t numel, float* sum, bool add) {
  const T* x = static_cast<const T*>(source);
  int64_t i = 0;
  for (; i + W <= numel; i += W) store(sum + i, add ? load(sum + i) + load(x + i) : load(x + i));
  for (; i < numel; ++i) sum[i] = add ? sum[i] + to_float(x[i]) : to_float(x[i]);
}

// (out +) sum * factor
template <class T>
DS_TARGET static void finish_piece(const float* sum, int64_t numel, float factor, void* to, bool add) {
  T* out = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + W <= numel; i += W) {
    const Floats x = load(sum + i) * factor;
    store(out + i, add ? load(out + i) + x : x);
  }
  for (; i < numel; ++i) {
    const float x = sum[i] * factor;
    from_float(add ? to_float(out[i]) + x : x, out + i);
  }
}

template <class T>
static Pieces pieces_of() {
  return {sign_piece<T>, error_piece, spread_piece, gather_piece<T>, finish_piece<T>};
}

static Pieces pick(int dtype) {
  if (dtype == kBf16) return pieces_of<bf16>();
  if (dtype == kFp16) return pieces_of<fp16>();
  return pieces_of<float>();
}

}  // namespace DS_SET
}  // namespace ds
