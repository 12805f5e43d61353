#include <cmath>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// Integers, so that sums in f32 are exact in whatever order.
template <class Elem>
std::vector<Elem> integers(Random& random, size_t n) {
  std::vector<Elem> values(n);
  for (Elem& v : values) v = from_f32<Elem>(static_cast<float>(random.between(-4, 4)));
  return values;
}

template <class Elem>
void check(uint64_t seed, bool gated) {
  Random random(seed);
  const int tokens = random.between(1, 60), top_k = random.between(1, 3);
  const int experts = random.between(1, 4), k = random.between(1, 150), n = random.between(1, 90);
  const Routing r = make_routing(random, tokens, top_k, experts, seed % 3 * 25);
  const bool gather = random.between(0, 1);
  const int parts = gated ? 2 : 1, x_rows = gather ? tokens : r.slots();
  const std::vector<Elem> x = integers<Elem>(random, static_cast<size_t>(x_rows) * k);
  const std::vector<Elem> w = integers<Elem>(random, static_cast<size_t>(experts) * parts * n * k);

  const Buffer<Elem> y(static_cast<size_t>(r.slots()) * n), x_device(x), w_device(w);
  const Buffer<int> tokens_of_rows(r.token_of_row), offsets(r.expert_offsets);
  const Buffer<GemmTile> tiles(r.tiles);
  const Buffer<int> num_tiles(std::vector<int>{static_cast<int>(r.tiles.size())});
  const GroupedGemmArgs args = {static_cast<long long>(parts) * n * k,
                                k,
                                1,
                                r.slots(),
                                n,
                                k,
                                experts,
                                k * sizeof(Elem) % 16 == 0,
                                n * sizeof(Elem) % 16 == 0};
  const int bound = std::min(r.slots(), (r.slots() + GEMM_BLOCK_M - 1) / GEMM_BLOCK_M + experts);
  const int columns = GEMM_BLOCK_N / parts;
  const int blocks = (bound + GEMM_TILE_GROUP - 1) / GEMM_TILE_GROUP * GEMM_TILE_GROUP *
                     ((n + columns - 1) / columns);
  const int threads = sizeof(Elem) == 4 ? GEMM_THREADS_FMA : GEMM_THREADS_MMA;
  const testing::Shape grid = {dim3(blocks), dim3(threads), GROUPED_GEMM_SMEM_BYTES, seed};
  const std::string symbol = "moe_grouped_gemm_fwd";
  if (gated) {
    const ActivationArgs silu = {ACTIVATION_SILU, 1.0f, INFINITY, INFINITY,
                                 INFINITY,        0.0f, 1.0f,     1.0f};
    const GateUpArgs gate_up = {args, silu, 1, gather, top_k, 0, 0, 0};
    testing::run_ok(symbol + "_gate_up" + suffix<Elem>(), grid, y.get(), x_device.get(),
                    w_device.get(), w_device.get() + static_cast<size_t>(n) * k, nullptr, nullptr,
                    nullptr, nullptr, tokens_of_rows.get(), offsets.get(), tiles.get(),
                    num_tiles.get(), gate_up);
  } else {
    testing::run_ok(symbol + suffix<Elem>(), grid, y.get(), x_device.get(), w_device.get(), nullptr,
                    gather ? tokens_of_rows.get() : nullptr, offsets.get(), tiles.get(),
                    num_tiles.get(), args);
  }

  int expert = 0;
  for (int row = 0; row < r.slots(); row++) {
    while (expert < experts && row >= r.expert_offsets[expert + 1]) expert++;
    for (int column = 0; column < n; column++) {
      double sums[2] = {0.0, 0.0};
      for (int part = 0; part < parts && expert < experts; part++) {
        const Elem* weights = &w[((static_cast<size_t>(expert) * parts + part) * n + column) * k];
        const Elem* values = &x[static_cast<size_t>(gather ? r.token_of_row[row] : row) * k];
        for (int i = 0; i < k; i++) sums[part] += double(to_f32(weights[i])) * to_f32(values[i]);
      }
      const double want = gated ? sums[0] / (1.0 + std::exp(-sums[0])) * sums[1] : sums[0];
      const double got = to_f32(y[static_cast<size_t>(row) * n + column]);
      // Overflow to infinity is what f16 does with large products.
      if (std::is_same_v<Elem, f16> && std::fabs(want) > 60000.0) continue;
      const double tolerance = roundoff<Elem>() * std::fabs(want) * 1.01 +
                               (gated ? 0x1p-20 * std::fabs(want) + 1e-30 : 0.0) +
                               (sizeof(Elem) == 2 ? 0x1p-24 : 0.0);
      CHECK(std::fabs(got - want) <= tolerance,
            "R %d N %d K %d E %d gated %d [%d, %d]: %g, want %g, seed %llu", r.slots(), n, k,
            experts, gated, row, column, got, want, static_cast<unsigned long long>(seed));
    }
  }
}

TEST(product_grouped_gemm) {
  for (uint64_t seed = 0; seed < testing::seeds(20); seed++) {
    for (bool gated : {false, true}) {
      check<float>(seed, gated);
      check<f16>(seed, gated);
      check<bf16>(seed, gated);
    }
  }
}

}  // namespace
