// grouped_gemm: multiplies each row by the weights of its expert, for groups of any length.
//   fwd          y[r, o]   = sum_i row(r)[i] * w[e(r), o, i] + bias[e(r), o]
//   fwd_weighted y[r, o]   = weight(r) * (sum_i row(r)[i] * w[e(r), o, i] + bias[e(r), o]), where
//                weight(r) is the routing weight of r. For f16 only: an output may exceed the range
//                of f16 before its weight is applied.
//   fwd_gate_up  act[r, o] = activation(gate, up), all in f32 (activation.cuh), where
//                gate = p * (sum_i row(r)[i] * gate[e(r), o, i]) + gate_bias[e(r), o], up the same;
//                p is 1 or the routing weight of r. That weight may multiply act instead. Experts
//                without a gate compute activation(up).
//   row(r) is x[token_of_row[r]] if x has a row per token, so that the gather needs no pass of its
//   own, else x[r]. Unused rows of the output (from expert_offsets[E] on) are zeroed.
// Weights are addressed by strides: [E, out, in], or [E, in, out] (entries with in_out, whose main
//         loop transposes while loading matrices). Gate and up are two tensors, the halves of one
//         tensor, or its even and odd features. No weight is copied in global memory.
// Tiles   128 rows of one expert (the plan's list) by 128 features by 128 bytes of inputs
//         (gemm_tile.cuh). With a gate: 64 features of gate and the same 64 of up, combined in
//         shared memory.
// Launch  grid (bound on tiles, rounded up to GEMM_TILE_GROUP, times column tiles); block
//         GEMM_THREADS_MMA for f16 and bf16, GEMM_THREADS_FMA for f32; GROUPED_GEMM_SMEM_BYTES.
//         Blocks past num_tiles zero the unused rows.
// Order   tiles of a group fastest, then columns: concurrent blocks read the same weights, and the
//         group's rows of x stay in L2 until its last column is done.
// Blocks  two per SM on sm_90 and sm_100, one elsewhere (shared memory); f32: one (registers).
// Types   f16, bf16: mma.sync m16n8k16 with f32 accumulation. f32: FFMA, never TF32.
// Roofline 2*R*in*out FLOPs (with a gate: 4*R*in*I); bytes of x, y and the weights of experts with
//         rows. T4096 H2048 I768 E128 K8 bf16, SwiGLU: 206 GFLOP, 872 MB (805 weights, 17 x, 50
//         act).
// Padding a short tile costs MMAs for 32, 64 or 128 rows, whichever suffices, and reads only its
//         own rows.
// Bounds  indices from the plan are checked against the host's sizes: a plan whose kernels have not
//         run has arbitrary bits, which select wrong rows, but none out of bounds.
// Writers one thread per element, summing inputs in order: deterministic. A row's bits depend on
//         neither its tile, nor other rows, nor the layout of the weights.
#include "kernel.cuh"

#include "activation.cuh"
#include "gemm_tile.cuh"
#include "gemm_epilogue.cuh"

using gemm_epilogue::GateUpEpilogue;
using gemm_tile::HALF_FEATURES;
using gemm_tile::Problem;
using gemm_tile::SharedStorage;

// ---- Parameters: the structs of abi.h with typed pointers ---------------------------------------

template <typename Elem>
struct TypedGroupedGemmParams {
  Elem* y;                    // [R, out]
  const Elem* x;              // [T, in] with token_of_row, else [R, in]
  const Elem* w;              // [E, out, in] or [E, in, out]
  const Elem* bias;           // [E, out] or nullptr
  const int* token_of_row;    // [R] or nullptr
  const int* expert_offsets;  // [E + 1]
  const GemmTile* tiles;      // [num_tiles]
  const int* num_tiles;       // [1]
  GroupedGemmArgs args;
};
static_assert(sizeof(TypedGroupedGemmParams<f16>) == sizeof(GroupedGemmParams), "the same layout");
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, y);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, x);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, w);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, bias);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, token_of_row);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, expert_offsets);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, tiles);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, num_tiles);
ASSERT_SAME_OFFSET(TypedGroupedGemmParams<f16>, GroupedGemmParams, args);

template <typename Elem>
struct TypedWeightedGemmParams {
  TypedGroupedGemmParams<Elem> gemm;
  const float* routing_weights;  // [T, K]
  const int* row_of_slot;        // [T * K]
  const int* token_of_row;       // [R]
  int top_k;                     // K
  int num_tokens;                // T
};
static_assert(sizeof(TypedWeightedGemmParams<f16>) == sizeof(WeightedGemmParams),
              "the same layout");
ASSERT_SAME_OFFSET(TypedWeightedGemmParams<f16>, WeightedGemmParams, gemm);
ASSERT_SAME_OFFSET(TypedWeightedGemmParams<f16>, WeightedGemmParams, routing_weights);
ASSERT_SAME_OFFSET(TypedWeightedGemmParams<f16>, WeightedGemmParams, row_of_slot);
ASSERT_SAME_OFFSET(TypedWeightedGemmParams<f16>, WeightedGemmParams, token_of_row);
ASSERT_SAME_OFFSET(TypedWeightedGemmParams<f16>, WeightedGemmParams, top_k);
ASSERT_SAME_OFFSET(TypedWeightedGemmParams<f16>, WeightedGemmParams, num_tokens);

// Strides of weights and biases are in args.
template <typename Elem>
struct TypedGateUpParams {
  Elem* act;                     // [R, I]
  const Elem* x;                 // [T, in] with args.gather, else [R, in]
  const Elem* gate;              // [E, I, in], from its first feature; unused without a gate
  const Elem* up;                // [E, I, in], from its first feature
  const Elem* gate_bias;         // [E, I] or nullptr; unused without a gate
  const Elem* up_bias;           // [E, I] or nullptr
  const float* routing_weights;  // [T, K] or nullptr
  const int* row_of_slot;        // [T * K], read with routing_weights
  const int* token_of_row;       // [R], or nullptr without a gather and without routing_weights
  const int* expert_offsets;     // [E + 1]
  const GemmTile* tiles;         // [num_tiles]
  const int* num_tiles;          // [1]
  GateUpArgs args;
};
static_assert(sizeof(TypedGateUpParams<f16>) == sizeof(GateUpParams), "the same layout");
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, act);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, x);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, gate);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, up);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, gate_bias);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, up_bias);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, routing_weights);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, row_of_slot);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, token_of_row);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, expert_offsets);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, tiles);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, num_tiles);
ASSERT_SAME_OFFSET(TypedGateUpParams<f16>, GateUpParams, args);

// ---- A block ------------------------------------------------------------------------------------

// The routing weight of a row: that of the slot whose row it is.
__device__ __forceinline__ float weight_of_row(const float* routing_weights, const int* row_of_slot,
                                               int token, int row, int top_k, int num_tokens) {
  const int64_t first_slot = (int64_t)token * top_k;
  float weight = 0.0f;
  if ((uint32_t)token >= (uint32_t)num_tokens) return weight;
  for (int k = 0; k < top_k; k++) {
    if (row_of_slot[first_slot + k] == row) weight = routing_weights[first_slot + k];
  }
  return weight;
}

// The tile and the columns of a block. Blocks past the last tile clear rows.
struct BlockPosition {
  int tile, first_column, column_tiles;

  __device__ __forceinline__ BlockPosition(int out_features, int columns) {
    column_tiles = (out_features + columns - 1) / columns;
    const int group_blocks = column_tiles * GEMM_TILE_GROUP;
    const int in_group = blockIdx.x % group_blocks;
    tile = blockIdx.x / group_blocks * GEMM_TILE_GROUP + in_group % GEMM_TILE_GROUP;
    first_column = in_group / GEMM_TILE_GROUP * columns;
  }
};

// A block without a tile clears its part of the unused rows and returns true. The host's bound on
// tiles leaves at least one such block per column if there are unused rows.
template <typename Elem>
__device__ __forceinline__ bool clear_instead(Elem* y, const BlockPosition& block, int columns,
                                              const int* expert_offsets, const int* num_tiles,
                                              const GroupedGemmArgs& args) {
  const int used_tiles = (int)min((uint32_t)*num_tiles, (uint32_t)args.max_tiles);
  if (block.tile < used_tiles) return false;
  const int surplus_tiles = gridDim.x / block.column_tiles - used_tiles;
  const int first_row = max(expert_offsets[args.num_experts], 0);
  gemm_epilogue::clear_rows(y, first_row, block.first_column, columns, block.tile - used_tiles,
                            surplus_tiles, args);
  return true;
}

// A tile of the plan's list; without rows if it is not inside the output.
__device__ __forceinline__ GemmTile tile_at(const GemmTile* tiles, int index,
                                            const GroupedGemmArgs& args) {
  GemmTile tile = tiles[index];
  const uint32_t rows = args.rows, first_row = tile.first_row, num_rows = tile.num_rows;
  const bool inside = (uint32_t)tile.expert < (uint32_t)args.num_experts && first_row < rows &&
                      num_rows <= min((uint32_t)GEMM_BLOCK_M, rows - first_row);
  if (!inside) tile = {0, 0, 0, 0};
  return tile;
}

// Multiplies a tile, and leaves its outputs or sums in the epilogue's tile of shared memory.
template <typename Elem, typename Value, int FRAGMENTS, bool IN_OUT, bool VECTOR, bool WEIGHTED>
__device__ __forceinline__ void multiply_fragments(const Problem<Elem>& problem,
                                                   SharedStorage& shared, const Elem* bias,
                                                   int columns) {
  using Tile = typename gemm_tile::TileOf<Elem, FRAGMENTS, IN_OUT>::Type;
  using Loader = gemm_tile::StageLoader<Elem, Tile::THREADS, IN_OUT, VECTOR>;
  Tile tile;
  const int blocks = (problem.in_features + Loader::BLOCK_K - 1) / Loader::BLOCK_K;
  tile.multiply(Loader{problem, shared}, blocks);
  if (bias) tile.add_bias(bias, columns);
  if constexpr (WEIGHTED) tile.scale_rows(shared.weight);
  // The stages' memory is free once every warp has read its last operands from it.
  ptx::cp_async_wait<0>();
  __syncthreads();
  tile.template store_sums<Value>(shared.epilogue_tile());
}

// Chooses the code for the tile's height and the alignment.
template <typename Value, bool IN_OUT, bool WEIGHTED = false, typename Elem>
__device__ __forceinline__ void multiply_tile(const Problem<Elem>& problem, SharedStorage& shared,
                                              bool vector, const Elem* bias = nullptr,
                                              int columns = 0) {
  if (!IN_OUT && !vector) {
    multiply_fragments<Elem, Value, 4, false, false, WEIGHTED>(problem, shared, bias, columns);
  } else if (problem.num_rows <= 32) {
    multiply_fragments<Elem, Value, 1, IN_OUT, true, WEIGHTED>(problem, shared, bias, columns);
  } else if (problem.num_rows <= 64) {
    multiply_fragments<Elem, Value, 2, IN_OUT, true, WEIGHTED>(problem, shared, bias, columns);
  } else {
    multiply_fragments<Elem, Value, 4, IN_OUT, true, WEIGHTED>(problem, shared, bias, columns);
  }
  __syncthreads();
}

// weight_of(row) is the routing weight of a row, used if WEIGHTED.
template <bool IN_OUT, bool WEIGHTED = false, typename Elem, typename WeightOf>
__device__ __forceinline__ void multiply_rows(const TypedGroupedGemmParams<Elem>& params,
                                              WeightOf weight_of) {
  SHARED_DYNAMIC(shared_bytes);
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const GroupedGemmArgs& args = params.args;
  const BlockPosition block(args.out_features, GEMM_BLOCK_N);
  if (clear_instead(params.y, block, GEMM_BLOCK_N, params.expert_offsets, params.num_tiles, args)) {
    return;
  }

  const GemmTile tile = tile_at(params.tiles, block.tile, args);
  const int in_tile = threadIdx.x, row = tile.first_row + in_tile;
  if (in_tile < tile.num_rows) {
    const int x_row = params.token_of_row ? params.token_of_row[row] : row;
    shared.x_row[in_tile] = (uint32_t)x_row < (uint32_t)args.x_rows ? x_row : INACTIVE;
    if constexpr (WEIGHTED) shared.weight[in_tile] = weight_of(row);
  } else if (in_tile < GEMM_BLOCK_M) {
    shared.x_row[in_tile] = INACTIVE;
    if constexpr (WEIGHTED) shared.weight[in_tile] = 0.0f;
  }
  __syncthreads();

  const int columns = args.out_features - block.first_column;
  const Problem<Elem> problem = {
      params.x,
      params.w + tile.expert * args.expert_stride + (int64_t)block.first_column * args.out_stride,
      (int64_t)HALF_FEATURES * args.out_stride,
      {columns, columns - HALF_FEATURES},
      args.out_stride,
      args.in_stride,
      args.in_features,
      tile.num_rows};
  const Elem* const bias =
      params.bias ? params.bias + (int64_t)tile.expert * args.out_features + block.first_column
                  : nullptr;
  multiply_tile<Elem, IN_OUT, WEIGHTED>(problem, shared, args.vector_load, bias, columns);
  gemm_epilogue::store_outputs(params.y, shared.epilogue_tile(), tile, block.first_column, args);
}

template <bool IN_OUT, typename Elem>
__device__ __forceinline__ void grouped_gemm_fwd(const TypedGroupedGemmParams<Elem>& params) {
  multiply_rows<IN_OUT>(params, [](int) { return 1.0f; });
}

template <bool IN_OUT, typename Elem>
__device__ __forceinline__ void weighted(const TypedWeightedGemmParams<Elem>& params) {
  multiply_rows<IN_OUT, true>(params.gemm, [&](int row) {
    return weight_of_row(params.routing_weights, params.row_of_slot, params.token_of_row[row], row,
                         params.top_k, params.num_tokens);
  });
}

template <bool IN_OUT, typename Elem>
__device__ __forceinline__ void gate_up(const TypedGateUpParams<Elem>& params) {
  SHARED_DYNAMIC(shared_bytes);
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const GateUpArgs& args = params.args;
  const GroupedGemmArgs& gemm = args.gemm;
  const int block_columns = args.gated ? HALF_FEATURES : GEMM_BLOCK_N;
  const BlockPosition block(gemm.out_features, block_columns);
  if (clear_instead(params.act, block, block_columns, params.expert_offsets, params.num_tiles,
                    gemm)) {
    return;
  }

  const GemmTile tile = tile_at(params.tiles, block.tile, gemm);
  const int in_tile = threadIdx.x, row = tile.first_row + in_tile;
  if (in_tile < tile.num_rows) {
    const int token = params.token_of_row ? params.token_of_row[row] : row;
    const int x_row = args.gather ? token : row;
    shared.x_row[in_tile] = (uint32_t)x_row < (uint32_t)gemm.x_rows ? x_row : INACTIVE;
    if (params.routing_weights) {
      shared.weight[in_tile] = weight_of_row(params.routing_weights, params.row_of_slot, token, row,
                                             args.top_k, args.num_tokens);
    }
  } else if (in_tile < GEMM_BLOCK_M) {
    shared.x_row[in_tile] = INACTIVE;
  }
  __syncthreads();

  // OUT_IN: strides separate interleaved features. IN_OUT: gate and up share 16-byte chunks, so the
  // tile is 128 adjacent features, which the epilogue separates.
  const bool interleaved = IN_OUT && args.gated && gemm.out_stride == 2;
  const int stride = interleaved ? 1 : gemm.out_stride;
  const bool two_halves = args.gated && !interleaved;
  const int columns = (gemm.out_features - block.first_column) * (interleaved ? 2 : 1);
  const Problem<Elem> problem = {
      params.x,
      (args.gated ? params.gate : params.up) + tile.expert * gemm.expert_stride +
          (int64_t)block.first_column * gemm.out_stride,
      two_halves ? params.up - params.gate : (int64_t)HALF_FEATURES * stride,
      {columns, two_halves ? columns : columns - HALF_FEATURES},
      stride,
      gemm.in_stride,
      gemm.in_features,
      tile.num_rows};
  multiply_tile<float, IN_OUT>(problem, shared, gemm.vector_load);

  const int64_t bias = (int64_t)tile.expert * args.bias_expert_stride;
  const GateUpEpilogue<Elem> epilogue = {params.gate_bias ? params.gate_bias + bias : nullptr,
                                         params.up_bias ? params.up_bias + bias : nullptr,
                                         params.routing_weights != nullptr, interleaved};
  gemm_epilogue::store_activations(params.act, shared, epilogue, tile, block.first_column, args);
}

// ---- Entries ------------------------------------------------------------------------------------
// TypedGateUpParams is a __grid_constant__: a local copy of it costs registers. Copies of the
// others do not.

// clang-format off: three lines per entry
extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
moe_grouped_gemm_fwd_f32(const TypedGroupedGemmParams<float> params) { grouped_gemm_fwd<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_f16(const TypedGroupedGemmParams<f16> params) { grouped_gemm_fwd<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_bf16(const TypedGroupedGemmParams<bf16> params) { grouped_gemm_fwd<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
moe_grouped_gemm_fwd_in_out_f32(const TypedGroupedGemmParams<float> params) { grouped_gemm_fwd<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_in_out_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_in_out_f16(const TypedGroupedGemmParams<f16> params) { grouped_gemm_fwd<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_in_out_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_in_out_bf16(const TypedGroupedGemmParams<bf16> params) { grouped_gemm_fwd<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_in_out_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_weighted_f16(const TypedWeightedGemmParams<f16> params) { weighted<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_weighted_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_weighted_in_out_f16(const TypedWeightedGemmParams<f16> params) { weighted<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_weighted_in_out_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
moe_grouped_gemm_fwd_gate_up_f32(const __grid_constant__ TypedGateUpParams<float> params) { gate_up<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_gate_up_f16(const __grid_constant__ TypedGateUpParams<f16> params) { gate_up<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_gate_up_bf16(const __grid_constant__ TypedGateUpParams<bf16> params) { gate_up<false>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
moe_grouped_gemm_fwd_gate_up_in_out_f32(const __grid_constant__ TypedGateUpParams<float> params) { gate_up<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_in_out_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_gate_up_in_out_f16(const __grid_constant__ TypedGateUpParams<f16> params) { gate_up<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_in_out_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
moe_grouped_gemm_fwd_gate_up_in_out_bf16(const __grid_constant__ TypedGateUpParams<bf16> params) { gate_up<true>(params); }
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_in_out_bf16, GEMM_THREADS_MMA)
// clang-format on
