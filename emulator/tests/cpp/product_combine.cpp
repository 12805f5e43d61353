#include <cmath>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// y[t, h] is the sum of weight * row over the token's active slots. `all` adds weight * token for
// ids from E on, a bias and half a shared row, and halves the sum. In f32, fma after fma, in the
// order of k, so the bits are the same.
template <class Elem>
void check(uint64_t seed) {
  Random random(seed);
  const int tokens = random.between(1, 12), top_k = random.between(1, 9);
  const int experts = random.between(1, 9), hidden = random.between(1, 600);
  const Routing r = make_routing(random, tokens, top_k, experts, seed % 3 * 25);
  const std::vector<Elem> yp = random.vector<Elem>(static_cast<size_t>(r.slots()) * hidden);
  const std::vector<float> weights = random.vector<float>(r.slots());
  const bool all = seed % 2 == 1;
  const bool rows_weighted = std::is_same_v<Elem, f16> && seed % 4 >= 2;
  const size_t size = static_cast<size_t>(tokens) * hidden;
  const std::vector<Elem> x = random.vector<Elem>(size), shared = random.vector<Elem>(size);
  const std::vector<Elem> bias = random.vector<Elem>(hidden);
  std::vector<Elem> want;
  for (int token = 0; token < tokens; token++) {
    for (int h = 0; h < hidden; h++) {
      float sum = 0.0f;
      for (int slot = token * top_k; slot < (token + 1) * top_k; slot++) {
        const int row = r.row_of_slot[slot];
        const size_t at = static_cast<size_t>(row < 0 ? token : row) * hidden + h;
        if (row < 0 && !all) continue;
        // Rows of f16 may already be weighted.
        const float weight = rows_weighted && row >= 0 ? 1.0f : weights[slot];
        sum = std::fma(weight, to_f32(row < 0 ? x[at] : yp[at]), sum);
      }
      // The sigmoid of gate 0 is 1/2.
      if (all) sum = std::fma(0.5f, to_f32(shared[want.size()]), sum + to_f32(bias[h]));
      want.push_back(from_f32<Elem>(all ? 0.5f * sum : sum));
    }
  }
  const Buffer<Elem> y(want.size()), yp_device(yp);
  const Buffer<float> weights_device(weights);
  const Buffer<Elem> x_device(x), shared_device(shared), bias_device(bias);
  const Buffer<float> gate(std::vector<float>(tokens, 0.0f));
  const Buffer<int> rows(r.row_of_slot);
  const Buffer<uint32_t> ids(r.expert_ids);
  CombineParams params = {};
  params.y = address(y);
  params.yp = address(yp_device);
  params.routing_weights = address(weights_device);
  params.row_of_slot = address(rows);
  if (all) {
    params.x = address(x_device);
    params.output_bias = address(bias_device);
    params.shared = address(shared_device);
    params.shared_gate = address(gate);
    params.expert_ids = address(ids);
  }
  params.args = {hidden,
                 top_k,
                 experts,
                 all ? INT32_MAX : 0,
                 all,
                 rows_weighted,
                 hidden * sizeof(Elem) % 16 == 0};
  const int length = 16 / sizeof(Elem);
  const int threads = std::min(((hidden + length - 1) / length + 31) / 32 * 32, COMBINE_THREADS);
  const int blocks = (hidden + threads * length - 1) / (threads * length);
  testing::run_ok(std::string("moe_combine_fwd") + suffix<Elem>(),
                  {dim3(tokens, blocks), dim3(threads), 0, seed}, params);
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
