// Choosing the largest of a row: numbers as keys, a warp that picks, a block that sorts.
#pragma once

// ---- Keys: unsigned integers in the order of numbers --------------------------------------------
// No number has key 0, which marks an expert that is taken or does not exist.

// NaN counts as -inf. Adding +0 turns -0 into +0 and leaves every other number alone.
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

// Two largest keys.
struct TopTwo {
  uint32_t first = 0, second = 0;
  __device__ __forceinline__ void add(uint32_t key) {
    second = max(second, min(first, key));
    first = max(first, key);
  }
};

// ---- A warp's row in registers ------------------------------------------------------------------

// A lane's part of a row: VALUES keys, in runs of LEN consecutive experts. Run c of the warp is the
// experts from c * RUN on, the first LEN of them in lane 0.
template <int VALUES, int LEN>
struct LaneKeys {
  static constexpr int RUN = WARP_SIZE * LEN;
  static constexpr int RUNS = VALUES / LEN;
  static_assert(VALUES % LEN == 0, "whole runs");

  uint32_t at[VALUES];

  __device__ __forceinline__ static int expert(int i, int lane) {
    return (i / LEN) * RUN + lane * LEN + i % LEN;
  }

  // The largest key and its expert, the lowest such one; key 0 and NO_EXPERT if all are taken. Runs
  // past the last expert cost nothing.
  __device__ __forceinline__ void best(int lane, int num_experts, uint32_t* key,
                                       uint32_t* best_expert) const {
    *key = 0;
    *best_expert = NO_EXPERT;
#pragma unroll
    for (int c = 0; c < RUNS; c++) {
      if (c * RUN >= num_experts) break;
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

  // Picks `count` times; lane k gets choice k. `best_key` and `best_expert` are those of best().
  // Lanes hold their own best, so only the lane that lost it looks again.
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

// An entry orders as (key descending, expert ascending) does when entries descend; 0 is last.
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
