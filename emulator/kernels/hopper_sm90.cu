// Hopper's instructions in combination: a warp-specialised GEMM and a tile copy, each correct and
// with one deliberate mistake, and small mistakes with mbarriers and clusters.
#include "kernel.cuh"

constexpr int WARP_GROUP = 128;
constexpr int WARP = 32;

// ---- A warp-specialised GEMM ----
// c[M, N] = a[M, K] * b[N, K]^T in tiles of 128 x 64; warp group 0 loads by TMA, 1 and 2 multiply.
// Shared memory: STAGES x (a: 128 x 64, b: 64 x 64, in the 128-byte swizzle), then the mbarriers.

constexpr int STAGES = 3;
constexpr int TILE_A = 128 * 64 * 2, TILE_B = 64 * 64 * 2, STAGE = TILE_A + TILE_B;

enum class Mistake { None, NoEmptyWait, EarlyRelease, NoMultiplyWait, TooFewBytes };

// A K-major tile whose rows are 128 bytes, swizzled.
__device__ __forceinline__ uint64_t k_major_128(uint32_t address) {
  return static_cast<uint64_t>(address >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <Mistake mistake>
__device__ __forceinline__ void produce(uint32_t base, uint32_t full, uint32_t empty,
                                        const CUtensorMap& map_a, const CUtensorMap& map_b, int k) {
#if KERNEL_SM90A
  ptx::setmaxnreg_dec<40>();
  if (threadIdx.x >= WARP || !ptx::elect_one()) return;
  for (int step = 0; step < (k + 63) / 64; step++) {
    const int stage = step % STAGES;
    const uint32_t at = base + stage * STAGE, bar = full + stage * 8;
    if (mistake != Mistake::NoEmptyWait) ptx::mbar_wait(empty + stage * 8, (step / STAGES & 1) ^ 1);
    ptx::mbar_arrive_expect_tx(bar, mistake == Mistake::TooFewBytes ? TILE_A : STAGE);
    ptx::tma_load_2d(at, &map_a, bar, step * 64, blockIdx.y * 128);
    ptx::tma_load_2d(at + TILE_A, &map_b, bar, step * 64, blockIdx.x * 64);
  }
#endif
}

template <Mistake mistake>
__device__ __forceinline__ void consume(float (&d)[32], int group, uint32_t base, uint32_t full,
                                        uint32_t empty, int k) {
#if KERNEL_SM90A
  ptx::setmaxnreg_inc<232>();
  for (int step = 0; step < (k + 63) / 64; step++) {
    const int stage = step % STAGES;
    const uint32_t a = base + stage * STAGE + group * 64 * 128, b = base + stage * STAGE + TILE_A;
    const auto release = [&] {
      if (threadIdx.x % WARP == 0) ptx::mbar_arrive(empty + stage * 8);
    };
    ptx::mbar_wait(full + stage * 8, step / STAGES & 1);
    ptx::wgmma_pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int slice = 0; slice < 4; slice++) {
      ptx::wgmma_m64n64k16_bf16(d, k_major_128(a + slice * 32), k_major_128(b + slice * 32),
                                step > 0 || slice > 0);
    }
    ptx::wgmma_commit();
    if (mistake == Mistake::EarlyRelease) release();
    if (mistake != Mistake::NoMultiplyWait) ptx::wgmma_wait<0>();
    ptx::wgmma_pin(d);
    if (mistake != Mistake::EarlyRelease) release();
  }
#endif
}

template <Mistake mistake>
__device__ __forceinline__ void gemm(float* c, const CUtensorMap& map_a, const CUtensorMap& map_b,
                                     int m, int n, int k) {
#if KERNEL_SM90A
  SHARED_DYNAMIC(smem);
  const uint32_t base = ptx::smem_u32(smem), full = base + STAGES * STAGE,
                 empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      ptx::mbar_init(full + i * 8, 1);
      ptx::mbar_init(empty + i * 8, 8);  // one arrival per consumer warp
    }
    ptx::fence_mbar_init();
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / WARP_GROUP - 1;
  if (group < 0) {
    produce<mistake>(base, full, empty, map_a, map_b, k);
    return;
  }
  float d[32];
  consume<mistake>(d, group, base, full, empty, k);
  const int warp = threadIdx.x / WARP % 4, lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int row = blockIdx.y * 128 + group * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
    const int column = blockIdx.x * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = d[i];
  }
#endif
}

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP)
    emu_ok_gemm_sm90(float* c, const __grid_constant__ CUtensorMap a,
                     const __grid_constant__ CUtensorMap b, int m, int n, int k) {
  gemm<Mistake::None>(c, a, b, m, n, k);
}
EXPORT_KERNEL(emu_ok_gemm_sm90, 3 * WARP_GROUP)

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP)
    emu_bug_gemm_no_empty_wait(float* c, const __grid_constant__ CUtensorMap a,
                               const __grid_constant__ CUtensorMap b, int m, int n, int k) {
  gemm<Mistake::NoEmptyWait>(c, a, b, m, n, k);
}
EXPORT_KERNEL(emu_bug_gemm_no_empty_wait, 3 * WARP_GROUP)

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP)
    emu_bug_gemm_early_release(float* c, const __grid_constant__ CUtensorMap a,
                               const __grid_constant__ CUtensorMap b, int m, int n, int k) {
  gemm<Mistake::EarlyRelease>(c, a, b, m, n, k);
}
EXPORT_KERNEL(emu_bug_gemm_early_release, 3 * WARP_GROUP)

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP)
    emu_bug_gemm_no_multiply_wait(float* c, const __grid_constant__ CUtensorMap a,
                                  const __grid_constant__ CUtensorMap b, int m, int n, int k) {
  gemm<Mistake::NoMultiplyWait>(c, a, b, m, n, k);
}
EXPORT_KERNEL(emu_bug_gemm_no_multiply_wait, 3 * WARP_GROUP)

extern "C" __global__ void __launch_bounds__(3 * WARP_GROUP)
    emu_bug_gemm_too_few_bytes(float* c, const __grid_constant__ CUtensorMap a,
                               const __grid_constant__ CUtensorMap b, int m, int n, int k) {
  gemm<Mistake::TooFewBytes>(c, a, b, m, n, k);
}
EXPORT_KERNEL(emu_bug_gemm_too_few_bytes, 3 * WARP_GROUP)

// ---- A tile copy by TMA in both directions ----

// out[r, c] = in[r, c] + 1 for a u32 matrix in tiles of 8 x 32, one buffer for all tiles of the
// block.
template <bool WAIT_BEFORE_REUSE>
__device__ __forceinline__ void add_one(const CUtensorMap& out, const CUtensorMap& in, int tiles) {
#if KERNEL_SM90A
  SHARED_DYNAMIC(tile);
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage), source = ptx::smem_u32(tile), sums = source + 1024;
  const uint32_t* const loaded = reinterpret_cast<const uint32_t*>(tile);
  uint32_t* const stored = reinterpret_cast<uint32_t*>(tile + 1024);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_mbar_init();
  }
  __syncthreads();
  for (int i = 0; i < tiles; i++) {
    if (threadIdx.x == 0) {
      ptx::mbar_arrive_expect_tx(bar, 1024);
      ptx::tma_load_2d(source, &in, bar, 0, i * 8);
    }
    ptx::mbar_wait(bar, i & 1);
    if (threadIdx.x == 0 && WAIT_BEFORE_REUSE) ptx::tma_store_wait_read<0>();
    __syncthreads();
    for (int word = threadIdx.x; word < 256; word += WARP) stored[word] = loaded[word] + 1;
    ptx::fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::tma_store_2d(&out, sums, 0, i * 8);
      ptx::tma_store_commit();
    }
  }
  if (threadIdx.x == 0) ptx::tma_store_wait<0>();
#endif
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_ok_add_one_sm90(const __grid_constant__ CUtensorMap out,
                        const __grid_constant__ CUtensorMap in, int tiles) {
  add_one<true>(out, in, tiles);
}
EXPORT_KERNEL(emu_ok_add_one_sm90, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_bug_store_overwritten(const __grid_constant__ CUtensorMap out,
                              const __grid_constant__ CUtensorMap in, int tiles) {
  add_one<false>(out, in, tiles);
}
EXPORT_KERNEL(emu_bug_store_overwritten, WARP)

// ---- mbarriers ----

// Expects bytes that never arrive.
extern "C" __global__ void __launch_bounds__(WARP) emu_bug_mbar_lost_bytes(int* out) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_arrive_expect_tx(bar, 4096);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  out[threadIdx.x] = 1;
#endif
}
EXPORT_KERNEL(emu_bug_mbar_lost_bytes, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_bug_mbar_uninitialised(int* out) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  ptx::mbar_wait(ptx::smem_u32(storage), 0);
  out[threadIdx.x] = 1;
#endif
}
EXPORT_KERNEL(emu_bug_mbar_uninitialised, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_bug_mbar_overwritten(int* out) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  if (threadIdx.x == 0) {
    ptx::mbar_init(ptx::smem_u32(storage), 1);
    storage[0] = 0;
    ptx::mbar_arrive(ptx::smem_u32(storage));
  }
  out[threadIdx.x] = 1;
#endif
}
EXPORT_KERNEL(emu_bug_mbar_overwritten, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_bug_mbar_too_many_arrivals(int* out) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_expect_tx(bar, 16);  // Keeps the phase open.
    ptx::mbar_arrive(bar);
    ptx::mbar_arrive(bar);
  }
  out[threadIdx.x] = 1;
#endif
}
EXPORT_KERNEL(emu_bug_mbar_too_many_arrivals, WARP)

// ---- Clusters ----

// Block 0 may exit before block 1 arrives on its barrier.
extern "C" __global__ void __launch_bounds__(WARP) emu_bug_cluster_exits_early(int* out) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage);
  if (threadIdx.x == 0) ptx::mbar_init(bar, 1);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (ptx::cluster_rank() == 1 && threadIdx.x == 0) ptx::mbar_arrive_cluster(ptx::mapa(bar, 0));
  out[threadIdx.x] = 1;
#endif
}
EXPORT_KERNEL(emu_bug_cluster_exits_early, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_bug_cluster_rank(int* out) {
#if KERNEL_SM90A
  out[threadIdx.x] = static_cast<int>(ptx::mapa(0, ptx::cluster_size()));
#endif
}
EXPORT_KERNEL(emu_bug_cluster_rank, WARP)
