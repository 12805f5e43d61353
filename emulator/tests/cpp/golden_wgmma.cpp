#include "golden.h"

namespace golden {

// The layout of an operand in shared memory: the tile as a TMA load with this swizzle writes it, or
// consecutive core matrices without a swizzle.
struct Layout {
  int swizzle;    // 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes
  bool mn_major;  // M or N innermost instead of K
};

// Bits 62 and 63 of a descriptor, by swizzle.
static constexpr uint64_t SWIZZLE_CODE[] = {0, 3, 2, 1};

// The byte offset of element (mn, k) in an operand of `rows` rows, and the operand's size. A tile
// is one swizzle atom wide: 64, 32 or 16 elements along its major dimension.
struct Placement {
  uint64_t descriptor;
  std::vector<uint32_t> byte;  // [rows][16]
  uint32_t bytes;
  uint32_t start;  // where the operand starts in its tile
};

static uint64_t descriptor_of(uint32_t leading, uint32_t stride, int swizzle) {
  return static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         SWIZZLE_CODE[swizzle] << 62;
}

static uint32_t swizzled_byte(uint32_t byte, int swizzle) {
  const uint32_t unit = byte / 16, group = (1u << swizzle) - 1;
  return (unit ^ (unit / 8 & group)) * 16 + byte % 16;
}

static Placement place(const Layout& layout, int rows, int slice) {
  Placement p{};
  const uint32_t width = 16u << layout.swizzle;  // bytes of a row of the tile
  uint32_t leading, stride;
  if (layout.swizzle == 0) {
    // Core matrices of 128 bytes: along mn first, then along k, or the reverse.
    leading = layout.mn_major ? 128 : rows / 8 * 128;
    stride = layout.mn_major ? 256 : 128;
    p.bytes = rows * 32;
  } else if (!layout.mn_major) {
    leading = 16;  // not used
    stride = 8 * width;
    p.bytes = rows * width;
    p.start = slice % (width / 32) * 32;  // one of the tile's slices of 16 in k
  } else {
    leading = 16 * width;  // from one tile of 16 rows of k to the next along mn
    stride = 8 * width;
    p.bytes = rows * 2 / width * leading;
  }
  p.descriptor = descriptor_of(leading, stride, layout.swizzle);
  for (int mn = 0; mn < rows; mn++) {
    for (int k = 0; k < 16; k++) {
      uint32_t byte;
      if (layout.swizzle == 0) {
        byte = layout.mn_major ? mn / 8 * stride + k / 8 * leading + k % 8 * 16 + mn % 8 * 2
                               : mn / 8 * stride + k / 8 * leading + mn % 8 * 16 + k % 8 * 2;
      } else if (!layout.mn_major) {
        byte = mn * width + p.start + k * 2;
      } else {
        byte = mn * 2 / width * leading + k * width + mn * 2 % width;
      }
      p.byte.push_back(swizzled_byte(byte, layout.swizzle));
    }
  }
  return p;
}

static std::vector<int> random_matrix(Random& random, int rows) {
  std::vector<int> matrix(rows * 16);
  for (int& value : matrix) value = random.between(-9, 9);
  return matrix;
}

static Case wgmma_case(int n, bool bf16, bool trans_a, bool trans_b, int swizzle, int number) {
  Random random(600 + number);
  const std::vector<int> a = random_matrix(random, 64), b = random_matrix(random, n);
  const Placement pa = place({swizzle, trans_a}, 64, number),
                  pb = place({swizzle, trans_b}, n, number + 1);
  const uint32_t b_at = (pa.bytes + 1023) / 1024 * 1024,
                 bytes = (b_at + pb.bytes + 1023) / 1024 * 1024;
  const uint32_t scale_d = number % 3 != 0;

  Case c;
  c.symbol = "emu_golden_wgmma_n" + std::to_string(n) + (bf16 ? "_bf16_" : "_f16_") +
             (trans_a ? "m" : "k") + (trans_b ? "n" : "k");
  c.name = "_swizzle" + std::to_string(swizzle == 0 ? 0 : 16 << swizzle);
  c.threads = 128;
  c.shared_bytes = bytes;
  c.in.assign(HEADER + bytes / 4, 0);
  c.in[0] = static_cast<uint32_t>(pa.descriptor);
  c.in[1] = static_cast<uint32_t>(pa.descriptor >> 32);
  c.in[2] = static_cast<uint32_t>(pb.descriptor);
  c.in[3] = static_cast<uint32_t>(pb.descriptor >> 32);
  c.in[4] = pa.start;
  c.in[5] = b_at + pb.start;
  c.in[6] = bytes;
  c.in[7] = scale_d;
  const auto put = [&](uint32_t byte, int value) {
    c.in[HEADER + byte / 4] |= static_cast<uint32_t>(half_bits(value, bf16)) << 8 * (byte % 4);
  };
  for (int i = 0; i < 64 * 16; i++) put(pa.byte[i], a[i]);
  for (int i = 0; i < n * 16; i++) put(b_at + pb.byte[i], b[i]);
  for (int thread = 0; thread < 128; thread++) {
    for (int i = 0; i < n / 2; i++) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      int sum = random.between(-1000, 1000);
      c.in.push_back(float_bits(static_cast<float>(sum)));
      if (scale_d == 0) sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row * 16 + k] * b[column * 16 + k];
      c.want.push_back(float_bits(static_cast<float>(sum)));
    }
  }
  return c;
}

std::vector<Case> wgmma_cases() {
  std::vector<Case> cases;
  const auto add = [&](int n, bool bf16, bool trans_a, bool trans_b) {
    for (int swizzle = 0; swizzle < 4; swizzle++) {
      const int number = static_cast<int>(cases.size());
      cases.push_back(wgmma_case(n, bf16, trans_a, trans_b, swizzle, number));
    }
  };
  for (int n : {64, 128, 256}) {
    for (bool trans_a : {false, true}) {
      for (bool trans_b : {false, true}) add(n, true, trans_a, trans_b);
    }
    add(n, false, false, false);
  }
  add(128, false, true, true);
  return cases;
}

}  // namespace golden
