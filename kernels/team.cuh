// Operations of the threads that share a row, and sums of a softmax, which do not depend on an
// order.
#pragma once

// ---- Shares of a softmax ------------------------------------------------------------------------

// exp(z - max), at most 1; 1 if both are the same infinity.
__device__ __forceinline__ float share(float z, float max) {
  return z == max ? 1.0f : exp_f32(__fsub_rn(z, max));
}

// A share in units of 2^-29, rounded to nearest even. Sums of such integers do not depend on the
// order, and the sum of four fits 32 bits.
constexpr int UNIT_BITS = 29;

__device__ __forceinline__ uint32_t units_of(float share) {
  return __float2uint_rn(__fmul_rn(share, 0x1p29f));
}

// units_of(share(z, max)), computed without subnormal numbers.
__device__ __forceinline__ uint32_t share_units(float z, float max) {
  int n;
  const float value = exp_parts_f32(fmaxf(__fsub_rn(z, max), -104.0f), &n);
  const float units = __fmul_rn(value, __int_as_float((n + UNIT_BITS + 127) << 23));
  return z == max ? 1u << UNIT_BITS : __float2uint_rn(units);
}

__device__ __forceinline__ float sum_of_units(uint64_t units) {
  return __fmul_rn((float)units, 0x1p-29f);
}

// Adds integers below 2^37 over the warp, in two parts that fit 32 bits.
__device__ __forceinline__ uint64_t warp_units(uint64_t units) {
  constexpr uint32_t LOW = (1u << 27) - 1;
  const uint32_t low = __reduce_add_sync(FULL_WARP, (uint32_t)units & LOW);
  const uint32_t high = __reduce_add_sync(FULL_WARP, (uint32_t)(units >> 27));
  return ((uint64_t)high << 27) + low;
}

// ---- Teams: the threads of a row, a warp or a block ---------------------------------------------

struct WarpTeam {
  static constexpr int SIZE = WARP_SIZE, WARPS = 1;
  int rank = threadIdx.x % WARP_SIZE, warp = 0;

  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ uint32_t max(uint32_t value) const {
    return __reduce_max_sync(FULL_WARP, value);
  }
  __device__ __forceinline__ uint64_t units(uint64_t value) const { return warp_units(value); }
  // Sums over chunks of 32 slots; a warp has one chunk.
  __device__ __forceinline__ void add_chunk(int, float) const {}
  __device__ __forceinline__ float sum_of_chunks(float chunk, int) const { return chunk; }
};

// `parts` and `chunks` are in shared memory: WARPS integers, and the sum of every 32 slots.
template <int THREADS>
struct BlockTeam {
  static constexpr int SIZE = THREADS, WARPS = THREADS / WARP_SIZE;
  uint64_t* parts;
  float* chunks;
  int rank = threadIdx.x, warp = threadIdx.x / WARP_SIZE;

  __device__ __forceinline__ BlockTeam(uint64_t* parts, float* chunks)
      : parts(parts), chunks(chunks) {}
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  // Joins the parts of all warps, with a barrier before the reads and one after.
  template <typename Join>
  __device__ __forceinline__ uint64_t join(uint64_t part, Join join) const {
    if (rank % WARP_SIZE == 0) parts[warp] = part;
    __syncthreads();
    uint64_t all = parts[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) all = join(all, parts[w]);
    __syncthreads();
    return all;
  }
  __device__ __forceinline__ uint32_t max(uint32_t value) const {
    return (uint32_t)join(__reduce_max_sync(FULL_WARP, value),
                          [](uint64_t a, uint64_t b) { return a < b ? b : a; });
  }
  __device__ __forceinline__ uint64_t units(uint64_t value) const {
    return join(warp_units(value), [](uint64_t a, uint64_t b) { return a + b; });
  }
  __device__ __forceinline__ void add_chunk(int chunk, float sum) const { chunks[chunk] = sum; }
  __device__ __forceinline__ float sum_of_chunks(float, int count) const {
    __syncthreads();
    float sum = 0.0f;
    for (int c = 0; c < count; c++) sum = __fadd_rn(sum, chunks[c]);
    __syncthreads();
    return sum;
  }
};
