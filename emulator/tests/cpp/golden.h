// The golden cases: operands for each primitive, drawn from a fixed seed, and the outputs that a
// plain loop over the documented semantics computes. `write_all` stores them as files, so that a
// program with a GPU can run the same entries on the same operands.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "types.h"

namespace golden {

// The tensor map of an entry that takes one: over the words of `in` after its header, or over
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

// Portable random numbers: the distributions of <random> differ between implementations.
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
inline uint32_t float_bits(float value) { return __float_as_uint(value); }

// Writes the operands of a case, the emulator's outputs and cases.txt to `directory`.
bool write_all(const char* directory);

}  // namespace golden
