// route: selects each token's K experts and computes their weights, in f32 for logits of any type.
//   z       each logit, plus noise times its deviation, times a multiplier, soft-capped; NaN counts
//           as -inf, -0 as +0
//   value   z or a score of it, plus a bias; 0 or -inf outside the best groups of experts
//   ids     the K experts of largest value, ties to the lower id; the last ones are the sinks
//   weights the scores of the chosen experts, divided by their sum or norm, times scales; never NaN
//   For sparsemixer in training, ids are drawn one after the other, with the caller's noise.
//   src/reference/route.rs states each step. All are correctly rounded operations, in an order that
//   depends on neither launch, alignment nor body: sums of a softmax are of integers, others are
//   over slots. Ids and weights have the same bits on every device, for any bits of the logits.
// Five bodies, chosen by E, K, and whether there are options:
//   plain_narrow, plain_wide  a softmax without options, K <= 32 and E <= 256 or 1024. Grid (T / 4,
//                 rounded up), block (ROUTE_PICK_THREADS): one warp per token keeps the row in
//                 registers and picks the largest key of all lanes, K times.
//   narrow, wide  any router of those sizes. The same, after values were computed in shared memory.
//   sort          any router, any K <= E <= MAX_EXPERTS. Grid (T), block (ROUTE_SORT_THREADS): one
//                 block per token sorts the row in shared memory, for K where picks take longer and
//                 for E that exceeds a warp's registers.
//   scores        any router, any E: no selection; writes the values of one step of the router for
//                 every expert, [T, E] in f32. Grid (T / 4, rounded up), one warp per token.
// Roofline reads T*E*s bytes, writes 8*T*K: at T16384 E128 K8 f32, 8.4 MB + 1.0 MB. Noise and noise
//         logits are read once too; sparsemixer in training reads 4*T*K*E + 4*T*K of draws.
// Error   of a plain router: |weight - exact| <= (|logit - m| + E / 64 + 8) * 2^-24 * exact +
//         2^-148, where E / 64 is of integers in units of 2^-29; reference::bound has the others'.
// Writers one per element: the result is deterministic.
#include "kernel.cuh"

#include "exact.cuh"
#include "select.cuh"
#include "team.cuh"

#include "router.cuh"

constexpr int ROUTE_TOKENS = ROUTE_PICK_THREADS / WARP_SIZE;
// Keys of a lane.
constexpr int NARROW_VALUES = ROUTE_NARROW_MAX_EXPERTS / WARP_SIZE;
constexpr int WIDE_VALUES = ROUTE_WIDE_MAX_EXPERTS / WARP_SIZE;
static_assert(ROUTE_PICK_MAX_TOP_K <= WARP_SIZE, "one lane per choice");
static_assert(sizeof(uint64_t) == ROUTE_SORT_ENTRY_BYTES, "the launch allocates this much");

// ---- plain_narrow, plain_wide -------------------------------------------------------------------

template <typename Elem>
struct TypedRoutePlainParams {
  uint32_t* expert_ids;    // [T, K] out
  float* routing_weights;  // [T, K] out
  const Elem* logits;      // [T, E]
  RouteArgs args;
  int padding;
};
static_assert(sizeof(TypedRoutePlainParams<float>) == sizeof(RoutePlainParams), "the same layout");
ASSERT_SAME_OFFSET(TypedRoutePlainParams<float>, RoutePlainParams, expert_ids);
ASSERT_SAME_OFFSET(TypedRoutePlainParams<float>, RoutePlainParams, routing_weights);
ASSERT_SAME_OFFSET(TypedRoutePlainParams<float>, RoutePlainParams, logits);
ASSERT_SAME_OFFSET(TypedRoutePlainParams<float>, RoutePlainParams, args);
ASSERT_SAME_OFFSET(TypedRoutePlainParams<float>, RoutePlainParams, padding);

template <typename Elem, int VALUES>
struct PlainKeys : LaneKeys<VALUES, Vec<Elem>::LEN> {
  using Keys = LaneKeys<VALUES, Vec<Elem>::LEN>;
  static constexpr int LEN = Vec<Elem>::LEN;

  __device__ __forceinline__ void load(const Elem* row, int lane, const RouteArgs& args) {
    const int num_experts = args.num_experts;
    if (args.vector) {
      // Rows are whole vectors. All loads are issued before the first key is used.
      Vec<Elem> loaded[Keys::VECTORS];
#pragma unroll
      for (int c = 0; c < Keys::VECTORS; c++) {
        const int first = c * Keys::STRIDE + lane * LEN;
        if (first < num_experts) loaded[c] = load_vec(row + first);
      }
#pragma unroll
      for (int c = 0; c < Keys::VECTORS; c++) {
        const int first = c * Keys::STRIDE + lane * LEN;
#pragma unroll
        for (int j = 0; j < LEN; j++) {
          this->at[c * LEN + j] =
              first < num_experts ? key_of(cleaned(to_f32(loaded[c].at[j]))) : 0;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < VALUES; i++) {
        const int e = Keys::expert(i, lane);
        this->at[i] = e < num_experts ? key_of(cleaned(to_f32(row[e]))) : 0;
      }
    }
  }

  // The shares of the lane's experts, four at a time. Experts ascend, so that the loop ends at the
  // first four without one. A key of 0 among the others reads as NaN, whose share is 0.
  __device__ __forceinline__ uint64_t units(float max) const {
    uint64_t total = 0;
#pragma unroll
    for (int first = 0; first < VALUES; first += 4) {
      if (this->at[first] == 0) break;
      uint32_t part = 0;
#pragma unroll
      for (int i = first; i < first + 4; i++) part += share_units(number_of(this->at[i]), max);
      total += part;
    }
    return total;
  }
};

template <int VALUES, typename Elem>
__device__ __forceinline__ void route_fwd_plain(const TypedRoutePlainParams<Elem>& params) {
  const RouteArgs& args = params.args;
  const int lane = threadIdx.x % WARP_SIZE;
  const int64_t token = (int64_t)blockIdx.x * ROUTE_TOKENS + threadIdx.x / WARP_SIZE;
  if (token >= args.num_tokens) return;

  PlainKeys<Elem, VALUES> keys;
  keys.load(params.logits + token * args.num_experts, lane, args);
  uint32_t best_key, best_expert;
  keys.best(lane, args.num_experts, &best_key, &best_expert);
  const float max = number_of(__reduce_max_sync(FULL_WARP, best_key));
  const bool sum_all = args.score == ROUTE_SOFTMAX;
  uint64_t units = sum_all ? keys.units(max) : 0;

  uint32_t my_key, my_expert;
  keys.pick(lane, args.num_experts, args.top_k, best_key, best_expert, &my_key, &my_expert);

  const bool chosen = lane < args.top_k;
  const float p = chosen ? share(number_of(my_key), max) : 0.0f;
  if (!sum_all) units = units_of(p);
  const float sum = sum_of_units(warp_units(units));
  if (chosen) {
    params.expert_ids[token * args.top_k + lane] = my_expert;
    params.routing_weights[token * args.top_k + lane] = __fdiv_rn(p, sum);
  }
}

// ---- narrow, wide -------------------------------------------------------------------------------

template <int VALUES>
__device__ __forceinline__ void route_fwd_pick(const TypedRouteParams params) {
  SHARED_DYNAMIC(shared);
  const RouteArgs& args = params.args;
  const int64_t token = (int64_t)blockIdx.x * ROUTE_TOKENS + threadIdx.x / WARP_SIZE;
  if (token >= args.num_tokens) return;
  const WarpTeam team;
  const int words = 2 * args.row_words + args.top_k;
  float* z = reinterpret_cast<float*>(shared) + threadIdx.x / WARP_SIZE * words;
  uint32_t* keys = reinterpret_cast<uint32_t*>(z + args.row_words);
  float* scores = z + 2 * args.row_words;
  const Router<WarpTeam> router = {params, args, team, token, z, keys, scores};
  router.route([&](uint32_t groups) {
    LaneKeys<VALUES, 1> row;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      const int e = row.expert(i, team.rank);
      row.at[i] = e < router.choices() ? router.key_in(groups, e) : 0;
    }
    uint32_t best_key, best_expert, my_key, my_expert;
    row.best(team.rank, router.choices(), &best_key, &best_expert);
    row.pick(team.rank, router.choices(), router.chosen(), best_key, best_expert, &my_key,
             &my_expert);
    team.sync();
    if (team.rank < router.chosen()) router.ids()[team.rank] = my_expert;
  });
}

// ---- sort ---------------------------------------------------------------------------------------

__device__ __forceinline__ void route_fwd_sort(const TypedRouteParams params) {
  SHARED_DYNAMIC(shared);
  const RouteArgs& args = params.args;
  using Team = BlockTeam<ROUTE_SORT_THREADS>;
  SHARED_ARRAY(uint64_t, parts, Team::WARPS);
  SHARED_ARRAY(float, chunks, MAX_EXPERTS / WARP_SIZE);
  uint64_t* entries = reinterpret_cast<uint64_t*>(shared);
  const Team team(parts, chunks);
  float* z = reinterpret_cast<float*>(entries + args.sort_length);
  uint32_t* keys = reinterpret_cast<uint32_t*>(z + args.row_words);
  // Scores are written after the last use of entries.
  float* scores = reinterpret_cast<float*>(entries);
  const Router<Team> router = {params, args, team, blockIdx.x, z, keys, scores};
  router.route([&](uint32_t groups) {
    for (int e = team.rank; e < args.sort_length; e += team.SIZE) {
      entries[e] = e < router.choices() ? entry_of(router.key_in(groups, e), e) : 0;
    }
    sort_entries<ROUTE_SORT_THREADS>(entries, args.sort_length);
    for (int k = team.rank; k < router.chosen(); k += team.SIZE) {
      router.ids()[k] = ~(uint32_t)entries[k];
    }
  });
}

// ---- scores -------------------------------------------------------------------------------------

__device__ __forceinline__ void route_fwd_scores(const TypedRouteParams params) {
  SHARED_DYNAMIC(shared);
  const RouteArgs& args = params.args;
  const int64_t token = (int64_t)blockIdx.x * ROUTE_TOKENS + threadIdx.x / WARP_SIZE;
  if (token >= args.num_tokens) return;
  const WarpTeam team;
  float* z = reinterpret_cast<float*>(shared) + threadIdx.x / WARP_SIZE * args.row_words;
  const Router<WarpTeam> router = {params, args, team, token, z, nullptr, nullptr};
  router.write_scores();
}

// ---- Entries ------------------------------------------------------------------------------------

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_plain_narrow_f32(const TypedRoutePlainParams<float> params) { route_fwd_plain<NARROW_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_plain_narrow_f32, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_plain_narrow_f16(const TypedRoutePlainParams<f16> params) { route_fwd_plain<NARROW_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_plain_narrow_f16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_plain_narrow_bf16(const TypedRoutePlainParams<bf16> params) { route_fwd_plain<NARROW_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_plain_narrow_bf16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_plain_wide_f32(const TypedRoutePlainParams<float> params) { route_fwd_plain<WIDE_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_plain_wide_f32, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_plain_wide_f16(const TypedRoutePlainParams<f16> params) { route_fwd_plain<WIDE_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_plain_wide_f16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_plain_wide_bf16(const TypedRoutePlainParams<bf16> params) { route_fwd_plain<WIDE_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_plain_wide_bf16, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_narrow(const TypedRouteParams params) { route_fwd_pick<NARROW_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_narrow, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_wide(const TypedRouteParams params) { route_fwd_pick<WIDE_VALUES>(params); }
EXPORT_KERNEL(moe_route_fwd_wide, ROUTE_PICK_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_SORT_THREADS)
moe_route_fwd_sort(const TypedRouteParams params) { route_fwd_sort(params); }
EXPORT_KERNEL(moe_route_fwd_sort, ROUTE_SORT_THREADS)

extern "C" __global__ void __launch_bounds__(ROUTE_PICK_THREADS)
moe_route_fwd_scores(const TypedRouteParams params) { route_fwd_scores(params); }
EXPORT_KERNEL(moe_route_fwd_scores, ROUTE_PICK_THREADS)
// clang-format on
