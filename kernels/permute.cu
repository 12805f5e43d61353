// permute: copies each token's row of x to the rows of its slots, which are grouped by expert.
//   xp[row_of_slot[t*K + k], :] = x[t, :]
//   A slot whose row is outside 0 .. T*K - 1 is inactive and ignored. Unused rows (from
//   expert_offsets[E] on) are zeroed, so xp is written whole.
// Launch  grid (T), block (PERMUTE_THREADS): one block per token. Block t also zeroes the unused
//         rows among t*K .. t*K + K - 1. xp has T*K rows, so each row belongs to one block.
// Bytes   reads T*H*s + 4*T*K, writes R*H*s: at T4096 H7168 K8 bf16, 59 MB + 470 MB.
// Why     one block per token, not per row: each row of x is read from memory once and stored K
//         times from registers.
// Writers one per element of xp, because row_of_slot is injective: the result is deterministic. As
//         a copy it is exact.
#include "kernel.cuh"

// PermuteParams with typed pointers.
template <typename Elem>
struct TypedPermuteParams {
  Elem* xp;                   // [R, H] out
  const Elem* x;              // [T, H]
  const int* row_of_slot;     // [T, K]; -1: the slot is inactive
  const int* expert_offsets;  // [E + 1]
  PermuteArgs args;
};
static_assert(sizeof(TypedPermuteParams<float>) == sizeof(PermuteParams), "the same layout");
ASSERT_SAME_OFFSET(TypedPermuteParams<float>, PermuteParams, xp);
ASSERT_SAME_OFFSET(TypedPermuteParams<float>, PermuteParams, x);
ASSERT_SAME_OFFSET(TypedPermuteParams<float>, PermuteParams, row_of_slot);
ASSERT_SAME_OFFSET(TypedPermuteParams<float>, PermuteParams, expert_offsets);
ASSERT_SAME_OFFSET(TypedPermuteParams<float>, PermuteParams, args);

// The block zeroes one row of xp.
template <typename Elem>
__device__ __forceinline__ void zero_row(Elem* row, int hidden, bool vector) {
  if (vector) {
    Vec<Elem> zero;
#pragma unroll
    for (int i = 0; i < Vec<Elem>::LEN; i++) zero.at[i] = from_f32<Elem>(0.0f);
    for (int h = threadIdx.x * Vec<Elem>::LEN; h < hidden; h += PERMUTE_THREADS * Vec<Elem>::LEN) {
      store_vec(row + h, zero);
    }
  } else {
    for (int h = threadIdx.x; h < hidden; h += PERMUTE_THREADS) row[h] = from_f32<Elem>(0.0f);
  }
}

template <typename Elem>
__device__ __forceinline__ void permute_fwd(const TypedPermuteParams<Elem>& params) {
  const PermuteArgs& args = params.args;
  const int hidden = args.hidden;
  Elem* xp = params.xp;
  const int* row_of_slot = params.row_of_slot;
  const int64_t token = blockIdx.x;
  const int64_t first_slot = token * args.top_k;
  const uint32_t rows = gridDim.x * (uint32_t)args.top_k;
  const Elem* source = params.x + token * hidden;

  if (args.vector) {
    for (int h = threadIdx.x * Vec<Elem>::LEN; h < hidden; h += PERMUTE_THREADS * Vec<Elem>::LEN) {
      const Vec<Elem> value = load_vec(source + h);
      for (int k = 0; k < args.top_k; k++) {
        const uint32_t row = row_of_slot[first_slot + k];
        if (row < rows) store_vec(xp + (int64_t)row * hidden + h, value);
      }
    }
  } else {
    for (int h = threadIdx.x; h < hidden; h += PERMUTE_THREADS) {
      const Elem value = source[h];
      for (int k = 0; k < args.top_k; k++) {
        const uint32_t row = row_of_slot[first_slot + k];
        if (row < rows) xp[(int64_t)row * hidden + h] = value;
      }
    }
  }

  const int rows_in_use = params.expert_offsets[args.num_experts];
  for (int k = 0; k < args.top_k; k++) {
    const int64_t row = first_slot + k;
    if (row >= rows_in_use) zero_row(xp + row * hidden, hidden, args.vector);
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(PERMUTE_THREADS)
moe_permute_fwd_f32(const TypedPermuteParams<float> params) { permute_fwd(params); }
EXPORT_KERNEL(moe_permute_fwd_f32, PERMUTE_THREADS)

extern "C" __global__ void __launch_bounds__(PERMUTE_THREADS)
moe_permute_fwd_f16(const TypedPermuteParams<f16> params) { permute_fwd(params); }
EXPORT_KERNEL(moe_permute_fwd_f16, PERMUTE_THREADS)

extern "C" __global__ void __launch_bounds__(PERMUTE_THREADS)
moe_permute_fwd_bf16(const TypedPermuteParams<bf16> params) { permute_fwd(params); }
EXPORT_KERNEL(moe_permute_fwd_bf16, PERMUTE_THREADS)
// clang-format on
