// The default memory pool. Freed memory returns to the system at once, so the pool's settings are
// stored and have no effect.
#include <cstring>

#include "api.h"

using namespace driver;

namespace {

const CUmemoryPool DEFAULT_POOL = reinterpret_cast<CUmemoryPool>(uintptr_t{9} << 40);

CUresult default_pool(CUmemoryPool* pool, CUdevice device) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!pool) return CUDA_ERROR_INVALID_VALUE;
  if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
  *pool = DEFAULT_POOL;
  return CUDA_SUCCESS;
}

}  // namespace

DRIVER_API CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  return default_pool(pool, device);
}

DRIVER_API CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) {
  return default_pool(pool, device);
}

DRIVER_API CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  return pool == DEFAULT_POOL ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute,
                                          void* value) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (pool != DEFAULT_POOL || !value) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
      std::memcpy(&call.driver.release_threshold, value, sizeof(uint64_t));
      return CUDA_SUCCESS;
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

DRIVER_API CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute,
                                          void* value) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (pool != DEFAULT_POOL || !value) return CUDA_ERROR_INVALID_VALUE;
  uint64_t result;
  switch (attribute) {
    case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
      result = call.driver.release_threshold;
      break;
    case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
    case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
      result = call.driver.allocated_bytes;
      break;
    default:
      return not_supported("this attribute of cuMemPoolGetAttribute");
  }
  std::memcpy(value, &result, sizeof result);
  return CUDA_SUCCESS;
}
