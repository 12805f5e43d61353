#include <cmath>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// y[t, h] = the sum of weight * row over the token's active slots: f32, fma after fma, in the order
// of k, so the result is the same bits.
template <class Elem>
void check(uint64_t seed) {
  Random random(seed);
  const int tokens = random.between(1, 12), top_k = random.between(1, 9);
  const int experts = random.between(1, 9), hidden = random.between(1, 600);
  const Routing r = make_routing(random, tokens, top_k, experts, seed % 3 * 25);
  const std::vector<Elem> yp = random.vector<Elem>(static_cast<size_t>(r.slots()) * hidden);
  const std::vector<float> weights = random.vector<float>(r.slots());
  std::vector<Elem> want;
  for (int token = 0; token < tokens; token++) {
    for (int h = 0; h < hidden; h++) {
      float sum = 0.0f;
      for (int slot = token * top_k; slot < (token + 1) * top_k; slot++) {
        const int row = r.row_of_slot[slot];
        if (row < 0) continue;
        sum = std::fma(weights[slot], to_f32(yp[static_cast<size_t>(row) * hidden + h]), sum);
      }
      want.push_back(from_f32<Elem>(sum));
    }
  }
  const Buffer<Elem> y(want.size()), yp_device(yp);
  const Buffer<float> weights_device(weights);
  const Buffer<int> rows(r.row_of_slot);
  const CombineArgs args = {hidden, top_k, hidden * sizeof(Elem) % 16 == 0};
  const int length = 16 / sizeof(Elem);
  const int threads = std::min(((hidden + length - 1) / length + 31) / 32 * 32, COMBINE_THREADS);
  const int blocks = (hidden + threads * length - 1) / (threads * length);
  testing::run_ok(std::string("moe_combine_fwd") + suffix<Elem>(),
                  {dim3(tokens, blocks), dim3(threads), 0, seed}, y.get(), yp_device.get(),
                  weights_device.get(), rows.get(), args);
  CHECK(same_bits(y.get(), want.data(), want.size() * sizeof(Elem)), "T %d K %d H %d, seed %llu",
        tokens, top_k, hidden, static_cast<unsigned long long>(seed));
}

TEST(product_combine) {
  for (uint64_t seed = 0; seed < testing::seeds(100); seed++) {
    check<float>(seed);
    check<f16>(seed);
    check<bf16>(seed);
  }
}

}  // namespace
