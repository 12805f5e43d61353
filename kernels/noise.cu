// noise: random numbers that depend on (seed, index of the element) alone, not on the launch.
//   noise[i] is element offset + i (modulo 2^64) of the sequence of `seed`. Elements 4c .. 4c + 3
//   come from the four words w0 .. w3 of Philox4x32-10 with counter (c, 0) and key `seed`
//   (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", 2011):
//     uniform   floor(w / 2^8) * 2^-24, in [0, 1)
//     normal    r cos(a), r sin(a) of (w0, w1), then of (w2, w3): r = sqrt(-2 ln u), where
//               u = (w0 + 1/2) 2^-32 rounded, in (0, 1], and a = 2 pi w1 2^-32
//     gumbel    -ln(-ln u) with u = (floor(w / 2^9) + 1/2) * 2^-23, in (0, 1)
//   Correctly rounded operations in a stated order, logarithm, sine and cosine included: the same
//   bits on every device.
// Launch  grid (groups of four elements / NOISE_THREADS, rounded up), one thread per group.
// Roofline writes 4*len bytes.
// Error   of ln at most 1.5 * 2^-24 of the value, of sin and cos 2^-23.
// Writers one per element: deterministic.
#include "kernel.cuh"

#include "exact.cuh"

struct TypedNoiseParams {
  float* noise;  // [len] out
  NoiseArgs args;
};
static_assert(sizeof(TypedNoiseParams) == sizeof(NoiseParams), "the same layout");
ASSERT_SAME_OFFSET(TypedNoiseParams, NoiseParams, noise);
ASSERT_SAME_OFFSET(TypedNoiseParams, NoiseParams, args);

constexpr int PHILOX_WORDS = 4;
constexpr int PHILOX_ROUNDS = 10;

struct PhiloxWords {
  uint32_t at[PHILOX_WORDS];
};

__device__ __forceinline__ PhiloxWords philox(uint64_t counter, uint64_t seed) {
  constexpr uint32_t MULTIPLIER_0 = 0xd2511f53u, MULTIPLIER_1 = 0xcd9e8d57u;
  constexpr uint32_t WEYL_0 = 0x9e3779b9u, WEYL_1 = 0xbb67ae85u;
  PhiloxWords word = {{(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0}};
  uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < PHILOX_ROUNDS; round++) {
    const uint32_t high_0 = __umulhi(MULTIPLIER_0, word.at[0]), low_0 = MULTIPLIER_0 * word.at[0];
    const uint32_t high_1 = __umulhi(MULTIPLIER_1, word.at[2]), low_1 = MULTIPLIER_1 * word.at[2];
    word = {{high_1 ^ word.at[1] ^ key_0, low_1, high_0 ^ word.at[3] ^ key_1, low_0}};
    key_0 += WEYL_0;
    key_1 += WEYL_1;
  }
  return word;
}

// cos and sin of 2 pi * word * 2^-32, within 2^-23.
__device__ __forceinline__ void cos_sin(uint32_t word, float* cosine, float* sine) {
  // The nearest quarter turn, and the rest: at most an eighth of a turn either way.
  const uint32_t quarter = (word + (1u << 29)) >> 30;
  const int rest = (int)(word - (quarter << 30));
  const float a = __fmul_rn(__int2float_rn(rest), 1.46291812e-9f);
  const float z = __fmul_rn(a, a);
  float q = -1.95878907e-4f;
  q = __fmaf_rn(q, z, 8.33274797e-3f);
  q = __fmaf_rn(q, z, -0.166666642f);
  const float s = __fmaf_rn(__fmul_rn(a, z), q, a);
  float p = 2.45479423e-5f;
  p = __fmaf_rn(p, z, -1.38883025e-3f);
  p = __fmaf_rn(p, z, 4.16666642e-2f);
  const float c = __fmaf_rn(__fmul_rn(z, z), p, __fmaf_rn(-0.5f, z, 1.0f));
  const bool swap = quarter & 1;
  const float x = swap ? s : c, y = swap ? c : s;
  *cosine = quarter == 1 || quarter == 2 ? -x : x;
  *sine = quarter >= 2 ? -y : y;
}

__device__ __forceinline__ float uniform(uint32_t word) {
  return __fmul_rn(__uint2float_rn(word >> 8), 5.96046448e-8f);  // 2^-24
}

__device__ __forceinline__ void normal_pair(uint32_t radius, uint32_t angle, float* pair) {
  // 2^-32 and 2^-33
  const float u = __fmaf_rn(__uint2float_rn(radius), 2.32830644e-10f, 1.16415322e-10f);
  const float r = __fsqrt_rn(__fmul_rn(-2.0f, precise_log_f32(u)));
  float cosine, sine;
  cos_sin(angle, &cosine, &sine);
  pair[0] = __fmul_rn(r, cosine);
  pair[1] = __fmul_rn(r, sine);
}

__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = __fmul_rn(__uint2float_rn(word >> 9 << 1 | 1), 5.96046448e-8f);  // 2^-24
  return -precise_log_f32(-precise_log_f32(u));
}

__device__ __forceinline__ void noise_fwd(const TypedNoiseParams& params) {
  const auto [noise, args] = params;
  const int64_t group = (int64_t)blockIdx.x * NOISE_THREADS + threadIdx.x;
  // Index of the group's first element; negative if the group starts before the first element.
  const int64_t first = group * PHILOX_WORDS - (int64_t)(args.offset % PHILOX_WORDS);
  if (first >= args.len) return;
  // The sequence wraps around after element 2^64 - 1; 2^64 is a multiple of four.
  const uint64_t counter = (args.offset / PHILOX_WORDS + group) & (~(uint64_t)0 / PHILOX_WORDS);
  const PhiloxWords word = philox(counter, args.seed);
  Vec<float> value;
  if (args.distribution == NOISE_NORMAL) {
    normal_pair(word.at[0], word.at[1], &value.at[0]);
    normal_pair(word.at[2], word.at[3], &value.at[2]);
  } else {
    const bool is_uniform = args.distribution == NOISE_UNIFORM;
#pragma unroll
    for (int i = 0; i < PHILOX_WORDS; i++) {
      value.at[i] = is_uniform ? uniform(word.at[i]) : gumbel(word.at[i]);
    }
  }
  if (args.vector && first + PHILOX_WORDS <= args.len) {
    store_vec(noise + first, value);
    return;
  }
#pragma unroll
  for (int i = 0; i < PHILOX_WORDS; i++) {
    if (first + i >= 0 && first + i < args.len) noise[first + i] = value.at[i];
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(NOISE_THREADS)
moe_noise_fwd(const TypedNoiseParams params) { noise_fwd(params); }
EXPORT_KERNEL(moe_noise_fwd, NOISE_THREADS)
// clang-format on
