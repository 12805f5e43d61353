// The view that a running CUDA thread has of itself and its block, and the calls into the
// scheduler.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace simt {

// A place in a kernel's source. The compiler fills in a default argument of this type at the call,
// so code duplication cannot change the reported place.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define SIMT_SITE ::simt::Site site = ::simt::Site::here()

struct ThreadVars {
  uint3 thread_idx;
  uint32_t lane;
};

struct BlockVars {
  uint3 block_idx;
  dim3 block_dim, grid_dim;
  uint32_t cluster_rank, cluster_size;
  unsigned char* shared;   // the block's shared memory: a 1024-aligned arena
  uint32_t dynamic_bytes;  // the dynamic part that the launch requested
};

// The running thread and its block. The scheduler sets both at every switch.
extern __thread ThreadVars* thread_vars __attribute__((tls_model("initial-exec")));
extern __thread BlockVars* block_vars __attribute__((tls_model("initial-exec")));

// Stops the kernel with a report that names kernel, block, thread and seed. Does not return: the
// fibers of the block are abandoned.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A rendezvous of the lanes of `mask`: each passes its operands, and the last one to arrive calls
// `apply` for all. OrderMemory says whether it also orders memory accesses.
using WarpFn = void (*)(void** operands, uint32_t mask);
enum class OrderMemory : bool { No, Yes };
void warp_op(uint32_t mask, void* operands, WarpFn apply, OrderMemory order, const char* kind,
             Site site);

// Barrier `id` of the block for `threads` threads; 0 means all threads that have not exited.
void barrier_arrive(int id, int threads, const char* kind, Site site);
void barrier_sync(int id, int threads, const char* kind, Site site);
enum class Vote { Count, And, Or };
int barrier_vote(Vote vote, bool predicate, const char* kind, Site site);

// Yields to other threads. Loops that wait for a value in memory must call it.
void yield_thread();

// A point at which the scheduler may preempt; also a fence between operating system threads.
void memory_fence();

// The block's static array for `key`; the first caller creates it.
void* static_shared(const void* key, size_t bytes, size_t align);

// The offset of `p` in the block's shared memory.
uint32_t shared_offset(const void* p);

}  // namespace simt

#define threadIdx (::simt::thread_vars->thread_idx)
#define blockIdx (::simt::block_vars->block_idx)
#define blockDim (::simt::block_vars->block_dim)
#define gridDim (::simt::block_vars->grid_dim)
static constexpr int warpSize = 32;

// Shared memory: kernel.cuh has the device forms of these two.
#define SHARED_DYNAMIC(name) unsigned char* const name = ::simt::block_vars->shared
#define SHARED_ARRAY(T, name, n)                                                            \
  T(&name)                                                                                  \
  [n] = *static_cast<T(*)[n]>([]() -> void* {                                               \
    static char key;                                                                        \
    return ::simt::static_shared(&key, sizeof(T) * (n), alignof(T) < 16 ? 16 : alignof(T)); \
  }())

inline void __syncthreads(SIMT_SITE) { simt::barrier_sync(0, 0, "__syncthreads", site); }
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return simt::barrier_vote(simt::Vote::Count, predicate != 0, "__syncthreads_count", site);
}
inline int __syncthreads_and(int predicate, SIMT_SITE) {
  return simt::barrier_vote(simt::Vote::And, predicate != 0, "__syncthreads_and", site);
}
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return simt::barrier_vote(simt::Vote::Or, predicate != 0, "__syncthreads_or", site);
}

inline void __threadfence() { simt::memory_fence(); }
inline void __threadfence_block() { simt::memory_fence(); }
inline void __threadfence_system() { simt::memory_fence(); }
inline void __nanosleep(unsigned) { simt::yield_thread(); }
inline long long clock64() { return 0; }
[[noreturn]] inline void __trap(SIMT_SITE) {
  simt::fail("__trap() at %s:%d", site.file, site.line);
}
inline uint32_t __cvta_generic_to_shared(const void* p) { return simt::shared_offset(p); }
