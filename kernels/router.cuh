// One token of any router, as RouteArgs describes it. A team of threads keeps the token's row in
// shared memory. src/reference/route.rs states what each step computes, in the same order.
#pragma once

static_assert(ROUTE_MAX_GROUPS <= WARP_SIZE, "one lane per group");

// RouteParams with typed pointers. Absent inputs are null.
struct TypedRouteParams {
  uint32_t* expert_ids;          // [T, K] out
  float* routing_weights;        // [T, K] out
  float* scores;                 // [T, E] out; of `scores`, which has no other output
  const void* logits;            // [T, E] of args.elem
  const float* selection_bias;   // [E - num_sinks]
  const float* expert_scale;     // [E]
  const float* noise;            // [T, E]
  const void* noise_logits;      // [T, E] of args.elem
  const float* selection_noise;  // [T, K, E], of sparsemixer in training
  const float* midpoint_draws;   // [T, K], of the same
  const uint32_t* given_ids;     // [V, K]
  const uint32_t* token_ids;     // [T]
  const uint8_t* active;         // [T]
  RouteArgs args;
  int padding;
};
static_assert(sizeof(TypedRouteParams) == sizeof(RouteParams), "the same layout");
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, expert_ids);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, routing_weights);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, scores);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, logits);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, selection_bias);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, expert_scale);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, noise);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, noise_logits);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, selection_noise);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, midpoint_draws);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, given_ids);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, token_ids);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, active);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, args);
ASSERT_SAME_OFFSET(TypedRouteParams, RouteParams, padding);

// A softmax over a set of experts: the largest z, and the sum of shares.
struct Softmax {
  float max, sum;
};

// The score `kind`, from ROUTE_LOGIT to ROUTE_SQRT_SOFTPLUS.
__device__ __forceinline__ float score_of(int kind, float z, const Softmax& softmax) {
  if (kind == ROUTE_LOGIT) return z;
  if (kind == ROUTE_SOFTMAX) return __fdiv_rn(share(z, softmax.max), softmax.sum);
  if (kind == ROUTE_SQRT_SOFTPLUS) return __fsqrt_rn(softplus_f32(z));
  const float t = exp_f32(-fabsf(z));
  return __fdiv_rn(z < 0.0f ? t : 1.0f, __fadd_rn(1.0f, t));
}

// True if sparsemixer includes an expert: its z is the largest or near it.
__device__ __forceinline__ bool is_near(float z, float max, float jitter) {
  const float size = fabsf(z) > max ? fabsf(z) : max;
  return z == max || __fdiv_rn(__fsub_rn(max, z), size) <= __fadd_rn(jitter, jitter);
}

// In training, a choice other than the largest keeps its share if its draw is above the first
// constant. Otherwise its share is multiplied by the second: a third, as in Heun's method of
// third order.
constexpr float ROUTE_MIDPOINT_ABOVE = 0.75f, ROUTE_MIDPOINT_FACTOR = 0.3333f;

// Index of an expert in a row of shared memory. One word after every 32 is unused, so that neither
// consecutive experts nor groups of 32 have bank conflicts.
__device__ __forceinline__ int word_of(int expert) { return expert + expert / WARP_SIZE; }

// One token. A thread handles the experts, and later the slots, of its rank modulo Team::SIZE.
// The first step converts elements of any type to f32, so that the others are compiled once. Loops
// are not unrolled: their bodies are long, and other warps hide their latency.
template <typename Team>
struct Router {
  const TypedRouteParams& params;
  const RouteArgs& args;
  const Team& team;
  const int64_t token;
  float* z;        // [E] by word_of, shared
  uint32_t* keys;  // [E] by word_of, shared; then the ids [K]
  float* scores;   // [K], shared

  __device__ __forceinline__ uint32_t* ids() const { return keys; }
  __device__ __forceinline__ int chosen() const { return args.top_k - args.num_sinks; }
  __device__ __forceinline__ int choices() const { return args.num_experts - args.num_sinks; }

  template <typename Elem>
  __device__ __forceinline__ void read_logits() const {
    constexpr int LEN = Vec<Elem>::LEN;
    const Elem* row = static_cast<const Elem*>(params.logits) + token * args.num_experts;
    if (args.vector) {
      for (int first = team.rank * LEN; first < args.num_experts; first += Team::SIZE * LEN) {
        const Vec<Elem> loaded = load_vec(row + first);
#pragma unroll
        for (int j = 0; j < LEN; j++) z[word_of(first + j)] = to_f32(loaded.at[j]);
      }
    } else {
#pragma unroll 1
      for (int e = team.rank; e < args.num_experts; e += Team::SIZE) z[word_of(e)] = to_f32(row[e]);
    }
  }

  __device__ __forceinline__ void read_logits() const {
    if (args.elem == ELEM_F32) read_logits<float>();
    if (args.elem == ELEM_F16) read_logits<f16>();
    if (args.elem == ELEM_BF16) read_logits<bf16>();
    team.sync();
  }

  __device__ __forceinline__ float noise_logit(int64_t at) const {
    if (args.elem == ELEM_F32) return static_cast<const float*>(params.noise_logits)[at];
    if (args.elem == ELEM_F16) return to_f32(static_cast<const f16*>(params.noise_logits)[at]);
    return to_f32(static_cast<const bf16*>(params.noise_logits)[at]);
  }

  __device__ __forceinline__ void make_z() const {
    const int64_t row = token * args.num_experts;
#pragma unroll 1
    for (int e = team.rank; e < args.num_experts; e += Team::SIZE) {
      float value = cleaned(z[word_of(e)]);
      if (params.noise) {
        float noise = __fmul_rn(params.noise[row + e], args.noise_deviation);
        if (params.noise_logits) {
          noise = __fmul_rn(noise, softplus_f32(cleaned(noise_logit(row + e))));
        }
        value = cleaned(__fadd_rn(value, noise));
      }
      value = __fmul_rn(value, args.multiplier);
      if (args.softcap != 0.0f) {
        value = __fmul_rn(args.softcap, tanh_f32(__fdiv_rn(value, args.softcap)));
      }
      z[word_of(e)] = cleaned(value);
    }
  }

  __device__ __forceinline__ Softmax softmax_of_all() const {
    uint32_t key = 0;
#pragma unroll 1
    for (int e = team.rank; e < args.num_experts; e += Team::SIZE) {
      key = max(key, key_of(z[word_of(e)]));
    }
    const float most = number_of(team.max(key));
    uint64_t units = 0;
#pragma unroll 1
    for (int e = team.rank; e < args.num_experts; e += Team::SIZE) {
      units += share_units(z[word_of(e)], most);
    }
    return {most, sum_of_units(team.units(units))};
  }

  __device__ __forceinline__ Softmax softmax_of_chosen() const {
    uint32_t key = 0;
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      if (ids()[k] != NO_EXPERT) key = max(key, key_of(z[word_of(ids()[k])]));
    }
    const float most = number_of(team.max(key));
    uint64_t units = 0;
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      if (ids()[k] != NO_EXPERT) units += share_units(z[word_of(ids()[k])], most);
    }
    return {most, sum_of_units(team.units(units))};
  }

  // Keys of the values that select experts.
  __device__ __forceinline__ void make_keys(const Softmax& all) const {
#pragma unroll 1
    for (int e = team.rank; e < choices(); e += Team::SIZE) {
      float value = score_of(args.value, z[word_of(e)], all);
      if (params.selection_bias) value = __fadd_rn(value, params.selection_bias[e]);
      keys[word_of(e)] = key_of(cleaned(value));
    }
    team.sync();
  }

  // The best groups: bit (g << group_part_bits) is set for group g. Each warp computes all of them.
  __device__ __forceinline__ uint32_t best_groups() const {
    const int lane = threadIdx.x % WARP_SIZE, bits = args.group_part_bits;
    const int group = lane >> bits, part = lane & ((1 << bits) - 1);
    const int length = (args.group_size + (1 << bits) - 1) >> bits;
    TopTwo best;
    if (group < args.num_groups) {
      const int end = min((part + 1) * length, args.group_size);
#pragma unroll 1
      for (int i = part * length; i < end; i++) {
        best.add(keys[word_of(group * args.group_size + i)]);
      }
    }
    for (int offset = (1 << bits) / 2; offset > 0; offset /= 2) {
      const uint32_t largest = __shfl_xor_sync(FULL_WARP, best.largest, offset);
      const uint32_t next_largest = __shfl_xor_sync(FULL_WARP, best.next_largest, offset);
      best.add(largest);
      best.add(next_largest);
    }
    uint32_t score = best.largest;
    if (args.group_sum && best.next_largest != 0) {
      score = key_of(cleaned(__fadd_rn(number_of(best.largest), number_of(best.next_largest))));
    }
    int better = 0;
#pragma unroll 1
    for (int other = 0; other < args.num_groups; other++) {
      const uint32_t other_score = __shfl_sync(FULL_WARP, score, other << bits);
      better += other_score > score || (other_score == score && other < group);
    }
    const bool first_part = part == 0 && group < args.num_groups;
    return __ballot_sync(FULL_WARP, first_part && better < args.top_groups);
  }

  // The key of an expert below choices(), masked outside the best groups.
  __device__ __forceinline__ uint32_t key_in(uint32_t groups, int expert) const {
    const uint32_t group = __umulhi(2 * (uint32_t)expert, args.group_magic);
    const bool inside = groups >> (group << args.group_part_bits) & 1;
    return inside ? keys[word_of(expert)] : key_of(args.masked_zero ? 0.0f : -INFINITY);
  }

  // Sinks are the last experts in the last slots.
  __device__ __forceinline__ void add_sinks() const {
#pragma unroll 1
    for (int s = team.rank; s < args.num_sinks; s += Team::SIZE) {
      ids()[chosen() + s] = choices() + s;
    }
    team.sync();
  }

  // Given ids; NO_EXPERT for ids out of range.
  __device__ __forceinline__ void read_ids() const {
    const uint32_t row = params.token_ids ? params.token_ids[token] : (uint32_t)token;
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      uint32_t id = NO_EXPERT;
      if (row < (uint32_t)args.given_rows) id = params.given_ids[(int64_t)row * args.top_k + k];
      ids()[k] = id < (uint32_t)args.num_experts ? id : NO_EXPERT;
    }
    team.sync();
  }

  // The share of each choice among the experts that are near and were not chosen before it: those
  // that follow it in the order of keys. One warp per choice.
  __device__ __forceinline__ void score_by_sparsemixer() const {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll 1
    for (int k = team.warp; k < args.top_k; k += Team::WARPS) {
      const int choice = ids()[k];
      const float most = z[word_of(choice)];
      uint64_t units = 0;
#pragma unroll 1
      for (int e = lane; e < args.num_experts; e += WARP_SIZE) {
        const float other = z[word_of(e)];
        const bool left = other < most || (other == most && e >= choice);
        if (left && is_near(other, most, args.jitter)) units += share_units(other, most);
      }
      const float sum = sum_of_units(warp_units(units));
      if (lane == 0) scores[k] = __fdiv_rn(1.0f, sum);
    }
    team.sync();
  }

  // The lowest expert with the largest key. `key_at` is 0 for excluded experts.
  template <typename Key>
  __device__ __forceinline__ int best_expert(Key key_at) const {
    uint32_t best = 0, expert = NO_EXPERT;
#pragma unroll 1
    for (int e = team.rank; e < args.num_experts; e += Team::SIZE) {
      const uint32_t key = key_at(e);
      if (key > best) {
        best = key;
        expert = e;
      }
    }
    const uint32_t most = team.max(best);
    // The lowest expert has the largest complement.
    return ~team.max(best == most ? ~expert : 0);
  }

  // Sparsemixer in training: ids() and scores, one choice after the other. The z of a chosen expert
  // becomes number_of(0), whose key is 0 and which is near no expert.
  __device__ __forceinline__ void sample_by_sparsemixer() const {
    team.sync();
#pragma unroll 1
    for (int k = 0; k < args.top_k; k++) {
      const int64_t slot = token * args.top_k + k;
      const float* noise = params.selection_noise + slot * args.num_experts;
      const int top = best_expert([&](int e) { return key_of(z[word_of(e)]); });
      const float most = z[word_of(top)];
      const int choice = best_expert([&](int e) {
        const float value = z[word_of(e)];
        const bool near = is_near(value, most, args.jitter);
        return near ? key_of(cleaned(__fadd_rn(value, noise[e]))) : 0;
      });
      uint64_t units = 0;
#pragma unroll 1
      for (int e = team.rank; e < args.num_experts; e += Team::SIZE) {
        const float value = z[word_of(e)];
        if (is_near(value, most, args.jitter)) units += share_units(value, most);
      }
      const float sum = sum_of_units(team.units(units));
      team.sync();  // after every read of z: a warp's reduction does not order memory
      if (team.rank == 0) {
        const float score = __fdiv_rn(share(z[word_of(choice)], most), sum);
        const bool whole = choice == top || params.midpoint_draws[slot] > ROUTE_MIDPOINT_ABOVE;
        scores[k] = whole ? score : __fmul_rn(score, ROUTE_MIDPOINT_FACTOR);
        ids()[k] = choice;
        z[word_of(choice)] = number_of(0);
      }
      team.sync();
    }
  }

  __device__ __forceinline__ void score(const Softmax& all) const {
    if (args.score == ROUTE_SPARSEMIXER) return score_by_sparsemixer();
    const bool over_chosen = args.score == ROUTE_SOFTMAX_CHOSEN;
    const Softmax softmax = over_chosen ? softmax_of_chosen() : all;
    const int kind = over_chosen ? ROUTE_SOFTMAX : args.score;
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      const uint32_t id = ids()[k];
      scores[k] = id == NO_EXPERT ? 0.0f : score_of(kind, z[word_of(id)], softmax);
    }
  }

  // The sum of term(score) over all slots, 32 slots per warp.
  template <typename Term>
  __device__ __forceinline__ float sum_of_slots(Term term) const {
    const int lane = threadIdx.x % WARP_SIZE;
    float chunk = 0.0f;
#pragma unroll 1
    for (int first = team.warp * WARP_SIZE; first < args.top_k; first += Team::SIZE) {
      chunk = warp_sum(first + lane < args.top_k ? term(scores[first + lane]) : 0.0f);
      if (Team::WARPS > 1 && lane == 0) team.add_chunk(first / WARP_SIZE, chunk);
    }
    return team.sum_of_chunks(chunk, (args.top_k + WARP_SIZE - 1) / WARP_SIZE);
  }

  // The p-norm of the scores. Divides them by the largest first, so that no power overflows.
  __device__ __forceinline__ float norm() const {
    const float p = args.divisor_number;
    uint32_t most = 0;
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      most = max(most, __float_as_uint(fabsf(scores[k])));
    }
    const float largest = __uint_as_float(team.max(most));
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      scores[k] = __fdiv_rn(scores[k], largest);
    }
    const float sum = sum_of_slots([p](float score) {
      const float size = fabsf(score);
      return p == 1.0f ? size : p == 2.0f ? __fmul_rn(size, size) : pow_f32(size, p);
    });
    if (p == 1.0f || !(sum >= 1.0f)) return sum;
    if (p == 2.0f) return __fsqrt_rn(sum);
    return __fdiv_rn(1.0f, exp_f32(-__fdiv_rn(log_f32(sum), p)));
  }

  __device__ __forceinline__ float divisor() const {
    if (args.divisor == ROUTE_BY_NOTHING) return 1.0f;
    if (args.divisor == ROUTE_BY_NORM) return norm();
    const float sum = sum_of_slots([](float score) { return score; });
    if (args.divisor == ROUTE_BY_SUM) return __fadd_rn(sum, args.divisor_number);
    return sum > args.divisor_number ? sum : args.divisor_number;
  }

  // Writes the id and the weight of each slot. The weight is 0 for NaN and for slots without an
  // expert.
  __device__ __forceinline__ void write(float divisor) const {
#pragma unroll 1
    for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
      const uint32_t id = ids()[k];
      float weight = __fmul_rn(__fdiv_rn(scores[k], divisor), args.scale);
      if (params.expert_scale && id != NO_EXPERT) {
        weight = __fmul_rn(weight, params.expert_scale[id]);
      }
      params.expert_ids[token * args.top_k + k] = id;
      params.routing_weights[token * args.top_k + k] =
          id == NO_EXPERT || weight != weight ? 0.0f : weight;
    }
  }

  // Writes the score args.value of every expert: [E].
  __device__ __forceinline__ void write_scores() const {
    const bool active = !params.active || params.active[token] != 0;
    Softmax all = {0.0f, 1.0f};
    if (active) {
      read_logits();
      make_z();
      if (args.value == ROUTE_SOFTMAX) all = softmax_of_all();
    }
    float* const row = params.scores + token * args.num_experts;
    const float inactive_score = args.value == ROUTE_LOGIT ? -INFINITY : 0.0f;
#pragma unroll 1
    for (int e = team.rank; e < args.num_experts; e += Team::SIZE) {
      row[e] = active ? score_of(args.value, z[word_of(e)], all) : inactive_score;
    }
  }

  // Everything but the selection, in which `select` writes ids().
  template <typename Select>
  __device__ __forceinline__ void route(Select select) const {
    if (params.active && params.active[token] == 0) {
#pragma unroll 1
      for (int k = team.rank; k < args.top_k; k += Team::SIZE) {
        params.expert_ids[token * args.top_k + k] = NO_EXPERT;
        params.routing_weights[token * args.top_k + k] = 0.0f;
      }
      return;
    }
    read_logits();
    make_z();
    if (params.selection_noise) {
      sample_by_sparsemixer();
      return write(1.0f);
    }
    Softmax all = {0.0f, 1.0f};
    if (args.score == ROUTE_SOFTMAX || args.value == ROUTE_SOFTMAX) all = softmax_of_all();
    if (params.given_ids) {
      read_ids();
    } else {
      make_keys(all);
      // Without groups every expert is in group 0.
      select(args.num_groups > 0 ? best_groups() : 1);
      add_sinks();
    }
    score(all);
    write(divisor());
  }
};
