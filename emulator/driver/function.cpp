// Function attributes, and the number of a function's blocks that fit on a multiprocessor.
#include <algorithm>

#include "api.h"
#include "device.h"

namespace driver {
namespace {

constexpr int WARP = 32, REGISTERS_PER_MULTIPROCESSOR = 65536;
constexpr size_t RESERVED_SHARED_BYTES = 1024;  // that each block costs on the device

unsigned max_threads(const Function& function) {
  return std::min(function.kernel->max_threads, MAX_THREADS_PER_BLOCK);
}

int active_blocks(int block_size, size_t dynamic_shared) {
  const DeviceProperties& device = *device_properties();
  int threads = (block_size + WARP - 1) / WARP * WARP;
  size_t by_shared = device.shared_per_multiprocessor / (dynamic_shared + RESERVED_SHARED_BYTES);
  return std::min({device.blocks_per_multiprocessor, device.threads_per_multiprocessor / threads,
                   REGISTERS_PER_MULTIPROCESSOR / (threads * REPORTED_REGISTERS),
                   static_cast<int>(std::min<size_t>(by_shared, 1024))});
}

bool fits(const Function& function, int block_size, size_t dynamic_shared) {
  return block_size > 0 && static_cast<unsigned>(block_size) <= max_threads(function) &&
         dynamic_shared <= function.max_dynamic_shared;
}

struct FunctionCall : Call {
  explicit FunctionCall(CUfunction handle) {
    if (error) return;
    function = driver.functions.find(handle);
    if (!function) error = CUDA_ERROR_INVALID_HANDLE;
  }
  std::shared_ptr<Function> function;
};

}  // namespace
}  // namespace driver

using namespace driver;

DRIVER_API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute,
                                       CUfunction handle) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  const Function& function = *call.function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = static_cast<int>(max_threads(function));
      break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = REPORTED_REGISTERS;
      break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *value = device_properties()->major * 10 + device_properties()->minor;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = static_cast<int>(function.max_dynamic_shared);
      break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      *value = function.carveout;
      break;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
      *value = function.cluster_policy;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
    case CU_FUNC_ATTRIBUTE_CLUSTER_SIZE_MUST_BE_SET:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH:
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      *value = 0;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute,
                                       int value) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  Function& function = *call.function;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      if (value < 0 || static_cast<size_t>(value) > device_properties()->shared_per_block_optin) {
        return CUDA_ERROR_INVALID_VALUE;
      }
      function.max_dynamic_shared = static_cast<size_t>(value);
      break;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      if (value < -1 || value > 100) return CUDA_ERROR_INVALID_VALUE;
      function.carveout = value;
      call.driver.carveouts[function.kernel] = value;
      break;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      if (value != 0) return not_supported("clusters of more than 8 blocks");
      break;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
      if (value < 0 || value > 2) return CUDA_ERROR_INVALID_VALUE;
      function.cluster_policy = value;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset,
                                       size_t* size) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  const simt::Kernel& kernel = *call.function->kernel;
  if (!offset || index >= kernel.num_parameters) return CUDA_ERROR_INVALID_VALUE;
  *offset = kernel.parameters[index].offset;
  if (size) *size = kernel.parameters[index].size;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncGetName(const char** name, CUfunction handle) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  if (!name) return CUDA_ERROR_INVALID_VALUE;
  *name = call.function->kernel->symbol;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncGetModule(CUmodule* module, CUfunction handle) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  if (!module) return CUDA_ERROR_INVALID_VALUE;
  *module = call.function->module;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncSetCacheConfig(CUfunction handle, int config) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  return config < 0 || config > 3 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

DRIVER_API CUresult cuFuncLoad(CUfunction handle) { return FunctionCall(handle).error; }

DRIVER_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, CUfunction handle, int block_size, size_t dynamic_shared, unsigned flags) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  if (!blocks || block_size <= 0 || flags > 1) return CUDA_ERROR_INVALID_VALUE;
  *blocks = fits(*call.function, block_size, dynamic_shared)
                ? active_blocks(block_size, dynamic_shared)
                : 0;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle,
                                                                int block_size,
                                                                size_t dynamic_shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, block_size,
                                                              dynamic_shared, 0);
}

DRIVER_API CUresult cuOccupancyMaxPotentialBlockSizeWithFlags(int* min_grid, int* block_size,
                                                              CUfunction handle,
                                                              CUoccupancyB2DSize shared_of_block,
                                                              size_t dynamic_shared, int limit,
                                                              unsigned flags) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  if (!min_grid || !block_size || limit < 0 || flags > 1) return CUDA_ERROR_INVALID_VALUE;
  int largest = static_cast<int>(max_threads(*call.function));
  if (limit > 0) largest = std::min(largest, limit);
  int best = 0, best_blocks = 0;
  for (int size = largest; size > 0; size = (size - 1) / WARP * WARP) {
    size_t shared = shared_of_block ? shared_of_block(size) : dynamic_shared;
    if (!fits(*call.function, size, shared)) continue;
    int blocks = active_blocks(size, shared);
    if (blocks * size > best_blocks * best) best = size, best_blocks = blocks;
  }
  *block_size = best;
  *min_grid = best_blocks * device_properties()->multiprocessors;
  return CUDA_SUCCESS;
}

DRIVER_API CUresult cuOccupancyMaxPotentialBlockSize(int* min_grid, int* block_size,
                                                     CUfunction handle,
                                                     CUoccupancyB2DSize shared_of_block,
                                                     size_t dynamic_shared, int limit) {
  return cuOccupancyMaxPotentialBlockSizeWithFlags(min_grid, block_size, handle, shared_of_block,
                                                   dynamic_shared, limit, 0);
}

DRIVER_API CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction handle,
                                                            int blocks, int block_size) {
  FunctionCall call(handle);
  if (call.error) return call.error;
  if (!bytes || blocks <= 0 || !fits(*call.function, block_size, 0)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (blocks > active_blocks(block_size, 0)) return CUDA_ERROR_INVALID_VALUE;
  const DeviceProperties& device = *device_properties();
  size_t share = device.shared_per_multiprocessor / static_cast<size_t>(blocks);
  size_t usable = share > RESERVED_SHARED_BYTES ? share - RESERVED_SHARED_BYTES : 0;
  *bytes = std::min(usable, device.shared_per_block_optin);
  return CUDA_SUCCESS;
}
