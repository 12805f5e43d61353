// Faults: an access of an emulated thread to a guard page or to freed memory stops its kernel with
// a report. With a sanitizer, whose reports are better, no fault is caught.
#include <ucontext.h>

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "state.h"

namespace simt {

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)

void run_guarded(void (*f)()) { f(); }

#else

static thread_local sigjmp_buf t_return;
static thread_local volatile bool t_guarded;
static struct sigaction g_previous;

static std::string describe(uintptr_t address, const void* context) {
  const Fiber* const fiber = current_fiber();
  const uintptr_t stack = reinterpret_cast<uintptr_t>(fiber->stack);
  const uintptr_t top = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RSP];
  if (top < stack + 4096 || (address >= stack && address < stack + 4096)) return "stack overflow";
  const std::string memory = describe_device_address(address);
  if (!memory.empty()) return memory;
  const uintptr_t shared = reinterpret_cast<uintptr_t>(fiber->block->shared);
  if (address + (1 << 20) > shared && address < shared + (1 << 20)) {
    return "shared memory, offset " + std::to_string(static_cast<intptr_t>(address - shared));
  }
  return "neither device nor shared memory";
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  if (!t_guarded || cluster == nullptr || thread_vars == nullptr) {
    // Not ours: the previous handler decides.
    if (g_previous.sa_flags & SA_SIGINFO) {
      g_previous.sa_sigaction(signal, info, context);
    } else {
      sigaction(signal, &g_previous, nullptr);
    }
    return;
  }
  const Fiber* const fiber = current_fiber();
  char text[512];
  std::snprintf(text, sizeof text,
                "invalid access at %p (%s); the thread's last wait or copy was %s "
                "at %s:%d",
                info->si_addr,
                describe(reinterpret_cast<uintptr_t>(info->si_addr), context).c_str(), fiber->kind,
                fiber->site.file, fiber->site.line);
  cluster->error = report_head(fiber) + text;
  cluster->failed = true;
  siglongjmp(t_return, 1);
}

static void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &g_previous);
  });
  // A fiber with an overflowed stack cannot run the handler on it.
  static thread_local bool has_stack = false;
  if (has_stack) return;
  has_stack = true;
  stack_t stack;
  sigaltstack(nullptr, &stack);
  if ((stack.ss_flags & SS_DISABLE) == 0) return;
  static constexpr size_t BYTES = 64 << 10;
  static thread_local std::unique_ptr<char[]> memory(new char[BYTES]);
  stack = {};
  stack.ss_sp = memory.get();
  stack.ss_size = BYTES;
  sigaltstack(&stack, nullptr);
}

void run_guarded(void (*f)()) {
  install_handler();
  if (sigsetjmp(t_return, 0) == 0) {
    t_guarded = true;
    f();
  }
  t_guarded = false;
}

#endif

}  // namespace simt
