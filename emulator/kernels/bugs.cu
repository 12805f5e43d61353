// Kernels with one deliberate mistake each, which test the emulator itself: every emu_bug_* must be
// reported or give wrong results in a given share of schedules, and every emu_ok_* must be right in
// all of them.
#include "kernel.cuh"

constexpr int BLOCK = 64;

// ---- Barriers and warp operations ---------------------------------------------------------------

// Both arms reach a barrier, but not the same one.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_divergent_barrier(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
EXPORT_KERNEL(emu_bug_divergent_barrier, BLOCK)

// Barrier 1 expects two warps and sees one.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_lost_barrier(int* out) {
  if (threadIdx.x < 32) ptx::named_bar_sync(1, 64);
  out[threadIdx.x] = 1;
}
EXPORT_KERNEL(emu_bug_lost_barrier, BLOCK)

// The two warps pass different thread counts for barrier 1.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_barrier_count(int* out) {
  ptx::named_bar_sync(1, threadIdx.x < 32 ? 64 : 32);
  out[threadIdx.x] = 1;
}
EXPORT_KERNEL(emu_bug_barrier_count, BLOCK)

// The mask contains lanes that take another branch.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_absent_lanes(int* out) {
  int value = threadIdx.x;
  if (threadIdx.x < 20) value = __shfl_xor_sync(FULL_WARP, value, 1);
  out[threadIdx.x] = value;
  if (threadIdx.x >= 20) __syncthreads();
}
EXPORT_KERNEL(emu_bug_absent_lanes, BLOCK)

// The lanes of a warp execute two different operations.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_mixed_operations(int* out) {
  int value = threadIdx.x;
  if (threadIdx.x & 1) {
    value = __shfl_sync(FULL_WARP, value, 0);
  } else {
    value = static_cast<int>(__ballot_sync(FULL_WARP, value > 3));
  }
  out[threadIdx.x] = value;
}
EXPORT_KERNEL(emu_bug_mixed_operations, BLOCK)

// The upper half of the warp calls with a mask that does not contain it.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_mask_without_caller(int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 0);
}
EXPORT_KERNEL(emu_bug_mask_without_caller, BLOCK)

// Waits for a flag that no thread sets.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_spin(volatile int* out) {
  while (out[0] != 1) __nanosleep(100);
}
EXPORT_KERNEL(emu_bug_spin, BLOCK)

// ---- Memory -------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_shared_past_end(int* out) {
  SHARED_DYNAMIC(smem);
  float* values = reinterpret_cast<float*>(smem);
  values[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(values[1]);
}
EXPORT_KERNEL(emu_bug_shared_past_end, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_bug_static_shared_past_end(int* out, int shift) {
  SHARED_ARRAY(int, values, BLOCK);
  int* at = values + shift;  // hidden from the compiler's bounds check
  at[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = at[0];
}
EXPORT_KERNEL(emu_bug_static_shared_past_end, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_shared_far(int* out) {
  SHARED_DYNAMIC(smem);
  out[threadIdx.x] = reinterpret_cast<int*>(smem)[(threadIdx.x + 1) * 65536];
}
EXPORT_KERNEL(emu_bug_shared_far, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_global_past_end(int* out) {
  out[threadIdx.x + 1] = 1;
}
EXPORT_KERNEL(emu_bug_global_past_end, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_uninitialised_shared(int* out) {
  SHARED_DYNAMIC(smem);
  float* values = reinterpret_cast<float*>(smem);
  if (threadIdx.x < 16) values[threadIdx.x] = 2.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] == 2.0f ? 1 : 0;
}
EXPORT_KERNEL(emu_bug_uninitialised_shared, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_misaligned_ldmatrix(int* out) {
  SHARED_DYNAMIC(smem);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::smem_u32(smem) + threadIdx.x * 8);
  out[threadIdx.x] = static_cast<int>(r[0]);
}
EXPORT_KERNEL(emu_bug_misaligned_ldmatrix, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_bug_misaligned_cp_async(int* out, const int* in) {
  SHARED_DYNAMIC(smem);
  ptx::cp_async16(ptx::smem_u32(smem) + threadIdx.x * 16, in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = reinterpret_cast<int*>(smem)[threadIdx.x * 4];
}
EXPORT_KERNEL(emu_bug_misaligned_cp_async, BLOCK)

// 300 KiB of locals, more than the emulated stack.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_stack_overflow(int* out) {
  volatile char locals[300 << 10];
  locals[threadIdx.x] = 1;
  out[threadIdx.x] = locals[threadIdx.x];
}
EXPORT_KERNEL(emu_bug_stack_overflow, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_shared_too_large(int* out) {
  SHARED_ARRAY(int, values, 12000);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
EXPORT_KERNEL(emu_bug_shared_too_large, BLOCK)

// ---- Races ----

enum class Sync { None, Shuffle, Warp, Block };

// Each thread reads its neighbour's value.
template <Sync sync>
__device__ __forceinline__ void exchange(int* out) {
  SHARED_DYNAMIC(exchanged);
  int* values = reinterpret_cast<int*>(exchanged);
  values[threadIdx.x] = threadIdx.x;
  if (sync == Sync::Shuffle) __shfl_sync(FULL_WARP, 0, 0);
  if (sync == Sync::Warp) __syncwarp();
  if (sync == Sync::Block) __syncthreads();
  out[threadIdx.x] = values[sync == Sync::Block ? BLOCK - 1 - threadIdx.x : threadIdx.x ^ 1];
}

extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_missing_syncwarp(int* out) {
  exchange<Sync::None>(out);
}
EXPORT_KERNEL(emu_bug_missing_syncwarp, BLOCK)

// A shuffle synchronises the lanes but orders no memory accesses.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_shuffle_for_syncwarp(int* out) {
  exchange<Sync::Shuffle>(out);
}
EXPORT_KERNEL(emu_bug_shuffle_for_syncwarp, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_ok_syncwarp(int* out) {
  exchange<Sync::Warp>(out);
}
EXPORT_KERNEL(emu_ok_syncwarp, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK) emu_ok_syncthreads(int* out) {
  exchange<Sync::Block>(out);
}
EXPORT_KERNEL(emu_ok_syncthreads, BLOCK)

// All threads write one word.
extern "C" __global__ void __launch_bounds__(BLOCK) emu_bug_global_race(int* out) {
  out[0] = threadIdx.x;
}
EXPORT_KERNEL(emu_bug_global_race, BLOCK)

// A histogram that some threads clear and others increment.
template <bool WITH_BARRIER>
__device__ __forceinline__ void histogram(int* out, const int* in, int n) {
  SHARED_ARRAY(int, bins, BLOCK);
  for (int i = BLOCK - 1 - threadIdx.x; i < BLOCK; i += BLOCK) bins[i] = 0;
  if (WITH_BARRIER) __syncthreads();
  for (int i = threadIdx.x; i < n; i += BLOCK) atomicAdd(&bins[in[i]], 1);
  __syncthreads();
  out[threadIdx.x] = bins[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_bug_missing_syncthreads(int* out, const int* in, int n) {
  histogram<false>(out, in, n);
}
EXPORT_KERNEL(emu_bug_missing_syncthreads, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_ok_histogram(int* out, const int* in, int n) {
  histogram<true>(out, in, n);
}
EXPORT_KERNEL(emu_ok_histogram, BLOCK)

// ---- A double-buffered cp.async pipeline ----

// Sums, over `tiles` tiles of 64 x 16 bytes, the values that another thread copied.
template <bool WITH_WAIT, bool WITH_REFILL_BARRIER>
__device__ __forceinline__ void pipeline(int* out, const int* in, int tiles) {
  SHARED_DYNAMIC(stages);
  const uint32_t base = ptx::smem_u32(stages), mine = threadIdx.x * 16;
  const int other = (threadIdx.x + 37) % BLOCK;
  const auto load = [&](int tile) {
    ptx::cp_async16(base + tile % 2 * BLOCK * 16 + mine, in + (tile * BLOCK + threadIdx.x) * 4,
                    tile < tiles ? 16 : 0);
    ptx::cp_async_commit();
  };
  int sum = 0;
  load(0);
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      load(tile + 1);
    } else {
      ptx::cp_async_commit();
    }
    if (WITH_WAIT) ptx::cp_async_wait<1>();
    __syncthreads();
    const int* values = reinterpret_cast<const int*>(stages) + tile % 2 * BLOCK * 4 + other * 4;
    sum += values[0] + values[3];
    if (WITH_REFILL_BARRIER) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_ok_pipeline(int* out, const int* in, int tiles) {
  pipeline<true, true>(out, in, tiles);
}
EXPORT_KERNEL(emu_ok_pipeline, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_bug_missing_copy_wait(int* out, const int* in, int tiles) {
  pipeline<false, true>(out, in, tiles);
}
EXPORT_KERNEL(emu_bug_missing_copy_wait, BLOCK)

extern "C" __global__ void __launch_bounds__(BLOCK)
    emu_bug_missing_refill_barrier(int* out, const int* in, int tiles) {
  pipeline<true, false>(out, in, tiles);
}
EXPORT_KERNEL(emu_bug_missing_refill_barrier, BLOCK)

// ---- Named barriers ----

// Warp 0 produces, warp 1 consumes; one barrier means "full", the other "empty".
extern "C" __global__ void __launch_bounds__(BLOCK) emu_ok_named_barriers(int* out, int rounds) {
  SHARED_ARRAY(int, box, 32);
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int i = 0; i < rounds; i++) {
    if (threadIdx.x < 32) {
      if (i > 0) ptx::named_bar_sync(2, 64);
      box[lane] = i * lane;
      ptx::named_bar_arrive(1, 64);
    } else {
      ptx::named_bar_sync(1, 64);
      sum += box[31 - lane];
      if (i + 1 < rounds) ptx::named_bar_arrive(2, 64);
    }
  }
  if (threadIdx.x >= 32) out[lane] = sum;
}
EXPORT_KERNEL(emu_ok_named_barriers, BLOCK)

// ---- Votes and warp operations on part of a warp ----

extern "C" __global__ void __launch_bounds__(BLOCK) emu_ok_warp_operations(int* out) {
  const int lane = threadIdx.x % 32;
  const bool low = lane < 12;
  const unsigned mask = low ? 0x00000fffu : 0xfffff000u;
  int sum;
  if (low) {
    sum = __reduce_add_sync(mask, lane);
  } else {
    sum = __reduce_add_sync(mask, -lane);
  }
  __syncwarp();
  const unsigned same = __match_any_sync(FULL_WARP, lane % 5);
  const int ballot = static_cast<int>(__ballot_sync(FULL_WARP, lane % 3 == 0));
  const int up = __shfl_up_sync(FULL_WARP, lane, 1), down = __shfl_down_sync(FULL_WARP, lane, 2, 8);
  const int xored = __shfl_xor_sync(FULL_WARP, lane, 5), from = __shfl_sync(FULL_WARP, lane, 9, 8);
  const int yes = __syncthreads_count(threadIdx.x % 4 == 0);
  const int all = __syncthreads_and(threadIdx.x < 64), any = __syncthreads_or(threadIdx.x == 63);
  int* mine = out + threadIdx.x * 10;
  mine[0] = sum;
  mine[1] = static_cast<int>(same);
  mine[2] = ballot;
  mine[3] = up;
  mine[4] = down;
  mine[5] = xored;
  mine[6] = from;
  mine[7] = yes;
  mine[8] = all * 2 + any;
  mine[9] = __any_sync(FULL_WARP, lane == 3) * 2 + __all_sync(FULL_WARP, lane < 31);
}
EXPORT_KERNEL(emu_ok_warp_operations, BLOCK)
