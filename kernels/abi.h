// The one place where a constant or an argument struct that two languages share is written: nvcc,
// the host compiler of the software device, and bindgen (src/abi.rs) all read this header.
// Plain C. A section per operation, in the order of a forward pass.
#ifndef MOE_ABI_H
#define MOE_ABI_H

// The most experts that one layer may have.
#define MAX_EXPERTS 4096

// The type of elements, for kernels that are not compiled for each of them.
#define ELEM_F32 0
#define ELEM_F16 1
#define ELEM_BF16 2

// Both maps of the plan hold this where there is nothing: a slot without a row, a row without a token.
#define INACTIVE (-1)

// ---- route ------------------------------------------------------------------------------------

#define ROUTE_PICK_THREADS 128      // narrow and wide: a warp per token
#define ROUTE_PICK_MAX_TOP_K 32     // narrow and wide: a lane per choice
#define ROUTE_NARROW_MAX_EXPERTS 256
#define ROUTE_WIDE_MAX_EXPERTS 1024
#define ROUTE_SORT_THREADS 256      // sort: a block per token
#define ROUTE_SORT_ENTRY_BYTES 8    // sort: shared memory begins with sort_length of these
#define ROUTE_MAX_GROUPS 32         // a lane per group

// What a number of an expert is made of: the value it is chosen by, and the score that weighs it.
#define ROUTE_LOGIT 0
#define ROUTE_SOFTMAX 1             // over all experts
#define ROUTE_SIGMOID 2
#define ROUTE_SQRT_SOFTPLUS 3
#define ROUTE_SOFTMAX_CHOSEN 4      // over the chosen experts; no value
#define ROUTE_SPARSEMIXER 5         // no value either

// What scores are divided by.
#define ROUTE_BY_NOTHING 0
#define ROUTE_BY_SUM 1              // sum + divisor_number
#define ROUTE_BY_SUM_AT_LEAST 2     // max(sum, divisor_number)
#define ROUTE_BY_NORM 3             // divisor_number is its p

typedef struct RouteArgs {
  int num_tokens;        // T
  int num_experts;       // E
  int top_k;             // K
  int num_sinks;         // The last so many experts, and slots.
  int sort_length;       // The power of two from E on; only sort reads it.
  int vector;            // 1: every row of logits starts at a 16-byte boundary.
  int elem;              // ELEM_..., of logits and noise logits; the plain entries know it.
  int row_words;         // E and one word more after every 32.
  float multiplier;
  float softcap;         // 0: none
  int value;             // ROUTE_LOGIT to ROUTE_SQRT_SOFTPLUS
  int num_groups;        // 0: none
  int top_groups;
  int group_size;        // Experts of a group.
  unsigned group_magic;  // ceil(2^31 / group_size), so that a product finds an expert's group; 0: none
  int group_part_bits;   // 2^this lanes look at a group.
  int group_sum;         // 1: a group is worth the sum of its two best values; 0: its best.
  int masked_zero;       // 1: what is outside the best groups has value 0; 0: -inf.
  int given_rows;        // V of given_ids
  int score;             // ROUTE_LOGIT to ROUTE_SPARSEMIXER; of the plain entries, a softmax.
  float jitter;          // of sparsemixer
  int divisor;           // ROUTE_BY_...
  float divisor_number;  // epsilon, the least sum, or p
  float scale;
  float noise_deviation;  // Multiplies the noise.
} RouteArgs;

// Addresses that route reads, 0 where there is nothing. The kernel has them as pointers.
typedef struct RouteAddresses {
  unsigned long long logits;          // [T, E]
  unsigned long long selection_bias;  // [E - num_sinks]
  unsigned long long expert_scale;    // [E]
  unsigned long long noise;           // [T, E]
  unsigned long long noise_logits;    // [T, E]
  unsigned long long selection_noise;  // [T, K, E], of sparsemixer in training
  unsigned long long midpoint_draws;  // [T, K], of the same
  unsigned long long given_ids;       // [V, K]
  unsigned long long token_ids;       // [T]
  unsigned long long active;          // [T]
} RouteAddresses;

// ---- plan -------------------------------------------------------------------------------------

#define PLAN_THREADS 256            // count, place and single, at most
#define PLAN_SCAN_THREADS 1024
#define PLAN_MAX_COUNTERS 12000     // A block's counters in shared memory, 4 bytes each.
#define PLAN_MIN_BLOCK_SLOTS 1024   // Up to this many slots go to one block.
#define PLAN_MAX_BLOCKS 128

typedef struct PlanArgs {
  int slots;        // T * K
  int num_experts;  // E, the experts that have rows here.
  int top_k;        // K
  int block_m;      // Rows of a tile.
  int max_tiles;    // Tiles that the list has room for.
  int num_blocks;   // Blocks of count and place.
  int block_slots;  // Slots of a block; the last one may have fewer.
  int first_expert;  // The id of the plan's expert 0.
} PlanArgs;

// ---- capacity ---------------------------------------------------------------------------------

#define CAPACITY_SELECT_THREADS 256
#define CAPACITY_TOKEN_THREADS 128

// Which slots of an expert come first.
#define CAPACITY_BY_TOKEN 0
#define CAPACITY_BY_CHOICE 1
#define CAPACITY_BY_WEIGHT 2
#define CAPACITY_BY_CHOICE_AND_TOP_WEIGHT 3

typedef struct CapacitySelectArgs {
  int num_tokens;       // T
  int num_experts;      // E, of the plan
  int top_k;            // K
  int first_expert;     // The id of the plan's expert 0.
  int sequence_tokens;  // Tokens of a sequence; the last one may have fewer.
  int capacity;         // Rows of an expert in a sequence.
  int priority;         // CAPACITY_BY_...
  int token_bits;       // A token's number, or for BY_TOKEN and BY_WEIGHT a slot's, has so many bits.
  int key_bits;         // What orders slots has so many.
  int later;            // 1: what experts hold from rounds before counts, and stays.
} CapacitySelectArgs;

typedef struct CapacityAskArgs {
  int num_tokens;      // T
  int num_experts;     // E, of the router
  int top_k;           // K
  int num_candidates;  // C
  int later;           // 1: next_candidate says where a token goes on; 0: at its first candidate.
} CapacityAskArgs;

typedef struct CapacityNormalizeArgs {
  int num_tokens;   // T
  int num_experts;  // E, of the router
  int top_k;        // K
  int divide;       // 1: by the sum of what is kept.
  float epsilon;    // Added to the sum.
  float min;        // The least divisor.
  float scale;      // Multiplies the quotient.
} CapacityNormalizeArgs;

// ---- expert_choice ----------------------------------------------------------------------------

#define EXPERT_CHOICE_THREADS 256
#define EXPERT_CHOICE_COLUMN_BYTES 32  // A block's columns of a row of scores: one sector of memory.

typedef struct ExpertChoiceArgs {
  int num_tokens;   // T
  int num_experts;  // E
  int capacity;     // Tokens of an expert, at most T.
  int token_bits;   // A token's number has so many bits.
} ExpertChoiceArgs;

// ---- noise ------------------------------------------------------------------------------------

#define NOISE_THREADS 256

#define NOISE_UNIFORM 0
#define NOISE_NORMAL 1
#define NOISE_GUMBEL 2

typedef struct NoiseArgs {
  unsigned long long seed;
  unsigned long long offset;  // The number of the first element in the seed's sequence.
  long long len;
  int distribution;  // NOISE_...
  int vector;        // 1: every group of four elements starts at a 16-byte boundary.
} NoiseArgs;

// ---- jitter -----------------------------------------------------------------------------------

#define JITTER_THREADS 256

typedef struct JitterArgs {
  long long len;  // T * H
  float epsilon;
  int vector;  // 1: all buffers start at a 16-byte boundary.
} JitterArgs;

// ---- permute --------------------------------------------------------------------------------

#define PERMUTE_THREADS 256

typedef struct PermuteArgs {
  int num_experts;  // E: expert_offsets[E] is the number of rows in use.
  int hidden;       // H
  int top_k;        // K
  int vector;       // 1: every row of x and xp starts at a 16-byte boundary.
} PermuteArgs;

// ---- grouped_gemm -----------------------------------------------------------------------------

// The rows of a tile and of its weights, in stages of 128 bytes of inputs each: 97 KiB, so that one
// configuration fits every GPU since sm_80 (at least 99 KiB per block).
#define GEMM_BLOCK_M 128
#define GEMM_BLOCK_N 128
#define GEMM_STAGES 3
#define GROUPED_GEMM_SMEM_BYTES (GEMM_STAGES * (GEMM_BLOCK_M + GEMM_BLOCK_N) * 128 + GEMM_BLOCK_M * 8)
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
  int first_identity;  // The ids of experts that return the token itself ...
  int num_identity;    // ... and how many there are; with 0 nobody reads expert_ids and x.
  int average;         // 1: what comes out is halved.
  int rows_weighted;   // 1: rows have their weights in them; weights are of identities. f16 alone.
  int vector;          // 1: every row of H elements starts at a 16-byte boundary.
} CombineArgs;

// ---- rms_norm ---------------------------------------------------------------------------------

#define RMS_NORM_THREADS 256  // at most

typedef struct RmsNormArgs {
  int hidden;       // H
  int num_experts;  // E: expert_offsets[E] is the number of rows in use, where there is such a list.
  float epsilon;    // Added to the mean square.
  float offset;     // Added to every weight.
  int scale_first;  // 1: rows are multiplied by their weights before the norm, not after it.
  int vector;       // 1: every row, and the weights, start at a 16-byte boundary.
} RmsNormArgs;

// ---- router_gemm ----------------------------------------------------------------------------------

// A sum over H in the one order that all bodies have: segments of columns, in them runs of columns
// that ROUTER_GEMM_LANES lanes take in turns. A step is a run for each lane.
#define ROUTER_GEMM_RUN 8
#define ROUTER_GEMM_LANES 8
#define ROUTER_GEMM_STEP (ROUTER_GEMM_RUN * ROUTER_GEMM_LANES)
#define ROUTER_GEMM_SEGMENT 512
// one and few: the segments that a block sums side by side, a power of two.
#define ROUTER_GEMM_MIN_SLOTS 4
#define ROUTER_GEMM_MAX_SLOTS 32
#define ROUTER_GEMM_MAX_THREADS (ROUTER_GEMM_MAX_SLOTS * ROUTER_GEMM_LANES)
#define ROUTER_GEMM_FEW_TOKENS 8
#define ROUTER_GEMM_FEW_EXPERTS 4
// tile: what a block computes, and the steps that its pipeline holds.
#define ROUTER_GEMM_TILE_TOKENS 64
#define ROUTER_GEMM_TILE_EXPERTS 32
#define ROUTER_GEMM_TILE_THREADS 256
#define ROUTER_GEMM_STAGES 3

typedef struct RouterGemmArgs {
  int num_tokens;   // T
  int num_experts;  // E
  int hidden;       // H
  int f32_logits;   // 1: logits are stored as f32, else as Elem.
  int vector;       // 1: every row of x and gate starts at a 16-byte boundary.
} RouterGemmArgs;

#endif  // MOE_ABI_H
