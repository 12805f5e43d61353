// The golden cases: operands for each primitive, drawn from a fixed seed, and what a plain loop
// over the documented semantics says must come out. `write_all` stores them as files, so that a
// program with a GPU can run the same entries on the same operands.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "types.h"

namespace golden {

// The tensor map of an entry that takes one: over the words of `in` behind its header, or over
// `out`.
struct Map {
  bool used = false, over_out = false;
  int data_type = 0, swizzle = 0;
  std::vector<uint64_t> dim, stride_bytes;
  std::vector<uint32_t> box;
};

struct Case {
  std::string symbol, name;
  unsigned threads = 32, cluster = 1;
  size_t shared_bytes = 0;
  std::vector<uint32_t> in, want;
  Map map;
};

std::vector<Case> portable_cases();  // golden_portable.cpp
std::vector<Case> tma_cases();       // golden_tma.cpp
std::vector<Case> wgmma_cases();     // golden_wgmma.cpp

constexpr size_t HEADER = 64;  // words in front of the data of `in`

// Random numbers that are the same everywhere, which <random>'s distributions are not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t word() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int between(int low, int high) {
    return low + static_cast<int>(word() % static_cast<uint32_t>(high - low + 1));
  }

 private:
  uint64_t state_;
};

// The 16 bits of a small integer.
uint16_t half_bits(int value, bool bf16);
inline uint32_t float_bits(float value) {
  return __float_as_uint(value);
}

// The operands of a case as files in `directory`, the emulator's outputs beside them, and
// cases.txt.
bool write_all(const char* directory);

}  // namespace golden
