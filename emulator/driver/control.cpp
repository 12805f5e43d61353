// Test controls of the software device beyond the driver API, which src/lib.rs declares too, and
// cuGetProcAddress, which finds this library's exports.
#include <dlfcn.h>

#include <cstring>

#include "api.h"
#include "device.h"

using namespace driver;

struct EmulatorCounters {
  uint64_t live_allocations, live_bytes, launches, copies, memsets, failures, unfinished;
};

DRIVER_API void moe_emulator_set_seed(uint64_t seed) {
  HostThread& thread = *this_thread();
  thread.seed = thread.random = seed;
  thread.launches = 0;
}

DRIVER_API void moe_emulator_set_os_threads(unsigned count) {
  this_thread()->os_threads = count ? count : 1;
}

DRIVER_API void moe_emulator_leave_out_blocks(uint64_t count) { this_thread()->left_out = count; }

// The report of the last failure of work that this thread submitted, or nullptr. The text is valid
// until the thread's next call.
DRIVER_API const char* moe_emulator_last_error() {
  Lock lock(state().mutex);
  HostThread& thread = *this_thread();
  thread.report_copy = thread.report;
  return thread.report_copy.empty() ? nullptr : thread.report_copy.c_str();
}

// The last preferred carve-out of a kernel, in percent of shared memory; -1 if none was set.
DRIVER_API int moe_emulator_carveout(const char* symbol) {
  Lock lock(state().mutex);
  const simt::Kernel* kernel = simt::find_kernel(symbol);
  return kernel && state().carveouts.count(kernel) ? state().carveouts[kernel] : -1;
}

// Clears the failures that stick to this thread's streams, and their report.
DRIVER_API void moe_emulator_clear_errors() {
  Lock lock(state().mutex);
  HostThread& thread = *this_thread();
  thread.report.clear();
  thread.default_domain->error = CUDA_SUCCESS;
  if (thread.contexts.empty()) return;
  for (const StreamPtr& stream : thread.contexts.back()->streams) {
    if (stream->domain && stream->domain->thread == &thread) stream->domain->error = CUDA_SUCCESS;
  }
}

DRIVER_API size_t moe_emulator_kernel_count() {
  size_t count;
  simt::all_kernels(&count);
  return count;
}

DRIVER_API const simt::Kernel* moe_emulator_kernel(size_t index) {
  size_t count;
  const simt::Kernel* const* kernels = simt::all_kernels(&count);
  return index < count ? kernels[index] : nullptr;
}

DRIVER_API void moe_emulator_counters(EmulatorCounters* counters) {
  Lock lock(state().mutex);
  const Driver& driver = state();
  *counters = {driver.allocations.size(),
               driver.allocated_bytes,
               driver.counters.launches,
               driver.counters.copies,
               driver.counters.memsets,
               driver.counters.failures,
               0};
  if (this_thread()->contexts.empty()) return;
  counters->unfinished = this_thread()->contexts.back()->unfinished.size();
}

// The traffic of a kernel since the last reset. Returns false if the kernel was not launched, or if
// this library does not count.
DRIVER_API bool moe_emulator_traffic(const char* symbol, simt::Traffic* traffic) {
  return simt::kernel_traffic(symbol, traffic);
}

DRIVER_API void moe_emulator_reset_traffic() { simt::reset_traffic(); }

DRIVER_API CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t,
                                        int* status) {
  constexpr int FOUND = 0, SYMBOL_NOT_FOUND = 1;
  if (!symbol || !function) return CUDA_ERROR_INVALID_VALUE;
  *function = nullptr;
  // Symbols that callers must work without.
  constexpr int PARAMETERS_SINCE = 12040;
  const bool too_new =
      !std::strcmp(symbol, "cuFuncGetParamInfo") && driver_version() < PARAMETERS_SINCE;
  if (void* self = dlopen("libcuda.so", RTLD_NOLOAD | RTLD_LAZY)) {
    // The API returns the newest version of a function under its plain name.
    for (const char* version : {"_v4", "_v3", "_v2", ""}) {
      if (too_new) break;
      *function = dlsym(self, (std::string(symbol) + version).c_str());
      if (*function) break;
    }
    dlclose(self);
  }
  if (status) *status = *function ? FOUND : SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

DRIVER_API CUresult cuGetProcAddress(const char* symbol, void** function, int version,
                                     uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
