// Any of the three dtypes to fp32 and back, a block at a time in the first-level cache; included once per instruction set.

namespace ds {
namespace DS_SET {

constexpr int64_t kBlock = 512;

template <class T>
DS_TARGET static void widen_as(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + DS_VEC::width <= n; i += DS_VEC::width) DS_VEC::store(to + i, DS_VEC::load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

template <class T>
DS_TARGET static void narrow_as(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + DS_VEC::width <= n; i += DS_VEC::width) DS_VEC::store(to + i, DS_VEC::load(from + i));
  for (; i < n; ++i) from_float(from[i], to + i);
}

// Up with a probability equal to what is cut off. The chance is drawn from the value itself and the seed (lowbias32 of
// Wellons 2018), not from its place: so it is the same however tensors are cut. Infinities stay, NaN stays NaN.
DS_TARGET static void narrow_stochastic(const float* from, int64_t n, bf16* to, uint32_t seed) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = bits_of(from[i]);
    uint32_t h = u ^ seed;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    h ^= h >> 16;
    const uint32_t drawn = (u + (h & 0xffffu)) >> 16, quiet = (u >> 16) | 0x40u;
    to[i].bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : drawn);
  }
}

// The block as fp32: in place when it is that already, else converted into `room`.
DS_TARGET static float* widen(void* from, int32_t dtype, int64_t n, float* room) {
  if (dtype == kFloat) return static_cast<float*>(from);
  if (dtype == kBf16) widen_as(static_cast<const bf16*>(from), n, room);
  if (dtype == kFp16) widen_as(static_cast<const fp16*>(from), n, room);
  return room;
}

DS_TARGET static void narrow(const float* from, int64_t n, void* to, int32_t dtype, bool stochastic, uint32_t seed) {
  if (to == from) return;
  if (dtype == kBf16 && stochastic) return narrow_stochastic(from, n, static_cast<bf16*>(to), seed);
  if (dtype == kBf16) return narrow_as(from, n, static_cast<bf16*>(to));
  if (dtype == kFp16) return narrow_as(from, n, static_cast<fp16*>(to));
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace DS_SET
}  // namespace ds
