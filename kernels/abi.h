// The constants and structs that kernels and host code share. nvcc, the host compiler of the
// software device, and bindgen (src/abi.rs) all read this header. Plain C, one section per
// operation, in the order of a forward pass.
// A kernel has one parameter, a struct <Op>Params: the device addresses, outputs first and null
// where an operand is absent, then the struct <Op>Args of numbers, then explicit padding.
#ifndef MOE_ABI_H
#define MOE_ABI_H

// The largest number of experts of a layer.
#define MAX_EXPERTS 4096

// The element type, for kernels that are not compiled once per type.
#define ELEM_F32 0
#define ELEM_F16 1
#define ELEM_BF16 2

// In the plan's maps: the row of an inactive slot, and the token of an unused row.
#define INACTIVE (-1)

// ---- route ------------------------------------------------------------------------------------

#define ROUTE_PICK_THREADS 128   // narrow and wide: one warp per token
#define ROUTE_PICK_MAX_TOP_K 32  // narrow and wide: one lane per choice
#define ROUTE_NARROW_MAX_EXPERTS 256
#define ROUTE_WIDE_MAX_EXPERTS 1024
#define ROUTE_SORT_THREADS 256    // sort: one block per token
#define ROUTE_SORT_ENTRY_BYTES 8  // sort: shared memory begins with sort_length of these
#define ROUTE_MAX_GROUPS 32       // one lane per group

// Functions of a logit: the value that selects an expert, and the score that becomes its weight.
#define ROUTE_LOGIT 0
#define ROUTE_SOFTMAX 1  // over all experts
#define ROUTE_SIGMOID 2
#define ROUTE_SQRT_SOFTPLUS 3
#define ROUTE_SOFTMAX_CHOSEN 4  // over the chosen experts; no value
#define ROUTE_SPARSEMIXER 5     // no value either

// The divisor of the scores.
#define ROUTE_BY_NOTHING 0
#define ROUTE_BY_SUM 1           // sum + divisor_number
#define ROUTE_BY_SUM_AT_LEAST 2  // max(sum, divisor_number)
#define ROUTE_BY_NORM 3          // divisor_number is its p

typedef struct RouteArgs {
  int num_tokens;   // T
  int num_experts;  // E
  int top_k;        // K
  int num_sinks;    // The last experts, which are in the last slots of every token.
  int sort_length;  // The least power of two >= E; read by sort alone.
  int vector;       // 1: every row of logits starts at a 16-byte boundary.
  int elem;         // ELEM_..., of logits and noise logits; unused by the plain entries.
  int row_words;    // Words of a row in shared memory: E, and one more after every 32.
  float multiplier;
  float softcap;   // 0: none
  int value;       // ROUTE_LOGIT to ROUTE_SQRT_SOFTPLUS
  int num_groups;  // 0: none
  int top_groups;
  int group_size;        // Experts of a group.
  unsigned group_magic;  // ceil(2^31 / group_size): divides an expert by group_size; 0: no groups
  int group_part_bits;   // log2 of the lanes of a group.
  int group_sum;         // 1: a group's score is the sum of its two largest values; 0: its largest.
  int masked_zero;       // 1: values outside the best groups become 0; 0: -inf.
  int given_rows;        // V of given_ids
  int score;             // ROUTE_LOGIT to ROUTE_SPARSEMIXER; a softmax for the plain entries.
  float jitter;          // of sparsemixer
  int divisor;           // ROUTE_BY_...
  float divisor_number;  // epsilon, the lower bound of the sum, or p
  float scale;
  float noise_deviation;  // Multiplies the noise.
} RouteArgs;

// plain_narrow and plain_wide, which have no other inputs. Beyond 128 bytes of parameters, nvcc
// unrolls their loops otherwise and needs up to 40 registers more.
typedef struct RoutePlainParams {
  unsigned long long expert_ids;       // [T, K] out
  unsigned long long routing_weights;  // [T, K] out
  unsigned long long logits;           // [T, E]
  RouteArgs args;
  int padding;
} RoutePlainParams;

// narrow, wide, sort and scores. Absent inputs are null.
typedef struct RouteParams {
  unsigned long long expert_ids;       // [T, K] out
  unsigned long long routing_weights;  // [T, K] out
  unsigned long long scores;           // [T, E] out; of `scores`, which has no other output
  unsigned long long logits;           // [T, E] of args.elem
  unsigned long long selection_bias;   // [E - num_sinks]
  unsigned long long expert_scale;     // [E]
  unsigned long long noise;            // [T, E]
  unsigned long long noise_logits;     // [T, E] of args.elem
  unsigned long long selection_noise;  // [T, K, E], of sparsemixer in training
  unsigned long long midpoint_draws;   // [T, K], of the same
  unsigned long long given_ids;        // [V, K]
  unsigned long long token_ids;        // [T]
  unsigned long long active;           // [T]
  RouteArgs args;
  int padding;
} RouteParams;

// ---- plan -------------------------------------------------------------------------------------

#define PLAN_THREADS 256  // count, place and single, at most
#define PLAN_SCAN_THREADS 1024
#define PLAN_MAX_COUNTERS 12000    // Counters of a block in shared memory, 4 bytes each.
#define PLAN_MIN_BLOCK_SLOTS 1024  // Up to this many slots, one block does everything.
#define PLAN_MAX_BLOCKS 128

typedef struct PlanArgs {
  int slots;         // T * K
  int num_experts;   // E, the experts of the plan.
  int top_k;         // K
  int block_m;       // Rows of a tile, at most.
  int max_tiles;     // Length of the list of tiles.
  int num_blocks;    // Blocks of count and place.
  int block_slots;   // Slots of a block; the last block may have fewer.
  int first_expert;  // The id of the plan's expert 0.
} PlanArgs;

// The parameter of every plan kernel.
typedef struct PlanParams {
  unsigned long long expert_offsets;  // [E + 1] out
  unsigned long long row_of_slot;     // [T, K] out
  unsigned long long token_of_row;    // [T * K] out
  unsigned long long tiles;           // [max_tiles] out
  unsigned long long tile_offsets;    // [E + 1] out
  unsigned long long counts;          // [E, num_blocks] out; scan turns counts into first rows
  unsigned long long expert_ids;      // [T, K] or null: all ids are 0
  PlanArgs args;
} PlanParams;

// ---- capacity ---------------------------------------------------------------------------------

#define CAPACITY_SELECT_THREADS 256
#define CAPACITY_TOKEN_THREADS 128

// The order in which slots take an expert's rows.
#define CAPACITY_BY_TOKEN 0
#define CAPACITY_BY_CHOICE 1
#define CAPACITY_BY_WEIGHT 2
#define CAPACITY_BY_CHOICE_AND_TOP_WEIGHT 3

typedef struct CapacitySelectArgs {
  int num_tokens;       // T
  int num_experts;      // E, of the plan
  int top_k;            // K
  int first_expert;     // The id of the plan's expert 0.
  int sequence_tokens;  // Tokens of a sequence; the last sequence may have fewer.
  int capacity;         // Rows of an expert in a sequence.
  int priority;         // CAPACITY_BY_...
  int token_bits;       // Bits of a token's index, or for BY_TOKEN and BY_WEIGHT of a slot's.
  int key_bits;         // Bits of a sort key.
  int later;            // 1: a later round; slots that earlier rounds kept stay and count.
} CapacitySelectArgs;

typedef struct CapacitySelectParams {
  unsigned long long expert_ids;       // [T, K] out
  unsigned long long kept;             // [sequences, E] out, in and out if later
  unsigned long long dropped;          // [sequences, E] out, in and out if later
  unsigned long long routing_weights;  // [T, K], unused by token and by choice
  unsigned long long expert_offsets;   // [E + 1]
  unsigned long long row_of_slot;      // [T * K]
  unsigned long long slot_of_row;      // [T * K]
  CapacitySelectArgs args;
} CapacitySelectParams;

typedef struct CapacityReassignArgs {
  int num_tokens;      // T
  int num_experts;     // E, of the router
  int top_k;           // K
  int num_candidates;  // C
  int later;           // 1: a token continues at next_candidate; 0: at its first candidate.
} CapacityReassignArgs;

typedef struct CapacityReassignParams {
  unsigned long long requests;           // [T, K] out
  unsigned long long routing_weights;    // [T, K] in and out: written where there is a request
  unsigned long long next_candidate;     // [T] out, in and out if later
  unsigned long long expert_ids;         // [T, K], the router's
  unsigned long long kept_ids;           // [T, K], as select has left them
  unsigned long long candidates;         // [T, C]
  unsigned long long candidate_weights;  // [T, C]
  CapacityReassignArgs args;
  int padding;
} CapacityReassignParams;

typedef struct CapacityNormalizeArgs {
  int num_tokens;   // T
  int num_experts;  // E, of the router
  int top_k;        // K
  int divide;       // 1: by the sum of the kept weights.
  float epsilon;    // Added to the sum.
  float min;        // Lower bound of the divisor.
  float scale;      // Multiplies the quotient.
} CapacityNormalizeArgs;

typedef struct CapacityNormalizeParams {
  unsigned long long normalized;       // [T, K] out
  unsigned long long expert_scale;     // [E] or null
  unsigned long long expert_ids;       // [T, K], as select has left them
  unsigned long long routing_weights;  // [T, K]
  CapacityNormalizeArgs args;
  int padding;
} CapacityNormalizeParams;

// ---- expert_choice ----------------------------------------------------------------------------

#define EXPERT_CHOICE_THREADS 256
#define EXPERT_CHOICE_COLUMN_BYTES 32  // A block's columns of scores: one sector of memory.

typedef struct ExpertChoiceArgs {
  int num_tokens;   // T
  int num_experts;  // E
  int capacity;     // Tokens of an expert, at most T.
  int token_bits;   // Bits of a token's index.
} ExpertChoiceArgs;

typedef struct ExpertChoiceParams {
  unsigned long long expert_ids;       // [T, E] out
  unsigned long long routing_weights;  // [T, E] out
  unsigned long long scores;           // [T, E]
  ExpertChoiceArgs args;
} ExpertChoiceParams;

// ---- noise ------------------------------------------------------------------------------------

#define NOISE_THREADS 256

#define NOISE_UNIFORM 0
#define NOISE_NORMAL 1
#define NOISE_GUMBEL 2

typedef struct NoiseArgs {
  unsigned long long seed;
  unsigned long long offset;  // Index of the first element in the seed's sequence.
  long long len;
  int distribution;  // NOISE_...
  int vector;        // 1: every group of four elements starts at a 16-byte boundary.
} NoiseArgs;

typedef struct NoiseParams {
  unsigned long long noise;  // [len] out
  NoiseArgs args;
} NoiseParams;

// ---- jitter -----------------------------------------------------------------------------------

#define JITTER_THREADS 256

typedef struct JitterArgs {
  long long len;  // T * H
  float epsilon;
  int vector;  // 1: all buffers start at a 16-byte boundary.
} JitterArgs;

typedef struct JitterParams {
  unsigned long long jittered;  // [T, H] out
  unsigned long long x;         // [T, H]
  unsigned long long u;         // [T, H] f32
  JitterArgs args;
} JitterParams;

// ---- permute --------------------------------------------------------------------------------

#define PERMUTE_THREADS 256

typedef struct PermuteArgs {
  int num_experts;  // E; expert_offsets[E] is the number of rows in use.
  int hidden;       // H
  int top_k;        // K
  int vector;       // 1: every row of x and xp starts at a 16-byte boundary.
} PermuteArgs;

typedef struct PermuteParams {
  unsigned long long xp;              // [R, H], written whole
  unsigned long long x;               // [T, H]
  unsigned long long row_of_slot;     // [T, K]; -1: the slot is inactive
  unsigned long long expert_offsets;  // [E + 1]
  PermuteArgs args;
} PermuteParams;

// ---- grouped_gemm -----------------------------------------------------------------------------

// The rows of a tile and of its weights, in stages of 128 bytes of inputs each: 97 KiB, so that one
// configuration fits every GPU since sm_80 (at least 99 KiB per block).
#define GEMM_BLOCK_M 128
#define GEMM_BLOCK_N 128
#define GEMM_STAGES 3
#define GROUPED_GEMM_SMEM_BYTES \
  (GEMM_STAGES * (GEMM_BLOCK_M + GEMM_BLOCK_N) * 128 + GEMM_BLOCK_M * 8)
#define GEMM_THREADS_MMA 128  // f16 and bf16
#define GEMM_THREADS_FMA 256  // f32

// Tiles whose blocks have adjacent indices, so that they share weights in L2. The grid is
// div_ceil(bound on tiles, GEMM_TILE_GROUP) * GEMM_TILE_GROUP * div_ceil(out_features, columns),
// where a block has GEMM_BLOCK_N columns, or half of that with a gate.
#define GEMM_TILE_GROUP 8

// Consecutive rows of one expert: an entry of the plan's list.
typedef struct GemmTile {
  int expert;
  int first_row;
  int num_rows;  // 1 to GEMM_BLOCK_M
  int reserved;
} GemmTile;

#define ACTIVATION_SILU 0  // g * sigmoid(alpha * g)
#define ACTIVATION_GELU 1
#define ACTIVATION_GELU_TANH 2
#define ACTIVATION_RELU 3
#define ACTIVATION_RELU_SQUARED 4

// min(f(min(g, limit_before)), limit_after) * (clamp(u, -limit_up, limit_up) + up_offset).
// With soft_cap, which SILU alone has, f(g) is gate_cap * tanh(g / gate_cap) * sigmoid(alpha * g),
// and up_cap * tanh(u / up_cap) replaces u. A limit of infinity is none.
typedef struct ActivationArgs {
  int function;  // ACTIVATION_*
  float alpha;   // SILU
  float limit_before;
  float limit_after;
  float limit_up;
  float up_offset;
  int soft_cap;  // 1: gate_cap and up_cap apply.
  float gate_cap;
  float up_cap;
} ActivationArgs;

// Element (expert, out, in) of the weights is expert * expert_stride + out * out_stride +
// in * in_stride elements from their start.
typedef struct GroupedGemmArgs {
  long long expert_stride;
  int out_stride;
  int in_stride;
  int rows;          // R, the rows of the output; expert_offsets[E] of them are used.
  int x_rows;        // The rows of x: T with a gather, else R.
  int max_tiles;     // The bound on tiles for any routing.
  int out_features;  // The columns of the output; I for gate_up.
  int in_features;   // The columns of x.
  int num_experts;   // E
  int vector_load;   // 1: every row of x and of the weights starts at a 16-byte boundary.
  int vector_store;  // 1: every row of the output does.
} GroupedGemmArgs;

typedef struct GroupedGemmParams {
  unsigned long long y;               // [R, out]
  unsigned long long x;               // [T, in] with token_of_row, else [R, in]
  unsigned long long w;               // [E, out, in] or [E, in, out]
  unsigned long long bias;            // [E, out] or null
  unsigned long long token_of_row;    // [R], or null: no gather
  unsigned long long expert_offsets;  // [E + 1]
  unsigned long long tiles;           // GemmTile [num_tiles]
  unsigned long long num_tiles;       // [1]
  GroupedGemmArgs args;
} GroupedGemmParams;

typedef struct WeightedGemmParams {
  GroupedGemmParams gemm;
  unsigned long long routing_weights;  // f32 [T, K]
  unsigned long long row_of_slot;      // [T * K]
  unsigned long long token_of_row;     // [R]
  int top_k;                           // K
  int num_tokens;                      // T
} WeightedGemmParams;

typedef struct GateUpArgs {
  GroupedGemmArgs gemm;
  ActivationArgs activation;
  int gated;               // 1: gate and up; 0: up alone.
  int gather;              // 1: x has a row per token; 0: a row per row of the output.
  int top_k;               // K
  int num_tokens;          // T
  int weight_inside;       // 1: routing weights multiply the activation's result; 0: the sums.
  int bias_expert_stride;  // As for the weights; both biases have these strides.
  int bias_out_stride;
} GateUpArgs;

typedef struct GateUpParams {
  unsigned long long act;              // [R, I]
  unsigned long long x;                // [T, in] with gather, else [R, in]
  unsigned long long gate;             // [E, I, in] by strides; unused without a gate
  unsigned long long up;               // [E, I, in] by strides
  unsigned long long gate_bias;        // [E, I] by strides, or null
  unsigned long long up_bias;          // [E, I] by strides, or null
  unsigned long long routing_weights;  // f32 [T, K] or null
  unsigned long long row_of_slot;      // [T * K], read with routing_weights
  unsigned long long token_of_row;     // [R], or null without gather and routing_weights
  unsigned long long expert_offsets;   // [E + 1]
  unsigned long long tiles;            // GemmTile [num_tiles]
  unsigned long long num_tiles;        // [1]
  GateUpArgs args;
} GateUpParams;

// ---- combine ----------------------------------------------------------------------------------

#define COMBINE_THREADS 256  // at most

typedef struct CombineArgs {
  int hidden;          // H
  int top_k;           // K
  int first_identity;  // The first id of an identity expert, which returns the token itself.
  int num_identity;    // The number of identity experts; if 0, expert_ids and x are not read.
  int average;         // 1: the result is halved.
  int rows_weighted;   // 1: yp is weighted already; weights are of identity experts only. f16 only.
  int vector;          // 1: every row of H elements starts at a 16-byte boundary.
} CombineArgs;

typedef struct CombineParams {
  unsigned long long y;                // [T, H], written whole
  unsigned long long yp;               // [R, H]
  unsigned long long routing_weights;  // [T, K] or null
  unsigned long long x;                // [T, H], for identity experts
  unsigned long long output_bias;      // [H] or null
  unsigned long long shared;           // [T, H] or null
  unsigned long long shared_gate;      // [T] or null
  unsigned long long row_of_slot;      // [T, K]; -1: the slot is inactive
  unsigned long long expert_ids;       // [T, K], for identity experts
  CombineArgs args;
  int padding;
} CombineParams;

// ---- rms_norm ---------------------------------------------------------------------------------

#define RMS_NORM_THREADS 256  // at most

typedef struct RmsNormArgs {
  int hidden;       // H
  int num_experts;  // E; unless expert_offsets is null, expert_offsets[E] rows are in use.
  float epsilon;    // Added to the mean square.
  float offset;     // Added to every weight.
  int scale_first;  // 1: x is multiplied by the weights before the norm, not after it.
  int vector;       // 1: every row of x and y, and the weights, start at a 16-byte boundary.
} RmsNormArgs;

typedef struct RmsNormParams {
  unsigned long long y;               // [R, H], written whole; may be x
  unsigned long long x;               // [R, H]
  unsigned long long weight;          // [H] or null
  unsigned long long expert_offsets;  // [E + 1] or null
  RmsNormArgs args;
} RmsNormParams;

// ---- router_gemm ------------------------------------------------------------------------------

// All bodies sum over H in the same order: H is cut into segments of columns, and a segment into
// chunks of columns that ROUTER_GEMM_LANES lanes take in turn. A step is one chunk per lane.
#define ROUTER_GEMM_CHUNK 8
#define ROUTER_GEMM_LANES 8
#define ROUTER_GEMM_STEP (ROUTER_GEMM_CHUNK * ROUTER_GEMM_LANES)
#define ROUTER_GEMM_SEGMENT 512
// one and few: the segments that a block sums in parallel, a power of two.
#define ROUTER_GEMM_MIN_SEGMENTS 4
#define ROUTER_GEMM_MAX_SEGMENTS 32
#define ROUTER_GEMM_MAX_THREADS (ROUTER_GEMM_MAX_SEGMENTS * ROUTER_GEMM_LANES)
#define ROUTER_GEMM_FEW_TOKENS 8
#define ROUTER_GEMM_FEW_EXPERTS 4
// tile: the tokens and experts of a block, and the stages of its pipeline, one step each.
#define ROUTER_GEMM_TILE_TOKENS 64
#define ROUTER_GEMM_TILE_EXPERTS 32
#define ROUTER_GEMM_TILE_THREADS 256
#define ROUTER_GEMM_STAGES 3

typedef struct RouterGemmArgs {
  int num_tokens;   // T
  int num_experts;  // E
  int hidden;       // H
  int f32_logits;   // 1: logits are stored as f32; 0: as Elem.
  int vector;       // 1: every row of x and router_gate starts at a 16-byte boundary.
} RouterGemmArgs;

typedef struct RouterGemmParams {
  unsigned long long logits;       // [T, E], written whole
  unsigned long long x;            // [T, H]
  unsigned long long router_gate;  // [E, H]
  unsigned long long bias;         // [E] or null
  RouterGemmArgs args;
  int padding;
} RouterGemmParams;

#endif  // MOE_ABI_H
