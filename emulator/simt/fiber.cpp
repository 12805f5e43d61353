// Fibers: the switch between two threads of a block. It saves the callee-saved registers and
// nothing else.
#include "state.h"

namespace simt {

__thread ThreadVars* thread_vars __attribute__((tls_model("initial-exec")));
__thread BlockVars* block_vars __attribute__((tls_model("initial-exec")));
__thread Cluster* cluster __attribute__((tls_model("initial-exec")));

#if defined(__x86_64__)
// Saves the stack pointer through the first argument and continues at the second.
extern "C" void simt_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.p2align 4
.globl simt_switch
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "The software device's context switch is written for x86-64."
#endif

void switch_to(Fiber* from, Fiber* to, [[maybe_unused]] bool leaving) {
  if (to == &cluster->main) {
    thread_vars = nullptr;
  } else {
    thread_vars = to;
    block_vars = to->block;
  }
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&from->stack_pointer, to->stack_pointer);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Completes the asynchronous operations of a thread that returns from the kernel, then switches for
// the last time.
[[noreturn]] static void exit_thread(Fiber* fiber) {
  copies_thread_exiting(fiber);
  stores_thread_exiting(fiber);
  tsan_release(&cluster->end_tag);
  fiber->state = State::Exited;
  fiber->warp->live &= ~(1u << fiber->lane);
  fiber->warp->runnable &= ~(1u << fiber->lane);
  fiber->block->live--;
  cluster->live--;
  made_progress();
  warp_lane_exited(fiber->warp);
  if (fiber->block->live != 0) barriers_thread_exited(fiber->block);
  Fiber* next = &cluster->main;
  if (cluster->live != 0) {
    cluster_thread_exited();
    next = pick_next();
    if (next == nullptr) fail_with(deadlock_report());
  } else {
    while (!cluster->async.empty()) run_one_async();
  }
  switch_to(fiber, next, true);
  __builtin_unreachable();
}

extern "C" void simt_fiber_main() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  tsan_acquire(&cluster->start_tag);
  cluster->entry(cluster->arguments);
  exit_thread(current_fiber());
}

void prepare_fiber(Fiber* fiber) {
  // Stacks lie at multiples of a power of two; staggered tops keep the threads of a block from
  // competing for the same cache sets.
  uintptr_t top = reinterpret_cast<uintptr_t>(fiber->stack) + fiber->stack_bytes - 64 -
                  fiber->linear % 32 * 192;
  void** sp = reinterpret_cast<void**>(top & ~uintptr_t{15});
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(simt_fiber_main);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--sp = nullptr;
  fiber->stack_pointer = sp;
}

}  // namespace simt
