// cuTensorMapEncodeTiled: the checks that the driver documents, then the encoding of tensor_map.h.
#include "tensor_map.h"

#include <cstring>

#include "runtime.h"

namespace simt {

// Element sizes by CUtensorMapDataType, from UINT8 to TFLOAT32_FTZ.
static constexpr uint8_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
static constexpr int FIRST_FLOAT = 6;  // FLOAT16; all later ones are floating-point too

int tensor_map_encode_tiled(void* map128, int data_type, unsigned rank, void* base,
                            const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                            const uint32_t* element_stride, int interleave, int swizzle, int l2,
                            int oob_fill) {
  const auto misaligned = [](const void* p, uintptr_t to) {
    return reinterpret_cast<uintptr_t>(p) % to != 0;
  };
  if (map128 == nullptr || misaligned(map128, 64)) return -1;
  if (base == nullptr || misaligned(base, 16)) return -1;
  if (data_type < 0 || data_type >= static_cast<int>(sizeof ELEMENT_BYTES)) return -1;
  if (rank < 1 || rank > 5) return -1;
  // Interleaved layouts are for images and are not emulated.
  if (interleave != 0 || swizzle < 0 || swizzle > 3 || l2 < 0 || l2 > 3) return -1;
  if (oob_fill < 0 || oob_fill > 1 || (oob_fill == 1 && data_type < FIRST_FLOAT)) return -1;

  TensorMap map{};
  map.magic = TENSOR_MAP_MAGIC;
  map.base = static_cast<unsigned char*>(base);
  map.rank = static_cast<uint8_t>(rank);
  map.data_type = static_cast<uint8_t>(data_type);
  map.element_bytes = ELEMENT_BYTES[data_type];
  map.swizzle = static_cast<Swizzle>(swizzle);
  map.fill_nan = oob_fill == 1;
  for (unsigned i = 0; i < rank; i++) {
    if (dim[i] == 0 || dim[i] > uint64_t{1} << 32) return -1;
    if (box[i] == 0 || box[i] > 256) return -1;
    // The driver allows strided traversal; it is not emulated.
    if (element_stride[i] != 1) return -1;
    map.dim[i] = dim[i];
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (stride_bytes[i] % 16 != 0 || stride_bytes[i] >= uint64_t{1} << 40) return -1;
    map.stride[i] = stride_bytes[i];
  }
  const uint32_t inner = map.inner_bytes();
  if (inner % 16 != 0) return -1;
  if (map.swizzle != Swizzle::None && inner > 16u << swizzle) return -1;
  std::memcpy(map128, &map, sizeof map);
  return 0;
}

}  // namespace simt
