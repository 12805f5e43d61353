#include <cmath>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// The reference is in double, where the order of the sum of squares is negligible. Unused rows are
// zero.
template <class Elem>
void check(uint64_t seed) {
  Random random(seed);
  const int rows = random.between(1, 9), hidden = random.between(1, 3000);
  const int used = seed % 2 ? random.between(0, rows) : rows;
  const bool scale_first = seed % 3 == 0;
  const std::vector<Elem> x = random.vector<Elem>(static_cast<size_t>(rows) * hidden);
  const std::vector<Elem> weight = random.vector<Elem>(hidden);
  const Buffer<Elem> y(x.size()), x_device(x), weight_device(weight);
  const Buffer<int> offsets(std::vector<int>{0, used});
  const RmsNormParams params = {
      address(y),
      address(x_device),
      address(weight_device),
      seed % 2 ? address(offsets) : 0,
      {hidden, 1, 0.25f, 1.0f, scale_first, hidden * sizeof(Elem) % 16 == 0}};
  const int length = 16 / sizeof(Elem);
  const int threads = std::min(((hidden + length - 1) / length + 31) / 32 * 32, RMS_NORM_THREADS);
  testing::run_ok(std::string("moe_rms_norm_fwd") + suffix<Elem>(),
                  {dim3(rows), dim3(threads), 0, seed}, params);
  for (int row = 0; row < rows; row++) {
    double squares = 0.0;
    auto value = [&](int h) {
      const double v = to_f32(x[static_cast<size_t>(row) * hidden + h]);
      return scale_first ? v * (1.0 + to_f32(weight[h])) : v;
    };
    for (int h = 0; h < hidden; h++) squares += value(h) * value(h);
    for (int h = 0; h < hidden; h++) {
      double want = value(h) / std::sqrt(squares / hidden + 0.25);
      if (!scale_first) want *= 1.0 + to_f32(weight[h]);
      if (row >= used) want = 0.0;
      const double got = to_f32(y.get()[static_cast<size_t>(row) * hidden + h]);
      const double bound = (roundoff<Elem>() + 0x1p-18) * std::abs(want) + 0x1p-24;
      CHECK(std::abs(got - want) <= bound, "row %d of %d column %d of %d, seed %llu", row, rows, h,
            hidden, static_cast<unsigned long long>(seed));
    }
  }
}

TEST(product_rms_norm) {
  for (uint64_t seed = 0; seed < testing::seeds(60); seed++) {
    check<float>(seed);
    check<f16>(seed);
    check<bf16>(seed);
  }
}

}  // namespace
