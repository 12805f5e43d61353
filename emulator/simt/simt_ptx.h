// The host twin of kernels/ptx.cuh: the same functions with the same signatures, in the same order.
// Their fragment layouts, descriptors and rules follow the PTX documentation.
#pragma once
#include "matrix.h"
#include "thread.h"
#include "warp.h"

namespace simt {

// Stops the kernel if the emulated device lacks the feature.
enum class Feature { Sm90, Clusters, Tma, Wgmma };
void need(Feature feature, const char* what, Site site);

// cp_async.cpp
void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes, Site site);
void cp_async_commit();
void cp_async_wait(uint32_t groups_left);
void cp_async_mbar_arrive(uint32_t bar, Site site);

// mbarrier.cpp
void mbar_init(uint32_t bar, uint32_t count, Site site);
void mbar_inval(uint32_t bar, Site site);
void mbar_arrive(uint32_t bar, const char* kind, Site site);
void mbar_expect_tx(uint32_t bar, uint32_t bytes, bool arrive, Site site);
bool mbar_test(uint32_t bar, uint32_t parity, Site site);
void mbar_wait(uint32_t bar, uint32_t parity, Site site);

// tma.cpp
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
              Site site);
void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int* at, int rank,
                        uint16_t blocks, Site site);
void tma_store(const CUtensorMap* map, uint32_t src, const int* at, int rank, Site site);
void tma_store_commit();
void tma_store_wait(uint32_t groups_left, bool read_only);
void tma_check_map(const CUtensorMap* map, Site site);

// cluster.cpp
void cluster_arrive(Site site);
void cluster_wait(Site site);
uint32_t cluster_map(uint32_t address, uint32_t rank, Site site);

}  // namespace simt

namespace ptx {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

inline u32 smem_u32(const void* p) { return __cvta_generic_to_shared(p); }

// ---- Asynchronous copies, global to shared ----

inline void cp_async4(u32 dst, const void* src, u32 src_bytes = 4, SIMT_SITE) {
  simt::cp_async(dst, src, 4, src_bytes, site);
}
inline void cp_async8(u32 dst, const void* src, u32 src_bytes = 8, SIMT_SITE) {
  simt::cp_async(dst, src, 8, src_bytes, site);
}
inline void cp_async16(u32 dst, const void* src, u32 src_bytes = 16, SIMT_SITE) {
  simt::cp_async(dst, src, 16, src_bytes, site);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  simt::cp_async_wait(N);
}

// ---- Warp-wide matrix instructions ----

inline void ldmatrix_x1(u32 (&r)[1], u32 row, SIMT_SITE) { simt::ldmatrix(r, 1, false, row, site); }
inline void ldmatrix_x2(u32 (&r)[2], u32 row, SIMT_SITE) { simt::ldmatrix(r, 2, false, row, site); }
inline void ldmatrix_x4(u32 (&r)[4], u32 row, SIMT_SITE) { simt::ldmatrix(r, 4, false, row, site); }
inline void ldmatrix_x1_trans(u32 (&r)[1], u32 row, SIMT_SITE) {
  simt::ldmatrix(r, 1, true, row, site);
}
inline void ldmatrix_x2_trans(u32 (&r)[2], u32 row, SIMT_SITE) {
  simt::ldmatrix(r, 2, true, row, site);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 row, SIMT_SITE) {
  simt::ldmatrix(r, 4, true, row, site);
}
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32* b, SIMT_SITE) {
  simt::mma(d, a, b, simt::Half::Bf16, site);
}
inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32* b, SIMT_SITE) {
  simt::mma(d, a, b, simt::Half::F16, site);
}

// ---- Named barriers ----

inline void named_bar_sync(int id, int threads, SIMT_SITE) {
  simt::barrier_sync(id, threads, "bar.sync", site);
}
inline void named_bar_arrive(int id, int threads, SIMT_SITE) {
  simt::barrier_arrive(id, threads, "bar.arrive", site);
}

// ---- Hopper's portable instructions ----

inline bool elect_one(SIMT_SITE) {
  simt::need(simt::Feature::Sm90, "elect.sync", site);
  return simt::elect(site);
}
inline void stmatrix_x4(u32 row, const u32 (&r)[4], SIMT_SITE) {
  simt::need(simt::Feature::Sm90, "stmatrix", site);
  simt::stmatrix(row, r, 4, false, site);
}
inline void stmatrix_x4_trans(u32 row, const u32 (&r)[4], SIMT_SITE) {
  simt::need(simt::Feature::Sm90, "stmatrix", site);
  simt::stmatrix(row, r, 4, true, site);
}

// ---- mbarriers ----

inline void mbar_init(u32 bar, u32 count, SIMT_SITE) { simt::mbar_init(bar, count, site); }
inline void mbar_inval(u32 bar, SIMT_SITE) { simt::mbar_inval(bar, site); }
inline void mbar_arrive(u32 bar, SIMT_SITE) { simt::mbar_arrive(bar, "mbarrier.arrive", site); }
inline void mbar_arrive_cluster(u32 bar, SIMT_SITE) {
  simt::need(simt::Feature::Clusters, "mbarrier.arrive.shared::cluster", site);
  simt::mbar_arrive(bar, "mbarrier.arrive.shared::cluster", site);
}
inline void mbar_expect_tx(u32 bar, u32 bytes, SIMT_SITE) {
  simt::mbar_expect_tx(bar, bytes, false, site);
}
inline void mbar_arrive_expect_tx(u32 bar, u32 bytes, SIMT_SITE) {
  simt::mbar_expect_tx(bar, bytes, true, site);
}
inline bool mbar_try_wait(u32 bar, u32 parity, SIMT_SITE) {
  return simt::mbar_test(bar, parity, site);
}
inline void mbar_wait(u32 bar, u32 parity, SIMT_SITE) { simt::mbar_wait(bar, parity, site); }
inline void cp_async_mbar_arrive(u32 bar, SIMT_SITE) { simt::cp_async_mbar_arrive(bar, site); }
inline void fence_mbar_init() {}
inline void fence_async_proxy() {}

// ---- TMA ----

inline void prefetch_tensor_map(const CUtensorMap* map, SIMT_SITE) {
  simt::tma_check_map(map, site);
}
inline void tma_load_2d(u32 dst, const CUtensorMap* map, u32 bar, int x, int y, SIMT_SITE) {
  const int at[] = {x, y};
  simt::tma_load(dst, map, bar, at, 2, site);
}
inline void tma_load_3d(u32 dst, const CUtensorMap* map, u32 bar, int x, int y, int z, SIMT_SITE) {
  const int at[] = {x, y, z};
  simt::tma_load(dst, map, bar, at, 3, site);
}
inline void tma_load_4d(u32 dst, const CUtensorMap* map, u32 bar, int x, int y, int z, int w,
                        SIMT_SITE) {
  const int at[] = {x, y, z, w};
  simt::tma_load(dst, map, bar, at, 4, site);
}
inline void tma_store_2d(const CUtensorMap* map, u32 src, int x, int y, SIMT_SITE) {
  const int at[] = {x, y};
  simt::tma_store(map, src, at, 2, site);
}
inline void tma_store_3d(const CUtensorMap* map, u32 src, int x, int y, int z, SIMT_SITE) {
  const int at[] = {x, y, z};
  simt::tma_store(map, src, at, 3, site);
}
inline void tma_store_4d(const CUtensorMap* map, u32 src, int x, int y, int z, int w, SIMT_SITE) {
  const int at[] = {x, y, z, w};
  simt::tma_store(map, src, at, 4, site);
}
inline void tma_store_commit() { simt::tma_store_commit(); }
template <int N>
inline void tma_store_wait_read() {
  simt::tma_store_wait(N, true);
}
template <int N>
inline void tma_store_wait() {
  simt::tma_store_wait(N, false);
}

// ---- Clusters and dependent launches ----

inline u32 cluster_rank(SIMT_SITE) {
  simt::need(simt::Feature::Sm90, "%cluster_ctarank", site);
  return simt::block_vars->cluster_rank;
}
inline u32 cluster_size(SIMT_SITE) {
  simt::need(simt::Feature::Sm90, "%cluster_nctarank", site);
  return simt::block_vars->cluster_size;
}
inline u32 mapa(u32 address, u32 rank, SIMT_SITE) { return simt::cluster_map(address, rank, site); }
inline void cluster_arrive(SIMT_SITE) { simt::cluster_arrive(site); }
inline void cluster_wait(SIMT_SITE) { simt::cluster_wait(site); }
// Kernels of one stream run one after another here, so these have no effect.
inline void griddep_wait(SIMT_SITE) { simt::need(simt::Feature::Sm90, "griddepcontrol", site); }
inline void griddep_launch(SIMT_SITE) { simt::need(simt::Feature::Sm90, "griddepcontrol", site); }

// ---- Multicast ----

inline void tma_load_multicast_2d(u32 dst, const CUtensorMap* map, u32 bar, int x, int y,
                                  u16 blocks, SIMT_SITE) {
  const int at[] = {x, y};
  simt::tma_load_multicast(dst, map, bar, at, 2, blocks, site);
}

// ---- Registers ----

template <int N>
inline void setmaxnreg_inc(SIMT_SITE) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "N is a multiple of 8 from 24 to 256");
  simt::need(simt::Feature::Wgmma, "setmaxnreg", site);
  simt::rendezvous_whole_warp("setmaxnreg", site);
}
template <int N>
inline void setmaxnreg_dec(SIMT_SITE) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "N is a multiple of 8 from 24 to 256");
  simt::need(simt::Feature::Wgmma, "setmaxnreg", site);
  simt::rendezvous_whole_warp("setmaxnreg", site);
}

// ---- wgmma ----

inline void wgmma_fence(SIMT_SITE) { simt::wgmma_fence(site); }
inline void wgmma_commit(SIMT_SITE) { simt::wgmma_commit(site); }
template <int N>
inline void wgmma_wait(SIMT_SITE) {
  simt::wgmma_wait(N, site);
}
// The accumulators are written through pointers, which the host compiler orders by itself.
template <int N>
inline void wgmma_pin([[maybe_unused]] float (&d)[N]) {}

template <int TRANS_A = 0, int TRANS_B = 0>
inline void wgmma_m64n64k16_bf16(float (&d)[32], u64 a, u64 b, int scale_d, SIMT_SITE) {
  simt::wgmma({d, a, b, 64, scale_d != 0, TRANS_A != 0, TRANS_B != 0, simt::Half::Bf16}, site);
}
template <int TRANS_A = 0, int TRANS_B = 0>
inline void wgmma_m64n64k16_f16(float (&d)[32], u64 a, u64 b, int scale_d, SIMT_SITE) {
  simt::wgmma({d, a, b, 64, scale_d != 0, TRANS_A != 0, TRANS_B != 0, simt::Half::F16}, site);
}
template <int TRANS_A = 0, int TRANS_B = 0>
inline void wgmma_m64n128k16_bf16(float (&d)[64], u64 a, u64 b, int scale_d, SIMT_SITE) {
  simt::wgmma({d, a, b, 128, scale_d != 0, TRANS_A != 0, TRANS_B != 0, simt::Half::Bf16}, site);
}
template <int TRANS_A = 0, int TRANS_B = 0>
inline void wgmma_m64n128k16_f16(float (&d)[64], u64 a, u64 b, int scale_d, SIMT_SITE) {
  simt::wgmma({d, a, b, 128, scale_d != 0, TRANS_A != 0, TRANS_B != 0, simt::Half::F16}, site);
}
template <int TRANS_A = 0, int TRANS_B = 0>
inline void wgmma_m64n256k16_bf16(float (&d)[128], u64 a, u64 b, int scale_d, SIMT_SITE) {
  simt::wgmma({d, a, b, 256, scale_d != 0, TRANS_A != 0, TRANS_B != 0, simt::Half::Bf16}, site);
}
template <int TRANS_A = 0, int TRANS_B = 0>
inline void wgmma_m64n256k16_f16(float (&d)[128], u64 a, u64 b, int scale_d, SIMT_SITE) {
  simt::wgmma({d, a, b, 256, scale_d != 0, TRANS_A != 0, TRANS_B != 0, simt::Half::F16}, site);
}

}  // namespace ptx
