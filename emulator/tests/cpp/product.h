// Shared by the tests of the shipped kernels: random operands in any element type, and routings.
// Each operation has a file product_<stem>.cpp, whose reference is a plain loop.
#pragma once
#include <algorithm>
#include <type_traits>

#include "abi.h"
#include "testing.h"

namespace product {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline float to_f32(float v) { return v; }
inline float to_f32(bf16 v) { return __bfloat162float(v); }
inline float to_f32(f16 v) { return __half2float(v); }

template <class Elem>
Elem from_f32(float v) {
  if constexpr (std::is_same_v<Elem, bf16>) return __float2bfloat16_rn(v);
  if constexpr (std::is_same_v<Elem, f16>) return __float2half_rn(v);
  if constexpr (std::is_same_v<Elem, float>) return v;
}

// The suffix of a symbol.
template <class Elem>
const char* suffix() {
  if constexpr (std::is_same_v<Elem, bf16>) return "_bf16";
  if constexpr (std::is_same_v<Elem, f16>) return "_f16";
  if constexpr (std::is_same_v<Elem, float>) return "_f32";
}

// The unit roundoff of the type.
template <class Elem>
constexpr double roundoff() {
  return std::is_same_v<Elem, bf16> ? 0x1p-8 : std::is_same_v<Elem, f16> ? 0x1p-11 : 0x1p-24;
}

// Random numbers of a case.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(static_cast<unsigned>(seed) * 2654435761u + 1) {}
  int between(int low, int high) {
    return low + static_cast<int>(engine_() % static_cast<unsigned>(high - low + 1));
  }
  float real() { return static_cast<float>(between(-1000, 1000)) / 500.0f; }
  template <class Elem>
  std::vector<Elem> vector(size_t n) {
    std::vector<Elem> values(n);
    for (Elem& v : values) v = from_f32<Elem>(real());
    return values;
  }

 private:
  std::mt19937 engine_;
};

// A buffer's address, as the parameter structs of abi.h have it.
template <class T>
unsigned long long address(const testing::Buffer<T>& buffer) {
  return reinterpret_cast<uintptr_t>(buffer.get());
}

inline bool same_bits(const void* a, const void* b, size_t bytes) {
  return std::memcmp(a, b, bytes) == 0;
}

// The rows of a routing, as the plan defines them: stable, by expert, then by slot.
struct Routing {
  int num_tokens, top_k, num_experts;
  std::vector<uint32_t> expert_ids;                            // [T * K]; from E on: inactive
  std::vector<int> expert_offsets, row_of_slot, token_of_row;  // [E + 1], [T * K], [T * K]
  std::vector<GemmTile> tiles;
  int slots() const { return num_tokens * top_k; }
};

inline Routing make_routing(Random& random, int num_tokens, int top_k, int num_experts,
                            int percent_inactive) {
  Routing r{num_tokens, top_k, num_experts, {}, {}, {}, {}, {}};
  for (int slot = 0; slot < r.slots(); slot++) {
    const bool inactive = random.between(0, 99) < percent_inactive;
    r.expert_ids.push_back(inactive ? num_experts + random.between(0, 1) * 1000000
                                    : random.between(0, num_experts - 1));
  }
  r.expert_offsets.assign(num_experts + 1, 0);
  r.row_of_slot.assign(r.slots(), -1);
  r.token_of_row.assign(r.slots(), -1);
  int row = 0;
  for (int expert = 0; expert < num_experts; expert++) {
    r.expert_offsets[expert] = row;
    for (int slot = 0; slot < r.slots(); slot++) {
      if (r.expert_ids[slot] != static_cast<uint32_t>(expert)) continue;
      r.row_of_slot[slot] = row;
      r.token_of_row[row++] = slot / top_k;
    }
    for (int first = r.expert_offsets[expert]; first < row; first += GEMM_BLOCK_M) {
      r.tiles.push_back({expert, first, std::min(GEMM_BLOCK_M, row - first), 0});
    }
  }
  r.expert_offsets[num_experts] = row;
  return r;
}

}  // namespace product
