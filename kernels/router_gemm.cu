// router_gemm: the logits of the router, the product of tokens and the router gate.
//   logits[t, e] = sum over h of x[t, h] * router_gate[e, h]  (+ bias[e])
//   x is Elem; router_gate and bias are Elem or f32 (Gate); the sum is f32 by FFMA, never TF32.
//   Logits are stored as f32, or rounded to Elem once.
// Order   the bits of a logit depend on H and its own operands, not on T, E, alignment or body. H
//         is cut into segments of 512 columns. In a segment, sum p of 8 starts from 0 and adds, fma
//         after fma in the order of h, the products of all h with h / 8 % 8 = p. The eight are
//         added as ((0+4) + (2+6)) + ((1+5) + (3+7)); segments are added to 0 in order, and the
//         bias last. Columns past H may be included as products 0 * 0: they could only turn a -0
//         into 0, and a sum that starts from 0 is never -0.
//         Eight lanes share a sum, each with chunks of 8 columns. This gives 16-byte loads of whole
//         lines, sums that stay in registers, and segments that warps sum in parallel.
// Bodies  one   for up to a few tokens. A block per token and expert, eight lanes per segment.
//         few   the same for 8 tokens times 4 experts, where tile would leave most SMs idle.
//               Both load chunks from global memory, one of f32 by two loads of the same sectors.
//         tile  a block per 64 tokens and 32 experts. Eight lanes compute 8 by 8 of its logits;
//               steps of 64 columns pass through a pipeline of ROUTER_GEMM_STAGES stages in shared
//               memory.
// Launch  a grid of blocks_of(experts) * blocks_of(tokens), experts fastest, as x is the larger
//         operand; one, few: ROUTER_GEMM_LANES threads for each of 4 to 32 segments in parallel;
//         tile: ROUTER_GEMM_TILE_THREADS, and dynamic shared memory for the stages.
// Roofline  bytes T*H*s + E*H*g + T*E*4 and 2*T*E*H FLOPs: at T1 H7168 E256 with an f32 gate 7.3
//         MB, at T16384 with bf16 tokens and an f32 gate 259 MB and 60 GFLOP.
// Writers one per logit, in the order above: the result is deterministic.
#include "kernel.cuh"

// RouterGemmParams with typed pointers.
template <typename Elem, typename Gate>
struct TypedRouterGemmParams {
  void* logits;             // [T, E] out, f32 or Elem
  const Elem* x;            // [T, H]
  const Gate* router_gate;  // [E, H]
  const Gate* bias;         // [E] or null
  RouterGemmArgs args;
  int padding;
};
using MixedRouterGemmParams = TypedRouterGemmParams<bf16, float>;
static_assert(sizeof(MixedRouterGemmParams) == sizeof(RouterGemmParams), "the same layout");
ASSERT_SAME_OFFSET(MixedRouterGemmParams, RouterGemmParams, logits);
ASSERT_SAME_OFFSET(MixedRouterGemmParams, RouterGemmParams, x);
ASSERT_SAME_OFFSET(MixedRouterGemmParams, RouterGemmParams, router_gate);
ASSERT_SAME_OFFSET(MixedRouterGemmParams, RouterGemmParams, bias);
ASSERT_SAME_OFFSET(MixedRouterGemmParams, RouterGemmParams, args);
ASSERT_SAME_OFFSET(MixedRouterGemmParams, RouterGemmParams, padding);

constexpr int CHUNK = ROUTER_GEMM_CHUNK;
constexpr int LANES = ROUTER_GEMM_LANES;
constexpr int STEP = ROUTER_GEMM_STEP;
constexpr int SEGMENT_STEPS = ROUTER_GEMM_SEGMENT / STEP;
static_assert(LANES == 8 && WARP_SIZE % LANES == 0, "lanes_sum adds eight lanes of a warp");
static_assert(ROUTER_GEMM_SEGMENT % STEP == 0, "segments are whole steps");

// ---- Chunks of columns --------------------------------------------------------------------------

struct Chunk {
  float at[CHUNK];
};

// The chunk of a row that starts at column `h`; columns from H on are 0.
template <bool VECTOR, typename T>
__device__ __forceinline__ Chunk load_chunk(const T* row, int h, int hidden) {
  constexpr int LEN = Vec<T>::LEN;
  Chunk chunk;
  if constexpr (VECTOR) {
#pragma unroll
    for (int i = 0; i < CHUNK; i += LEN) {
      Vec<T> value = {};
      if (h + i < hidden) value = load_vec(row + h + i);
#pragma unroll
      for (int j = 0; j < LEN; j++) chunk.at[i + j] = to_f32(value.at[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) chunk.at[i] = h + i < hidden ? to_f32(row[h + i]) : 0.0f;
  }
  return chunk;
}

// sum[t, e] += the products of one chunk, in the order of columns.
template <int TOKENS, int EXPERTS>
__device__ __forceinline__ void add_products(float (&sum)[TOKENS * EXPERTS],
                                             const Chunk (&x)[TOKENS],
                                             const Chunk (&gate)[EXPERTS]) {
#pragma unroll
  for (int e = 0; e < EXPERTS; e++) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float& s = sum[t * EXPERTS + e];
        s = __fmaf_rn(x[t].at[i], gate[e].at[i], s);
      }
    }
  }
}

// ---- Sums over the eight lanes ------------------------------------------------------------------

// Adds sum[i] over eight neighbouring lanes for each i. If N is 8 or more, lane p receives the
// totals of i = p * N / 8 and on, in its first N / 8 elements. If N is 1, every lane receives the
// total.
template <int N, int BIT = LANES / 2, int COUNT = N>
__device__ __forceinline__ void lanes_sum(float (&sum)[N]) {
  static_assert(N == 1 || N % LANES == 0, "each lane receives as many totals");
  if constexpr (BIT > 0) {
    constexpr int HALF = COUNT / 2;
    const bool upper = threadIdx.x & BIT;
    if constexpr (N == 1) sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(FULL_WARP, sum[0], BIT));
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float keep = upper ? sum[HALF + i] : sum[i];
      const float give = upper ? sum[i] : sum[HALF + i];
      sum[i] = __fadd_rn(keep, __shfl_xor_sync(FULL_WARP, give, BIT));
    }
    lanes_sum<N, BIT / 2, HALF>(sum);
  }
}

template <typename Elem, typename Gate>
__device__ __forceinline__ void store_logit(const TypedRouterGemmParams<Elem, Gate>& params,
                                            float sum, int token, int expert) {
  const RouterGemmArgs& args = params.args;
  if (token >= args.num_tokens || expert >= args.num_experts) return;
  if (params.bias != nullptr) sum = __fadd_rn(sum, to_f32(params.bias[expert]));
  const int64_t at = (int64_t)token * args.num_experts + expert;
  if (args.f32_logits) {
    static_cast<float*>(params.logits)[at] = sum;
  } else {
    static_cast<Elem*>(params.logits)[at] = from_f32<Elem>(sum);
  }
}

// ---- one, few: a block per TOKENS times EXPERTS, its segments in parallel -----------------------

// The least number of resident blocks of an SM for body one. At 1 the compiler has enough registers
// to issue all loads of a segment at once; their latency bounds a product with one token.
constexpr int ONE_BLOCKS = 1;

// AHEAD steps are loaded before the first is used.
template <int TOKENS, int EXPERTS, int AHEAD, bool VECTOR, typename Elem, typename Gate>
__device__ __forceinline__ void segments_body(const TypedRouterGemmParams<Elem, Gate>& params) {
  const RouterGemmArgs& args = params.args;
  constexpr int N = TOKENS * EXPERTS;
  constexpr int SHARE = N == 1 ? 1 : N / LANES;
  static_assert(N <= ROUTER_GEMM_MIN_SEGMENTS * LANES, "a thread per logit");
  SHARED_ARRAY(float, segment_sums, ROUTER_GEMM_MAX_SEGMENTS * N);
  const int segment = threadIdx.x / LANES, block_segments = blockDim.x / LANES;
  const int lane = threadIdx.x % LANES;
  const int expert_blocks = (args.num_experts + EXPERTS - 1) / EXPERTS;
  const int first_token = blockIdx.x / expert_blocks * TOKENS;
  const int first_expert = blockIdx.x % expert_blocks * EXPERTS;
  const int segments = (args.hidden + ROUTER_GEMM_SEGMENT - 1) / ROUTER_GEMM_SEGMENT;

  // Past the last token or expert, the last one is multiplied again and not stored.
  const Elem* x_rows[TOKENS];
  const Gate* gate_rows[EXPERTS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    x_rows[t] = params.x + (int64_t)min(first_token + t, args.num_tokens - 1) * args.hidden;
  }
#pragma unroll
  for (int e = 0; e < EXPERTS; e++) {
    const int expert = min(first_expert + e, args.num_experts - 1);
    gate_rows[e] = params.router_gate + (int64_t)expert * args.hidden;
  }

  float total = 0.0f;
  for (int begin = 0; begin < segments; begin += block_segments) {
    float sum[N] = {};
    // Lanes whose segment is past H continue with zeros, because other segments share their warp.
    const int first_column = (begin + segment) * ROUTER_GEMM_SEGMENT + lane * CHUNK;
#pragma unroll 1
    for (int step = 0; step < SEGMENT_STEPS; step += AHEAD) {
      Chunk x_chunk[AHEAD][TOKENS], gate_chunk[AHEAD][EXPERTS];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int h = first_column + (step + a) * STEP;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          x_chunk[a][t] = load_chunk<VECTOR>(x_rows[t], h, args.hidden);
        }
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
          gate_chunk[a][e] = load_chunk<VECTOR>(gate_rows[e], h, args.hidden);
        }
      }
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        add_products<TOKENS, EXPERTS>(sum, x_chunk[a], gate_chunk[a]);
      }
    }
    lanes_sum(sum);
    if (N > 1 || lane == 0) {
#pragma unroll
      for (int i = 0; i < SHARE; i++) segment_sums[segment * N + lane * SHARE + i] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x < N) {
      for (int s = 0; s < min(block_segments, segments - begin); s++) {
        total = __fadd_rn(total, segment_sums[s * N + threadIdx.x]);
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < N) {
    const int token = first_token + threadIdx.x / EXPERTS;
    const int expert = first_expert + threadIdx.x % EXPERTS;
    store_logit(params, total, token, expert);
  }
}

// ---- tile: 64 tokens by 32 experts, steps of columns through shared memory ----------------------

constexpr int TILE_ROWS = 8;  // Tokens, and experts, of a group of eight lanes.
constexpr int TILE_N = TILE_ROWS * TILE_ROWS;
constexpr int TILE_EXPERT_GROUPS = ROUTER_GEMM_TILE_EXPERTS / TILE_ROWS;
static_assert(ROUTER_GEMM_TILE_TOKENS * ROUTER_GEMM_TILE_EXPERTS / TILE_N * LANES ==
                  ROUTER_GEMM_TILE_THREADS,
              "eight lanes per 8 by 8 logits");

// The columns of one step, for ROWS rows of an operand. A chunk is one or two 16-byte vectors. The
// first vectors of all chunks are stored before the second ones, so that eight lanes read 128
// consecutive bytes. The second vectors swap halves, so that writing a row in the order of columns
// is free of bank conflicts too.
template <typename T, int ROWS>
struct StepRows {
  static constexpr int LEN = Vec<T>::LEN;
  static constexpr int ROW_VECTORS = STEP / LEN;
  static constexpr int LOADS = ROWS * ROW_VECTORS / ROUTER_GEMM_TILE_THREADS;
  static_assert(ROWS * ROW_VECTORS % ROUTER_GEMM_TILE_THREADS == 0, "as many loads per thread");
  T at[ROWS * STEP];

  __device__ __forceinline__ static int place(int row, int chunk, int i) {
    const int vector = i / LEN;
    return row * STEP + (vector * LANES + (chunk ^ (vector * LANES / 2))) * LEN;
  }

  // Loads the columns from `h` on of rows first, first + 1, ...; rows past the last one repeat it.
  template <bool VECTOR>
  __device__ __forceinline__ void fill(const T* rows, int first, int num_rows, int h, int hidden) {
#pragma unroll
    for (int load = 0; load < LOADS; load++) {
      const int index = load * ROUTER_GEMM_TILE_THREADS + threadIdx.x;
      const int row = index / ROW_VECTORS, column = index % ROW_VECTORS * LEN;
      const T* source = rows + (int64_t)min(first + row, num_rows - 1) * hidden;
      T* target = at + place(row, column / CHUNK, column % CHUNK);
      const int begin = h + column;
      if constexpr (VECTOR) {
        const bool inside = begin < hidden;
        ptx::cp_async16(ptx::smem_u32(target), inside ? source + begin : source, inside ? 16 : 0);
      } else {
        Vec<T> value;
#pragma unroll
        for (int i = 0; i < LEN; i++) {
          value.at[i] = begin + i < hidden ? source[begin + i] : from_f32<T>(0.0f);
        }
        store_vec(target, value);
      }
    }
  }

  __device__ __forceinline__ Chunk chunk(int row, int lane) const {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < CHUNK; i += LEN) {
      const Vec<T> value = load_vec(at + place(row, lane, i));
#pragma unroll
      for (int j = 0; j < LEN; j++) chunk.at[i + j] = to_f32(value.at[j]);
    }
    return chunk;
  }
};

template <typename Elem, typename Gate>
struct alignas(16) RouterGemmStage {
  StepRows<Elem, ROUTER_GEMM_TILE_TOKENS> x;
  StepRows<Gate, ROUTER_GEMM_TILE_EXPERTS> gate;
};
static_assert(sizeof(RouterGemmStage<bf16, float>) ==
                  STEP * (ROUTER_GEMM_TILE_TOKENS * 2 + ROUTER_GEMM_TILE_EXPERTS * 4),
              "the launch allocates this much");

template <bool VECTOR, typename Elem, typename Gate>
__device__ __forceinline__ void tile_body(const TypedRouterGemmParams<Elem, Gate>& params) {
  const RouterGemmArgs& args = params.args;
  SHARED_DYNAMIC(shared);
  auto* stages = reinterpret_cast<RouterGemmStage<Elem, Gate>*>(shared);
  const int expert_blocks =
      (args.num_experts + ROUTER_GEMM_TILE_EXPERTS - 1) / ROUTER_GEMM_TILE_EXPERTS;
  const int first_token = blockIdx.x / expert_blocks * ROUTER_GEMM_TILE_TOKENS;
  const int first_expert = blockIdx.x % expert_blocks * ROUTER_GEMM_TILE_EXPERTS;
  const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int token_row = group / TILE_EXPERT_GROUPS * TILE_ROWS;
  const int expert_row = group % TILE_EXPERT_GROUPS * TILE_ROWS;
  const int steps = (args.hidden + STEP - 1) / STEP;

  // Every step commits a group of copies, even an empty one, so that waits can count groups.
  auto fill = [&](int step) {
    if (step < steps) {
      auto& stage = stages[step % ROUTER_GEMM_STAGES];
      stage.x.template fill<VECTOR>(params.x, first_token, args.num_tokens, step * STEP,
                                    args.hidden);
      stage.gate.template fill<VECTOR>(params.router_gate, first_expert, args.num_experts,
                                       step * STEP, args.hidden);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < ROUTER_GEMM_STAGES - 1; step++) fill(step);

  float total[TILE_ROWS] = {};
  float sum[TILE_N] = {};
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<ROUTER_GEMM_STAGES - 2>();
    // Now all threads' copies of this step are visible, and the stage that is filled next is free.
    __syncthreads();
    fill(step + ROUTER_GEMM_STAGES - 1);

    const auto& stage = stages[step % ROUTER_GEMM_STAGES];
    Chunk x_chunk[TILE_ROWS], gate_chunk[TILE_ROWS];
#pragma unroll
    for (int i = 0; i < TILE_ROWS; i++) {
      x_chunk[i] = stage.x.chunk(token_row + i, lane);
      gate_chunk[i] = stage.gate.chunk(expert_row + i, lane);
    }
    add_products<TILE_ROWS, TILE_ROWS>(sum, x_chunk, gate_chunk);
    if (step % SEGMENT_STEPS == SEGMENT_STEPS - 1 || step == steps - 1) {
      lanes_sum(sum);
#pragma unroll
      for (int e = 0; e < TILE_ROWS; e++) total[e] = __fadd_rn(total[e], sum[e]);
#pragma unroll
      for (int i = 0; i < TILE_N; i++) sum[i] = 0.0f;
    }
  }
  // Each lane has the logits of one token of the group's 8 by 8.
#pragma unroll
  for (int e = 0; e < TILE_ROWS; e++) {
    store_logit(params, total[e], first_token + token_row + lane, first_expert + expert_row + e);
  }
}

// ---- The entries: for each body, a gate of the tokens' type or of f32 ---------------------------

template <typename Elem, typename Gate>
__device__ __forceinline__ void router_gemm_one(const TypedRouterGemmParams<Elem, Gate>& params) {
  if (params.args.vector) {
    segments_body<1, 1, SEGMENT_STEPS, true>(params);
  } else {
    segments_body<1, 1, 1, false>(params);
  }
}

template <typename Elem, typename Gate>
__device__ __forceinline__ void router_gemm_few(const TypedRouterGemmParams<Elem, Gate>& params) {
  if (params.args.vector) {
    segments_body<ROUTER_GEMM_FEW_TOKENS, ROUTER_GEMM_FEW_EXPERTS, 1, true>(params);
  } else {
    segments_body<ROUTER_GEMM_FEW_TOKENS, ROUTER_GEMM_FEW_EXPERTS, 1, false>(params);
  }
}

template <typename Elem, typename Gate>
__device__ __forceinline__ void router_gemm_tile(const TypedRouterGemmParams<Elem, Gate>& params) {
  if (params.args.vector) {
    tile_body<true>(params);
  } else {
    tile_body<false>(params);
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS, ONE_BLOCKS)
moe_router_gemm_fwd_one_f32(const TypedRouterGemmParams<float, float> params) { router_gemm_one(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_one_f32, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS, ONE_BLOCKS)
moe_router_gemm_fwd_one_f16(const TypedRouterGemmParams<f16, f16> params) { router_gemm_one(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_one_f16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS, ONE_BLOCKS)
moe_router_gemm_fwd_one_bf16(const TypedRouterGemmParams<bf16, bf16> params) { router_gemm_one(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_one_bf16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS, ONE_BLOCKS)
moe_router_gemm_fwd_one_gate32_f16(const TypedRouterGemmParams<f16, float> params) { router_gemm_one(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_one_gate32_f16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS, ONE_BLOCKS)
moe_router_gemm_fwd_one_gate32_bf16(const TypedRouterGemmParams<bf16, float> params) { router_gemm_one(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_one_gate32_bf16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS)
moe_router_gemm_fwd_few_f32(const TypedRouterGemmParams<float, float> params) { router_gemm_few(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_few_f32, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS)
moe_router_gemm_fwd_few_f16(const TypedRouterGemmParams<f16, f16> params) { router_gemm_few(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_few_f16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS)
moe_router_gemm_fwd_few_bf16(const TypedRouterGemmParams<bf16, bf16> params) { router_gemm_few(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_few_bf16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS)
moe_router_gemm_fwd_few_gate32_f16(const TypedRouterGemmParams<f16, float> params) { router_gemm_few(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_few_gate32_f16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_MAX_THREADS)
moe_router_gemm_fwd_few_gate32_bf16(const TypedRouterGemmParams<bf16, float> params) { router_gemm_few(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_few_gate32_bf16, ROUTER_GEMM_MAX_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_TILE_THREADS)
moe_router_gemm_fwd_tile_f32(const TypedRouterGemmParams<float, float> params) { router_gemm_tile(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_tile_f32, ROUTER_GEMM_TILE_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_TILE_THREADS)
moe_router_gemm_fwd_tile_f16(const TypedRouterGemmParams<f16, f16> params) { router_gemm_tile(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_tile_f16, ROUTER_GEMM_TILE_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_TILE_THREADS)
moe_router_gemm_fwd_tile_bf16(const TypedRouterGemmParams<bf16, bf16> params) { router_gemm_tile(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_tile_bf16, ROUTER_GEMM_TILE_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_TILE_THREADS)
moe_router_gemm_fwd_tile_gate32_f16(const TypedRouterGemmParams<f16, float> params) { router_gemm_tile(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_tile_gate32_f16, ROUTER_GEMM_TILE_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTER_GEMM_TILE_THREADS)
moe_router_gemm_fwd_tile_gate32_bf16(const TypedRouterGemmParams<bf16, float> params) { router_gemm_tile(params); }
EXPORT_KERNEL(moe_router_gemm_fwd_tile_gate32_bf16, ROUTER_GEMM_TILE_THREADS)
// clang-format on
