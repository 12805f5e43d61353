// Modules and functions. The code of a kernel is compiled into this library, so a module is a name
// space: its image is only checked for being one, and a function is found among all kernels.
#include <cstdio>
#include <cstring>

#include "api.h"
#include "device.h"

namespace driver {
namespace {

constexpr uint32_t FATBIN_MAGIC = 0xba55ed50, FATBIN_WRAPPER_MAGIC = 0x466243b1;

// A fat binary, a cubin (an ELF file) or PTX, which names its version and target before any code.
CUresult check_image(const void* image) {
  if (!image) return CUDA_ERROR_INVALID_VALUE;
  uint32_t magic;
  std::memcpy(&magic, image, sizeof magic);
  if (magic == FATBIN_MAGIC || magic == FATBIN_WRAPPER_MAGIC) return CUDA_SUCCESS;
  const char* text = static_cast<const char*>(image);
  if (!std::memcmp(text, "\177ELF", 4)) return CUDA_SUCCESS;
  const char* version = std::strstr(text, ".version");
  if (!version) return CUDA_ERROR_INVALID_IMAGE;
  return std::strstr(version, ".target") ? CUDA_SUCCESS : CUDA_ERROR_INVALID_PTX;
}

CUresult load(CUmodule* out, const void* image) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult error = check_image(image)) return error;
  auto module = std::make_shared<Module>();
  module->context = call.context;
  *out = call.driver.modules.add(module);
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuModuleLoadData(CUmodule* out, const void* image) { return load(out, image); }

DRIVER_API CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, int*, void**) {
  return load(out, image);
}

DRIVER_API CUresult cuModuleLoadFatBinary(CUmodule* out, const void* image) {
  return load(out, image);
}

DRIVER_API CUresult cuModuleLoad(CUmodule* out, const char* path) {
  if (!path) return CUDA_ERROR_INVALID_VALUE;
  std::FILE* file = std::fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::string image;
  char part[4096];
  while (size_t read = std::fread(part, 1, sizeof part, file)) image.append(part, read);
  std::fclose(file);
  image.append(4, '\0');  // so that a short file can be looked at
  return load(out, image.data());
}

DRIVER_API CUresult cuModuleUnload(CUmodule handle) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  if (!call.driver.modules.remove(handle)) return CUDA_ERROR_INVALID_HANDLE;
  call.driver.functions.remove_if([&](const Function& f) { return f.module == handle; });
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuModuleGetFunction(CUfunction* out, CUmodule handle, const char* name) {
  Call call;
  if (call.error) return call.error;
  auto module = call.driver.modules.find(handle);
  if (!module) return CUDA_ERROR_INVALID_HANDLE;
  if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
  auto known = module->functions.find(name);
  if (known != module->functions.end()) {
    *out = known->second;
    return CUDA_SUCCESS;
  }
  // Where modules load lazily, the first look-up is what loads the kernel.
  if (CUresult error = capture_forbids(call)) return error;
  const simt::Kernel* kernel = simt::find_kernel(name);
  if (!kernel) return CUDA_ERROR_NOT_FOUND;
  auto function = std::make_shared<Function>();
  function->context = call.context;
  function->module = handle;
  function->kernel = kernel;
  function->max_dynamic_shared = DEFAULT_SHARED_BYTES;
  function->carveout = -1;
  function->cluster_policy = 0;
  *out = module->functions[name] = call.driver.functions.add(function);
  return CUDA_SUCCESS;
}

// Device globals are no part of the boundary to the kernels, so no module has any.
DRIVER_API CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule handle, const char* name) {
  Call call;
  if (call.error) return call.error;
  if (!call.driver.modules.find(handle)) return CUDA_ERROR_INVALID_HANDLE;
  return name ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_INVALID_VALUE;
}
