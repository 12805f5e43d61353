// The golden program for Hopper: like golden.cu, for the instructions of sm_90 and sm_90a. Entries
// with a tensor map take (out, in, map); the first 64 words of `in` are then numbers for the
// kernel.
#include "kernel.cuh"

constexpr int WARP = 32;
constexpr int WARP_GROUP = 128;
constexpr int HEADER = 64;

// ---- elect.sync: out = the number of elected lanes, and whether the same one is elected twice

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_elect_one(uint32_t* out, const uint32_t*) {
#if KERNEL_SM90A
  const unsigned first = __ballot_sync(FULL_WARP, ptx::elect_one());
  const unsigned second = __ballot_sync(FULL_WARP, ptx::elect_one());
  if (threadIdx.x == 0) {
    out[0] = __popc(first);
    out[1] = first == second;
  }
#endif
}
EXPORT_KERNEL(emu_golden_elect_one, WARP)

// ---- stmatrix: in = [32][4] registers, then each lane's row number; out = 32 rows of 4 words ----

template <bool TRANS>
__device__ __forceinline__ void golden_stmatrix(uint32_t* out, const uint32_t* in) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint4, rows, WARP);
  const int lane = threadIdx.x;
  const uint32_t row = ptx::smem_u32(rows + in[4 * WARP + lane]);
  const uint32_t r[4] = {in[4 * lane], in[4 * lane + 1], in[4 * lane + 2], in[4 * lane + 3]};
  if (TRANS) {
    ptx::stmatrix_x4_trans(row, r);
  } else {
    ptx::stmatrix_x4(row, r);
  }
  __syncwarp();
  reinterpret_cast<uint4*>(out)[lane] = rows[lane];
#endif
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_stmatrix_x4(uint32_t* out, const uint32_t* in) {
  golden_stmatrix<false>(out, in);
}
EXPORT_KERNEL(emu_golden_stmatrix_x4, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_stmatrix_x4_trans(uint32_t* out, const uint32_t* in) {
  golden_stmatrix<true>(out, in);
}
EXPORT_KERNEL(emu_golden_stmatrix_x4_trans, WARP)

// ---- mbarriers: out = the result of try_wait after each step ----

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_mbarrier(uint32_t* out, const uint32_t*) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 2);
    ptx::fence_mbar_init();
    out[0] = ptx::mbar_try_wait(bar, 0);  // Phase 0 is incomplete,
    out[1] = ptx::mbar_try_wait(bar, 1);  // and the phase before it counts as complete.
    ptx::mbar_arrive(bar);
    out[2] = ptx::mbar_try_wait(bar, 0);
    ptx::mbar_arrive(bar);
    out[3] = ptx::mbar_try_wait(bar, 0);
    out[4] = ptx::mbar_try_wait(bar, 1);
    ptx::mbar_wait(bar, 0);
    ptx::mbar_arrive_expect_tx(bar, 0);
    ptx::mbar_arrive(bar);
    ptx::mbar_wait(bar, 1);
    out[5] = ptx::mbar_try_wait(bar, 0);
    ptx::mbar_inval(bar);
  }
#endif
}
EXPORT_KERNEL(emu_golden_mbarrier, WARP)

// ---- cp.async with an mbarrier: in = 32 chunks of 4 words; out = the same, reversed ----

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_cp_async_mbar_arrive(uint32_t* out, const uint32_t* in) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint4, tile, WARP);
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage);
  const int lane = threadIdx.x;
  if (lane == 0) ptx::mbar_init(bar, WARP);
  __syncwarp();
  ptx::cp_async16(ptx::smem_u32(tile + lane), in + 4 * lane);
  ptx::cp_async_mbar_arrive(bar);
  ptx::mbar_wait(bar, 0);
  reinterpret_cast<uint4*>(out)[lane] = tile[WARP - 1 - lane];
#endif
}
EXPORT_KERNEL(emu_golden_cp_async_mbar_arrive, WARP)

// ---- TMA loads: in = bytes of the box, coordinates, then the tensor; out = shared memory ----

template <int RANK>
__device__ __forceinline__ void golden_tma_load(uint32_t* out, const uint32_t* in,
                                                const CUtensorMap& map) {
#if KERNEL_SM90A
  SHARED_DYNAMIC(smem);
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage), dst = ptx::smem_u32(smem), bytes = in[0];
  const int x = in[1], y = in[2], z = in[3], w = in[4];
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbar_init(bar, 1);
    ptx::fence_mbar_init();
    ptx::mbar_arrive_expect_tx(bar, bytes);
    if (RANK == 2) ptx::tma_load_2d(dst, &map, bar, x, y);
    if (RANK == 3) ptx::tma_load_3d(dst, &map, bar, x, y, z);
    if (RANK == 4) ptx::tma_load_4d(dst, &map, bar, x, y, z, w);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(smem);
  for (uint32_t i = threadIdx.x; i < bytes / 4; i += WARP) out[i] = words[i];
#endif
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_load_2d(uint32_t* out, const uint32_t* in,
                           const __grid_constant__ CUtensorMap map) {
  golden_tma_load<2>(out, in, map);
}
EXPORT_KERNEL(emu_golden_tma_load_2d, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_load_3d(uint32_t* out, const uint32_t* in,
                           const __grid_constant__ CUtensorMap map) {
  golden_tma_load<3>(out, in, map);
}
EXPORT_KERNEL(emu_golden_tma_load_3d, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_load_4d(uint32_t* out, const uint32_t* in,
                           const __grid_constant__ CUtensorMap map) {
  golden_tma_load<4>(out, in, map);
}
EXPORT_KERNEL(emu_golden_tma_load_4d, WARP)

// A cluster of two: each block loads one box for both. out = the shared memory of both blocks.
extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_load_multicast_2d(uint32_t* out, const uint32_t* in,
                                     const __grid_constant__ CUtensorMap map) {
#if KERNEL_SM90A
  SHARED_DYNAMIC(tile);
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage), bytes = in[0], rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_mbar_init();
    ptx::mbar_arrive_expect_tx(bar, 2 * bytes);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0) {
    ptx::tma_load_multicast_2d(ptx::smem_u32(tile) + rank * bytes, &map, bar, in[1], in[2] + rank,
                               3);
  }
  ptx::mbar_wait(bar, 0);
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(tile);
  for (uint32_t i = threadIdx.x; i < bytes / 2; i += WARP) out[rank * bytes / 2 + i] = words[i];
  // No block may exit while the other one still writes to its shared memory.
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}
EXPORT_KERNEL(emu_golden_tma_load_multicast_2d, WARP)

// ---- TMA stores: in = bytes of the box, coordinates, then shared memory; the map covers `out`

template <int RANK>
__device__ __forceinline__ void golden_tma_store(const uint32_t* in, const CUtensorMap& map) {
#if KERNEL_SM90A
  SHARED_DYNAMIC(smem);
  uint32_t* const words = reinterpret_cast<uint32_t*>(smem);
  for (uint32_t i = threadIdx.x; i < in[0] / 4; i += WARP) words[i] = in[HEADER + i];
  ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int x = in[1], y = in[2], z = in[3], w = in[4];
    const uint32_t src = ptx::smem_u32(smem);
    if (RANK == 2) ptx::tma_store_2d(&map, src, x, y);
    if (RANK == 3) ptx::tma_store_3d(&map, src, x, y, z);
    if (RANK == 4) ptx::tma_store_4d(&map, src, x, y, z, w);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
    ptx::tma_store_wait<0>();
  }
#endif
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_store_2d(uint32_t*, const uint32_t* in,
                            const __grid_constant__ CUtensorMap map) {
  golden_tma_store<2>(in, map);
}
EXPORT_KERNEL(emu_golden_tma_store_2d, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_store_3d(uint32_t*, const uint32_t* in,
                            const __grid_constant__ CUtensorMap map) {
  golden_tma_store<3>(in, map);
}
EXPORT_KERNEL(emu_golden_tma_store_3d, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_tma_store_4d(uint32_t*, const uint32_t* in,
                            const __grid_constant__ CUtensorMap map) {
  golden_tma_store<4>(in, map);
}
EXPORT_KERNEL(emu_golden_tma_store_4d, WARP)

// ---- Clusters of two: out = per block its rank, its size, and that the other block arrived ----

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_cluster(uint32_t* out, const uint32_t*) {
#if KERNEL_SM90A
  SHARED_ARRAY(uint64_t, storage, 1);
  const uint32_t bar = ptx::smem_u32(storage), rank = ptx::cluster_rank();
  ptx::griddep_wait();
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_mbar_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0) ptx::mbar_arrive_cluster(ptx::mapa(bar, 1 - rank));
  ptx::mbar_wait(bar, 0);
  ptx::griddep_launch();
  if (threadIdx.x == 0) {
    out[3 * rank] = rank;
    out[3 * rank + 1] = ptx::cluster_size();
    out[3 * rank + 2] = 1;
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}
EXPORT_KERNEL(emu_golden_cluster, WARP)

// ---- wgmma ----
// in = the descriptors of a and b without their start addresses (2 x 2 words), the offsets of a and
// b in the image (bytes), the bytes of the image, scale_d; then the image of shared memory from
// word 64 on, then the accumulators [128][N / 2]. out = the accumulators.

template <int N, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d,
                                         bf16) {
#if KERNEL_SM90A
  if constexpr (N == 64) ptx::wgmma_m64n64k16_bf16<TRANS_A, TRANS_B>(d, a, b, scale_d);
  if constexpr (N == 128) ptx::wgmma_m64n128k16_bf16<TRANS_A, TRANS_B>(d, a, b, scale_d);
  if constexpr (N == 256) ptx::wgmma_m64n256k16_bf16<TRANS_A, TRANS_B>(d, a, b, scale_d);
#endif
}

template <int N, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d,
                                         f16) {
#if KERNEL_SM90A
  if constexpr (N == 64) ptx::wgmma_m64n64k16_f16<TRANS_A, TRANS_B>(d, a, b, scale_d);
  if constexpr (N == 128) ptx::wgmma_m64n128k16_f16<TRANS_A, TRANS_B>(d, a, b, scale_d);
  if constexpr (N == 256) ptx::wgmma_m64n256k16_f16<TRANS_A, TRANS_B>(d, a, b, scale_d);
#endif
}

template <typename Elem, int N, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void golden_wgmma(uint32_t* out, const uint32_t* in) {
#if KERNEL_SM90A
  SHARED_DYNAMIC(smem);
  const uint32_t base = ptx::smem_u32(smem), bytes = in[6];
  uint32_t* const words = reinterpret_cast<uint32_t*>(smem);
  for (uint32_t i = threadIdx.x; i < bytes / 4; i += WARP_GROUP) words[i] = in[HEADER + i];
  const uint32_t* const accumulators = in + HEADER + bytes / 4 + threadIdx.x * (N / 2);
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[i] = __uint_as_float(accumulators[i]);
  const uint64_t a = (static_cast<uint64_t>(in[1]) << 32 | in[0]) | (base + in[4]) >> 4;
  const uint64_t b = (static_cast<uint64_t>(in[3]) << 32 | in[2]) | (base + in[5]) >> 4;
  ptx::fence_async_proxy();
  __syncthreads();
  ptx::wgmma_pin(d);
  ptx::wgmma_fence();
  multiply<N, TRANS_A, TRANS_B>(d, a, b, in[7], from_f32<Elem>(0.0f));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(d);
#pragma unroll
  for (int i = 0; i < N / 2; i++) out[threadIdx.x * (N / 2) + i] = __float_as_uint(d[i]);
#endif
}

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n64_bf16_kk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 64, 0, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n64_bf16_kk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n64_bf16_kn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 64, 0, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n64_bf16_kn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n64_bf16_mk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 64, 1, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n64_bf16_mk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n64_bf16_mn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 64, 1, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n64_bf16_mn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n64_f16_kk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<f16, 64, 0, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n64_f16_kk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n128_bf16_kk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 128, 0, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n128_bf16_kk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n128_bf16_kn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 128, 0, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n128_bf16_kn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n128_bf16_mk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 128, 1, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n128_bf16_mk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n128_bf16_mn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 128, 1, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n128_bf16_mn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n128_f16_kk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<f16, 128, 0, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n128_f16_kk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n128_f16_mn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<f16, 128, 1, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n128_f16_mn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n256_bf16_kk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 256, 0, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n256_bf16_kk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n256_bf16_kn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 256, 0, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n256_bf16_kn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n256_bf16_mk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 256, 1, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n256_bf16_mk, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n256_bf16_mn(uint32_t* out, const uint32_t* in) {
  golden_wgmma<bf16, 256, 1, 1>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n256_bf16_mn, WARP_GROUP)

extern "C" __global__ void __launch_bounds__(WARP_GROUP)
    emu_golden_wgmma_n256_f16_kk(uint32_t* out, const uint32_t* in) {
  golden_wgmma<f16, 256, 0, 0>(out, in);
}
EXPORT_KERNEL(emu_golden_wgmma_n256_f16_kk, WARP_GROUP)
