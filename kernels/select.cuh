// Selection: keys of numbers; the largest keys of a row, picked by a warp or sorted by a block; the
// smallest keys of a set, found by a block digit by digit.
#pragma once

// ---- Keys: unsigned integers in the order of numbers --------------------------------------------
// The key of a number is never 0: 0 marks an expert that is taken or does not exist.

// -inf for NaN. Adding +0 turns -0 into +0 and keeps every other number.
__device__ __forceinline__ float cleaned(float value) {
  return __fadd_rn(value != value ? -INFINITY : value, 0.0f);
}

__device__ __forceinline__ uint32_t key_of(float cleaned_value) {
  const uint32_t bits = __float_as_uint(cleaned_value);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float number_of(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) ? key ^ 0x80000000u : ~key);
}

// The two largest keys.
struct TopTwo {
  uint32_t largest = 0, next_largest = 0;
  __device__ __forceinline__ void add(uint32_t key) {
    next_largest = max(next_largest, min(largest, key));
    largest = max(largest, key);
  }
};

// ---- A warp's row in registers ------------------------------------------------------------------

// A lane's part of a row: VALUES keys, as vectors of LEN consecutive experts. Vector c of all lanes
// covers the STRIDE experts from c * STRIDE on, the first LEN of them in lane 0.
template <int VALUES, int LEN>
struct LaneKeys {
  static constexpr int STRIDE = WARP_SIZE * LEN;
  static constexpr int VECTORS = VALUES / LEN;
  static_assert(VALUES % LEN == 0, "whole vectors");

  uint32_t at[VALUES];

  __device__ __forceinline__ static int expert(int i, int lane) {
    return (i / LEN) * STRIDE + lane * LEN + i % LEN;
  }

  // The largest key and the lowest expert that has it; key 0 and NO_EXPERT if all are taken. Skips
  // vectors past the last expert.
  __device__ __forceinline__ void best(int lane, int num_experts, uint32_t* key,
                                       uint32_t* best_expert) const {
    *key = 0;
    *best_expert = NO_EXPERT;
#pragma unroll
    for (int c = 0; c < VECTORS; c++) {
      if (c * STRIDE >= num_experts) break;
#pragma unroll
      for (int j = 0; j < LEN; j++) {
        if (at[c * LEN + j] > *key) {
          *key = at[c * LEN + j];
          *best_expert = expert(c * LEN + j, lane);
        }
      }
    }
  }

  __device__ __forceinline__ void take(int lane, uint32_t taken) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      if (taken == (uint32_t)expert(i, lane)) at[i] = 0;
    }
  }

  // Picks `count` times; lane k receives choice k. `best_key` and `best_expert` are those of
  // best(). Each lane keeps its own best, so only the lane whose best was picked searches again.
  __device__ __forceinline__ void pick(int lane, int num_experts, int count, uint32_t best_key,
                                       uint32_t best_expert, uint32_t* my_key,
                                       uint32_t* my_expert) {
    *my_key = 0;
    *my_expert = NO_EXPERT;
    for (int k = 0; k < count; k++) {
      const uint32_t key = __reduce_max_sync(FULL_WARP, best_key);
      const uint32_t first =
          __reduce_min_sync(FULL_WARP, best_key == key ? best_expert : NO_EXPERT);
      if (lane == k) {
        *my_key = key;
        *my_expert = first;
      }
      if (first == best_expert) {
        take(lane, first);
        best(lane, num_experts, &best_key, &best_expert);
      }
    }
  }
};

// ---- A block's row in shared memory -------------------------------------------------------------

// Entries in descending order are in the order (key descending, expert ascending); 0 is last.
__device__ __forceinline__ uint64_t entry_of(uint32_t key, int expert) {
  return (uint64_t)key << 32 | ~(uint32_t)expert;
}

// Bitonic sort, descending; `length` is a power of two. Starts and ends with a barrier.
template <int THREADS>
__device__ __forceinline__ void sort_entries(uint64_t* entries, int length) {
  for (int size = 2; size <= length; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < length / 2; pair += THREADS) {
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

// ---- The smallest keys among many, by their digits ----------------------------------------------

constexpr int DIGIT_BITS = 8;
constexpr int DIGITS = 1 << DIGIT_BITS;

// Finds for each of COLUMNS sets of keys the largest of its wanted[column] smallest keys, digit by
// digit from the top, and stops as soon as all keys with the digits found so far are selected: a
// key is among the smallest if it is at most last[column]. `last` and `wanted` are in shared memory
// and have COLUMNS elements: on entry `last` is 0, and `wanted` is 0 or at most the number of keys;
// on exit `wanted` is 0. `counters` has COLUMNS * DIGITS elements. Keys of a set are distinct and
// have key_bits bits. `for_each_key(visit)` calls visit(column, key) for the thread's keys. A
// block-wide operation with a barrier at its start and its end.
template <int COLUMNS, typename ForEachKey>
__device__ __forceinline__ void select_smallest(uint64_t* last, int* wanted, int* counters,
                                                int key_bits, ForEachKey for_each_key) {
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
  const int warps = blockDim.x / WARP_SIZE;
  constexpr int LANE_DIGITS = DIGITS / WARP_SIZE;
  // Bits from `above` on are known; the next digit has `bits` bits from `shift` on. The last digit
  // may have fewer than DIGIT_BITS.
  for (int above = key_bits; above > 0; above -= DIGIT_BITS) {
    const int bits = min(above, DIGIT_BITS), shift = above - bits;
    for (int i = threadIdx.x; i < COLUMNS * DIGITS; i += blockDim.x) counters[i] = 0;
    __syncthreads();
    for_each_key([=](int column, uint64_t key) {
      // Two shifts: a shift by 64 is undefined.
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
      __syncwarp();  // after every lane's read of wanted[column]
      if (before >= rank || rank > inclusive) continue;
      // The one lane whose digits include that of the key with this rank.
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
