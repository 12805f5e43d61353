// jitter: every element times a factor near 1 of its own; input noise of a router in training.
//   jittered[i] = x[i] * (1 + epsilon * (2 u[i] - 1)): factors from U(1 - epsilon, 1 + epsilon) for
//   uniform u.
//   In f32: fma(epsilon, fma(2, u, -1), 1), then one product, rounded to Elem.
// Launch  grid (len / (JITTER_THREADS * LEN), rounded up), block (JITTER_THREADS): one vector of
//         elements per thread, or as many single elements if a buffer is not aligned.
// Roofline reads len*(s + 4) bytes, writes len*s: at T4096 H4096 bf16, 101 MB + 34 MB.
// Writers one per element: deterministic, and the same bits on every device.
#include "kernel.cuh"

template <typename Elem>
struct TypedJitterParams {
  Elem* jittered;  // [T, H] out
  const Elem* x;   // [T, H]
  const float* u;  // [T, H]
  JitterArgs args;
};
static_assert(sizeof(TypedJitterParams<float>) == sizeof(JitterParams), "the same layout");
ASSERT_SAME_OFFSET(TypedJitterParams<float>, JitterParams, jittered);
ASSERT_SAME_OFFSET(TypedJitterParams<float>, JitterParams, x);
ASSERT_SAME_OFFSET(TypedJitterParams<float>, JitterParams, u);
ASSERT_SAME_OFFSET(TypedJitterParams<float>, JitterParams, args);

template <typename Elem>
__device__ __forceinline__ Elem jitter(Elem x, float u, float epsilon) {
  const float factor = __fmaf_rn(epsilon, __fmaf_rn(2.0f, u, -1.0f), 1.0f);
  return from_f32<Elem>(__fmul_rn(to_f32(x), factor));
}

template <typename Elem>
__device__ __forceinline__ void jitter_fwd(const TypedJitterParams<Elem>& params) {
  const auto [jittered, x, u, args] = params;
  constexpr int LEN = Vec<Elem>::LEN;
  constexpr int FLOATS = Vec<float>::LEN;
  const int64_t first_of_block = (int64_t)blockIdx.x * JITTER_THREADS * LEN;
  const int64_t first = first_of_block + threadIdx.x * LEN;
  if (args.vector && first + LEN <= args.len) {
    const Vec<Elem> value = load_vec(x + first);
    Vec<float> uniform[LEN / FLOATS];
#pragma unroll
    for (int i = 0; i < LEN / FLOATS; i++) uniform[i] = load_vec(u + first + i * FLOATS);
    Vec<Elem> result;
#pragma unroll
    for (int i = 0; i < LEN; i++) {
      result.at[i] = jitter(value.at[i], uniform[i / FLOATS].at[i % FLOATS], args.epsilon);
    }
    store_vec(jittered + first, result);
    return;
  }
  if (args.vector) {
    // The last vector is shorter.
    for (int64_t i = first; i < args.len; i++) jittered[i] = jitter(x[i], u[i], args.epsilon);
    return;
  }
  // A thread's elements are JITTER_THREADS apart, so that a warp accesses consecutive ones.
  for (int i = 0; i < LEN; i++) {
    const int64_t at = first_of_block + i * JITTER_THREADS + threadIdx.x;
    if (at < args.len) jittered[at] = jitter(x[at], u[at], args.epsilon);
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(JITTER_THREADS)
moe_jitter_fwd_f32(const TypedJitterParams<float> params) { jitter_fwd(params); }
EXPORT_KERNEL(moe_jitter_fwd_f32, JITTER_THREADS)

extern "C" __global__ void __launch_bounds__(JITTER_THREADS)
moe_jitter_fwd_f16(const TypedJitterParams<f16> params) { jitter_fwd(params); }
EXPORT_KERNEL(moe_jitter_fwd_f16, JITTER_THREADS)

extern "C" __global__ void __launch_bounds__(JITTER_THREADS)
moe_jitter_fwd_bf16(const TypedJitterParams<bf16> params) { jitter_fwd(params); }
EXPORT_KERNEL(moe_jitter_fwd_bf16, JITTER_THREADS)
// clang-format on
