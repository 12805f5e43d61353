// Copies and fills. Host memory follows the driver's rules: pageable memory has been read or
// written when the call returns; pinned memory is accessed only when the stream reaches the copy.
#include <cstring>

#include "api.h"

namespace driver {
namespace {

// The device memory of a copy must still exist when the copy runs.
bool is_live(CUdeviceptr address, size_t bytes) {
  Lock lock(state().mutex);
  return find_allocation(address, bytes, nullptr, true) != nullptr;
}

Outcome illegal(const char* what, CUdeviceptr address, size_t bytes) {
  char text[160];
  std::snprintf(text, sizeof text, "%s of %zu bytes at %#llx: the memory has been freed", what,
                bytes, address);
  return {CUDA_ERROR_ILLEGAL_ADDRESS, text};
}

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
  bool to_device, from_device;
};

Work copy_work(Copy copy, std::shared_ptr<const std::vector<unsigned char>> staged = nullptr) {
  return [copy, staged](const Operation&) -> Outcome {
    if (copy.to_device && !is_live(address_of(copy.to), copy.bytes)) {
      return illegal("a copy to device memory", address_of(copy.to), copy.bytes);
    }
    if (copy.from_device && !is_live(address_of(copy.from), copy.bytes)) {
      return illegal("a copy from device memory", address_of(copy.from), copy.bytes);
    }
    std::memmove(copy.to, staged ? staged->data() : copy.from, copy.bytes);
    return {};
  };
}

// With `blocking`, the copy is one of the functions without a stream, which use the legacy stream.
CUresult copy(Copy copy, CUstream handle, bool blocking) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (blocking) {
    if (CUresult error = capture_forbids(call)) return error;
  }
  if (copy.bytes == 0) return CUDA_SUCCESS;
  if (!copy.to || !copy.from) return CUDA_ERROR_INVALID_VALUE;
  if (copy.to_device && !find_allocation(address_of(copy.to), copy.bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (copy.from_device && !find_allocation(address_of(copy.from), copy.bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  call.driver.counters.copies++;
  std::shared_ptr<std::vector<unsigned char>> staged;
  if (!copy.from_device && !stream->capture && !is_pinned(copy.from, copy.bytes)) {
    staged = std::make_shared<std::vector<unsigned char>>(copy.from, copy.from + copy.bytes);
  }
  bool wait = !copy.to_device && !stream->capture && !is_pinned(copy.to, copy.bytes);
  wait |= blocking && !(copy.to_device && copy.from_device);
  Submission submission;
  submission.task = {CU_GRAPH_NODE_TYPE_MEMCPY, make_work(copy_work(copy, staged))};
  if (CUresult error = submit(call, stream, std::move(submission))) return error;
  return wait ? synchronize(call, stream) : CUDA_SUCCESS;
}

// For the functions that determine by the address whether memory is on the host or the device.
CUresult copy_any(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream, bool blocking) {
  bool to_device, from_device;
  {
    Lock lock(state().mutex);
    to_device = find_allocation(to, 1) != nullptr;
    from_device = find_allocation(from, 1) != nullptr;
  }
  return copy({bytes_at(to), bytes_at(from), bytes, to_device, from_device}, stream, blocking);
}

template <class Word>
CUresult fill(CUdeviceptr address, Word value, size_t count, CUstream handle, bool blocking) {
  Call call;
  if (call.error) return call.error;
  StreamPtr stream = find_stream(call, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (blocking) {
    if (CUresult error = capture_forbids(call)) return error;
  }
  if (count == 0) return CUDA_SUCCESS;
  size_t bytes = count * sizeof(Word);
  if (bytes / sizeof(Word) != count || address % sizeof(Word) != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!find_allocation(address, bytes)) return CUDA_ERROR_INVALID_VALUE;
  call.driver.counters.memsets++;
  Submission submission;
  submission.task = {CU_GRAPH_NODE_TYPE_MEMSET,
                     make_work([address, value, count, bytes](const Operation&) -> Outcome {
                       if (!is_live(address, bytes)) return illegal("a memset", address, bytes);
                       auto* words = reinterpret_cast<Word*>(bytes_at(address));
                       for (size_t i = 0; i < count; i++) words[i] = value;
                       return {};
                     })};
  return submit(call, stream, std::move(submission));
}

unsigned char* host(void* pointer) { return static_cast<unsigned char*>(pointer); }
const unsigned char* host(const void* pointer) {
  return static_cast<const unsigned char*>(pointer);
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return copy({bytes_at(to), host(from), bytes, true, false}, nullptr, true);
}

DRIVER_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes,
                                         CUstream stream) {
  return copy({bytes_at(to), host(from), bytes, true, false}, stream, false);
}

DRIVER_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return copy({host(to), bytes_at(from), bytes, false, true}, nullptr, true);
}

DRIVER_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes,
                                         CUstream stream) {
  return copy({host(to), bytes_at(from), bytes, false, true}, stream, false);
}

DRIVER_API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy({bytes_at(to), bytes_at(from), bytes, true, true}, nullptr, true);
}

DRIVER_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes,
                                         CUstream stream) {
  return copy({bytes_at(to), bytes_at(from), bytes, true, true}, stream, false);
}

DRIVER_API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy_any(to, from, bytes, nullptr, true);
}

DRIVER_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy_any(to, from, bytes, stream, false);
}

// There is one device, so peer copies are between its contexts.
DRIVER_API CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext,
                                      size_t bytes, CUstream stream) {
  return copy({bytes_at(to), bytes_at(from), bytes, true, true}, stream, false);
}

DRIVER_API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
  return fill(to, value, count, nullptr, true);
}

DRIVER_API CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t count) {
  return fill(to, value, count, nullptr, true);
}

DRIVER_API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
  return fill(to, value, count, nullptr, true);
}

DRIVER_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count,
                                    CUstream stream) {
  return fill(to, value, count, stream, false);
}

DRIVER_API CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count,
                                     CUstream stream) {
  return fill(to, value, count, stream, false);
}

DRIVER_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count,
                                     CUstream stream) {
  return fill(to, value, count, stream, false);
}
