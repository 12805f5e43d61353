// combine: each token's output is the weighted sum of its experts' rows, plus an output bias and
// the output of a shared expert.
//   y[t, h] = (sum over k = 0 .. K-1 of routing_weights[t, k] * v[k, h]  + output_bias[h]
//              + sigmoid(shared_gate[t]) * shared[t, h]) * (average ? 1/2 : 1)
//   v[k, :] is yp[row_of_slot[t*K + k], :]. For a slot without a row whose id is an identity
//   expert's it is x[t, :]. Any other slot without a row is skipped: neither a row nor its weight
//   is read. A slot has no row if row_of_slot is outside 0 .. T*K - 1.
//   With args.rows_weighted (f16 only) the rows of yp are already weighted, and routing_weights
//   apply to identity experts only. Without routing_weights each weight is 1; output_bias, shared
//   and shared_gate are left out where null.
//   In f32: fma after fma from 0 in the order of k, then the bias is added, then the shared row (as
//   one fma with its gate), then the sum is halved, and rounded to Elem once. A token without any
//   term gets 0.
// Launch  grid (T, blocks to cover H), block (whole warps, at most COMBINE_THREADS): each thread
//         has one vector of columns, or as many single elements where rows are not aligned.
// Bytes   reads R*H*s + 8*T*K, writes T*H*s: at T4096 H7168 K8 bf16, 470 MB + 59 MB. Identity slots
//         and the shared row read H*s more each.
// Why     COMBINE_LOADS rows are loaded before the first is used, to hide the latency of memory;
//         more would cost registers, and with them resident threads. Each lane looks up one slot
//         and shares it by shuffle, so that map and weights cost one load per 32 slots.
// Writers one per element of y, with a fixed order of summation: the result is deterministic.
#include "kernel.cuh"

// CombineParams with typed pointers.
template <typename Elem>
struct TypedCombineParams {
  Elem* y;                       // [T, H] out
  const Elem* yp;                // [R, H]
  const float* routing_weights;  // [T, K] or null
  const Elem* x;                 // [T, H], for identity experts
  const Elem* output_bias;       // [H] or null
  const Elem* shared;            // [T, H] or null
  const float* shared_gate;      // [T] or null
  const int* row_of_slot;        // [T, K]; -1: the slot is inactive
  const uint32_t* expert_ids;    // [T, K], for identity experts
  CombineArgs args;
  int padding;
};
static_assert(sizeof(TypedCombineParams<float>) == sizeof(CombineParams), "the same layout");
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, y);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, yp);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, routing_weights);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, x);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, output_bias);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, shared);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, shared_gate);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, row_of_slot);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, expert_ids);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, args);
ASSERT_SAME_OFFSET(TypedCombineParams<float>, CombineParams, padding);

constexpr int COMBINE_LOADS = 4;
constexpr int COMBINE_BLOCKS = 4;  // Resident blocks per SM, which bound the registers of a thread.
static_assert(WARP_SIZE % COMBINE_LOADS == 0, "one look-up serves a group of loads");

// Marks a slot of an identity expert, in the place of a row.
constexpr int IDENTITY = -2;
static_assert(IDENTITY != INACTIVE, "identity slots differ from inactive ones");

// A thread's columns of a row: one vector, or as many single elements, a block apart so that loads
// coalesce. For columns past H it loads other elements of the row, and stores nothing.
template <typename Elem, bool VECTOR>
struct Columns {
  static constexpr int LEN = Vec<Elem>::LEN;
  int first, stride, hidden;

  __device__ __forceinline__ explicit Columns(int hidden)
      : first(blockIdx.y * blockDim.x * LEN + threadIdx.x * (VECTOR ? LEN : 1)),
        stride(blockDim.x),
        hidden(hidden) {}

  // The address that `load` takes: that of the thread's first column in vectors, else of the row.
  __device__ __forceinline__ const Elem* of(const Elem* row) const {
    return VECTOR && first < hidden ? row + first : row;
  }

  __device__ __forceinline__ Vec<Elem> load(const Elem* row_columns) const {
    if constexpr (VECTOR) {
      return load_vec(row_columns);
    } else {
      Vec<Elem> value;
#pragma unroll
      for (int i = 0; i < LEN; i++) value.at[i] = row_columns[min(first + i * stride, hidden - 1)];
      return value;
    }
  }

  __device__ __forceinline__ void store(Elem* row, const Vec<Elem>& value) const {
    if constexpr (VECTOR) {
      if (first < hidden) store_vec(row + first, value);
    } else {
#pragma unroll
      for (int i = 0; i < LEN; i++) {
        const int h = first + i * stride;
        if (h < hidden) row[h] = value.at[i];
      }
    }
  }
};

// ROWS_WEIGHTED: whether args.rows_weighted is read.
template <typename Elem, bool VECTOR, bool ROWS_WEIGHTED>
__device__ __forceinline__ void combine_columns(const TypedCombineParams<Elem>& params) {
  const CombineArgs& args = params.args;
  constexpr int LEN = Vec<Elem>::LEN;
  constexpr int LOADS = VECTOR ? COMBINE_LOADS : 1;  // Single elements take LEN loads per row.
  const int64_t token = blockIdx.x;
  const int64_t first_slot = token * args.top_k;
  const uint32_t rows = gridDim.x * (uint32_t)args.top_k;
  const Columns<Elem, VECTOR> columns(args.hidden);
  const Elem* yp = columns.of(params.yp);
  const Elem* x = args.num_identity != 0 ? columns.of(params.x) + token * args.hidden : nullptr;
  float sum[LEN] = {};

  // Threads past H take part, because their lanes look up slots for the others.
  for (int begin = 0; begin < args.top_k; begin += WARP_SIZE) {
    const int lane = begin + threadIdx.x % WARP_SIZE;
    int lane_row = INACTIVE;
    float lane_weight = 1.0f;
    if (lane < args.top_k) {
      lane_row = params.row_of_slot[first_slot + lane];
      if ((uint32_t)lane_row >= rows) lane_row = INACTIVE;
      if (params.routing_weights != nullptr) {
        lane_weight = params.routing_weights[first_slot + lane];
      }
      if (lane_row == INACTIVE && args.num_identity != 0) {
        const uint32_t id = params.expert_ids[first_slot + lane];
        const uint32_t identity = id - (uint32_t)args.first_identity;
        if (identity < (uint32_t)args.num_identity) lane_row = IDENTITY;
      }
      if (ROWS_WEIGHTED && args.rows_weighted && lane_row != IDENTITY) lane_weight = 1.0f;
    }
    const int count = min(WARP_SIZE, args.top_k - begin);
    for (int k = 0; k < count; k += LOADS) {
      int row[LOADS];
      Vec<Elem> value[LOADS];
#pragma unroll
      for (int j = 0; j < LOADS; j++) {
        row[j] = __shfl_sync(FULL_WARP, lane_row, k + j);  // INACTIVE past the last slot.
        if (row[j] == INACTIVE) continue;
        const int64_t offset = (uint64_t)(uint32_t)row[j] * (uint32_t)args.hidden;
        value[j] = columns.load(row[j] == IDENTITY ? x : yp + offset);
      }
#pragma unroll
      for (int j = 0; j < LOADS; j++) {
        const float weight = __shfl_sync(FULL_WARP, lane_weight, k + j);
        if (row[j] == INACTIVE) continue;
#pragma unroll
        for (int i = 0; i < LEN; i++) sum[i] = __fmaf_rn(weight, to_f32(value[j].at[i]), sum[i]);
      }
    }
  }

  if (params.output_bias != nullptr) {
    const Vec<Elem> bias = columns.load(columns.of(params.output_bias));
#pragma unroll
    for (int i = 0; i < LEN; i++) sum[i] = __fadd_rn(sum[i], to_f32(bias.at[i]));
  }
  if (params.shared != nullptr) {
    const Vec<Elem> shared = columns.load(columns.of(params.shared) + token * args.hidden);
    float weight = 1.0f;  // An fma by 1 is an addition.
    if (params.shared_gate != nullptr) {
      weight = __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-params.shared_gate[token])));
    }
#pragma unroll
    for (int i = 0; i < LEN; i++) sum[i] = __fmaf_rn(weight, to_f32(shared.at[i]), sum[i]);
  }
  const float factor = args.average ? 0.5f : 1.0f;
  Vec<Elem> result;
#pragma unroll
  for (int i = 0; i < LEN; i++) result.at[i] = from_f32<Elem>(__fmul_rn(sum[i], factor));
  columns.store(params.y + token * args.hidden, result);
}

template <bool ROWS_WEIGHTED = false, typename Elem>
__device__ __forceinline__ void combine_fwd(const TypedCombineParams<Elem>& params) {
  if (params.args.vector) {
    combine_columns<Elem, true, ROWS_WEIGHTED>(params);
  } else {
    combine_columns<Elem, false, ROWS_WEIGHTED>(params);
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, COMBINE_BLOCKS)
moe_combine_fwd_f32(const TypedCombineParams<float> params) { combine_fwd(params); }
EXPORT_KERNEL(moe_combine_fwd_f32, COMBINE_THREADS)

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, COMBINE_BLOCKS)
moe_combine_fwd_f16(const TypedCombineParams<f16> params) { combine_fwd<true>(params); }
EXPORT_KERNEL(moe_combine_fwd_f16, COMBINE_THREADS)

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, COMBINE_BLOCKS)
moe_combine_fwd_bf16(const TypedCombineParams<bf16> params) { combine_fwd(params); }
EXPORT_KERNEL(moe_combine_fwd_bf16, COMBINE_THREADS)
// clang-format on
