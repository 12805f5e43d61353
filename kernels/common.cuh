// The vocabulary that several kernels share: element types, 16-byte vectors, reductions.
#pragma once

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP_SIZE = 32;

// The id of a slot that belongs to no expert.
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

// ---- Vec: 16 bytes of Elem, the widest load there is ------------------------------------------

template <typename Elem>
struct alignas(16) Vec {
  static constexpr int LEN = 16 / sizeof(Elem);
  Elem at[LEN];
};

// `source` must be 16-byte aligned; so must `target` below.
template <typename Elem>
__device__ __forceinline__ Vec<Elem> load_vec(const Elem* source) {
  return *reinterpret_cast<const Vec<Elem>*>(source);
}

template <typename Elem>
__device__ __forceinline__ void store_vec(Elem* target, const Vec<Elem>& value) {
  *reinterpret_cast<Vec<Elem>*>(target) = value;
}

// ---- Reductions over a warp; every lane gets the result, in a fixed order ----------------------

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

// ---- Selection: the smallest keys among many, by their digits ------------------------------------

constexpr int DIGIT_BITS = 8;
constexpr int DIGITS = 1 << DIGIT_BITS;

// An unsigned integer in the order of `value`: -0 is 0, and NaN is minus infinity.
__device__ __forceinline__ uint32_t order_of(float value) {
  if (value != value) value = -INFINITY;
  const uint32_t bits = __float_as_uint(__fadd_rn(value, 0.0f));
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// Finds for each of COLUMNS sets of keys the largest of its wanted[column] smallest ones, digit by
// digit from the top, and stops where all keys with the digits found so far are wanted: a key of
// the set is among the smallest where it is at most last[column]. In shared memory, all COLUMNS
// long: `last` is 0 before, and `wanted` 0 or at most the number of keys; it is 0 after. `counters`
// has COLUMNS * DIGITS. Keys of a set are distinct and have key_bits bits. `for_each_key(visit)`
// calls visit(column, key) for each key, each thread with its part of them. The whole block takes
// part; there is a barrier at the start and at the end.
template <int COLUMNS, typename ForEachKey>
__device__ __forceinline__ void select_smallest(uint64_t* last, int* wanted, int* counters,
                                                int key_bits, ForEachKey for_each_key) {
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
  const int warps = blockDim.x / WARP_SIZE;
  constexpr int LANE_DIGITS = DIGITS / WARP_SIZE;
  // Bits from `above` on are found; the next digit has `bits` bits from `shift` on, the last one
  // perhaps fewer than others.
  for (int above = key_bits; above > 0; above -= DIGIT_BITS) {
    const int bits = min(above, DIGIT_BITS), shift = above - bits;
    for (int i = threadIdx.x; i < COLUMNS * DIGITS; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    for_each_key([=](int column, uint64_t key) {
      // Two shifts, as one of 64 bits is none.
      const bool same_digits = ((key ^ last[column]) >> shift >> bits) == 0;
      if (wanted[column] == 0 || !same_digits) return;
      atomicAdd(&counters[column * DIGITS + (int)(key >> shift & ((1 << bits) - 1))], 1);
    });
    __syncthreads();

    for (int column = warp; column < COLUMNS; column += warps) {
      const int rank = wanted[column];
      const int* counts = counters + column * DIGITS + lane * LANE_DIGITS;
      int sum = 0;
#pragma unroll
      for (int i = 0; i < LANE_DIGITS; i++) sum += counts[i];
      const int inclusive = warp_inclusive_sum(sum);
      int before = inclusive - sum;
      __syncwarp();  // Every lane has read wanted[column].
      if (before >= rank || rank > inclusive) continue;
      // One lane has the digit of the key with this rank.
      int i = 0;
      for (; before + counts[i] < rank; i++) before += counts[i];
      uint64_t digits = last[column] | (uint64_t)(lane * LANE_DIGITS + i) << shift;
      const bool all = before + counts[i] == rank;
      if (all) digits |= ((uint64_t)1 << shift) - 1;
      last[column] = digits;
      wanted[column] = all ? 0 : rank - before;
    }
    __syncthreads();
    int open = 0;
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) open |= wanted[column];
    if (open == 0) break;
  }
  __syncthreads();
}

// A kernel's parameter struct with typed pointers has the layout of the struct in abi.h.
#define ASSERT_SAME_OFFSET(Twin, Params, field) \
  static_assert(offsetof(Twin, field) == offsetof(Params, field), "the same layout")
