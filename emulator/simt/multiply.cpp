#include "multiply.h"

namespace simt {

SIMT_CLONES static void widen_bf16(const uint16_t* from, float* to, int n) {
  uint32_t bits;
  for (int i = 0; i < n; i++) {
    bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// Like __half2float, without a branch.
SIMT_CLONES static void widen_f16(const uint16_t* from, float* to, int n) {
  for (int i = 0; i < n; i++) {
    const uint32_t magnitude = (from[i] & 0x7fffu) << 13, sign = (from[i] & 0x8000u) << 16;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= sign | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u);
    std::memcpy(to + i, &bits, 4);
  }
}

void widen(const uint16_t* from, float* to, int n, Half half) {
  if (half == Half::Bf16) {
    widen_bf16(from, to, n);
  } else {
    widen_f16(from, to, n);
  }
}

SIMT_CLONES void multiply_add(const float* a, const float* b, float* c, int rows, int columns) {
  for (int j = 0; j < columns; j += 8) {
    for (int i = 0; i < rows; i += 4) {
      Float8 sum[4];
      for (int r = 0; r < 4; r++) std::memcpy(&sum[r], c + (i + r) * columns + j, sizeof(Float8));
      for (int k = 0; k < 16; k++) {
        Float8 right;
        std::memcpy(&right, b + k * columns + j, sizeof right);
        for (int r = 0; r < 4; r++) sum[r] += a[(i + r) * 16 + k] * right;
      }
      for (int r = 0; r < 4; r++) std::memcpy(c + (i + r) * columns + j, &sum[r], sizeof(Float8));
    }
  }
}

}  // namespace simt
