// Modules and functions. Kernels are compiled into this library, so a module is only a name space:
// its image is validated and otherwise ignored, and functions are looked up among all kernels.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "api.h"
#include "device.h"

namespace driver {
namespace {

constexpr uint32_t FATBIN_MAGIC = 0xba55ed50, FATBIN_WRAPPER_MAGIC = 0x466243b1;

// A fat binary, a cubin (an ELF file) or PTX, which states its version and target before any code.
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

// The newest PTX version that a driver reads, as 10 * major + minor; from the table of releases in
// the PTX ISA.
unsigned newest_ptx(int driver) {
  const int major = driver / 1000, minor = driver % 1000 / 10;
  const int ptx_minor = major == 12 && minor > 5 ? minor - 1 : minor;
  return static_cast<unsigned>(10 * (major - 4) + ptx_minor);
}

// The version of a PTX text, in the same form; 0 for a text without one.
unsigned stated_ptx(const char* text) {
  unsigned major = 0, minor = 0;
  const char* version = std::strstr(text, ".version");
  return version && std::sscanf(version, ".version %u.%u", &major, &minor) == 2 ? 10 * major + minor
                                                                                : 0;
}

// The PTX version in the headers of a fat binary's parts; 0 for a fat binary without PTX.
unsigned fat_ptx(const unsigned char* image) {
  constexpr size_t HEADER = 16;
  constexpr uint16_t PTX = 1;
  uint64_t size;
  std::memcpy(&size, image + 8, sizeof size);
  unsigned newest = 0;
  for (uint64_t at = 0; at < size;) {
    const unsigned char* part = image + HEADER + at;
    uint16_t kind, minor, major;
    uint32_t header;
    uint64_t length;
    std::memcpy(&kind, part, sizeof kind);
    std::memcpy(&header, part + 4, sizeof header);
    std::memcpy(&length, part + 8, sizeof length);
    std::memcpy(&minor, part + 24, sizeof minor);
    std::memcpy(&major, part + 26, sizeof major);
    if (kind == PTX) newest = std::max(newest, 10u * major + minor);
    at += header + length;
  }
  return newest;
}

// The result for an image of a toolkit newer than the driver. The driver reads no newer PTX; it
// accepts the machine code of a fat binary from a toolkit of its own major version.
CUresult check_version(const void* image) {
  const int driver = driver_version();
  if (driver >= DRIVER_VERSION) return CUDA_SUCCESS;
  uint32_t magic;
  std::memcpy(&magic, image, sizeof magic);
  bool readable = true;
  if (magic == FATBIN_MAGIC) {
    readable = fat_ptx(static_cast<const unsigned char*>(image)) / 10 <= newest_ptx(driver) / 10;
  } else if (magic != FATBIN_WRAPPER_MAGIC && std::memcmp(image, "\177ELF", 4)) {
    readable = stated_ptx(static_cast<const char*>(image)) <= newest_ptx(driver);
  }
  return readable ? CUDA_SUCCESS : CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
}

CUresult load(CUmodule* out, const void* image) {
  Call call;
  if (call.error) return call.error;
  if (CUresult error = capture_forbids(call)) return error;
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult error = check_image(image)) return error;
  if (CUresult error = check_version(image)) return error;
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
  image.append(4, '\0');  // makes short files readable
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
  // With lazy loading, the first look-up loads the kernel.
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

// Kernels have no device globals, so no module has any.
DRIVER_API CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule handle, const char* name) {
  Call call;
  if (call.error) return call.error;
  if (!call.driver.modules.find(handle)) return CUDA_ERROR_INVALID_HANDLE;
  return name ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_INVALID_VALUE;
}
