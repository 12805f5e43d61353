// capacity: an expert keeps a limited number of slots and drops the others.
//   In each sequence n (sequence_tokens consecutive tokens), expert e keeps the first `capacity` of
//   its slots, in the order of `priority`, ties to the lower slot:
//     BY_TOKEN                   slot
//     BY_CHOICE                  k, then token: all first choices before all second choices
//     BY_WEIGHT                  routing_weights[t, k] descending
//     BY_CHOICE_AND_TOP_WEIGHT   k, then routing_weights[t, 0] descending
//   -0 counts as 0 and NaN as -inf. Dropped slots count in positions too, so the kept slots are
//   those of the smallest keys: a selection, without a sort.
// select     expert_ids'[s] = expert_ids[s] if slot s is kept, else NO_EXPERT
//            kept[n, e], dropped[n, e] = number of slots that expert e keeps and drops
//            Grid (sequences, E + 1), block (CAPACITY_SELECT_THREADS). A block per sequence and
//            expert finds the last key that is kept, digit by digit, and then writes the expert's
//            slots. The blocks with index E write the slots without an expert. The plan is of
//            slots: its tokens are slots, so that token_of_row lists each expert's slots in
//            ascending order.
// reassign   overflow: a dropped slot requests the next candidate of its token, in the order of
//            candidates, that is not in the token's own expert_ids; the slots of a token in order.
//            Grid (T / CAPACITY_TOKEN_THREADS), one thread per token. A plan of `requests` and
//            select with later = 1 follow: experts keep their slots, and accept requests up to
//            `capacity`.
// normalize  normalized[s] = routing_weights[s] / max(epsilon + sum over the token's kept slots,
//            min) * scale * expert_scale[e]; 0 for dropped slots and for NaN. The sum starts at 0
//            and is in the order of k. Grid and block as for reassign.
// Roofline select reads 4*T*K bytes of rows and writes 4*T*K; priorities by weight read rows and
//         weights once per digit.
// Writers one per element: a slot has one expert in a plan, a token one thread. Atomics add
//         integers, in any order. The result is deterministic.
#include "kernel.cuh"

#include "select.cuh"

// ---- Parameters ---------------------------------------------------------------------------------

struct TypedCapacitySelectParams {
  uint32_t* expert_ids;          // [T, K] out
  uint32_t* kept;                // [sequences, E] out, in and out if later
  uint32_t* dropped;             // [sequences, E] out, in and out if later
  const float* routing_weights;  // [T, K], unused by token and by choice
  const int* expert_offsets;     // [E + 1]
  const int* row_of_slot;        // [T * K]
  const int* slot_of_row;        // [T * K]
  CapacitySelectArgs args;
};
static_assert(sizeof(TypedCapacitySelectParams) == sizeof(CapacitySelectParams), "the same layout");
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, expert_ids);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, kept);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, dropped);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, routing_weights);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, expert_offsets);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, row_of_slot);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, slot_of_row);
ASSERT_SAME_OFFSET(TypedCapacitySelectParams, CapacitySelectParams, args);

struct TypedCapacityReassignParams {
  uint32_t* requests;              // [T, K] out
  float* routing_weights;          // [T, K] in and out: written where there is a request
  uint32_t* next_candidate;        // [T] out, in and out if later
  const uint32_t* expert_ids;      // [T, K], the router's
  const uint32_t* kept_ids;        // [T, K], as select has left them
  const uint32_t* candidates;      // [T, C]
  const float* candidate_weights;  // [T, C]
  CapacityReassignArgs args;
  int padding;
};
static_assert(sizeof(TypedCapacityReassignParams) == sizeof(CapacityReassignParams),
              "the same layout");
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, requests);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, routing_weights);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, next_candidate);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, expert_ids);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, kept_ids);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, candidates);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, candidate_weights);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, args);
ASSERT_SAME_OFFSET(TypedCapacityReassignParams, CapacityReassignParams, padding);

struct TypedCapacityNormalizeParams {
  float* normalized;             // [T, K] out
  const float* expert_scale;     // [E] or null
  const uint32_t* expert_ids;    // [T, K], as select has left them
  const float* routing_weights;  // [T, K]
  CapacityNormalizeArgs args;
  int padding;
};
static_assert(sizeof(TypedCapacityNormalizeParams) == sizeof(CapacityNormalizeParams),
              "the same layout");
ASSERT_SAME_OFFSET(TypedCapacityNormalizeParams, CapacityNormalizeParams, normalized);
ASSERT_SAME_OFFSET(TypedCapacityNormalizeParams, CapacityNormalizeParams, expert_scale);
ASSERT_SAME_OFFSET(TypedCapacityNormalizeParams, CapacityNormalizeParams, expert_ids);
ASSERT_SAME_OFFSET(TypedCapacityNormalizeParams, CapacityNormalizeParams, routing_weights);
ASSERT_SAME_OFFSET(TypedCapacityNormalizeParams, CapacityNormalizeParams, args);
ASSERT_SAME_OFFSET(TypedCapacityNormalizeParams, CapacityNormalizeParams, padding);

// ---- select -------------------------------------------------------------------------------------

// Slots are kept in ascending order of their keys. The host checks that 64 bits are enough: a
// choice and a token have at most 32 bits together, and a slot has 31.
__device__ __forceinline__ uint64_t key_of_slot(int slot, const float* weights,
                                                const CapacitySelectArgs& args) {
  if (args.priority == CAPACITY_BY_TOKEN) return (uint32_t)slot;
  if (args.priority == CAPACITY_BY_WEIGHT) {
    return (uint64_t)~key_of(cleaned(weights[slot])) << args.token_bits | (uint32_t)slot;
  }
  const uint32_t token = slot / args.top_k, choice = slot % args.top_k;
  if (args.priority == CAPACITY_BY_CHOICE) return (uint64_t)choice << args.token_bits | token;
  const uint64_t top = ~key_of(cleaned(weights[(int64_t)token * args.top_k]));
  return ((uint64_t)choice << 32 | top) << args.token_bits | token;
}

// The slot of a row, clamped: a plan that was not computed yet may hold any bits.
__device__ __forceinline__ int slot_at(const int* slot_of_row, int row, int slots) {
  return (int)min((uint32_t)slot_of_row[row], (uint32_t)slots - 1);
}

// The first row in begin .. end - 1 whose slot is >= `slot`, or `end`. Slots ascend.
__device__ __forceinline__ int first_row_from(const int* slot_of_row, int begin, int end,
                                              int64_t slot) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (slot_of_row[middle] < slot) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ __forceinline__ void capacity_select(const TypedCapacitySelectParams& params) {
  const CapacitySelectArgs& args = params.args;
  uint32_t* const expert_ids = params.expert_ids;
  const float* const routing_weights = params.routing_weights;
  const int* const slot_of_row = params.slot_of_row;
  SHARED_ARRAY(uint64_t, last, 1);
  SHARED_ARRAY(int, wanted, 1);
  SHARED_ARRAY(int, counters, DIGITS);
  const int expert = blockIdx.y;
  const int64_t sequence = blockIdx.x;
  const int64_t first_token = sequence * args.sequence_tokens;
  const int64_t end_token = min(first_token + args.sequence_tokens, (int64_t)args.num_tokens);
  const int64_t first_slot = first_token * args.top_k, end_slot = end_token * args.top_k;

  if (expert == args.num_experts) {
    if (args.later) return;
    for (int64_t slot = first_slot + threadIdx.x; slot < end_slot; slot += blockDim.x) {
      if (params.row_of_slot[slot] == INACTIVE) expert_ids[slot] = NO_EXPERT;
    }
    return;
  }

  const int slots = args.num_tokens * args.top_k;
  const int begin = min(max(params.expert_offsets[expert], 0), slots);
  const int end = min(max(params.expert_offsets[expert + 1], begin), slots);
  const int first_row = first_row_from(slot_of_row, begin, end, first_slot);
  const int end_row = first_row_from(slot_of_row, first_row, end, end_slot);
  const int count = end_row - first_row;
  const int64_t cell = sequence * args.num_experts + expert;
  // In a later round `kept` is the caller's and may have any value: no room
  // above the capacity.
  const uint32_t capacity = args.capacity, held = args.later ? params.kept[cell] : 0;
  const int room = held < capacity ? min(count, (int)(capacity - held)) : 0;

  // Rows are in the order of slots, so BY_TOKEN needs no search.
  const bool by_token = args.priority == CAPACITY_BY_TOKEN;
  const bool choose = 0 < room && room < count;
  if (threadIdx.x == 0) {
    wanted[0] = choose && !by_token ? room : 0;
    last[0] = choose ? 0 : ~(uint64_t)0;
    if (choose && by_token) last[0] = slot_at(slot_of_row, first_row + room - 1, slots);
  }
  __syncthreads();  // also after the last read of `kept`
  if (choose && !by_token) {
    select_smallest<1>(last, wanted, counters, args.key_bits, [=](auto visit) {
      for (int row = first_row + threadIdx.x; row < end_row; row += CAPACITY_SELECT_THREADS) {
        visit(0, key_of_slot(slot_at(slot_of_row, row, slots), routing_weights, args));
      }
    });
  }

  const uint64_t last_key = last[0];
  for (int row = first_row + threadIdx.x; row < end_row; row += CAPACITY_SELECT_THREADS) {
    const int slot = slot_at(slot_of_row, row, slots);
    const bool keep = room > 0 && key_of_slot(slot, routing_weights, args) <= last_key;
    if (keep) {
      expert_ids[slot] = args.first_expert + expert;
    } else if (!args.later) {
      expert_ids[slot] = NO_EXPERT;
    }
  }
  if (threadIdx.x == 0) {
    params.kept[cell] = held + room;
    params.dropped[cell] = (args.later ? params.dropped[cell] : 0) + count - room;
  }
}

// Four blocks a multiprocessor: for six of them, ptxas spills on sm_120.
// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(CAPACITY_SELECT_THREADS, 4)
moe_capacity_fwd_select(const TypedCapacitySelectParams params) { capacity_select(params); }
EXPORT_KERNEL(moe_capacity_fwd_select, CAPACITY_SELECT_THREADS)
// clang-format on

// ---- reassign -----------------------------------------------------------------------------------

__device__ __forceinline__ void capacity_reassign(const TypedCapacityReassignParams& params) {
  const CapacityReassignArgs& args = params.args;
  const int64_t token = (int64_t)blockIdx.x * CAPACITY_TOKEN_THREADS + threadIdx.x;
  if (token >= args.num_tokens) return;
  const int64_t first_slot = token * args.top_k;
  const uint32_t num_experts = args.num_experts, num_candidates = args.num_candidates;
  const uint32_t* own = params.expert_ids + first_slot;
  const uint32_t* candidates = params.candidates + token * args.num_candidates;
  const float* candidate_weights = params.candidate_weights + token * args.num_candidates;
  // Unsigned: the caller's value may have any bits, and from C on there are no candidates left.
  uint32_t next = args.later ? params.next_candidate[token] : 0;
  for (int k = 0; k < args.top_k; k++) {
    uint32_t request = NO_EXPERT;
    const bool is_dropped = own[k] < num_experts && params.kept_ids[first_slot + k] >= num_experts;
    while (is_dropped && request == NO_EXPERT && next < num_candidates) {
      const uint32_t candidate = candidates[next];
      bool is_new = candidate < num_experts;
      for (int j = 0; j < args.top_k && is_new; j++) is_new = own[j] != candidate;
      if (is_new) {
        request = candidate;
        params.routing_weights[first_slot + k] = candidate_weights[next];
      }
      next++;
    }
    params.requests[first_slot + k] = request;
  }
  params.next_candidate[token] = next;
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(CAPACITY_TOKEN_THREADS)
moe_capacity_fwd_reassign(const TypedCapacityReassignParams params) { capacity_reassign(params); }
EXPORT_KERNEL(moe_capacity_fwd_reassign, CAPACITY_TOKEN_THREADS)
// clang-format on

// ---- normalize ----------------------------------------------------------------------------------

__device__ __forceinline__ void capacity_normalize(const TypedCapacityNormalizeParams& params) {
  const CapacityNormalizeArgs& args = params.args;
  const uint32_t* const expert_ids = params.expert_ids;
  const float* const routing_weights = params.routing_weights;
  const int64_t token = (int64_t)blockIdx.x * CAPACITY_TOKEN_THREADS + threadIdx.x;
  if (token >= args.num_tokens) return;
  const int64_t first_slot = token * args.top_k, end_slot = first_slot + args.top_k;
  const uint32_t num_experts = args.num_experts;
  float divisor = 1.0f;
  if (args.divide) {
    float sum = 0.0f;
    for (int64_t slot = first_slot; slot < end_slot; slot++) {
      if (expert_ids[slot] < num_experts) sum = __fadd_rn(sum, routing_weights[slot]);
    }
    divisor = __fadd_rn(sum, args.epsilon);
    if (divisor < args.min) divisor = args.min;
  }
  for (int64_t slot = first_slot; slot < end_slot; slot++) {
    const uint32_t expert = expert_ids[slot];
    float weight = 0.0f;
    if (expert < num_experts) {
      weight = __fmul_rn(__fdiv_rn(routing_weights[slot], divisor), args.scale);
      if (params.expert_scale != nullptr) weight = __fmul_rn(weight, params.expert_scale[expert]);
    }
    params.normalized[slot] = weight == weight ? weight : 0.0f;  // 0 for 0 / 0
  }
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(CAPACITY_TOKEN_THREADS)
moe_capacity_fwd_normalize(const TypedCapacityNormalizeParams params) { capacity_normalize(params); }
EXPORT_KERNEL(moe_capacity_fwd_normalize, CAPACITY_TOKEN_THREADS)
// clang-format on
