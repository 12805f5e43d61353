// Allocations: device memory, which the SIMT runtime guards and poisons, and pinned host memory.
#include <cstdlib>
#include <cstring>

#include "api.h"
#include "device.h"

namespace driver {
namespace {

constexpr size_t HOST_ALIGNMENT = 4096;

CUresult allocate(Call& call, CUdeviceptr* out, size_t bytes) {
  if (!out || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (bytes > TOTAL_MEMORY) return CUDA_ERROR_OUT_OF_MEMORY;
  // Pending frees in streams release their memory before an allocation fails.
  if (call.driver.allocated_bytes + bytes > TOTAL_MEMORY) {
    complete_context(call.lock, *call.thread, *call.context);
  }
  if (call.driver.allocated_bytes + bytes > TOTAL_MEMORY) return CUDA_ERROR_OUT_OF_MEMORY;
  void* memory = simt::device_alloc(bytes);
  if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
  call.driver.allocations[reinterpret_cast<uintptr_t>(memory)] = {bytes, call.context,
                                                                  ++call.driver.next_id, false};
  call.driver.allocated_bytes += bytes;
  *out = address_of(memory);
  return CUDA_SUCCESS;
}

CUresult free_in_stream_order(Call& call, CUdeviceptr address, CUstream handle) {
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) {
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  auto it = call.driver.allocations.find(address);
  if (it == call.driver.allocations.end() || it->second.freed) return CUDA_ERROR_INVALID_VALUE;
  it->second.freed = true;
  Submission submission;
  submission.always = true;
  submission.task = {CU_GRAPH_NODE_TYPE_EMPTY, make_work([address](const Operation&) {
                       Outcome outcome;
                       Lock lock(state().mutex);
                       free_allocation(lock, address, &outcome.report);
                       if (!outcome.report.empty()) outcome.error = CUDA_ERROR_ILLEGAL_ADDRESS;
                       return outcome;
                     })};
  return submit(call, stream, std::move(submission));
}

CUresult allocate_host(void** out, size_t bytes, unsigned flags) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  if (!out || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  size_t rounded = (bytes + HOST_ALIGNMENT - 1) / HOST_ALIGNMENT * HOST_ALIGNMENT;
  void* memory = rounded < bytes ? nullptr : std::aligned_alloc(HOST_ALIGNMENT, rounded);
  if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
  call.driver.host_allocations[reinterpret_cast<uintptr_t>(memory)] = {bytes, flags, false};
  *out = memory;
  return CUDA_SUCCESS;
}

const std::pair<const uintptr_t, HostAllocation>* find_host(uintptr_t address, size_t bytes) {
  auto& table = state().host_allocations;
  auto it = table.upper_bound(address);
  if (it == table.begin()) return nullptr;
  --it;
  size_t offset = address - it->first;
  return offset < it->second.size && bytes <= it->second.size - offset ? &*it : nullptr;
}

// Writes one attribute of a pointer; returns false if the attribute is unknown.
CUresult pointer_attribute(void* data, int attribute, CUdeviceptr pointer) {
  if (!data) return CUDA_ERROR_INVALID_VALUE;
  uintptr_t start = 0;
  const Allocation* device = find_allocation(pointer, 1, &start);
  const auto* host = device ? nullptr : find_host(pointer, 1);
  if (!device && !host) return CUDA_ERROR_INVALID_VALUE;
  auto put = [data](auto value) { std::memcpy(data, &value, sizeof value); };
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      put(device ? device->context->handle : nullptr);
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      put(device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST);
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      put(pointer);
      break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (device) return CUDA_ERROR_INVALID_VALUE;
      put(pointer);
      break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      put(device ? device->id : uint64_t{host->first});
      break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      put(0);
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      put(0);
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      put(CUdeviceptr{device ? start : host->first});
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      put(device ? device->size : host->second.size);
      break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
      put(1);
      break;
    default:
      return not_supported("this attribute of cuPointerGetAttribute");
  }
  return CUDA_SUCCESS;
}

}  // namespace

const Allocation* find_allocation(CUdeviceptr address, size_t bytes, uintptr_t* start,
                                  bool freed_too) {
  auto& table = state().allocations;
  auto it = table.upper_bound(address);
  if (it == table.begin()) return nullptr;
  --it;
  size_t offset = address - it->first;
  if (offset > it->second.size || bytes > it->second.size - offset) return nullptr;
  if (it->second.freed && !freed_too) return nullptr;
  if (start) *start = it->first;
  return &it->second;
}

void free_allocation(Lock&, uintptr_t start, std::string* report) {
  auto it = state().allocations.find(start);
  if (it == state().allocations.end()) return;
  state().allocated_bytes -= it->second.size;
  state().allocations.erase(it);
  simt::device_free(reinterpret_cast<void*>(start));
  const char* found = simt::take_memory_error();
  if (found && report) *report = found;
}

bool is_pinned(const void* host, size_t bytes) {
  return find_host(reinterpret_cast<uintptr_t>(host), bytes) != nullptr;
}

}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  return allocate(call, out, bytes);
}

// Like cuMemAlloc, which does not wait either. During a capture the driver would create a node;
// here the call is refused, since graphs that allocate are not supported.
DRIVER_API CUresult cuMemAllocAsync(CUdeviceptr* out, size_t bytes, CUstream handle) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) {
    invalidate(*stream->capture);
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  if (CUresult error = domain_of(*call.thread, *stream)->error) return error;
  return allocate(call, out, bytes);
}

DRIVER_API CUresult cuMemFree_v2(CUdeviceptr address) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  if (address == 0) return CUDA_SUCCESS;
  auto it = call.driver.allocations.find(address);
  if (it == call.driver.allocations.end() || it->second.freed) return CUDA_ERROR_INVALID_VALUE;
  it->second.freed = true;
  complete_context(call.lock, *call.thread, *call.context);
  std::string report;
  free_allocation(call.lock, address, &report);
  if (report.empty()) return CUDA_SUCCESS;
  call.thread->report = report;
  call.thread->report_error = CUDA_ERROR_ILLEGAL_ADDRESS;
  return CUDA_ERROR_ILLEGAL_ADDRESS;
}

DRIVER_API CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
  Call call;
  if (call.error) return call.error;
  return free_in_stream_order(call, address, handle);
}

DRIVER_API CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  Call call;
  if (call.error) return call.error;
  if (!free || !total) return CUDA_ERROR_INVALID_VALUE;
  *free = TOTAL_MEMORY - call.driver.allocated_bytes;
  *total = TOTAL_MEMORY;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  Call call;
  if (call.error) return call.error;
  uintptr_t start = 0;
  const Allocation* allocation = find_allocation(address, 1, &start);
  if (!allocation) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = start;
  if (size) *size = allocation->size;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr pointer) {
  Call call;
  if (call.error) return call.error;
  return pointer_attribute(data, attribute, pointer);
}

DRIVER_API CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
  if (flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
  return allocate_host(out, bytes, flags);
}

DRIVER_API CUresult cuMemAllocHost_v2(void** out, size_t bytes) {
  return allocate_host(out, bytes, 0);
}

DRIVER_API CUresult cuMemFreeHost(void* host) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  if (!host) return CUDA_SUCCESS;
  auto it = call.driver.host_allocations.find(reinterpret_cast<uintptr_t>(host));
  if (it == call.driver.host_allocations.end() || it->second.registered) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  complete_context(call.lock, *call.thread, *call.context);
  call.driver.host_allocations.erase(reinterpret_cast<uintptr_t>(host));
  std::free(host);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostRegister_v2(void* host, size_t bytes, unsigned flags) {
  Call call;
  if (call.error) return call.error;
  if (!host || bytes == 0 || flags & ~15u) return CUDA_ERROR_INVALID_VALUE;
  auto start = reinterpret_cast<uintptr_t>(host);
  auto& table = call.driver.host_allocations;
  auto next = table.lower_bound(start);
  bool overlaps = next != table.end() && next->first - start < bytes;
  if (overlaps || find_host(start, 1)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  table[start] = {bytes, flags, true};
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostUnregister(void* host) {
  Call call;
  if (call.error) return call.error;
  auto it = call.driver.host_allocations.find(reinterpret_cast<uintptr_t>(host));
  if (it == call.driver.host_allocations.end() || !it->second.registered) {
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  }
  complete_context(call.lock, *call.thread, *call.context);
  call.driver.host_allocations.erase(reinterpret_cast<uintptr_t>(host));
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* host, unsigned flags) {
  Call call;
  if (call.error) return call.error;
  if (!out || flags != 0 || !is_pinned(host, 1)) return CUDA_ERROR_INVALID_VALUE;
  *out = address_of(host);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostGetFlags(unsigned* flags, void* host) {
  Call call;
  if (call.error) return call.error;
  const auto* found = find_host(reinterpret_cast<uintptr_t>(host), 1);
  if (!flags || !found) return CUDA_ERROR_INVALID_VALUE;
  *flags = found->second.flags;
  return CUDA_SUCCESS;
}
