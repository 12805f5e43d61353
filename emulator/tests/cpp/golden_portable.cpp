#include "golden.h"

namespace golden {

uint16_t half_bits(int value, bool bf16) {
  return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)))
              : __half_as_ushort(__float2half_rn(static_cast<float>(value)));
}

static Case cp_async_case(uint32_t bytes) {
  Random random(bytes);
  const uint32_t words = bytes / 4;
  Case c;
  c.symbol = "emu_golden_cp_async" + std::to_string(bytes);
  for (uint32_t i = 0; i < 32 * words; i++) c.in.push_back(random.word());
  for (uint32_t lane = 0; lane < 32; lane++) c.in.push_back(lane % (bytes + 1));
  for (uint32_t i = 0; i < 32 * words; i++) {
    const uint32_t size = i / words % (bytes + 1);
    uint32_t want = 0;
    for (uint32_t byte = 0; byte < 4; byte++) {
      if (i % words * 4 + byte < size) want |= c.in[i] & 0xffu << 8 * byte;
    }
    c.want.push_back(want);
  }
  return c;
}

// 32 rows in a random order.
static std::vector<uint32_t> permutation(Random& random) {
  std::vector<uint32_t> rows(32);
  for (uint32_t i = 0; i < 32; i++) rows[i] = i;
  for (int i = 31; i > 0; i--) std::swap(rows[i], rows[random.between(0, i)]);
  return rows;
}

static uint32_t half_of_row(const std::vector<uint32_t>& rows, uint32_t row, int column) {
  return rows[row * 4 + column / 2] >> 16 * (column % 2) & 0xffff;
}

static Case ldmatrix_case(int matrices, bool trans) {
  Random random(100 + matrices * 2 + trans);
  Case c;
  c.symbol = "emu_golden_ldmatrix_x" + std::to_string(matrices) + (trans ? "_trans" : "");
  for (int i = 0; i < 128; i++) c.in.push_back(random.word());
  const std::vector<uint32_t> row = permutation(random);
  c.in.insert(c.in.end(), row.begin(), row.end());
  for (int lane = 0; lane < 32; lane++) {
    for (int m = 0; m < matrices; m++) {
      uint32_t word = 0;
      for (int half = 0; half < 2; half++) {
        const int r = lane / 4, column = lane % 4 * 2 + half;
        word |= (trans ? half_of_row(c.in, row[8 * m + column], r)
                       : half_of_row(c.in, row[8 * m + r], column))
                << 16 * half;
      }
      c.want.push_back(word);
    }
  }
  return c;
}

static Case stmatrix_case(bool trans) {
  Random random(200 + trans);
  Case c;
  c.symbol = std::string("emu_golden_stmatrix_x4") + (trans ? "_trans" : "");
  for (int i = 0; i < 128; i++) c.in.push_back(random.word());
  const std::vector<uint32_t> row = permutation(random);
  c.in.insert(c.in.end(), row.begin(), row.end());
  c.want.assign(128, 0);
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 8; i++) {
      const int m = i / 2, minor = lane % 4 * 2 + i % 2, major = lane / 4;
      const uint32_t value = c.in[4 * lane + m] >> 16 * (i % 2) & 0xffff;
      const int r = trans ? minor : major, column = trans ? major : minor;
      c.want[row[8 * m + r] * 4 + column / 2] |= value << 16 * (column % 2);
    }
  }
  return c;
}

static Case mma_case(bool bf16) {
  Random random(300 + bf16);
  int a[16][16], b[16][8], d[16][8];
  for (auto& row : a) {
    for (int& v : row) v = random.between(-9, 9);
  }
  for (auto& row : b) {
    for (int& v : row) v = random.between(-9, 9);
  }
  for (auto& row : d) {
    for (int& v : row) v = random.between(-1000, 1000);
  }
  Case c;
  c.symbol = bf16 ? "emu_golden_mma_bf16" : "emu_golden_mma_f16";
  const auto pair = [&](int low, int high) {
    return half_bits(low, bf16) | static_cast<uint32_t>(half_bits(high, bf16)) << 16;
  };
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      const int row = i % 2 == 0 ? g : g + 8, column = 2 * t + (i < 2 ? 0 : 8);
      c.in.push_back(pair(a[row][column], a[row][column + 1]));
    }
    for (int i = 0; i < 2; i++) c.in.push_back(pair(b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]));
    for (int i = 0; i < 4; i++) {
      const int row = i < 2 ? g : g + 8, column = 2 * t + i % 2;
      int sum = d[row][column];
      c.in.push_back(float_bits(static_cast<float>(sum)));
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      c.want.push_back(float_bits(static_cast<float>(sum)));
    }
  }
  return c;
}

static Case reversed_case(const char* symbol, unsigned threads, int rows, int words) {
  Random random(rows + words);
  Case c;
  c.symbol = symbol;
  c.threads = threads;
  for (int i = 0; i < rows * words; i++) c.in.push_back(random.word());
  for (int i = 0; i < rows * words; i++) {
    c.want.push_back(c.in[(rows - 1 - i / words) * words + i % words]);
  }
  return c;
}

static Case fixed_case(const char* symbol, unsigned cluster, const std::vector<uint32_t>& want) {
  Case c;
  c.symbol = symbol;
  c.cluster = cluster;
  c.in = {0};
  c.want = want;
  return c;
}

std::vector<Case> portable_cases() {
  std::vector<Case> cases;
  for (uint32_t bytes : {4, 8, 16}) cases.push_back(cp_async_case(bytes));
  for (int matrices : {1, 2, 4}) {
    for (bool trans : {false, true}) cases.push_back(ldmatrix_case(matrices, trans));
  }
  for (bool trans : {false, true}) cases.push_back(stmatrix_case(trans));
  for (bool bf16 : {false, true}) cases.push_back(mma_case(bf16));
  cases.push_back(reversed_case("emu_golden_named_bar", 64, 32, 1));
  cases.push_back(reversed_case("emu_golden_cp_async_mbar_arrive", 32, 32, 4));
  cases.push_back(fixed_case("emu_golden_elect_one", 1, {1, 1}));
  cases.push_back(fixed_case("emu_golden_mbarrier", 1, {0, 1, 0, 1, 0, 0}));
  cases.push_back(fixed_case("emu_golden_cluster", 2, {0, 2, 1, 1, 2, 1}));
  return cases;
}

}  // namespace golden
