#include <cmath>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// Integers, so that f32 sums are exact in any order.
template <class Elem>
std::vector<Elem> integers(Random& random, size_t n) {
  std::vector<Elem> values(n);
  for (Elem& v : values) v = from_f32<Elem>(static_cast<float>(random.between(-4, 4)));
  return values;
}

// The layout of the weights: [E, features, in], or [E, in, features] with gate and up interleaved.
enum class Order { kOutIn, kInOut };

unsigned long long address(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer);
}

template <class Elem>
void check(uint64_t seed, bool gated, Order order) {
  Random random(seed);
  const bool in_out = order == Order::kInOut;
  const int tokens = random.between(1, 60), top_k = random.between(1, 3);
  const int experts = random.between(1, 4), step = in_out ? 8 : 1;
  const int in_features = random.between(1, 150 / step) * step;
  const int out_features = random.between(1, 90 / step) * step;
  const Routing r = make_routing(random, tokens, top_k, experts, seed % 3 * 25);
  const bool gather = random.between(0, 1);
  const int parts = gated ? 2 : 1, x_rows = gather ? tokens : r.slots();
  const int features = parts * out_features;
  const std::vector<Elem> x = integers<Elem>(random, static_cast<size_t>(x_rows) * in_features);
  const std::vector<Elem> w =
      integers<Elem>(random, static_cast<size_t>(experts) * features * in_features);
  const std::vector<Elem> bias = integers<Elem>(random, static_cast<size_t>(experts) * features);
  std::vector<float> weights(r.slots());  // powers of two: sums stay exact
  for (float& weight : weights) weight = 0.5f * static_cast<float>(random.between(1, 2));
  const auto feature_of = [&](int part, int column) {
    return gated && in_out ? 2 * column + part : part * out_features + column;
  };
  const auto index_of = [&](int expert, int feature, int i) {
    const int row = in_out ? i : feature, at = in_out ? feature : i;
    return static_cast<size_t>(expert) * features * in_features +
           static_cast<size_t>(row) * (in_out ? features : in_features) + at;
  };

  const Buffer<Elem> y(static_cast<size_t>(r.slots()) * out_features), x_device(x), w_device(w),
      b_device(bias);
  const Buffer<float> weights_device(weights);
  const Buffer<int> tokens_of_rows(r.token_of_row), offsets(r.expert_offsets), rows(r.row_of_slot);
  const Buffer<GemmTile> tiles(r.tiles);
  const Buffer<int> num_tiles(std::vector<int>{static_cast<int>(r.tiles.size())});
  const int bound = std::min(r.slots(), (r.slots() + GEMM_BLOCK_M - 1) / GEMM_BLOCK_M + experts);
  const GroupedGemmArgs args = {static_cast<long long>(features) * in_features,
                                in_out ? parts : in_features,
                                in_out ? features : 1,
                                r.slots(),
                                x_rows,
                                bound,
                                out_features,
                                in_features,
                                experts,
                                in_features * sizeof(Elem) % 16 == 0,
                                out_features * sizeof(Elem) % 16 == 0};
  const int columns = GEMM_BLOCK_N / parts;
  const int blocks = (bound + GEMM_TILE_GROUP - 1) / GEMM_TILE_GROUP * GEMM_TILE_GROUP *
                     ((out_features + columns - 1) / columns);
  const int threads = sizeof(Elem) == 4 ? GEMM_THREADS_FMA : GEMM_THREADS_MMA;
  const testing::Shape grid = {dim3(blocks), dim3(threads), GROUPED_GEMM_SMEM_BYTES, seed};
  const std::string end = std::string(in_out ? "_in_out" : "") + suffix<Elem>();
  if (gated) {
    const ActivationArgs silu = {
        ACTIVATION_SILU, 1.0f, INFINITY, INFINITY, INFINITY, 0.0f, 0, 1.0f, 1.0f};
    const GateUpArgs gate_up = {args, silu, 1, gather, top_k, tokens, 0, features, in_out ? 2 : 1};
    const GateUpParams params = {address(y.get()),
                                 address(x_device.get()),
                                 address(w_device.get()),
                                 address(w_device.get() + index_of(0, feature_of(1, 0), 0)),
                                 address(b_device.get()),
                                 address(b_device.get() + feature_of(1, 0)),
                                 address(weights_device.get()),
                                 address(rows.get()),
                                 address(tokens_of_rows.get()),
                                 address(offsets.get()),
                                 address(tiles.get()),
                                 address(num_tiles.get()),
                                 gate_up};
    testing::run_ok("moe_grouped_gemm_fwd_gate_up" + end, grid, params);
  } else {
    const GroupedGemmParams params = {address(y.get()),
                                      address(x_device.get()),
                                      address(w_device.get()),
                                      address(b_device.get()),
                                      gather ? address(tokens_of_rows.get()) : 0,
                                      address(offsets.get()),
                                      address(tiles.get()),
                                      address(num_tiles.get()),
                                      args};
    testing::run_ok("moe_grouped_gemm_fwd" + end, grid, params);
  }

  std::vector<float> weight_of_row(r.slots());
  for (int slot = 0; slot < r.slots(); slot++) {
    if (r.row_of_slot[slot] >= 0) weight_of_row[r.row_of_slot[slot]] = weights[slot];
  }
  int expert = 0;
  for (int row = 0; row < r.slots(); row++) {
    while (expert < experts && row >= r.expert_offsets[expert + 1]) expert++;
    for (int column = 0; column < out_features; column++) {
      double sums[2] = {0.0, 0.0};
      for (int part = 0; part < parts && expert < experts; part++) {
        const int feature = feature_of(part, column);
        const int x_row = gather ? r.token_of_row[row] : row;
        const Elem* values = &x[static_cast<size_t>(x_row) * in_features];
        for (int i = 0; i < in_features; i++) {
          sums[part] += double(to_f32(w[index_of(expert, feature, i)])) * to_f32(values[i]);
        }
        if (gated) sums[part] *= weight_of_row[row];
        sums[part] += to_f32(bias[static_cast<size_t>(expert) * features + feature]);
      }
      const double want = gated ? sums[0] / (1.0 + std::exp(-sums[0])) * sums[1] : sums[0];
      const double got = to_f32(y[static_cast<size_t>(row) * out_features + column]);
      // Large products overflow to infinity in f16.
      if (std::is_same_v<Elem, f16> && std::fabs(want) > 60000.0) continue;
      const double tolerance = roundoff<Elem>() * std::fabs(want) * 1.01 +
                               (gated ? 0x1p-20 * std::fabs(want) + 1e-30 : 0.0) +
                               (sizeof(Elem) == 2 ? 0x1p-24 : 0.0);
      CHECK(std::fabs(got - want) <= tolerance,
            "R %d out %d in %d E %d gated %d in_out %d [%d, %d]: %g, want %g, seed %llu", r.slots(),
            out_features, in_features, experts, gated, in_out, row, column, got, want,
            static_cast<unsigned long long>(seed));
    }
  }
}

TEST(product_grouped_gemm) {
  for (uint64_t seed = 0; seed < testing::seeds(20); seed++) {
    for (bool gated : {false, true}) {
      for (Order order : {Order::kOutIn, Order::kInOut}) {
        check<float>(seed, gated, order);
        check<f16>(seed, gated, order);
        check<bf16>(seed, gated, order);
      }
    }
  }
}

}  // namespace
