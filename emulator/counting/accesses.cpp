// The plain C++ reads and writes of kernels. Kernels are compiled with -fsanitize=thread, which
// makes the compiler call a function before each access; these functions replace ThreadSanitizer's.
// The return address distinguishes accesses.
#include "warp_traffic.h"

namespace simt {

// An access by the running lane. Its own stack, the parameters and constants are not counted.
static void count_access(bool written, const void* p, uint32_t bytes, const void* where, int part) {
  // Initialisers and the unpacking of a launch's parameters are compiled like kernels.
  if (cluster == nullptr || thread_vars == nullptr) return;
  const Fiber* const fiber = current_fiber();
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at - reinterpret_cast<uintptr_t>(fiber->stack) < fiber->stack_bytes) return;
  WarpEvent event;
  if (at - reinterpret_cast<uintptr_t>(fiber->block->shared) < ARENA_BYTES) {
    event = written ? WarpEvent::SharedWrite : WarpEvent::SharedRead;
  } else if (cluster->traffic->find(at) != nullptr) {
    event = written ? WarpEvent::GlobalWrite : WarpEvent::GlobalRead;
  } else {
    return;
  }
  fiber->warp->traffic->add({event, where, part}, fiber->lane, at, bytes);
}

// A struct that is less aligned than wide. A GPU moves it in pieces of its alignment, usually 4
// bytes.
static void count_pieces(bool written, const void* p, size_t bytes, const void* where) {
  const size_t odd = (reinterpret_cast<uintptr_t>(p) | bytes) % 4;
  const size_t piece = odd == 0 ? 4 : odd == 2 ? 2 : 1;
  for (size_t i = 0; i < bytes / piece; i++) {
    const void* const at = static_cast<const char*>(p) + i * piece;
    count_access(written, at, static_cast<uint32_t>(piece), where, static_cast<int>(i));
  }
}

// simt::atomic_update begins with one atomic load, for any number of attempts.
static void count_atomic(const void* p, uint32_t bytes, const void* where) {
  if (cluster == nullptr || thread_vars == nullptr) return;
  const Fiber* const fiber = current_fiber();
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const bool shared = at - reinterpret_cast<uintptr_t>(fiber->block->shared) < ARENA_BYTES;
  const WarpEvent event = shared ? WarpEvent::SharedAtomic : WarpEvent::GlobalAtomic;
  fiber->warp->traffic->add({event, where, 0}, fiber->lane, at, bytes);
}

}  // namespace simt

#define WHERE __builtin_return_address(0)
#define ACCESSES(bytes)                                                               \
  void __tsan_read##bytes(void* p) { simt::count_access(false, p, bytes, WHERE, 0); } \
  void __tsan_write##bytes(void* p) { simt::count_access(true, p, bytes, WHERE, 0); }
#define ATOMICS(bits)                                                                           \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {            \
    simt::count_atomic(const_cast<const uint##bits##_t*>(p), bits / 8, WHERE);                  \
    return __atomic_load_n(p, __ATOMIC_RELAXED);                                                \
  }                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_strong(                                            \
      volatile uint##bits##_t* p, uint##bits##_t* expected, uint##bits##_t desired, int, int) { \
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_RELAXED,           \
                                       __ATOMIC_RELAXED);                                       \
  }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long n) { simt::count_pieces(false, p, n, WHERE); }
void __tsan_write_range(void* p, unsigned long n) { simt::count_pieces(true, p, n, WHERE); }
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

}  // extern "C"
