// rms_norm: divides each row by the root of its mean square and multiplies it by weights.
//   y[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + epsilon) * s[:], with s = offset + weight[:]
//   scale_first: x[r, :] * s[:] takes the place of x[r, :], and there is no factor after the norm.
//   Without weights s is 1.
//   Computed in f32 and rounded to Elem once. Every operation is correctly rounded and in a stated
//   order, so the bits are the same on every device. If the sum of squares overflows f32, finite
//   elements of the row become 0, as in the models' own code, and infinite elements NaN. NaN
//   propagates to its whole row.
//   If expert_offsets is not null, unused rows (from expert_offsets[E] on) are not read and are
//   zeroed, so y is written whole. y may be x.
// Launch  grid (R), block (whole warps, at most RMS_NORM_THREADS): one block per row.
// Order   a row is cut into 16-byte vectors. Each thread takes every blockDim-th vector and sums
//         its squares by fma in the order of columns; then the lanes of a warp are summed (xor 16,
//         8, 4, 2, 1), then the warps in order. The order depends on H and the size of Elem, not on
//         alignment.
// Bytes   reads R*H*s, writes R*H*s: at R32768 H2048 bf16, 134 MB + 134 MB. The second pass over a
//         row reads it from L1.
// Writers one per element, the last thread that reads it: deterministic, and y may be x.
#include "kernel.cuh"

// RmsNormParams with typed pointers.
template <typename Elem>
struct TypedRmsNormParams {
  Elem* y;                    // [R, H] out
  const Elem* x;              // [R, H]
  const Elem* weight;         // [H] or null
  const int* expert_offsets;  // [E + 1] or null
  RmsNormArgs args;
};
static_assert(sizeof(TypedRmsNormParams<float>) == sizeof(RmsNormParams), "the same layout");
ASSERT_SAME_OFFSET(TypedRmsNormParams<float>, RmsNormParams, y);
ASSERT_SAME_OFFSET(TypedRmsNormParams<float>, RmsNormParams, x);
ASSERT_SAME_OFFSET(TypedRmsNormParams<float>, RmsNormParams, weight);
ASSERT_SAME_OFFSET(TypedRmsNormParams<float>, RmsNormParams, expert_offsets);
ASSERT_SAME_OFFSET(TypedRmsNormParams<float>, RmsNormParams, args);

constexpr int RMS_NORM_WARPS = RMS_NORM_THREADS / WARP_SIZE;

// One 16-byte vector of columns, converted to f32; 0 from column H on.
template <typename Elem>
struct NormColumns {
  static constexpr int LEN = Vec<Elem>::LEN;
  float at[LEN];

  __device__ __forceinline__ void load(const Elem* row, int h, const RmsNormArgs& args) {
    if (args.vector) {
      const Vec<Elem> value = load_vec(row + h);
#pragma unroll
      for (int i = 0; i < LEN; i++) at[i] = to_f32(value.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < LEN; i++) at[i] = h + i < args.hidden ? to_f32(row[h + i]) : 0.0f;
    }
  }

  __device__ __forceinline__ void store(Elem* row, int h, const RmsNormArgs& args) const {
    if (args.vector) {
      Vec<Elem> value;
#pragma unroll
      for (int i = 0; i < LEN; i++) value.at[i] = from_f32<Elem>(at[i]);
      store_vec(row + h, value);
    } else {
#pragma unroll
      for (int i = 0; i < LEN; i++) {
        if (h + i < args.hidden) row[h + i] = from_f32<Elem>(at[i]);
      }
    }
  }

  __device__ __forceinline__ void scale(const Elem* weight, int h, const RmsNormArgs& args) {
    NormColumns weights;
    weights.load(weight, h, args);
#pragma unroll
    for (int i = 0; i < LEN; i++) at[i] = __fmul_rn(at[i], __fadd_rn(args.offset, weights.at[i]));
  }
};

// The sum of `part` over the block, in every thread.
__device__ __forceinline__ float block_sum(float part) {
  SHARED_ARRAY(float, warp_sums, RMS_NORM_WARPS);
  part = warp_sum(part);
  if (threadIdx.x % WARP_SIZE == 0) warp_sums[threadIdx.x / WARP_SIZE] = part;
  __syncthreads();
  float sum = 0.0f;
  const int warps = blockDim.x / WARP_SIZE;
  for (int warp = 0; warp < warps; warp++) sum = __fadd_rn(sum, warp_sums[warp]);
  return sum;
}

template <typename Elem>
__device__ __forceinline__ void rms_norm_fwd(const TypedRmsNormParams<Elem>& params) {
  constexpr int LEN = Vec<Elem>::LEN;
  const RmsNormArgs& args = params.args;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * LEN, step = blockDim.x * LEN;
  Elem* y = params.y + row * args.hidden;
  const Elem* x = params.x + row * args.hidden;
  const Elem* weight = params.weight;
  const int* expert_offsets = params.expert_offsets;
  NormColumns<Elem> columns;

  if (expert_offsets != nullptr && row >= expert_offsets[args.num_experts]) {
#pragma unroll
    for (int i = 0; i < LEN; i++) columns.at[i] = 0.0f;
    for (int h = first; h < args.hidden; h += step) columns.store(y, h, args);
    return;
  }

  const bool scale_first = weight != nullptr && args.scale_first;
  float part = 0.0f;
  for (int h = first; h < args.hidden; h += step) {
    columns.load(x, h, args);
    if (scale_first) columns.scale(weight, h, args);
#pragma unroll
    for (int i = 0; i < LEN; i++) part = __fmaf_rn(columns.at[i], columns.at[i], part);
  }
  const float mean = __fdiv_rn(block_sum(part), (float)args.hidden);
  const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, args.epsilon)));

  for (int h = first; h < args.hidden; h += step) {
    columns.load(x, h, args);
    if (scale_first) columns.scale(weight, h, args);
#pragma unroll
    for (int i = 0; i < LEN; i++) columns.at[i] = __fmul_rn(columns.at[i], inverse);
    if (weight != nullptr && !scale_first) columns.scale(weight, h, args);
    columns.store(y, h, args);
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(RMS_NORM_THREADS)
moe_rms_norm_fwd_f32(const TypedRmsNormParams<float> params) { rms_norm_fwd(params); }
EXPORT_KERNEL(moe_rms_norm_fwd_f32, RMS_NORM_THREADS)

extern "C" __global__ void __launch_bounds__(RMS_NORM_THREADS)
moe_rms_norm_fwd_f16(const TypedRmsNormParams<f16> params) { rms_norm_fwd(params); }
EXPORT_KERNEL(moe_rms_norm_fwd_f16, RMS_NORM_THREADS)

extern "C" __global__ void __launch_bounds__(RMS_NORM_THREADS)
moe_rms_norm_fwd_bf16(const TypedRmsNormParams<bf16> params) { rms_norm_fwd(params); }
EXPORT_KERNEL(moe_rms_norm_fwd_bf16, RMS_NORM_THREADS)
// clang-format on
