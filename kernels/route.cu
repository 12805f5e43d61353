// route: chooses each token's K experts of largest logit and gives them weights.
//   order    (logit descending, expert ascending), where NaN counts as -inf and -0 as +0
//   ids      expert_ids[t, k] = the k-th expert in that order: always K different ones below E
//   weights  weights[t, k] = p(k) / S, p(e) = 1 where logit e equals the largest one m, else
//            exp(logit - m); S sums p over all experts (sum_all) or over the chosen K, which is
//            both "softmax, top-k, renormalise" and "top-k, softmax".
//   All in f32 whatever Elem is. Selection compares logits, never rounded exponentials, and weights
//   are correctly rounded operations in a fixed order, so both are the same bits on every device.
// Three bodies, chosen by E and K alone:
//   narrow, wide  K <= 32 and E <= 256 or 1024. Grid (T / 4, rounded up), block
//                 (ROUTE_PICK_THREADS): a warp per token holds the row in registers and picks the
//                 largest key of all lanes, K times.
//   sort          any K <= E <= MAX_EXPERTS. Grid (T), block (ROUTE_SORT_THREADS): a block per token
//                 sorts the row in shared memory, where K picks would take longer or a warp's
//                 registers do not hold the row.
// Bytes   reads T*E*s once, writes 8*T*K: at T16384 E128 K8 f32, 8.4 MB + 1.0 MB.
// Error   |weight - exact| <= (|logit - m| + E/32 + 16) * 2^-24 * exact + 2^-148: the first term is
//         what rounding logit - m does, E/32 is the longest run of additions.
// Writers one per element, and an order of summation that depends on E, K and Elem alone, not on
//         alignment or launch: the result is deterministic.
#include "kernel.cuh"

constexpr int ROUTE_TOKENS = ROUTE_PICK_THREADS / WARP_SIZE;
constexpr int ROUTE_SORT_WARPS = ROUTE_SORT_THREADS / WARP_SIZE;
constexpr uint32_t NO_EXPERT = 0xffffffffu;
static_assert(ROUTE_PICK_MAX_TOP_K <= WARP_SIZE, "a lane keeps each choice");
static_assert(sizeof(uint64_t) == ROUTE_SORT_ENTRY_BYTES, "what the launch counts with");

// ---- Keys: unsigned integers in the order of the logits -----------------------------------------
// No logit has key 0, which marks an expert that is taken or does not exist.

template <typename Elem>
__device__ __forceinline__ uint32_t key_of(Elem logit) {
  float value = to_f32(logit);
  if (value != value) value = -INFINITY;
  // Adding +0 turns -0 into +0 and leaves every other value alone.
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) ? key ^ 0x80000000u : ~key);
}

// ---- Weights ------------------------------------------------------------------------------------

// exp(x) for x <= 0, off by at most 1.6 * 2^-24 of its value where that is a normal number. Only
// correctly rounded operations, and intrinsics that the compiler never contracts: the same bits on
// every device, which neither expf nor __expf promise.
__device__ __forceinline__ float exp_f32(float x) {
  if (x < -104.0f) return 0.0f;  // Less than half of the smallest number, and -inf.
  // Adding 1.5 * 2^23 rounds x / ln 2 to the integer n in the low bits.
  constexpr float ROUND = 12582912.0f;
  const float shifted = __fmaf_rn(x, 1.44269504f, ROUND);
  const int n = __float_as_int(shifted) - 0x4b400000;
  const float whole = __fsub_rn(shifted, ROUND);
  // r = x - n ln 2, with ln 2 as the sum of two numbers.
  const float r = __fmaf_rn(whole, 1.90465430e-9f, __fmaf_rn(whole, -0.693147182f, x));
  // exp(r) = 1 + (r + r^2 q(r)), q through the Chebyshev points of |r| <= ln(2) / 2.
  float q = 1.39263261e-3f;
  q = __fmaf_rn(q, r, 8.36329255e-3f);
  q = __fmaf_rn(q, r, 4.16665524e-2f);
  q = __fmaf_rn(q, r, 1.66665763e-1f);
  q = __fmaf_rn(q, r, 0.5f);
  const float value = __fadd_rn(1.0f, __fmaf_rn(__fmul_rn(r, r), q, r));
  // Times 2^n in two exact factors, as 2^-150 is not a number; only the second product rounds.
  const int half = n / 2;
  const float scaled = __fmul_rn(value, __int_as_float((half + 127) << 23));
  return __fmul_rn(scaled, __int_as_float((n - half + 127) << 23));
}

// p of the header. Equal keys are equal logits, so that infinite maxima share equally.
__device__ __forceinline__ float share(uint32_t key, uint32_t max_key) {
  return key == max_key ? 1.0f : exp_f32(__fsub_rn(logit_of(key), logit_of(max_key)));
}

// ---- narrow, wide -------------------------------------------------------------------------------

// A lane's part of a row: VALUES keys, in runs of consecutive experts as 16-byte loads bring them.
// Run c of the warp is the experts from c * WARP_SIZE * LEN on, the first LEN of them in lane 0.
template <typename Elem, int VALUES>
struct LaneKeys {
  static constexpr int LEN = Vec<Elem>::LEN;
  static constexpr int RUN = WARP_SIZE * LEN;
  static constexpr int RUNS = VALUES / LEN;
  static_assert(VALUES % LEN == 0, "whole loads");

  uint32_t at[VALUES];

  __device__ __forceinline__ void load(const Elem* row, int lane, const RouteArgs& args) {
    const int num_experts = args.num_experts;
    if (args.vector) {
      // Rows are whole vectors then. All loads go out before the first key is needed.
      Vec<Elem> loaded[RUNS];
#pragma unroll
      for (int c = 0; c < RUNS; c++) {
        const int first = c * RUN + lane * LEN;
        if (first < num_experts) loaded[c] = load_vec(row + first);
      }
#pragma unroll
      for (int c = 0; c < RUNS; c++) {
        const int first = c * RUN + lane * LEN;
#pragma unroll
        for (int j = 0; j < LEN; j++) {
          at[c * LEN + j] = first < num_experts ? key_of(loaded[c].at[j]) : 0;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < VALUES; i++) {
        const int expert = (i / LEN) * RUN + lane * LEN + i % LEN;
        at[i] = expert < num_experts ? key_of(row[expert]) : 0;
      }
    }
  }

  // The sum of p over the lane's experts, ascending. Runs past the last expert cost nothing.
  __device__ __forceinline__ float sum(uint32_t max_key, int num_experts) const {
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < RUNS; c++) {
      if (c * RUN >= num_experts) break;
#pragma unroll
      for (int j = 0; j < LEN; j++) {
        const uint32_t key = at[c * LEN + j];
        if (key != 0) total = __fadd_rn(total, share(key, max_key));
      }
    }
    return total;
  }

  // The largest key and its expert, the lowest such one; key 0 and NO_EXPERT if all are taken.
  __device__ __forceinline__ void best(int lane, int num_experts, uint32_t* key,
                                       uint32_t* expert) const {
    *key = 0;
    *expert = NO_EXPERT;
#pragma unroll
    for (int c = 0; c < RUNS; c++) {
      if (c * RUN >= num_experts) break;
#pragma unroll
      for (int j = 0; j < LEN; j++) {
        if (at[c * LEN + j] > *key) {
          *key = at[c * LEN + j];
          *expert = c * RUN + lane * LEN + j;
        }
      }
    }
  }

  __device__ __forceinline__ void take(int lane, uint32_t expert) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      if (expert == (uint32_t)((i / LEN) * RUN + lane * LEN + i % LEN)) at[i] = 0;
    }
  }
};

template <typename Elem, int VALUES>
__device__ __forceinline__ void route_fwd_pick(uint32_t* expert_ids,  // [T, K] out
                                               float* weights,        // [T, K] out
                                               const Elem* logits,    // [T, E]
                                               const RouteArgs& args) {
  const int lane = threadIdx.x % WARP_SIZE;
  const int64_t token = (int64_t)blockIdx.x * ROUTE_TOKENS + threadIdx.x / WARP_SIZE;
  if (token >= args.num_tokens) return;

  LaneKeys<Elem, VALUES> keys;
  keys.load(logits + token * args.num_experts, lane, args);
  uint32_t best_key, best_expert;
  keys.best(lane, args.num_experts, &best_key, &best_expert);
  const uint32_t max_key = __reduce_max_sync(FULL_WARP, best_key);
  float sum = args.sum_all ? warp_sum(keys.sum(max_key, args.num_experts)) : 0.0f;

  // Lane k keeps choice k. Lanes hold their own best, so only the lane that lost it looks again.
  uint32_t my_key = 0, my_expert = NO_EXPERT;
  for (int k = 0; k < args.top_k; k++) {
    const uint32_t key = __reduce_max_sync(FULL_WARP, best_key);
    const uint32_t expert = __reduce_min_sync(FULL_WARP, best_key == key ? best_expert : NO_EXPERT);
    if (lane == k) {
      my_key = key;
      my_expert = expert;
    }
    if (expert == best_expert) {
      keys.take(lane, expert);
      keys.best(lane, args.num_experts, &best_key, &best_expert);
    }
  }

  const bool chosen = lane < args.top_k;
  const float p = chosen ? share(my_key, max_key) : 0.0f;
  if (!args.sum_all) sum = warp_sum(p);
  if (chosen) {
    expert_ids[token * args.top_k + lane] = my_expert;
    weights[token * args.top_k + lane] = __fdiv_rn(p, sum);
  }
}

// ---- sort ---------------------------------------------------------------------------------------

// An entry orders as (logit descending, expert ascending) does when entries descend; 0 is last.
__device__ __forceinline__ uint64_t entry_of(uint32_t key, int expert) {
  return (uint64_t)key << 32 | ~(uint32_t)expert;
}

__device__ __forceinline__ uint32_t entry_key(uint64_t entry) { return (uint32_t)(entry >> 32); }

// Bitonic sort, descending; `length` is a power of two. Starts and ends with a barrier.
__device__ __forceinline__ void sort_entries(uint64_t* entries, int length) {
  for (int size = 2; size <= length; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < length / 2; pair += ROUTE_SORT_THREADS) {
        const int low = 2 * pair - (pair & (stride - 1));
        const uint64_t a = entries[low], b = entries[low + stride];
        const bool descending = (low & size) == 0;
        if ((a < b) == descending) {
          entries[low] = b;
          entries[low + stride] = a;
        }
      }
    }
  }
  __syncthreads();
}

template <typename Elem>
__device__ __forceinline__ void route_fwd_sort(uint32_t* expert_ids,  // [T, K] out
                                               float* weights,        // [T, K] out
                                               const Elem* logits,    // [T, E]
                                               const RouteArgs& args) {
  SHARED_DYNAMIC(shared);
  SHARED_ARRAY(float, warp_sums, ROUTE_SORT_WARPS);
  constexpr int LEN = Vec<Elem>::LEN;
  uint64_t* entries = reinterpret_cast<uint64_t*>(shared);
  const int64_t token = blockIdx.x;
  const int num_experts = args.num_experts;
  const Elem* row = logits + token * num_experts;

  if (args.vector) {
    for (int first = threadIdx.x * LEN; first < num_experts; first += ROUTE_SORT_THREADS * LEN) {
      const Vec<Elem> loaded = load_vec(row + first);
#pragma unroll
      for (int j = 0; j < LEN; j++) entries[first + j] = entry_of(key_of(loaded.at[j]), first + j);
    }
  } else {
    for (int e = threadIdx.x; e < num_experts; e += ROUTE_SORT_THREADS) {
      entries[e] = entry_of(key_of(row[e]), e);
    }
  }
  for (int e = num_experts + threadIdx.x; e < args.sort_length; e += ROUTE_SORT_THREADS) {
    entries[e] = 0;
  }
  sort_entries(entries, args.sort_length);

  // The sum runs over the sorted row, so it needs no second order for the chosen alone.
  const uint32_t max_key = entry_key(entries[0]);
  const int summed = args.sum_all ? num_experts : args.top_k;
  float part = 0.0f;
  for (int i = threadIdx.x; i < summed; i += ROUTE_SORT_THREADS) {
    part = __fadd_rn(part, share(entry_key(entries[i]), max_key));
  }
  part = warp_sum(part);
  if (threadIdx.x % WARP_SIZE == 0) warp_sums[threadIdx.x / WARP_SIZE] = part;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < ROUTE_SORT_WARPS; warp++) sum = __fadd_rn(sum, warp_sums[warp]);

  for (int k = threadIdx.x; k < args.top_k; k += ROUTE_SORT_THREADS) {
    expert_ids[token * args.top_k + k] = ~(uint32_t)entries[k];
    weights[token * args.top_k + k] = __fdiv_rn(share(entry_key(entries[k]), max_key), sum);
  }
}

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_narrow_f32(uint32_t* expert_ids, float* weights, const float* logits,
                         const RouteArgs args) {
  route_fwd_pick<float, ROUTE_NARROW_MAX_EXPERTS / WARP_SIZE>(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_narrow_f32, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_narrow_f16(uint32_t* expert_ids, float* weights, const f16* logits,
                         const RouteArgs args) {
  route_fwd_pick<f16, ROUTE_NARROW_MAX_EXPERTS / WARP_SIZE>(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_narrow_f16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_narrow_bf16(uint32_t* expert_ids, float* weights, const bf16* logits,
                          const RouteArgs args) {
  route_fwd_pick<bf16, ROUTE_NARROW_MAX_EXPERTS / WARP_SIZE>(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_narrow_bf16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_wide_f32(uint32_t* expert_ids, float* weights, const float* logits,
                       const RouteArgs args) {
  route_fwd_pick<float, ROUTE_WIDE_MAX_EXPERTS / WARP_SIZE>(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_wide_f32, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_wide_f16(uint32_t* expert_ids, float* weights, const f16* logits,
                       const RouteArgs args) {
  route_fwd_pick<f16, ROUTE_WIDE_MAX_EXPERTS / WARP_SIZE>(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_wide_f16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_wide_bf16(uint32_t* expert_ids, float* weights, const bf16* logits,
                        const RouteArgs args) {
  route_fwd_pick<bf16, ROUTE_WIDE_MAX_EXPERTS / WARP_SIZE>(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_wide_bf16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_SORT_THREADS)
moe_route_fwd_sort_f32(uint32_t* expert_ids, float* weights, const float* logits,
                       const RouteArgs args) {
  route_fwd_sort(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_sort_f32, ROUTE_SORT_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_SORT_THREADS)
moe_route_fwd_sort_f16(uint32_t* expert_ids, float* weights, const f16* logits,
                       const RouteArgs args) {
  route_fwd_sort(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_sort_f16, ROUTE_SORT_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_SORT_THREADS)
moe_route_fwd_sort_bf16(uint32_t* expert_ids, float* weights, const bf16* logits,
                        const RouteArgs args) {
  route_fwd_sort(expert_ids, weights, logits, args);
}
EXPORT_KERNEL(moe_route_fwd_sort_bf16, ROUTE_SORT_THREADS)
