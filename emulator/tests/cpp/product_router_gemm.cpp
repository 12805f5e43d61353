#include <cmath>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// Small integers: their sums are exact in f32 and double, in every order.
template <class T>
std::vector<T> integers(Random& random, size_t n) {
  std::vector<T> values(n);
  for (T& v : values) v = from_f32<T>(static_cast<float>(random.between(-8, 8)));
  return values;
}

template <class Elem, class Gate>
void check(uint64_t seed) {
  Random random(seed);
  const int tokens = random.between(1, 70), experts = random.between(1, 40);
  const int hidden = random.between(1, 1200);
  const std::vector<Elem> x = integers<Elem>(random, static_cast<size_t>(tokens) * hidden);
  const std::vector<Gate> gate = integers<Gate>(random, static_cast<size_t>(experts) * hidden);
  const std::vector<Gate> bias = integers<Gate>(random, experts);
  const Buffer<Elem> x_device(x);
  const Buffer<Gate> gate_device(gate), bias_device(bias);
  const bool vector = hidden * sizeof(Elem) % 16 == 0 && hidden * sizeof(Gate) % 16 == 0;
  int segments = ROUTER_GEMM_MIN_SEGMENTS;
  while (segments * ROUTER_GEMM_SEGMENT < hidden) segments *= 2;
  auto blocks = [&](int block_tokens, int block_experts) {
    return (tokens + block_tokens - 1) / block_tokens *
           ((experts + block_experts - 1) / block_experts);
  };
  struct Body {
    const char* name;
    int blocks, threads;
    unsigned shared_bytes;
  };
  const unsigned stage = ROUTER_GEMM_STEP * (ROUTER_GEMM_TILE_TOKENS * sizeof(Elem) +
                                             ROUTER_GEMM_TILE_EXPERTS * sizeof(Gate));
  const Body bodies[] = {
      {"one", blocks(1, 1), segments * ROUTER_GEMM_LANES, 0},
      {"few", blocks(ROUTER_GEMM_FEW_TOKENS, ROUTER_GEMM_FEW_EXPERTS), segments * ROUTER_GEMM_LANES,
       0},
      {"tile", blocks(ROUTER_GEMM_TILE_TOKENS, ROUTER_GEMM_TILE_EXPERTS), ROUTER_GEMM_TILE_THREADS,
       ROUTER_GEMM_STAGES * stage},
  };
  const char* wide = std::is_same_v<Elem, Gate> ? "" : "_gate32";
  for (const Body& body : bodies) {
    const Buffer<float> logits(static_cast<size_t>(tokens) * experts);
    const RouterGemmParams params = {address(logits),
                                     address(x_device),
                                     address(gate_device),
                                     address(bias_device),
                                     {tokens, experts, hidden, 1, vector},
                                     0};
    testing::run_ok(std::string("moe_router_gemm_fwd_") + body.name + wide + suffix<Elem>(),
                    {dim3(body.blocks), dim3(body.threads), body.shared_bytes, seed}, params);
    for (int i = 0; i < tokens * experts; i++) {
      const int token = i / experts, expert = i % experts;
      double want = to_f32(bias[expert]);
      for (int h = 0; h < hidden; h++) {
        want += static_cast<double>(to_f32(x[static_cast<size_t>(token) * hidden + h])) *
                to_f32(gate[static_cast<size_t>(expert) * hidden + h]);
      }
      CHECK(logits.get()[i] == want, "%s: T %d E %d H %d: token %d expert %d, seed %llu", body.name,
            tokens, experts, hidden, token, expert, static_cast<unsigned long long>(seed));
    }
  }
}

TEST(product_router_gemm) {
  for (uint64_t seed = 0; seed < testing::seeds(12); seed++) {
    check<float, float>(seed);
    check<f16, f16>(seed);
    check<bf16, bf16>(seed);
    check<f16, float>(seed);
    check<bf16, float>(seed);
  }
}

}  // namespace
