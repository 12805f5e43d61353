// Definitions shared by the kernels: element types, 16-byte vectors, reductions, selection.
#pragma once

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP_SIZE = 32;

// The expert id of an inactive slot.
constexpr uint32_t NO_EXPERT = 0xffffffffu;

// ---- Elem: the type of activations and weights ------------------------------------------------
// Kernels load Elem, compute in f32 and store Elem, rounded to nearest even.

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_f32(f16 value) { return __half2float(value); }

template <typename Elem>
__device__ __forceinline__ Elem from_f32(float value);
template <>
__device__ __forceinline__ float from_f32<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ f16 from_f32<f16>(float value) {
  return __float2half_rn(value);
}

// ---- Vec: 16 bytes of Elem, the width of a vector load ----------------------------------------

template <typename Elem>
struct alignas(16) Vec {
  static constexpr int LEN = 16 / sizeof(Elem);
  Elem at[LEN];
};

// `source`, and `target` below, must be 16-byte aligned.
template <typename Elem>
__device__ __forceinline__ Vec<Elem> load_vec(const Elem* source) {
  return *reinterpret_cast<const Vec<Elem>*>(source);
}

template <typename Elem>
__device__ __forceinline__ void store_vec(Elem* target, const Vec<Elem>& value) {
  *reinterpret_cast<Vec<Elem>*>(target) = value;
}

// ---- Reductions over a warp, in a fixed order ---------------------------------------------------

// The sum of `value` over the lanes, in every lane.

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(FULL_WARP, value, offset);
  }
  return value;
}

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
  for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
    const int below = __shfl_up_sync(FULL_WARP, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// ---- Parameters ---------------------------------------------------------------------------------
// A kernel has one struct as its parameter. In abi.h its addresses are integers, which Rust fills
// in; the kernel's twin of it has typed pointers, so that loads and stores keep their address
// space.

#define ASSERT_SAME_OFFSET(Twin, Params, field) \
  static_assert(offsetof(Twin, field) == offsetof(Params, field), "the same layout")
