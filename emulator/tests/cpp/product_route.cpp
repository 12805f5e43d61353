#include <cmath>
#include <limits>

#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

template <class T>
unsigned long long address_of(const Buffer<T>& buffer) {
  return reinterpret_cast<unsigned long long>(buffer.get());
}

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
  RouteArgs args = {};
  args.num_tokens = tokens;
  args.num_experts = experts;
  args.top_k = top_k;
  args.sort_length = sort_length;
  args.vector = experts * sizeof(Elem) % 16 == 0;
  args.elem = std::is_same_v<Elem, float> ? ELEM_F32
              : std::is_same_v<Elem, f16> ? ELEM_F16
                                          : ELEM_BF16;
  args.row_words = experts + (experts + 31) / 32;
  args.multiplier = args.scale = 1.0f;
  args.score = sum_all ? ROUTE_SOFTMAX : ROUTE_SOFTMAX_CHOSEN;
  const Buffer<uint32_t> ids(tokens * top_k);
  const Buffer<float> weights(tokens * top_k);
  const Buffer<Elem> logits_device(logits);
  const bool sort = top_k > ROUTE_PICK_MAX_TOP_K || experts > ROUTE_WIDE_MAX_EXPERTS;
  const char* const body = sort ? "sort" : experts <= ROUTE_NARROW_MAX_EXPERTS ? "narrow" : "wide";
  constexpr int TOKENS = ROUTE_PICK_THREADS / 32;
  const size_t words = 2 * static_cast<size_t>(args.row_words);
  const size_t entries = static_cast<size_t>(sort_length) * ROUTE_SORT_ENTRY_BYTES;
  // The bodies with options route without them too.
  const bool plain = !sort && random.between(0, 1);
  const size_t shared = sort    ? entries + 4 * words
                        : plain ? 0
                                : TOKENS * 4 * (words + static_cast<size_t>(top_k));
  const testing::Shape shape = {dim3(sort ? tokens : (tokens + TOKENS - 1) / TOKENS),
                                dim3(sort ? ROUTE_SORT_THREADS : ROUTE_PICK_THREADS), shared, seed};
  if (plain) {
    const RoutePlainParams params = {address_of(ids), address_of(weights),
                                     address_of(logits_device), args, 0};
    testing::run_ok(std::string("moe_route_fwd_plain_") + body + suffix<Elem>(), shape, params);
  } else {
    RouteParams params = {};
    params.expert_ids = address_of(ids);
    params.routing_weights = address_of(weights);
    params.logits = address_of(logits_device);
    params.args = args;
    testing::run_ok(std::string("moe_route_fwd_") + body, shape, params);
  }

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

// Random options. Other tests compare the results with the reference; here sanitizers run every
// path, ids must be distinct, and no weight is NaN.
void check_options(uint64_t seed, int experts, int top_k) {
  Random random(seed);
  const int tokens = random.between(1, 6);
  const std::vector<float> logits = random_logits(random, tokens * experts);
  RouteArgs args = {};
  args.num_tokens = tokens;
  args.num_experts = experts;
  args.top_k = top_k;
  args.num_sinks = random.between(0, 2) == 0 ? random.between(0, top_k - 1) : 0;
  args.sort_length = 1;
  while (args.sort_length < experts) args.sort_length *= 2;
  args.vector = experts % 4 == 0;
  args.elem = ELEM_F32;
  args.row_words = experts + (experts + 31) / 32;
  args.multiplier = args.scale = 1.0f;
  args.softcap = random.between(0, 1) ? 2.0f : 0.0f;
  args.value = random.between(ROUTE_LOGIT, ROUTE_SQRT_SOFTPLUS);
  args.score = random.between(ROUTE_LOGIT, ROUTE_SPARSEMIXER);
  args.jitter = 0.1f;
  args.divisor = random.between(ROUTE_BY_NOTHING, ROUTE_BY_NORM);
  args.divisor_number = 1.5f;
  const int choices = experts - args.num_sinks;
  const int groups = random.between(0, 32);
  if (groups > 0 && choices % groups == 0) {
    args.num_groups = groups;
    args.top_groups = random.between(1, groups);
    args.group_size = choices / groups;
    args.group_magic = ((1u << 31) + args.group_size - 1) / args.group_size;
    while (groups << (args.group_part_bits + 1) <= 32) args.group_part_bits++;
    args.group_sum = random.between(0, 1);
    args.masked_zero = random.between(0, 1);
  }
  const bool is_given = random.between(0, 4) == 0;
  std::vector<uint32_t> given_rows(7 * static_cast<size_t>(top_k));
  for (uint32_t& id : given_rows) id = static_cast<uint32_t>(random.between(0, experts));
  args.given_rows = 7;
  const auto optional = [&](const auto& buffer) {
    const bool is_given = random.between(0, 1);
    return is_given ? address_of(buffer) : 0;
  };
  const Buffer<float> logits_device(logits), bias(random.vector<float>(choices)),
      scale(random.vector<float>(experts)), noise(random.vector<float>(logits.size())),
      noise_logits(random.vector<float>(logits.size())),
      selection_noise(random.vector<float>(logits.size() * top_k)),
      midpoint_draws(random.vector<float>(static_cast<size_t>(tokens) * top_k));
  const Buffer<uint32_t> given(given_rows);
  const Buffer<uint8_t> active(std::vector<uint8_t>(tokens, 1));
  RouteParams params = {};
  params.logits = address_of(logits_device);
  params.selection_bias = optional(bias);
  params.expert_scale = optional(scale);
  params.noise = optional(noise);
  params.noise_logits = optional(noise_logits);
  if (is_given) params.given_ids = address_of(given);
  params.active = optional(active);
  // Sparsemixer takes no given ids.
  if (is_given && args.score == ROUTE_SPARSEMIXER) args.score = ROUTE_SOFTMAX;
  // Sparsemixer of training has neither sinks nor a divisor.
  if (args.score == ROUTE_SPARSEMIXER && args.num_sinks == 0 && random.between(0, 1)) {
    params.selection_noise = address_of(selection_noise);
    params.midpoint_draws = address_of(midpoint_draws);
  }

  const bool sort = top_k > ROUTE_PICK_MAX_TOP_K || experts > ROUTE_WIDE_MAX_EXPERTS;
  const char* const body = sort ? "sort" : experts <= ROUTE_NARROW_MAX_EXPERTS ? "narrow" : "wide";
  constexpr int TOKENS = ROUTE_PICK_THREADS / 32;
  const size_t words = 2 * static_cast<size_t>(args.row_words);
  const size_t shared =
      sort ? static_cast<size_t>(args.sort_length) * ROUTE_SORT_ENTRY_BYTES + 4 * words
           : TOKENS * 4 * (words + static_cast<size_t>(top_k));
  const Buffer<uint32_t> ids(tokens * top_k);
  const Buffer<float> weights(tokens * top_k);
  const testing::Shape shape = {dim3(sort ? tokens : (tokens + TOKENS - 1) / TOKENS),
                                dim3(sort ? ROUTE_SORT_THREADS : ROUTE_PICK_THREADS), shared, seed};
  params.expert_ids = address_of(ids);
  params.routing_weights = address_of(weights);
  params.args = args;
  testing::run_ok(std::string("moe_route_fwd_") + body, shape, params);
  for (int token = 0; token < tokens; token++) {
    std::vector<bool> seen(experts);
    for (int k = 0; k < top_k; k++) {
      const uint32_t id = ids[token * top_k + k];
      const float weight = weights[token * top_k + k];
      const bool is_new = is_given || (id < seen.size() && !seen[id]);
      CHECK(is_new, "%s E %d K %d: id %u, seed %llu", body, experts, top_k, id,
            static_cast<unsigned long long>(seed));
      if (id < seen.size()) seen[id] = true;
      CHECK(weight == weight, "%s E %d K %d: no weight, seed %llu", body, experts, top_k,
            static_cast<unsigned long long>(seed));
    }
  }
}

TEST(product_route_options) {
  for (uint64_t seed = 0; seed < testing::seeds(80); seed++) {
    Random random(seed + 2000);
    const int narrow = random.between(1, 8) * random.between(1, 32);
    check_options(seed, narrow, random.between(1, std::min(narrow, 32)));
    const int many = random.between(33, 200);
    if (seed % 3 == 0) check_options(seed, many, random.between(33, many));
    if (seed % 8 == 0) check_options(seed, 512, random.between(1, 32));
  }
}

}  // namespace
