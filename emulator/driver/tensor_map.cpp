// Tensor maps. The runtime that reads them also encodes them and checks the format's rules; the
// checks here depend on the device and on the pointers.
#include "api.h"
#include "device.h"

using namespace driver;

DRIVER_API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int data_type, uint32_t rank,
                                           void* base, const uint64_t* dim,
                                           const uint64_t* stride_bytes, const uint32_t* box,
                                           const uint32_t* element_stride, int interleave,
                                           int swizzle, int l2_promotion, int oob_fill) {
  Call call(Call::ANY_CONTEXT);
  if (call.error) return call.error;
  if (!device_properties()->tma) return CUDA_ERROR_NOT_SUPPORTED;
  if (!map || reinterpret_cast<uintptr_t>(map) % alignof(CUtensorMap) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!base || !dim || !box || !element_stride || (rank > 1 && !stride_bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  int result =
      simt::tensor_map_encode_tiled(map, data_type, rank, base, dim, stride_bytes, box,
                                    element_stride, interleave, swizzle, l2_promotion, oob_fill);
  return result == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
