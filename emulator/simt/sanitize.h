// Annotations for ThreadSanitizer and AddressSanitizer; empty in a plain build. The race checker
// must see only the order of the emulated threads, not the runtime's bookkeeping, so the runtime is
// compiled without instrumentation and with SIMT_TSAN, and declares the order itself.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace simt {

// Everything before a release of a tag happens before everything after a later acquire of it.
inline void tsan_release([[maybe_unused]] void* tag) {
#if defined(SIMT_TSAN)
  __tsan_release(tag);
#endif
}
inline void tsan_acquire([[maybe_unused]] void* tag) {
#if defined(SIMT_TSAN)
  __tsan_acquire(tag);
#endif
}

// An access that the runtime makes on behalf of an emulated thread or unit.
inline void tsan_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_TSAN)
  if (bytes != 0) __tsan_read_range(const_cast<void*>(p), bytes);
#endif
}
inline void tsan_write([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_TSAN)
  if (bytes != 0) __tsan_write_range(p, bytes);
#endif
}

// Disables the recording of accesses for its lifetime: memset and similar functions are intercepted
// even in code that is not instrumented.
class TsanQuiet {
 public:
  TsanQuiet() {
#if defined(SIMT_TSAN)
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
#endif
  }
  ~TsanQuiet() {
#if defined(SIMT_TSAN)
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
#endif
  }
};

// An asynchronous unit, which is a thread of its own for the race checker: its operations are
// ordered after its issue and before a later acquire of `done`.
struct AsyncUnit {
  void* fiber = nullptr;
  char issue = 0, done = 0;
};

class AsUnit {
 public:
  explicit AsUnit([[maybe_unused]] AsyncUnit& unit)
#if defined(SIMT_TSAN)
      : back_(__tsan_get_current_fiber()) {
    if (unit.fiber == nullptr) unit.fiber = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(unit.fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(&unit.issue);
  }
  ~AsUnit() { __tsan_switch_to_fiber(back_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* back_;
#else
  {
  }
#endif
};

// For its lifetime, operations count as those of the emulated thread with the given context.
class AsThread {
 public:
  explicit AsThread([[maybe_unused]] void* thread)
#if defined(SIMT_TSAN)
      : back_(__tsan_get_current_fiber()) {
    __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
  }
  ~AsThread() { __tsan_switch_to_fiber(back_, __tsan_switch_to_fiber_no_sync); }

 private:
  void* back_;
#else
  {
  }
#endif
};

// Resets a thread that was abandoned inside a kernel: everything it did counts as finished, and a
// new context replaces its own, whose calls never return.
inline void tsan_abandon([[maybe_unused]] void*& thread, [[maybe_unused]] void* tag) {
#if defined(SIMT_TSAN)
  {
    const AsThread as(thread);
    __tsan_release(tag);
  }
  __tsan_destroy_fiber(thread);
  thread = __tsan_create_fiber(0);
#endif
}

inline void asan_poison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(p, bytes);
#endif
}
inline void asan_unpoison([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

}  // namespace simt
