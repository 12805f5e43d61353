// Functions that cudarc's safe interface can reach and this device does not support. Other
// functions are not exported at all; cudarc then names the missing symbol.
#include "api.h"

#define NOT_SUPPORTED(function) \
  DRIVER_API CUresult function() { return driver::not_supported(#function); }

NOT_SUPPORTED(cuCtxCreate_v3)
NOT_SUPPORTED(cuDestroyExternalMemory)
NOT_SUPPORTED(cuDeviceSetMemPool)
NOT_SUPPORTED(cuExternalMemoryGetMappedBuffer)
NOT_SUPPORTED(cuGraphInstantiateWithParams)
NOT_SUPPORTED(cuImportExternalMemory)
NOT_SUPPORTED(cuLaunchCooperativeKernel)
NOT_SUPPORTED(cuLibraryLoadData)
NOT_SUPPORTED(cuMemAdvise_v2)
NOT_SUPPORTED(cuMemAllocFromPoolAsync)
NOT_SUPPORTED(cuMemAllocManaged)
NOT_SUPPORTED(cuMemPoolCreate)
NOT_SUPPORTED(cuMemPoolDestroy)
NOT_SUPPORTED(cuMemPrefetchAsync_v2)
NOT_SUPPORTED(cuOccupancyMaxActiveClusters)
NOT_SUPPORTED(cuOccupancyMaxPotentialClusterSize)
NOT_SUPPORTED(cuProfilerStart)
NOT_SUPPORTED(cuProfilerStop)
NOT_SUPPORTED(cuStreamAddCallback)
NOT_SUPPORTED(cuStreamAttachMemAsync)
NOT_SUPPORTED(cuTensorMapReplaceAddress)
