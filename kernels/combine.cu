// combine: each token's result is the weighted sum of its rows.
//   y[t, h] = sum over k = 0 .. K-1 of weights[t, k] * yp[row_of_slot[t*K + k], h]
//   In f32: fma after fma from 0 in the order of k, rounded to Elem once at the end. An inactive
//   slot is left out: neither a row nor its weight is looked at. A token without active slots gets 0.
// Launch  grid (T, blocks to cover H), block (whole warps, at most COMBINE_THREADS): a thread has one
//         vector of columns, or as many single elements where rows are not aligned.
// Bytes   reads R*H*s + 8*T*K, writes T*H*s: at T4096 H7168 K8 bf16, 470 MB + 59 MB.
// Why     COMBINE_LOADS rows are asked for before the first is used, as memory is far away; more at
//         once would take registers from threads that hide the rest.
// Writers one per element of y, and a fixed order of summation: the result is deterministic.
#include "kernel.cuh"

constexpr int COMBINE_LOADS = 4;

template <typename Elem>
__device__ __forceinline__ void combine_fwd(Elem* y,                 // [T, H] out
                                            const Elem* yp,          // [R, H]
                                            const float* weights,    // [T, K]
                                            const int* row_of_slot,  // [T, K], -1: inactive
                                            const CombineArgs& args) {
  constexpr int LEN = Vec<Elem>::LEN;
  const int hidden = args.hidden;
  const int64_t token = blockIdx.x;
  const int first_column = blockIdx.y * blockDim.x * LEN;
  y += token * hidden;
  weights += token * args.top_k;
  row_of_slot += token * args.top_k;

  if (args.vector) {
    const int h = first_column + threadIdx.x * LEN;
    if (h >= hidden) return;
    const Elem* column = yp + h;
    float sum[LEN] = {};
    for (int k = 0; k < args.top_k; k += COMBINE_LOADS) {
      int row[COMBINE_LOADS];
      Vec<Elem> value[COMBINE_LOADS];
#pragma unroll
      for (int j = 0; j < COMBINE_LOADS; j++) {
        row[j] = k + j < args.top_k ? row_of_slot[k + j] : INACTIVE;
        if (row[j] != INACTIVE) value[j] = load_vec(column + (int64_t)row[j] * hidden);
      }
#pragma unroll
      for (int j = 0; j < COMBINE_LOADS; j++) {
        if (row[j] == INACTIVE) continue;
        const float weight = weights[k + j];
#pragma unroll
        for (int i = 0; i < LEN; i++) sum[i] = __fmaf_rn(weight, to_f32(value[j].at[i]), sum[i]);
      }
    }
    Vec<Elem> result;
#pragma unroll
    for (int i = 0; i < LEN; i++) result.at[i] = from_f32<Elem>(sum[i]);
    store_vec(y + h, result);
    return;
  }

  // The block has the same columns, but a thread's are a block apart, so that warps read runs.
  const int end = min(first_column + (int)blockDim.x * LEN, hidden);
  for (int h = first_column + threadIdx.x; h < end; h += blockDim.x) {
    const Elem* column = yp + h;
    float sum = 0.0f;
    for (int k = 0; k < args.top_k; k += COMBINE_LOADS) {
      int row[COMBINE_LOADS];
      Elem value[COMBINE_LOADS];
#pragma unroll
      for (int j = 0; j < COMBINE_LOADS; j++) {
        row[j] = k + j < args.top_k ? row_of_slot[k + j] : INACTIVE;
        if (row[j] != INACTIVE) value[j] = column[(int64_t)row[j] * hidden];
      }
#pragma unroll
      for (int j = 0; j < COMBINE_LOADS; j++) {
        if (row[j] != INACTIVE) sum = __fmaf_rn(weights[k + j], to_f32(value[j]), sum);
      }
    }
    y[h] = from_f32<Elem>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
moe_combine_fwd_f32(float* y, const float* yp, const float* weights, const int* row_of_slot,
                    const CombineArgs args) {
  combine_fwd(y, yp, weights, row_of_slot, args);
}
EXPORT_KERNEL(moe_combine_fwd_f32, COMBINE_THREADS)

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
moe_combine_fwd_f16(f16* y, const f16* yp, const float* weights, const int* row_of_slot,
                    const CombineArgs args) {
  combine_fwd(y, yp, weights, row_of_slot, args);
}
EXPORT_KERNEL(moe_combine_fwd_f16, COMBINE_THREADS)

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
moe_combine_fwd_bf16(bf16* y, const bf16* yp, const float* weights, const int* row_of_slot,
                     const CombineArgs args) {
  combine_fwd(y, yp, weights, row_of_slot, args);
}
EXPORT_KERNEL(moe_combine_fwd_bf16, COMBINE_THREADS)
