// expert_choice: each expert takes the tokens of its largest scores.
//   Expert e takes the `capacity` tokens t whose scores[t, e] are largest, ties to the lower token;
//   -0 counts as 0 and NaN as -inf.
//   expert_ids[t, e]      = e if expert e takes token t, else NO_EXPERT
//   routing_weights[t, e] = scores[t, e] as f32 if it does, else 0
//   Slot (t, e) pairs token t with expert e: a plan of these ids has K = E.
// Launch  grid (E / columns, rounded up), block (EXPERT_CHOICE_THREADS): a block handles the
//         consecutive experts of one 32-byte sector of a row of scores, and finds the last key that
//         each expert takes, digit by digit from the top. Keys are (score descending, token).
// Roofline reads T*E*s bytes, writes 8*T*E. The kernel reads the scores once per digit (two or
//         three, more if scores tie around the last key) and once more.
// Writers one per element. Atomics add integers, in any order: deterministic, and exact.
#include "kernel.cuh"

#include "select.cuh"

template <typename Elem>
struct TypedExpertChoiceParams {
  uint32_t* expert_ids;    // [T, E] out
  float* routing_weights;  // [T, E] out
  const Elem* scores;      // [T, E]
  ExpertChoiceArgs args;
};
static_assert(sizeof(TypedExpertChoiceParams<float>) == sizeof(ExpertChoiceParams),
              "the same layout");
ASSERT_SAME_OFFSET(TypedExpertChoiceParams<float>, ExpertChoiceParams, expert_ids);
ASSERT_SAME_OFFSET(TypedExpertChoiceParams<float>, ExpertChoiceParams, routing_weights);
ASSERT_SAME_OFFSET(TypedExpertChoiceParams<float>, ExpertChoiceParams, scores);
ASSERT_SAME_OFFSET(TypedExpertChoiceParams<float>, ExpertChoiceParams, args);

// Upper bits of an f32 in which scores of a type can differ.
template <typename Elem>
constexpr int SCORE_BITS = 32;
template <>
constexpr int SCORE_BITS<f16> = 19;
template <>
constexpr int SCORE_BITS<bf16> = 16;

// Rows of scores that a thread loads ahead.
constexpr int EXPERT_CHOICE_LOADS = 4;

template <typename Elem>
__device__ __forceinline__ void expert_choice_fwd(const TypedExpertChoiceParams<Elem>& params) {
  constexpr int COLUMNS = EXPERT_CHOICE_COLUMN_BYTES / sizeof(Elem);
  constexpr int ROWS = EXPERT_CHOICE_THREADS / COLUMNS;
  static_assert(EXPERT_CHOICE_THREADS % COLUMNS == 0, "one column per thread");
  SHARED_ARRAY(uint64_t, last, COLUMNS);
  SHARED_ARRAY(int, wanted, COLUMNS);
  SHARED_ARRAY(int, counters, COLUMNS * DIGITS);
  const int column = threadIdx.x % COLUMNS, first_token = threadIdx.x / COLUMNS;
  const int expert = blockIdx.x * COLUMNS + column;
  const int num_tokens = params.args.num_tokens, num_experts = params.args.num_experts;
  const bool choose = 0 < params.args.capacity && params.args.capacity < num_tokens;
  if (threadIdx.x < COLUMNS) {
    wanted[column] = choose && expert < num_experts ? params.args.capacity : 0;
    last[column] = choose ? 0 : ~(uint64_t)0;
  }
  __syncthreads();

  // Calls visit(token, score) for the thread's tokens.
  const auto for_each_score = [=](auto visit) {
    if (expert >= num_experts) return;
    for (int64_t first = first_token; first < num_tokens; first += ROWS * EXPERT_CHOICE_LOADS) {
      Elem score[EXPERT_CHOICE_LOADS];
#pragma unroll
      for (int i = 0; i < EXPERT_CHOICE_LOADS; i++) {
        const int64_t token = first + i * ROWS;
        if (token < num_tokens) score[i] = params.scores[token * num_experts + expert];
      }
#pragma unroll
      for (int i = 0; i < EXPERT_CHOICE_LOADS; i++) {
        const int64_t token = first + i * ROWS;
        if (token < num_tokens) visit(token, to_f32(score[i]));
      }
    }
  };
  const auto token_key = [=](int64_t token, float score) {
    const uint64_t descending = ~key_of(cleaned(score)) >> (32 - SCORE_BITS<Elem>);
    return descending << params.args.token_bits | (uint64_t)token;
  };
  if (choose) {
    const int key_bits = SCORE_BITS<Elem> + params.args.token_bits;
    select_smallest<COLUMNS>(last, wanted, counters, key_bits, [=](auto visit) {
      for_each_score([=](int64_t token, float score) { visit(column, token_key(token, score)); });
    });
  }

  const uint64_t last_key = last[column];
  for_each_score([=](int64_t token, float score) {
    const bool taken = params.args.capacity > 0 && token_key(token, score) <= last_key;
    params.expert_ids[token * num_experts + expert] = taken ? (uint32_t)expert : NO_EXPERT;
    params.routing_weights[token * num_experts + expert] = taken ? score : 0.0f;
  });
}

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(EXPERT_CHOICE_THREADS)
moe_expert_choice_fwd_f32(const TypedExpertChoiceParams<float> params) { expert_choice_fwd(params); }
EXPORT_KERNEL(moe_expert_choice_fwd_f32, EXPERT_CHOICE_THREADS)

extern "C" __global__ void __launch_bounds__(EXPERT_CHOICE_THREADS)
moe_expert_choice_fwd_f16(const TypedExpertChoiceParams<f16> params) { expert_choice_fwd(params); }
EXPORT_KERNEL(moe_expert_choice_fwd_f16, EXPERT_CHOICE_THREADS)

extern "C" __global__ void __launch_bounds__(EXPERT_CHOICE_THREADS)
moe_expert_choice_fwd_bf16(const TypedExpertChoiceParams<bf16> params) { expert_choice_fwd(params); }
EXPORT_KERNEL(moe_expert_choice_fwd_bf16, EXPERT_CHOICE_THREADS)
// clang-format on
