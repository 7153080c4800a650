// Vectors of one instruction set as GCC's vector extension has them, included by a loop file once per set.
// No include guard: see each_set.h.

namespace ds {
namespace DS_SET {

using V = DS_VEC;
constexpr int W = V::width < 4 ? 4 : V::width;  // lanes of 32 bits
typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(4 * W)));  // of words

template <class T>
DS_TARGET static inline Floats load(const T* x) {
  if constexpr (V::width == W) {
    return (Floats)V::load(x);
  } else {
    Floats out;
    for (int i = 0; i < W; ++i) out[i] = to_float(x[i]);
    return out;
  }
}

template <class T>
DS_TARGET static inline void store(T* out, Floats x) {
  if constexpr (V::width == W) {
    V::store(out, (V::F)x);
  } else {
    for (int i = 0; i < W; ++i) from_float(x[i], out + i);
  }
}

template <class To, class From>
DS_TARGET static inline To as(From x) {
  To out;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&out, &x, sizeof out);
  return out;
}

template <class To>
DS_TARGET static inline To read(const void* p) {
  To out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

template <class From>
DS_TARGET static inline void write(void* p, From x) {
  std::memcpy(p, &x, sizeof x);
}

}  // namespace DS_SET
}  // namespace ds
