// Names and descriptions of the API's error codes.
#include <cstdio>
#include <mutex>
#include <set>

#include "api.h"

namespace {

struct ErrorText {
  CUresult code;
  const char* name;
  const char* text;
};

#define ENTRY(code, text) {code, #code, text}
constexpr ErrorText ERRORS[] = {
    ENTRY(CUDA_SUCCESS, "no error"),
    ENTRY(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ENTRY(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ENTRY(CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called"),
    ENTRY(CUDA_ERROR_DEINITIALIZED, "the driver is shutting down"),
    ENTRY(CUDA_ERROR_NO_DEVICE,
          "no device (MOE_EMULATOR_CC must be 8.0, 9.0 or 12.0, and MOE_EMULATOR_DRIVER a version "
          "such as 12040)"),
    ENTRY(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ENTRY(CUDA_ERROR_INVALID_IMAGE, "the image is not a module"),
    ENTRY(CUDA_ERROR_INVALID_CONTEXT, "invalid context, or no current context"),
    ENTRY(CUDA_ERROR_NO_BINARY_FOR_GPU, "the image has no code for this device"),
    ENTRY(CUDA_ERROR_UNSUPPORTED_LIMIT, "unsupported limit"),
    ENTRY(CUDA_ERROR_INVALID_PTX, "the module's PTX is invalid"),
    ENTRY(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the PTX is newer than this driver supports"),
    ENTRY(CUDA_ERROR_FILE_NOT_FOUND, "file not found"),
    ENTRY(CUDA_ERROR_INVALID_HANDLE, "invalid handle"),
    ENTRY(CUDA_ERROR_ILLEGAL_STATE, "not possible in the current state"),
    ENTRY(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ENTRY(CUDA_ERROR_NOT_READY, "not finished yet"),
    ENTRY(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ENTRY(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "the launch requests too many resources"),
    ENTRY(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "the primary context is active"),
    ENTRY(CUDA_ERROR_CONTEXT_IS_DESTROYED, "the context is destroyed"),
    ENTRY(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "the host memory is registered already"),
    ENTRY(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "the host memory is not registered"),
    ENTRY(CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    ENTRY(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    ENTRY(CUDA_ERROR_LAUNCH_FAILED, "the kernel failed"),
    ENTRY(CUDA_ERROR_NOT_PERMITTED, "not permitted from a host function"),
    ENTRY(CUDA_ERROR_NOT_SUPPORTED, "not supported"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not permitted while a stream is capturing"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture failed because of an earlier error"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_MERGE, "two captures would be merged"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "the capture was not begun on this stream"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "a forked stream was not joined to the capture"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "a dependency would cross the capture's boundary"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
          "the legacy stream would depend on a stream that is capturing"),
    ENTRY(CUDA_ERROR_CAPTURED_EVENT, "the event was last recorded in a capturing stream"),
    ENTRY(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "the capture was begun by another thread"),
    ENTRY(CUDA_ERROR_INVALID_CLUSTER_SIZE, "the cluster does not fit the grid or the device"),
    ENTRY(CUDA_ERROR_UNKNOWN, "unknown error"),
};
#undef ENTRY

const ErrorText* find(CUresult code) {
  for (const ErrorText& error : ERRORS) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

// A failure of this thread's work is described with its report. Callers may keep a description
// forever, so these texts are never freed.
const char* description(const ErrorText& error) {
  driver::Lock lock(driver::state().mutex);
  const driver::HostThread& thread = *driver::this_thread();
  if (thread.report.empty() || thread.report_error != error.code) return error.text;
  static std::set<std::string>* texts = new std::set<std::string>;
  return texts->insert(std::string(error.text) + ": " + thread.report).first->c_str();
}

}  // namespace

const char* driver::error_name(CUresult code) {
  const ErrorText* error = find(code);
  return error ? error->name : "unknown error";
}

CUresult driver::not_supported(const char* what) {
  static std::mutex mutex;
  static std::set<std::string>* printed = new std::set<std::string>;
  std::lock_guard<std::mutex> lock(mutex);
  if (printed->insert(what).second) {
    std::fprintf(stderr, "software CUDA device: not supported: %s\n", what);
  }
  return CUDA_ERROR_NOT_SUPPORTED;
}

DRIVER_API CUresult cuGetErrorName(CUresult code, const char** name) {
  if (!name) return CUDA_ERROR_INVALID_VALUE;
  const ErrorText* error = find(code);
  *name = error ? error->name : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuGetErrorString(CUresult code, const char** text) {
  if (!text) return CUDA_ERROR_INVALID_VALUE;
  const ErrorText* error = find(code);
  *text = error ? description(*error) : nullptr;
  return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
