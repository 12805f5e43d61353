#include "product.h"

namespace {

using namespace product;
using testing::Buffer;

template <class T>
unsigned long long address_of(const Buffer<T>& buffer) {
  return reinterpret_cast<unsigned long long>(buffer.get());
}

struct Plan {
  Buffer<int> expert_offsets, row_of_slot, token_of_row, tile_offsets, counts;
  Buffer<GemmTile> tiles;
  Plan(const Routing& r, int max_tiles, int blocks)
      : expert_offsets(r.num_experts + 1),
        row_of_slot(r.slots()),
        token_of_row(r.slots()),
        tile_offsets(r.num_experts + 1),
        counts(static_cast<size_t>(r.num_experts) * blocks),
        tiles(max_tiles) {}
};

void run_plan(const Plan& plan, const Buffer<uint32_t>& ids, const PlanArgs& args, uint64_t seed) {
  const int warps = std::min(PLAN_MAX_COUNTERS / args.num_experts, PLAN_THREADS / 32);
  const dim3 grid(args.num_blocks), place_block(32 * warps);
  const size_t count_bytes = 4 * args.num_experts, place_bytes = warps * count_bytes;
  const PlanParams params = {address_of(plan.expert_offsets),
                             address_of(plan.row_of_slot),
                             address_of(plan.token_of_row),
                             address_of(plan.tiles),
                             address_of(plan.tile_offsets),
                             address_of(plan.counts),
                             address_of(ids),
                             args};
  if (args.num_blocks == 1) {
    testing::run_ok("moe_plan_fwd_single", {grid, place_block, place_bytes, seed}, params);
    return;
  }
  testing::run_ok("moe_plan_fwd_count", {grid, dim3(PLAN_THREADS), count_bytes, seed}, params);
  testing::run_ok("moe_plan_fwd_scan", {dim3(1), dim3(PLAN_SCAN_THREADS), 0, seed}, params);
  testing::run_ok("moe_plan_fwd_place", {grid, place_block, place_bytes, seed}, params);
}

void check(uint64_t seed, int blocks) {
  Random random(seed);
  const int tokens = random.between(1, 300), top_k = random.between(1, 5);
  const int experts = seed % 7 == 0 ? random.between(1, 3000) : random.between(1, 80);
  const Routing r = make_routing(random, tokens, top_k, experts, seed % 4 * 20);
  const int max_tiles = (r.slots() + GEMM_BLOCK_M - 1) / GEMM_BLOCK_M + experts;
  const int block_slots = (r.slots() + blocks - 1) / blocks;
  const PlanArgs args = {r.slots(),    experts,   top_k,
                         GEMM_BLOCK_M, max_tiles, (r.slots() + block_slots - 1) / block_slots,
                         block_slots,  0};
  const Plan plan(r, max_tiles, args.num_blocks);
  const Buffer<uint32_t> ids(r.expert_ids);
  run_plan(plan, ids, args, seed);

  std::vector<GemmTile> tiles = r.tiles;
  tiles.resize(max_tiles, GemmTile{0, 0, 0, 0});
  const auto seed_number = static_cast<unsigned long long>(seed);
  CHECK(plan.expert_offsets.copy() == r.expert_offsets, "expert_offsets, seed %llu", seed_number);
  CHECK(plan.row_of_slot.copy() == r.row_of_slot, "row_of_slot, seed %llu", seed_number);
  CHECK(plan.token_of_row.copy() == r.token_of_row, "token_of_row, seed %llu", seed_number);
  CHECK(plan.tile_offsets[experts] == static_cast<int>(r.tiles.size()), "num_tiles, seed %llu",
        seed_number);
  CHECK(same_bits(plan.tiles.get(), tiles.data(), tiles.size() * sizeof(GemmTile)),
        "tiles, seed %llu", seed_number);
}

TEST(product_plan) {
  for (uint64_t seed = 0; seed < testing::seeds(60); seed++) {
    check(seed, 1);
    check(seed, 3);
  }
}

}  // namespace
