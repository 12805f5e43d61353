// Initialisation, contexts, and the checks at the start of every call.
#include <algorithm>
#include <cstdlib>

#include "api.h"
#include "device.h"

namespace driver {

Driver& state() {
  static Driver* driver = new Driver;
  return *driver;
}

namespace {

uint64_t environment_number(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 0) : otherwise;
}

// Ends a thread's use of the driver. Its per-thread streams stay listed until their work is done.
struct ThreadOwner {
  std::shared_ptr<HostThread> thread = std::make_shared<HostThread>();
  ThreadOwner() {
    thread->seed = thread->random = environment_number("MOE_EMULATOR_SEED", 0);
    uint64_t os_threads = environment_number("MOE_EMULATOR_THREADS", 1);
    thread->os_threads = os_threads ? static_cast<unsigned>(os_threads) : 1;
  }
  ~ThreadOwner() {
    Lock lock(state().mutex);
    for (auto& [context, stream] : thread->default_streams) stream->destroyed = true;
    thread->default_streams.clear();
    thread->contexts.clear();
  }
};

void start_context(Context& context) {
  context.alive = true;
  context.id = ++state().next_id;
  constexpr size_t DEFAULT_LIMITS[CU_LIMIT_COUNT] = {1024, 1 << 20, 8 << 20, 2, 2048, 128, 0};
  for (int i = 0; i < CU_LIMIT_COUNT; i++) context.limits[i] = DEFAULT_LIMITS[i];
}

ContextPtr new_context() {
  auto context = std::make_shared<Context>();
  context->handle = state().contexts.add(context);
  context->legacy = std::make_shared<Stream>();
  context->legacy->context = context;
  context->legacy->legacy = true;
  return context;
}

CUresult create_context(CUcontext* out, unsigned flags, CUdevice device) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!out || flags & ~CU_CTX_FLAGS_MASK) return CUDA_ERROR_INVALID_VALUE;
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  ContextPtr context = new_context();
  context->flags = flags;
  start_context(*context);
  call.thread->contexts.push_back(context);
  *out = context->handle;
  return CUDA_SUCCESS;
}

}  // namespace

const std::shared_ptr<HostThread>& this_thread() {
  static thread_local ThreadOwner owner;
  return owner.thread;
}

Call::Call(Needs needs)
    : driver(state()), thread(this_thread()), lock(driver.mutex), error(CUDA_SUCCESS) {
  if (!driver.initialised) {
    error = CUDA_ERROR_NOT_INITIALIZED;
  } else if (thread->in_host_function) {
    error = CUDA_ERROR_NOT_PERMITTED;
  } else if (!thread->contexts.empty()) {
    context = thread->contexts.back();
  }
  if (error || needs == ANY_CONTEXT) return;
  if (!context) {
    error = CUDA_ERROR_INVALID_CONTEXT;
  } else if (!context->alive) {
    error = CUDA_ERROR_CONTEXT_IS_DESTROYED;
  }
}

void release_context(Lock& lock, Context& context) {
  // The lock is released while work runs, and another thread may submit more.
  while (!context.unfinished.empty()) complete_context(lock, *this_thread(), context);
  context.alive = false;
  Driver& driver = state();
  auto owned = [&](const auto& object) { return object.context.get() == &context; };
  auto& captures = driver.captures;
  captures.erase(std::remove_if(captures.begin(), captures.end(),
                                [&](const CapturePtr& c) { return owned(*c->graph); }),
                 captures.end());
  for (const StreamPtr& stream : context.streams) {
    stream->destroyed = true;
    stream->capture.reset();
    stream->tail.clear();
  }
  context.streams.clear();
  context.legacy->last.reset();
  this_thread()->default_streams.erase(&context);
  driver.modules.remove_if(owned);
  driver.functions.remove_if(owned);
  driver.streams.remove_if(owned);
  driver.events.remove_if(owned);
  driver.graphs.remove_if(owned);
  driver.graph_execs.remove_if(owned);
  for (auto it = driver.allocations.begin(); it != driver.allocations.end();) {
    uintptr_t start = it->first;
    bool free = it->second.context.get() == &context;
    ++it;
    if (free) free_allocation(lock, start, nullptr);
  }
}

}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuInit(unsigned flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  const DeviceProperties* properties = device_properties();
  if (!properties || !driver_version()) return CUDA_ERROR_NO_DEVICE;
  Lock lock(state().mutex);
  if (!state().initialised) {
    simt::set_device_limits({properties->major, properties->minor,
                             static_cast<unsigned>(properties->shared_per_block_optin),
                             properties->clusters, properties->tma, properties->wgmma});
    state().initialised = true;
  }
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDriverGetVersion(int* version) {
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = driver_version() ? driver_version() : DRIVER_VERSION;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  if (!call.driver.primary) {
    call.driver.primary = new_context();
    call.driver.primary->primary = true;
  }
  if (call.driver.primary->retained++ == 0) start_context(*call.driver.primary);
  *out = call.driver.primary->handle;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  const ContextPtr& primary = call.driver.primary;
  if (!primary || primary->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  // The last user still holds its reference while it waits for the work: if another thread retains
  // the context meanwhile, the context stays alive.
  while (primary->retained == 1 && !primary->unfinished.empty()) {
    complete_context(call.lock, *call.thread, *primary);
  }
  if (--primary->retained == 0) release_context(call.lock, *primary);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  if (call.driver.primary && call.driver.primary->alive) {
    release_context(call.lock, *call.driver.primary);
    if (call.driver.primary->retained) start_context(*call.driver.primary);
  }
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  if (!flags || !active) return CUDA_ERROR_INVALID_VALUE;
  *flags = call.driver.primary ? call.driver.primary->flags : 0;
  *active = call.driver.primary && call.driver.primary->alive;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxCreate_v2(CUcontext* out, unsigned flags, CUdevice device) {
  return create_context(out, flags, device);
}

DRIVER_API CUresult cuCtxCreate_v4(CUcontext* out, void* parameters, unsigned flags,
                                   CUdevice device) {
  if (parameters) return not_supported("cuCtxCreate_v4 with parameters");
  return create_context(out, flags, device);
}

DRIVER_API CUresult cuCtxDestroy_v2(CUcontext handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  ContextPtr context = call.driver.contexts.find(handle);
  if (!context || context->primary || !context->alive) return CUDA_ERROR_INVALID_CONTEXT;
  release_context(call.lock, *context);
  call.driver.contexts.remove(handle);
  auto& stack = call.thread->contexts;
  if (!stack.empty() && stack.back() == context) stack.pop_back();
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetCurrent(CUcontext* out) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  *out = call.context ? call.context->handle : nullptr;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetCurrent(CUcontext handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  auto& stack = call.thread->contexts;
  ContextPtr context = call.driver.contexts.find(handle);
  if (handle && !context) return CUDA_ERROR_INVALID_CONTEXT;
  if (context && !context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (!stack.empty()) stack.pop_back();
  if (context) stack.push_back(context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxPushCurrent_v2(CUcontext handle) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  ContextPtr context = call.driver.contexts.find(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  call.thread->contexts.push_back(context);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxPopCurrent_v2(CUcontext* out) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!call.context) return CUDA_ERROR_INVALID_CONTEXT;
  if (out) *out = call.context->handle;
  call.thread->contexts.pop_back();
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetDevice(CUdevice* device) {
  Call call;
  if (call.error) return call.error;
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = 0;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetFlags(unsigned* flags) {
  Call call;
  if (call.error) return call.error;
  if (!flags) return CUDA_ERROR_INVALID_VALUE;
  *flags = call.context->flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetFlags(unsigned flags) {
  Call call;
  if (call.error) return call.error;
  if (flags & ~CU_CTX_FLAGS_MASK) return CUDA_ERROR_INVALID_VALUE;
  call.context->flags = flags;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
  Call call(handle ? Call::ANY_CONTEXT : Call::CURRENT_CONTEXT);
  if (call.error) return call.error;
  ContextPtr context = handle ? call.driver.contexts.find(handle) : call.context;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (!id) return CUDA_ERROR_INVALID_VALUE;
  *id = context->id;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetApiVersion(CUcontext handle, unsigned* version) {
  Call call(handle ? Call::ANY_CONTEXT : Call::CURRENT_CONTEXT);
  if (call.error) return call.error;
  if (handle && !call.driver.contexts.find(handle)) return CUDA_ERROR_INVALID_CONTEXT;
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = 3020;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSynchronize() {
  Call call;
  if (call.error) return call.error;
  bool capturing = false;
  for (const CapturePtr& capture : call.driver.captures) {
    // Another thread's capture counts only in global mode: tests that share a process would
    // otherwise end each other's captures, as they do on a GPU.
    if (capture->graph->context != call.context) continue;
    if (capture->mode != CU_STREAM_CAPTURE_MODE_GLOBAL && capture->thread != call.thread) continue;
    invalidate(*capture);
    capturing = true;
  }
  if (capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  complete_context(call.lock, *call.thread, *call.context);
  // Reports only failures of work that this thread submitted; see ErrorDomain.
  if (call.thread->default_domain->error) return call.thread->default_domain->error;
  for (const StreamPtr& stream : call.context->streams) {
    if (!stream->domain || stream->destroyed) continue;
    if (stream->domain->error && stream->domain->thread == call.thread.get())
      return stream->domain->error;
  }
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  Call call;
  if (call.error) return call.error;
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  if (limit < 0 || limit >= CU_LIMIT_COUNT) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  *value = call.context->limits[limit];
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  Call call;
  if (call.error) return call.error;
  if (limit < 0 || limit >= CU_LIMIT_COUNT) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  call.context->limits[limit] = value;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetCacheConfig(int* config) {
  Call call;
  if (call.error) return call.error;
  if (!config) return CUDA_ERROR_INVALID_VALUE;
  *config = call.context->cache_config;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetCacheConfig(int config) {
  Call call;
  if (call.error) return call.error;
  if (config < 0 || config > 3) return CUDA_ERROR_INVALID_VALUE;
  call.context->cache_config = config;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  Call call;
  if (call.error) return call.error;
  if (least) *least = LEAST_PRIORITY;
  if (greatest) *greatest = GREATEST_PRIORITY;
  return CUDA_SUCCESS;
}
