#include <cmath>
#include <limits>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

// The logit as selection sees it: NaN counts as -inf.
float ordered(float logit) {
  return logit == logit ? logit : -std::numeric_limits<float>::infinity();
}

std::vector<float> random_logits(Random& random, int n) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float special[] = {NAN, infinity, -infinity, 0.0f, -0.0f, 1e-40f};
  std::vector<float> logits(n);
  const bool with_special = random.between(0, 3) == 0, with_ties = random.between(0, 1) == 0;
  for (float& logit : logits) {
    logit = with_ties ? static_cast<float>(random.between(-3, 3)) : random.real() * 4.0f;
    if (with_special && random.between(0, 4) == 0) logit = special[random.between(0, 5)];
  }
  return logits;
}

// The experts of a token in the order (logit descending, id ascending).
std::vector<int> expert_order(const std::vector<float>& logits) {
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return ordered(logits[a]) > ordered(logits[b]); });
  return order;
}

template <class Elem>
void check(uint64_t seed, int experts, int top_k) {
  Random random(seed);
  const int tokens = random.between(1, 9);
  std::vector<Elem> logits;
  for (float logit : random_logits(random, tokens * experts))
    logits.push_back(from_f32<Elem>(logit));
  const bool sum_all = random.between(0, 1);
  int sort_length = 1;
  while (sort_length < experts) sort_length *= 2;
  const RouteArgs args = {tokens,      experts, top_k,
                          sort_length, sum_all, experts * sizeof(Elem) % 16 == 0};
  const Buffer<uint32_t> ids(tokens * top_k);
  const Buffer<float> weights(tokens * top_k);
  const Buffer<Elem> logits_device(logits);
  const bool sort = top_k > ROUTE_PICK_MAX_TOP_K || experts > ROUTE_WIDE_MAX_EXPERTS;
  const char* const body = sort ? "sort" : experts <= ROUTE_NARROW_MAX_EXPERTS ? "narrow" : "wide";
  constexpr int TOKENS = ROUTE_PICK_THREADS / 32;
  const testing::Shape shape = {
      dim3(sort ? tokens : (tokens + TOKENS - 1) / TOKENS),
      dim3(sort ? ROUTE_SORT_THREADS : ROUTE_PICK_THREADS),
      sort ? static_cast<size_t>(sort_length) * ROUTE_SORT_ENTRY_BYTES : 0, seed};
  testing::run_ok(std::string("moe_route_fwd_") + body + suffix<Elem>(), shape, ids.get(),
                  weights.get(), logits_device.get(), args);

  for (int token = 0; token < tokens; token++) {
    std::vector<float> row;
    for (int e = 0; e < experts; e++) row.push_back(to_f32(logits[token * experts + e]));
    const std::vector<int> order = expert_order(row);
    const double most = ordered(row[order[0]]);
    const auto share = [&](int expert) {
      const double logit = ordered(row[expert]);
      return logit == most ? 1.0 : std::exp(logit - most);
    };
    double sum = 0.0;
    for (int i = 0; i < (sum_all ? experts : top_k); i++) sum += share(order[i]);
    for (int k = 0; k < top_k; k++) {
      const uint32_t id = ids[token * top_k + k];
      const double weight = weights[token * top_k + k], exact = share(order[k]) / sum;
      CHECK(id == static_cast<uint32_t>(order[k]), "%s E %d K %d: id %u, want %d, seed %llu", body,
            experts, top_k, id, order[k], static_cast<unsigned long long>(seed));
      const double distance = most - ordered(row[order[k]]);
      const double factor = std::isfinite(distance) ? distance : 0.0;
      const double bound = (factor + experts / 32.0 + 16.0) * 0x1p-24 * exact + 0x1p-148;
      CHECK(std::fabs(weight - exact) <= bound, "%s E %d K %d: weight %g, want %g, seed %llu", body,
            experts, top_k, weight, exact, static_cast<unsigned long long>(seed));
    }
  }
}

TEST(product_route) {
  for (uint64_t seed = 0; seed < testing::seeds(60); seed++) {
    Random random(seed + 1000);
    const int narrow = random.between(1, ROUTE_NARROW_MAX_EXPERTS);
    const int wide = random.between(ROUTE_NARROW_MAX_EXPERTS + 1, ROUTE_WIDE_MAX_EXPERTS);
    const int many = random.between(33, 200);
    check<float>(seed, narrow, random.between(1, std::min(narrow, 32)));
    check<bf16>(seed, narrow, random.between(1, std::min(narrow, 32)));
    check<f16>(seed, many, random.between(33, many));
    if (seed % 5 == 0) check<float>(seed, wide, random.between(1, 32));
    if (seed % 10 == 0) check<bf16>(seed, random.between(1025, 2048), random.between(1, 64));
  }
}

}  // namespace
