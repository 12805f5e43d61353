#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

template <class Elem>
void check(uint64_t seed) {
  Random random(seed);
  const int tokens = random.between(1, 20), top_k = random.between(1, 4);
  const int experts = random.between(1, 9), hidden = random.between(1, 70);
  const Routing r = make_routing(random, tokens, top_k, experts, seed % 3 * 25);
  const std::vector<Elem> x = random.vector<Elem>(static_cast<size_t>(tokens) * hidden);
  std::vector<Elem> want(static_cast<size_t>(r.slots()) * hidden, from_f32<Elem>(0.0f));
  for (int slot = 0; slot < r.slots(); slot++) {
    if (r.row_of_slot[slot] < 0) continue;
    for (int h = 0; h < hidden; h++) {
      want[static_cast<size_t>(r.row_of_slot[slot]) * hidden + h] =
          x[static_cast<size_t>(slot / top_k) * hidden + h];
    }
  }
  const Buffer<Elem> xp(want.size()), x_device(x);
  const Buffer<int> rows(r.row_of_slot), offsets(r.expert_offsets);
  const PermuteParams params = {address(xp),
                                address(x_device),
                                address(rows),
                                address(offsets),
                                {experts, hidden, top_k, hidden * sizeof(Elem) % 16 == 0}};
  testing::run_ok(std::string("moe_permute_fwd") + suffix<Elem>(),
                  {dim3(tokens), dim3(PERMUTE_THREADS), 0, seed}, params);
  CHECK(same_bits(xp.get(), want.data(), want.size() * sizeof(Elem)),
        "T %d K %d E %d H %d, seed %llu", tokens, top_k, experts, hidden,
        static_cast<unsigned long long>(seed));
}

TEST(product_permute) {
  for (uint64_t seed = 0; seed < testing::seeds(100); seed++) {
    check<float>(seed);
    check<f16>(seed);
    check<bf16>(seed);
  }
}

}  // namespace
