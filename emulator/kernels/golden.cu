// The golden program, portable part: each primitive of ptx.cuh alone, on operands from the host.
// The same entries run on a GPU, whose outputs are compared with the emulator's. Every entry takes
// (out, in), both u32, and uses one block; a comment at each entry gives the layout of its
// operands.
#include "kernel.cuh"

constexpr int WARP = 32;

// ---- cp.async: in = 32 chunks, then 32 source sizes; out = 32 chunks ----

template <int BYTES>
__device__ __forceinline__ void copy_chunk(uint32_t dst, const uint32_t* src, uint32_t src_bytes) {
  if (BYTES == 4) ptx::cp_async4(dst, src, src_bytes);
  if (BYTES == 8) ptx::cp_async8(dst, src, src_bytes);
  if (BYTES == 16) ptx::cp_async16(dst, src, src_bytes);
}

template <int BYTES>
__device__ __forceinline__ void golden_cp_async(uint32_t* out, const uint32_t* in) {
  constexpr int WORDS = BYTES / 4;
  SHARED_ARRAY(uint4, tile, WARP);
  const int lane = threadIdx.x;
  uint32_t* const words = reinterpret_cast<uint32_t*>(tile) + lane * WORDS;
  for (int i = 0; i < WORDS; i++) words[i] = 0x55555555u;
  copy_chunk<BYTES>(ptx::smem_u32(words), in + lane * WORDS, in[WARP * WORDS + lane]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < WORDS; i++) out[lane * WORDS + i] = words[i];
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_cp_async4(uint32_t* out, const uint32_t* in) {
  golden_cp_async<4>(out, in);
}
EXPORT_KERNEL(emu_golden_cp_async4, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_cp_async8(uint32_t* out, const uint32_t* in) {
  golden_cp_async<8>(out, in);
}
EXPORT_KERNEL(emu_golden_cp_async8, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_cp_async16(uint32_t* out, const uint32_t* in) {
  golden_cp_async<16>(out, in);
}
EXPORT_KERNEL(emu_golden_cp_async16, WARP)

// ---- ldmatrix: in = 32 rows of 4 words, then each lane's row number; out = [32][matrices] ----

template <int MATRICES, bool TRANS>
__device__ __forceinline__ void golden_ldmatrix(uint32_t* out, const uint32_t* in) {
  SHARED_ARRAY(uint4, rows, WARP);
  const int lane = threadIdx.x;
  rows[lane] = reinterpret_cast<const uint4*>(in)[lane];
  __syncwarp();
  const uint32_t row = ptx::smem_u32(rows + in[4 * WARP + lane]);
  uint32_t r[MATRICES];
  if constexpr (MATRICES == 1 && !TRANS) ptx::ldmatrix_x1(r, row);
  if constexpr (MATRICES == 2 && !TRANS) ptx::ldmatrix_x2(r, row);
  if constexpr (MATRICES == 4 && !TRANS) ptx::ldmatrix_x4(r, row);
  if constexpr (MATRICES == 1 && TRANS) ptx::ldmatrix_x1_trans(r, row);
  if constexpr (MATRICES == 2 && TRANS) ptx::ldmatrix_x2_trans(r, row);
  if constexpr (MATRICES == 4 && TRANS) ptx::ldmatrix_x4_trans(r, row);
  for (int i = 0; i < MATRICES; i++) out[lane * MATRICES + i] = r[i];
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_ldmatrix_x1(uint32_t* out, const uint32_t* in) {
  golden_ldmatrix<1, false>(out, in);
}
EXPORT_KERNEL(emu_golden_ldmatrix_x1, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_ldmatrix_x2(uint32_t* out, const uint32_t* in) {
  golden_ldmatrix<2, false>(out, in);
}
EXPORT_KERNEL(emu_golden_ldmatrix_x2, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_ldmatrix_x4(uint32_t* out, const uint32_t* in) {
  golden_ldmatrix<4, false>(out, in);
}
EXPORT_KERNEL(emu_golden_ldmatrix_x4, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_ldmatrix_x1_trans(uint32_t* out, const uint32_t* in) {
  golden_ldmatrix<1, true>(out, in);
}
EXPORT_KERNEL(emu_golden_ldmatrix_x1_trans, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_ldmatrix_x2_trans(uint32_t* out, const uint32_t* in) {
  golden_ldmatrix<2, true>(out, in);
}
EXPORT_KERNEL(emu_golden_ldmatrix_x2_trans, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_ldmatrix_x4_trans(uint32_t* out, const uint32_t* in) {
  golden_ldmatrix<4, true>(out, in);
}
EXPORT_KERNEL(emu_golden_ldmatrix_x4_trans, WARP)

// ---- mma.sync: in = per lane 4 words of a, 2 of b, 4 of d; out = [32][4] ----

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], bf16) {
  ptx::mma_bf16(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], f16) {
  ptx::mma_f16(d, a, b);
}

template <typename Elem>
__device__ __forceinline__ void golden_mma(uint32_t* out, const uint32_t* in) {
  const uint32_t* const mine = in + threadIdx.x * 10;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(mine[6 + i]);
  multiply(d, a, b, from_f32<Elem>(0.0f));
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_mma_bf16(uint32_t* out, const uint32_t* in) {
  golden_mma<bf16>(out, in);
}
EXPORT_KERNEL(emu_golden_mma_bf16, WARP)

extern "C" __global__ void __launch_bounds__(WARP)
    emu_golden_mma_f16(uint32_t* out, const uint32_t* in) {
  golden_mma<f16>(out, in);
}
EXPORT_KERNEL(emu_golden_mma_f16, WARP)

// ---- Named barriers: in = 32 words; out = the same, passed from warp 0 to warp 1 ----

extern "C" __global__ void __launch_bounds__(2 * WARP)
    emu_golden_named_bar(uint32_t* out, const uint32_t* in) {
  SHARED_ARRAY(uint32_t, box, WARP);
  const int lane = threadIdx.x % WARP;
  if (threadIdx.x < WARP) {
    box[lane] = in[lane];
    ptx::named_bar_arrive(3, 2 * WARP);
  } else {
    ptx::named_bar_sync(3, 2 * WARP);
    out[lane] = box[WARP - 1 - lane];
  }
}
EXPORT_KERNEL(emu_golden_named_bar, 2 * WARP)
