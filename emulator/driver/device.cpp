// The one device and its attributes.
#include "device.h"

#include <cstdlib>
#include <cstring>

#include "api.h"

namespace driver {

const DeviceProperties* device_properties() {
  constexpr size_t K = 1024;
  static const DeviceProperties DEVICES[] = {
      {8, 0, "Software CUDA device 8.0", 108, 163 * K, 164 * K, 40 * K * K, 2048, 32, false, false,
       false},
      {9, 0, "Software CUDA device 9.0", 132, 227 * K, 228 * K, 50 * K * K, 2048, 32, true, true,
       true},
      {12, 0, "Software CUDA device 12.0", 170, 99 * K, 100 * K, 96 * K * K, 1536, 24, true, true,
       false},
  };
  static const DeviceProperties* chosen = [] {
    const char* capability = std::getenv("MOE_EMULATOR_CC");
    if (!capability || !*capability) capability = "9.0";
    for (const DeviceProperties& device : DEVICES) {
      if (!std::strcmp(std::strrchr(device.name, ' ') + 1, capability)) return &device;
    }
    return static_cast<const DeviceProperties*>(nullptr);
  }();
  return chosen;
}

int driver_version() {
  constexpr int OLDEST = 11000;
  static const int version = [] {
    const char* text = std::getenv("MOE_EMULATOR_DRIVER");
    if (!text || !*text) return DRIVER_VERSION;
    char* end;
    const long number = std::strtol(text, &end, 10);
    return *end || number < OLDEST || number > DRIVER_VERSION ? 0 : static_cast<int>(number);
  }();
  return version;
}

namespace {

// An attribute of the API by its number. Attributes that do not apply to this device are 0.
int attribute_value(const DeviceProperties& device, int attribute) {
  switch (attribute) {
    case 1:
      return MAX_THREADS_PER_BLOCK;
    case 2:
      return MAX_THREADS_PER_BLOCK;  // block x
    case 3:
      return MAX_THREADS_PER_BLOCK;  // block y
    case 4:
      return MAX_BLOCK_Z;
    case 5:
      return MAX_GRID_X;
    case 6:
      return MAX_GRID_YZ;
    case 7:
      return MAX_GRID_YZ;
    case 8:
      return DEFAULT_SHARED_BYTES;
    case 9:
      return 64 * 1024;  // constant memory
    case 10:
      return 32;  // warp size
    case 11:
      return 0x7fffffff;  // pitch
    case 12:
      return 65536;  // registers per block
    case 13:
      return 1000000;  // clock in kHz: no speed is emulated
    case 14:
      return 512;  // texture alignment
    case 16:
      return device.multiprocessors;
    case 19:
      return 1;  // maps host memory
    case 30:
      return 512;
    case 31:
      return 1;  // concurrent kernels
    case 36:
      return 1000000;  // memory clock in kHz
    case 37:
      return 1024;  // bus width
    case 38:
      return static_cast<int>(device.l2_bytes);
    case 39:
      return device.threads_per_multiprocessor;
    case 40:
      return 2;  // copy engines
    case 41:
      return 1;  // unified addressing
    case 51:
      return 32;  // texture pitch alignment
    case 75:
      return device.major;
    case 76:
      return device.minor;
    case 78:
      return 1;  // stream priorities
    case 79:
      return 1;  // L1 for globals
    case 80:
      return 1;  // L1 for locals
    case 81:
      return static_cast<int>(device.shared_per_multiprocessor);
    case 82:
      return 65536;  // registers per multiprocessor
    case 91:
      return 1;  // registered host memory keeps its address
    case 97:
      return static_cast<int>(device.shared_per_block_optin);
    case 99:
      return 1;  // registers host memory
    case 106:
      return device.blocks_per_multiprocessor;
    case 111:
      return 1024;  // shared bytes that each block costs
    case 115:
      return 1;  // memory pools
    case 120:
      return device.clusters;
    case 127:
      return device.tma;
    default:
      return 0;
  }
}

CUresult check_device(CUdevice device) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuDeviceGetCount(int* count) {
  if (CUresult error = check_device(0)) return error;
  if (!count) return CUDA_ERROR_INVALID_VALUE;
  *count = 1;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (CUresult error = check_device(ordinal)) return error;
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = 0;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  if (CUresult error = check_device(device)) return error;
  if (!name || length <= 0) return CUDA_ERROR_INVALID_VALUE;
  std::strncpy(name, device_properties()->name, static_cast<size_t>(length));
  name[length - 1] = 0;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  if (CUresult error = check_device(device)) return error;
  if (!uuid) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(uuid->bytes, "software-device", sizeof uuid->bytes);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  return cuDeviceGetUuid_v2(uuid, device);
}

DRIVER_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  if (CUresult error = check_device(device)) return error;
  if (!bytes) return CUDA_ERROR_INVALID_VALUE;
  *bytes = TOTAL_MEMORY;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  if (CUresult error = check_device(device)) return error;
  if (!value || attribute < 1 || attribute > 161) return CUDA_ERROR_INVALID_VALUE;
  *value = attribute_value(*device_properties(), attribute);
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  if (CUresult error = check_device(device)) return error;
  if (!major || !minor) return CUDA_ERROR_INVALID_VALUE;
  *major = device_properties()->major;
  *minor = device_properties()->minor;
  return CUDA_SUCCESS;
}
