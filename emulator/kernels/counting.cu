// Kernels with known exact memory traffic and warp operations, for emulator/tests/counting. They
// use one warp unless the launch has more; `lane` is the thread's number.
#include "kernel.cuh"

constexpr int WARP = 32;

// ---- Device memory ----

// y[lane] = x[first + stride * lane], for each thread of the grid
extern "C" __global__ void __launch_bounds__(256)
    emu_count_words(float* y, const float* x, const int first, const int stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[first + stride * i];
}
EXPORT_KERNEL(emu_count_words, 256)

// y = 2 * x, 16 bytes a lane: each load_vec and store_vec must remain one access of 16 bytes.
template <typename Elem>
__device__ __forceinline__ void scale_vectors(Elem* y, const Elem* x) {
  const int i = threadIdx.x * Vec<Elem>::LEN;
  const Vec<Elem> value = load_vec(x + i);
  Vec<Elem> result;
#pragma unroll
  for (int j = 0; j < Vec<Elem>::LEN; j++) {
    result.at[j] = from_f32<Elem>(2.0f * to_f32(value.at[j]));
  }
  store_vec(y + i, result);
}

extern "C" __global__ void __launch_bounds__(WARP) emu_count_vectors_f32(float* y, const float* x) {
  scale_vectors(y, x);
}
EXPORT_KERNEL(emu_count_vectors_f32, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_count_vectors_f16(f16* y, const f16* x) {
  scale_vectors(y, x);
}
EXPORT_KERNEL(emu_count_vectors_f16, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_count_vectors_bf16(bf16* y, const bf16* x) {
  scale_vectors(y, x);
}
EXPORT_KERNEL(emu_count_vectors_bf16, WARP)

// The same by element name: y[lane] from x[lane] and, in the lower half of the warp, x[32 + lane]
extern "C" __global__ void __launch_bounds__(WARP) emu_count_int4(int4* y, const int4* x) {
  int4 value[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = i * WARP + threadIdx.x;
    value[i] = at < 48 ? x[at] : make_int4(0, 0, 0, 0);
  }
  const int4 sum = {value[0].x + value[1].x, value[0].y, value[1].z, value[0].w};
  y[threadIdx.x] = sum;
}
EXPORT_KERNEL(emu_count_int4, WARP)

struct Quad {
  int at[4];
};

// y[lane] = x[lane], 16 bytes with an alignment of 4: four accesses of 4 bytes
extern "C" __global__ void __launch_bounds__(WARP) emu_count_quads(Quad* y, const Quad* x) {
  y[threadIdx.x] = x[threadIdx.x];
}
EXPORT_KERNEL(emu_count_quads, WARP)

// Lane l reads l % 4 words of its own, 32 apart; then each lane reads one.
extern "C" __global__ void __launch_bounds__(WARP) emu_count_uneven(float* y, const float* x) {
  const int lane = threadIdx.x;
  float sum = 0.0f;
  for (int i = 0; i < lane % 4; i++) sum += x[i * WARP + lane];
  __syncwarp();
  y[lane] = sum + x[lane];
}
EXPORT_KERNEL(emu_count_uneven, WARP)

// Between two rendezvous of the warp, odd lanes alone take the second of two iterations: if an
// iteration ends in a rendezvous, the lanes' iterations are counted separately, otherwise as one.
extern "C" __global__ void __launch_bounds__(WARP)
    emu_count_iterations(float* y, const float* x, const int rendezvous) {
  const int lane = threadIdx.x;
  for (int iteration = 0; iteration < 2; iteration++) {
    if (lane % 2 == iteration) y[lane] = x[lane];
    if (rendezvous) __syncwarp();
  }
}
EXPORT_KERNEL(emu_count_iterations, WARP)

// ---- Shared memory ----

// Lane l writes and reads the shared element `stride * l`; y[lane] = the value read.
template <typename T>
__device__ __forceinline__ void through_shared(T* y, const int stride) {
  SHARED_DYNAMIC(memory);
  T* const elements = reinterpret_cast<T*>(memory);
  const int lane = threadIdx.x;
  const T zero = {};
  elements[stride * lane] = zero;
  __syncwarp();
  y[lane] = elements[stride * lane];
}

extern "C" __global__ void __launch_bounds__(WARP)
    emu_count_shared2(unsigned short* y, const int stride) {
  through_shared(y, stride);
}
EXPORT_KERNEL(emu_count_shared2, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_count_shared4(float* y, const int stride) {
  through_shared(y, stride);
}
EXPORT_KERNEL(emu_count_shared4, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_count_shared8(float2* y, const int stride) {
  through_shared(y, stride);
}
EXPORT_KERNEL(emu_count_shared8, WARP)

extern "C" __global__ void __launch_bounds__(WARP) emu_count_shared16(float4* y, const int stride) {
  through_shared(y, stride);
}
EXPORT_KERNEL(emu_count_shared16, WARP)

// ---- Asynchronous copies ----

// Twice: lanes below `copied` copy 16 bytes from the source, the others write zeros. Then all copy.
extern "C" __global__ void __launch_bounds__(WARP)
    emu_count_cp_async(uint4* y, const uint4* x, const int copied) {
  SHARED_ARRAY(uint4, tile, 3 * WARP);
  const int lane = threadIdx.x;
  for (int i = 0; i < 3; i++) {
    const uint32_t bytes = i == 2 || lane < copied ? 16 : 0;
    ptx::cp_async16(ptx::smem_u32(tile + i * WARP + lane), x + i * WARP + lane, bytes);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 3; i++) y[i * WARP + lane] = tile[i * WARP + lane];
}
EXPORT_KERNEL(emu_count_cp_async, WARP)

// ---- Matrix instructions ----

// Four 8 x 8 matrices in rows of 128 bytes, with or without a swizzle of 16-byte chunks.
extern "C" __global__ void __launch_bounds__(WARP) emu_count_matrices(float* y, const int swizzle) {
  SHARED_ARRAY(uint4, rows, 32 * 8);
  const int lane = threadIdx.x, row = lane;
  for (int i = 0; i < 8; i++) rows[i * WARP + lane] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  const uint32_t at = ptx::smem_u32(rows + row * 8 + (swizzle ? row % 8 : 0));
  uint32_t a[4], b[2];
  ptx::ldmatrix_x4(a, at);
  ptx::ldmatrix_x2(b, at);
  float d[4] = {};
  ptx::mma_bf16(d, a, b);
  y[lane] = d[0];
}
EXPORT_KERNEL(emu_count_matrices, WARP)

// ---- Warp operations, barriers, atomics ----

// A block of any number of warps: sum[0] += the sum of x over the block.
extern "C" __global__ void __launch_bounds__(256) emu_count_sum(int* sum, const int* x) {
  SHARED_ARRAY(int, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(FULL_WARP, value, offset);
  }
  if (threadIdx.x % WARP == 0) atomicAdd(total, value);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sum, total[0]);
}
EXPORT_KERNEL(emu_count_sum, 256)

// Each of the other operations once, by the whole warp; the last two by half a warp each.
extern "C" __global__ void __launch_bounds__(WARP) emu_count_operations(uint32_t* y) {
  const uint32_t lane = threadIdx.x;
  uint32_t value = __ballot_sync(FULL_WARP, lane % 2);
  value += __any_sync(FULL_WARP, lane == 3);
  value += __all_sync(FULL_WARP, lane < 40);
  value += __reduce_add_sync(FULL_WARP, lane);
  value += __match_any_sync(FULL_WARP, lane / 8);
  __syncwarp();
  if (lane < 16) {
    value += __shfl_down_sync(0x0000ffffu, value, 1);
  } else {
    value += __shfl_down_sync(0xffff0000u, value, 1);
  }
  y[lane] = value;
}
EXPORT_KERNEL(emu_count_operations, WARP)
