// The software device's encoding of the 128 bytes of a CUtensorMap.
#pragma once
#include <cstdint>

namespace simt {

enum class Swizzle : uint8_t { None, Bytes32, Bytes64, Bytes128 };

struct TensorMap {
  uint64_t magic;
  unsigned char* base;
  uint64_t dim[5];
  uint64_t stride[4];  // in bytes, of dimensions 1 to 4
  uint16_t box[5];
  uint8_t rank, element_bytes, data_type;
  Swizzle swizzle;
  bool fill_nan;
  uint8_t reserved[25];

  uint32_t inner_bytes() const { return static_cast<uint32_t>(box[0]) * element_bytes; }
  uint32_t rows() const {
    uint32_t n = 1;
    for (int i = 1; i < rank; i++) n *= box[i];
    return n;
  }
  uint32_t box_bytes() const { return inner_bytes() * rows(); }
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

constexpr uint64_t TENSOR_MAP_MAGIC = 0x70616d20726f736eull;

// The location under a swizzle of the byte at a shared address: address bits above the 16-byte
// chunks permute the chunks, in patterns of 256, 512 and 1024 bytes.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::Bytes128:
      return address ^ (address >> 7 & 7) << 4;
    case Swizzle::Bytes64:
      return address ^ (address >> 7 & 3) << 4;
    case Swizzle::Bytes32:
      return address ^ (address >> 7 & 1) << 4;
    case Swizzle::None:
      break;
  }
  return address;
}

// The size of a swizzle's pattern, which is the required alignment of a tile.
inline uint32_t swizzle_align(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::Bytes128:
      return 1024;
    case Swizzle::Bytes64:
      return 512;
    case Swizzle::Bytes32:
      return 256;
    case Swizzle::None:
      break;
  }
  return 128;
}

}  // namespace simt
