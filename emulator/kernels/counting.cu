// Kernels whose memory traffic and warp operations are known exactly, for emulator/tests/counting.
// One warp each, unless the launch says otherwise; `lane` is the thread's number.
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

// y = 2 * x, 16 bytes a lane: what load_vec and store_vec move must stay one access of 16 bytes.
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

// The same by name: y[lane] from x[lane] and, in the lower half of the warp, x[32 + lane]
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

// y[lane] = x[lane], 16 bytes that are aligned to 4: four accesses of 4 bytes
extern "C" __global__ void __launch_bounds__(WARP) emu_count_quads(Quad* y, const Quad* x) {
  y[threadIdx.x] = x[threadIdx.x];
}
EXPORT_KERNEL(emu_count_quads, WARP)

// Lane l reads l % 4 words of its own, 32 apart, and then all lanes read one each.
extern "C" __global__ void __launch_bounds__(WARP) emu_count_uneven(float* y, const float* x) {
  const int lane = threadIdx.x;
  float sum = 0.0f;
  for (int i = 0; i < lane % 4; i++) sum += x[i * WARP + lane];
  __syncwarp();
  y[lane] = sum + x[lane];
}
EXPORT_KERNEL(emu_count_uneven, WARP)

// Between two meetings of the warp, odd lanes alone take the second of two turns: where a turn
// ends in a meeting, the lanes' turns are told apart, else they are taken for one.
extern "C" __global__ void __launch_bounds__(WARP)
emu_count_turns(float* y, const float* x, const int meet) {
  const int lane = threadIdx.x;
  for (int turn = 0; turn < 2; turn++) {
    if (lane % 2 == turn) y[lane] = x[lane];
    if (meet) __syncwarp();
  }
}
EXPORT_KERNEL(emu_count_turns, WARP)

// ---- Shared memory ----

// Lane l writes and reads the shared element `stride * l`; y[lane] = what it read.
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

// Twice: lanes below `copied` bring 16 bytes from the source, the others zeros. Then all do.
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

// Four 8 x 8 matrices in rows of 128 bytes, with a swizzle of 16-byte chunks or without.
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

// Each of the other operations once, over the whole warp; the last two in half a warp each.
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
