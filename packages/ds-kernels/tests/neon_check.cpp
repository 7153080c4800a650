// Runs under an emulator: the NEON body must write the same bits as the scalar one, for all dtypes, sizes and flags.
// Exit status: the number of differing combinations, at most 100.
#include "adam_cpu.cpp"

#include <cstdio>

static uint32_t state = 1;
static uint32_t bits() { return state = state * 1664525u + 1013904223u; }

// Every exponent, both signs, subnormals, infinities and NaN: raw random bits.
static void fill(void* out, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(out)[i] = static_cast<unsigned char>(bits() >> 24);
}

static bool is_nan(float x) { return x != x; }

int main() {
  constexpr int64_t n = 4099;
  static float start[5][n], work[2][5][n];
  int bad = 0, runs = 0;
  for (int p = 0; p < 3; ++p)
    for (int g = 0; g < 3; ++g)
      for (int c = 0; c < 4; ++c)
        for (int l2 = 0; l2 < 2; ++l2) {
          fill(start, sizeof start);
          for (int64_t i = 0; i < n; ++i) start[3][i] = __builtin_fabsf(start[3][i]);
          for (int k = 0; k < 2; ++k) {
            std::memcpy(work[k], start, sizeof start);
            void* params[] = {work[k][0]};
            const void* grads[] = {work[k][1]};
            float *firsts[] = {work[k][2]}, *seconds[] = {work[k][3]};
            void* copies[] = {work[k][4]};
            const int64_t numels[] = {n};
            const float step_size[] = {0.01f}, denom_scale[] = {1.5f};
            const DsAdamCall call{1,    params, grads, firsts, seconds, copies, numels, step_size, denom_scale, 0.37f, 0.1f,
                                  0.9f, 0.1f,   1e-8f, 0.999f, p,       g,      c,      l2,        k ? ds::kNeon : ds::kScalar, 1};
            if (ds_adam_step(&call) != ds::kOk) return 101;
          }
          ++runs;
          bool same = true;
          for (int part = 0; part < 5; ++part) {
            const int dtype = part == 0 ? p : part == 1 ? g : part == 4 ? c : 0;
            for (int64_t i = 0; i < n && dtype < ds::kNone; ++i) {
              float x[2];
              for (int k = 0; k < 2; ++k) {
                const uint16_t* half = reinterpret_cast<const uint16_t*>(work[k][part]);
                x[k] = dtype == 0   ? work[k][part][i]
                       : dtype == 1 ? ds::to_float(ds::bf16{half[i]})
                                    : ds::to_float(ds::fp16{half[i]});
              }
              same = same && (is_nan(x[0]) ? is_nan(x[1]) : ds::bits_of(x[0]) == ds::bits_of(x[1]));
            }
          }
          if (!same && ++bad) std::printf("differs: param %d grad %d copy %d l2 %d\n", p, g, c, l2);
        }
  std::printf("%d combinations, %d differ\n", runs, bad);
  return bad < 100 ? bad : 100;
}
