// grouped_gemm: each expert's weights times the rows that are its own, for groups of any length.
//   fwd          y[r, o]   = sum_i row(r)[i] * w[e(r), o, i] + bias[e(r), o]
//   fwd_weighted y[r, o]   = weight(r) * (sum_i row(r)[i] * w[e(r), o, i] + bias[e(r), o]), where
//                weight(r) is the one that the routing gave r: for f16, whose range an output may
//                leave before its weight brings it back.
//   fwd_gate_up  act[r, o] = activation(gate, up), all in f32 (activation.cuh), where
//                gate = p * (sum_i row(r)[i] * gate[e(r), o, i]) + gate_bias[e(r), o], up the same;
//                p = 1, or the weight that the routing gave r; or that weight multiplies act.
//   row(r) is x[token_of_row[r]] where x has a row per token, so that a gather costs no pass of its
//   own, else x[r]. Rows from expert_offsets[E] on are nobody's and become zero: outputs are
//   written whole. Experts without a gate have activation(up).
// Weights lie as strides say: [E, out, in], or [E, in, out] (the entries with in_out, whose main loop
//         transposes on the way to the tensor cores); gate and up are two tensors, the halves of
//         one, or its even and odd features. None is copied.
// Tiles   128 rows of one expert (the plan's list) by 128 features by 128 bytes of in
// (gemm_tile.cuh).
//         With a gate: 64 of its features and the 64 of up, which meet in shared memory.
// Launch  grid (bound on tiles, in whole groups of GEMM_TILE_GROUP, times column tiles); block
//         GEMM_THREADS_MMA for f16 and bf16, GEMM_THREADS_FMA for f32; GROUPED_GEMM_SMEM_BYTES.
//         Blocks past the device's own number of tiles clear the rows that are nobody's.
// Order   tiles of a group fastest, then columns: blocks that run together read the same weights,
//         and the group's rows of x stay in L2 until its last column is done.
// Blocks  two an SM on sm_90 and sm_100, one elsewhere (shared memory); f32: one (registers).
// Types   f16, bf16: mma.sync m16n8k16, summed in f32. f32: FFMA, never TF32.
// Floor   2*R*in*out FLOPs (with a gate: 4*R*in*I); bytes of the weights of experts with rows, of x and
//         y. T4096 H2048 I768 E128 K8 bf16, SwiGLU: 206 GFLOP, 872 MB (805 weights, 17 x, 50 act).
// Padding a short tile costs MMAs for 32, 64 or 128 rows, whichever is enough, and reads no row
//         that is not its own.
// Bounds  what the plan holds is held against the sizes that the host knows: a plan that its kernels
//         have not made yet has any bits, which then choose the wrong rows, and none outside.
// Writers one thread per element, and the inputs in order: deterministic, and a row's bits depend neither on
//         the tile it is in, nor on the rows beside it, nor on how the weights lie.
#include "kernel.cuh"

using gemm_tile::HALF_FEATURES;
using gemm_tile::Problem;
using gemm_tile::SharedStorage;
using gemm_tile::Staging;

// ---- Outputs ------------------------------------------------------------------------------------

// A thread stores chunks of one column, and of every so many-th row.
template <typename Elem>
struct Chunks {
  static constexpr int THREADS = sizeof(Elem) == 4 ? GEMM_THREADS_FMA : GEMM_THREADS_MMA;

  int column;     // in the block's columns
  int first_row;  // in the tile
  int pass_rows;

  __device__ __forceinline__ explicit Chunks(int columns) {
    const int chunks = columns / Vec<Elem>::LEN;
    column = threadIdx.x % chunks * Vec<Elem>::LEN;
    first_row = threadIdx.x / chunks;
    pass_rows = THREADS / chunks;
  }
};

template <typename Elem>
__device__ __forceinline__ void store_chunk(Elem* row, const Vec<Elem>& chunk, int column,
                                            int out_features, bool vector) {
  if (vector) {
    if (column < out_features) store_vec(row + column, chunk);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<Elem>::LEN; i++) {
      if (column + i < out_features) row[column + i] = chunk.at[i];
    }
  }
}

// Stores the tile's outputs, which lie rounded in `staging`, and no other.
template <typename Elem>
__device__ __forceinline__ void store_outputs(Elem* y, const unsigned char* staging,
                                              const GemmTile& tile, int first_column,
                                              const GroupedGemmArgs& args) {
  const Chunks<Elem> mine(GEMM_BLOCK_N);
  for (int row = mine.first_row; row < tile.num_rows; row += mine.pass_rows) {
    const int offset = Staging<Elem>::offset(row, mine.column);
    store_chunk(y + (int64_t)(tile.first_row + row) * args.out_features,
                load_vec(reinterpret_cast<const Elem*>(staging + offset)),
                first_column + mine.column, args.out_features, args.vector_store);
  }
}

// Zeroes the block's columns of the rows that belong to no expert: block `part` of `parts` takes
// every `parts`-th group of rows.
template <typename Elem>
__device__ __forceinline__ void clear_rows(Elem* y, int first_row, int first_column, int columns,
                                           int part, int parts, const GroupedGemmArgs& args) {
  Vec<Elem> zero;
#pragma unroll
  for (int i = 0; i < Vec<Elem>::LEN; i++) zero.at[i] = from_f32<Elem>(0.0f);
  const Chunks<Elem> mine(columns);
  const int64_t start = first_row + (int64_t)part * mine.pass_rows + mine.first_row;
  for (int64_t row = start; row < args.rows; row += (int64_t)parts * mine.pass_rows) {
    store_chunk(y + row * args.out_features, zero, first_column + mine.column, args.out_features, args.vector_store);
  }
}

// ---- Gate and up --------------------------------------------------------------------------------

// What the epilogue of gate_up reads besides the sums; no pointer but up_bias's counts without a
// gate, and each may be nullptr.
template <typename Elem>
struct GateUp {
  const Elem* gate_bias;  // of the tile's expert
  const Elem* up_bias;    // of the tile's expert
  bool weighted;          // shared.weight holds the rows' weights
  bool interleaved;       // the tile's features are gate, up, gate, up ...; else all of gate first
};

// The sums behind LEN neighbours of the output. Interleaved ones lie in pairs.
template <int LEN>
__device__ __forceinline__ void load_sums(float (&gate)[LEN], float (&up)[LEN],
                                          const unsigned char* staging, int row, int column,
                                          bool gated, bool interleaved) {
  constexpr int STEP = Vec<float>::LEN;
  const auto load = [&](int at) {
    return load_vec(reinterpret_cast<const float*>(staging + Staging<float>::offset(row, at)));
  };
#pragma unroll
  for (int i = 0; i < LEN; i += STEP) {
    Vec<float> first = load(interleaved ? 2 * (column + i) : column + i), second = first;
    if (gated) second = load(interleaved ? 2 * (column + i) + STEP : HALF_FEATURES + column + i);
#pragma unroll
    for (int c = 0; c < STEP; c++) {
      const Vec<float>& pairs = c < STEP / 2 ? first : second;
      gate[i + c] = interleaved ? pairs.at[2 * c % STEP] : first.at[c];
      up[i + c] = interleaved ? pairs.at[2 * c % STEP + 1] : second.at[c];
    }
  }
}

template <int LEN, typename Elem>
__device__ __forceinline__ void load_bias(float (&bias)[LEN], const Elem* source, int column,
                                          int out_features, int stride) {
#pragma unroll
  for (int i = 0; i < LEN; i++) {
    const bool inside = source && column + i < out_features;
    bias[i] = inside ? to_f32(source[(int64_t)(column + i) * stride]) : 0.0f;
  }
}

// Makes the tile's outputs of the sums, which lie in `staging` in f32.
template <typename Elem>
__device__ __forceinline__ void store_activations(Elem* act, const SharedStorage& shared,
                                                  const GateUp<Elem>& gate_up, const GemmTile& tile,
                                                  int first_column, const GateUpArgs& args) {
  constexpr int LEN = Vec<Elem>::LEN;
  const unsigned char* staging = shared.stages[0].x;
  const Chunks<Elem> mine(args.gated ? HALF_FEATURES : GEMM_BLOCK_N);
  const int out_features = args.gemm.out_features;
  const int column = first_column + mine.column;
  float gate_bias[LEN], up_bias[LEN];
  // Without a gate the function is up's.
  const Elem* const first_bias = args.gated ? gate_up.gate_bias : gate_up.up_bias;
  load_bias(gate_bias, first_bias, column, out_features, args.bias_out_stride);
  load_bias(up_bias, gate_up.up_bias, column, out_features, args.bias_out_stride);

  for (int row = mine.first_row; row < tile.num_rows; row += mine.pass_rows) {
    float gate[LEN], up[LEN];
    load_sums(gate, up, staging, row, mine.column, args.gated, gate_up.interleaved);
    const float weight = gate_up.weighted ? shared.weight[row] : 1.0f;
    const float before = args.weight_inside ? 1.0f : weight;
    const float after = args.weight_inside ? weight : 1.0f;
#pragma unroll
    for (int i = 0; i < LEN; i++) {
      gate[i] = before * gate[i] + gate_bias[i];
      up[i] = before * up[i] + up_bias[i];
    }
    activation::apply(gate, up, args.gated, args.activation);
    Vec<Elem> chunk;
#pragma unroll
    for (int i = 0; i < LEN; i++) chunk.at[i] = from_f32<Elem>(after * gate[i]);
    store_chunk(act + (int64_t)(tile.first_row + row) * out_features, chunk, column, out_features,
                args.gemm.vector_store);
  }
}

// The weight that the routing gave a row: that of the one slot whose row it is.
__device__ __forceinline__ float weight_of_row(const float* weights, const int* row_of_slot,
                                               int token, int row, int top_k, int num_tokens) {
  const int64_t first_slot = (int64_t)token * top_k;
  float weight = 0.0f;
  if ((uint32_t)token >= (uint32_t)num_tokens) return weight;
  for (int k = 0; k < top_k; k++) {
    if (row_of_slot[first_slot + k] == row) weight = weights[first_slot + k];
  }
  return weight;
}

// ---- A block ------------------------------------------------------------------------------------

// Which tile and which columns are the block's. Blocks past the last tile clear rows.
struct Work {
  int tile, first_column, column_tiles;

  __device__ __forceinline__ Work(int out_features, int columns) {
    column_tiles = (out_features + columns - 1) / columns;
    const int group_blocks = column_tiles * GEMM_TILE_GROUP;
    const int in_group = blockIdx.x % group_blocks;
    tile = blockIdx.x / group_blocks * GEMM_TILE_GROUP + in_group % GEMM_TILE_GROUP;
    first_column = in_group / GEMM_TILE_GROUP * columns;
  }
};

// Where a block has no tile, it clears its part of the rows without owner. The host's bound leaves
// at least one block per column for them.
template <typename Elem>
__device__ __forceinline__ bool clear_instead(Elem* y, const Work& work, int columns,
                                              const int* expert_offsets, const int* num_tiles,
                                              const GroupedGemmArgs& args) {
  const int used_tiles = (int)min((uint32_t)*num_tiles, (uint32_t)args.max_tiles);
  if (work.tile < used_tiles) return false;
  const int surplus_tiles = gridDim.x / work.column_tiles - used_tiles;
  clear_rows(y, max(expert_offsets[args.num_experts], 0), work.first_column, columns,
             work.tile - used_tiles, surplus_tiles, args);
  return true;
}

// A tile of the plan's list, without rows where it is not inside the output.
__device__ __forceinline__ GemmTile tile_at(const GemmTile* tiles, int index,
                                            const GroupedGemmArgs& args) {
  GemmTile tile = tiles[index];
  const uint32_t rows = args.rows, first_row = tile.first_row, num_rows = tile.num_rows;
  const bool inside = (uint32_t)tile.expert < (uint32_t)args.num_experts && first_row < rows &&
                      num_rows <= min((uint32_t)GEMM_BLOCK_M, rows - first_row);
  if (!inside) tile = {0, 0, 0, 0};
  return tile;
}

// Multiplies a tile and leaves its outputs, or its sums, in the stages' memory.
template <typename Elem, typename Value, int FRAGMENTS, bool IN_OUT, bool VECTOR, bool WEIGHTED>
__device__ __forceinline__ void multiply_tile(const Problem<Elem>& problem, SharedStorage& shared,
                                              const Elem* bias, int columns) {
  using Tile = typename gemm_tile::TileOf<Elem, FRAGMENTS, IN_OUT>::Type;
  using Loader = gemm_tile::StageLoader<Elem, Tile::THREADS, IN_OUT, VECTOR>;
  Tile tile;
  tile.multiply(Loader{problem, shared}, (problem.in_features + Loader::BLOCK_K - 1) / Loader::BLOCK_K);
  if (bias) tile.add_bias(bias, columns);
  if constexpr (WEIGHTED) tile.scale_rows(shared.weight);
  // The stages' memory is free once every warp has read its last operands from it.
  ptx::cp_async_wait<0>();
  __syncthreads();
  tile.template stage<Value>(shared.stages[0].x);
}

// The shapes of tiles that there is code for.
template <typename Value, bool IN_OUT, bool WEIGHTED = false, typename Elem>
__device__ __forceinline__ void multiply_any(const Problem<Elem>& problem, SharedStorage& shared,
                                             bool vector, const Elem* bias = nullptr,
                                             int columns = 0) {
  if (!IN_OUT && !vector) {
    multiply_tile<Elem, Value, 4, false, false, WEIGHTED>(problem, shared, bias, columns);
  } else if (problem.num_rows <= 32) {
    multiply_tile<Elem, Value, 1, IN_OUT, true, WEIGHTED>(problem, shared, bias, columns);
  } else if (problem.num_rows <= 64) {
    multiply_tile<Elem, Value, 2, IN_OUT, true, WEIGHTED>(problem, shared, bias, columns);
  } else {
    multiply_tile<Elem, Value, 4, IN_OUT, true, WEIGHTED>(problem, shared, bias, columns);
  }
  __syncthreads();
}

// The routing's weights of the output's rows. Without weights there is none of this.
struct RowWeights {
  const float* weights;     // [T, K]
  const int* row_of_slot;   // [T * K]
  const int* token_of_row;  // [R]
  int top_k;                // K
  int num_tokens;           // T

  __device__ __forceinline__ float of(int row) const {
    return weight_of_row(weights, row_of_slot, token_of_row[row], row, top_k, num_tokens);
  }
};

template <bool IN_OUT, bool WEIGHTED = false, typename Elem>
__device__ __forceinline__ void grouped_gemm_fwd(Elem* y,                    // [R, out]
                                                 const Elem* x,              // [T, in]; [R, in]
                                                 const Elem* w,              // [E, out, in]; IN_OUT
                                                 const Elem* bias,           // [E, out] or nullptr
                                                 const int* token_of_row,    // [R] or nullptr
                                                 const int* expert_offsets,  // [E + 1]
                                                 const GemmTile* tiles,      // [num_tiles]
                                                 const int* num_tiles,       // [1]
                                                 const GroupedGemmArgs& args,
                                                 const RowWeights& row_weights = {}) {
  SHARED_DYNAMIC(shared_bytes);
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const Work work(args.out_features, GEMM_BLOCK_N);
  if (clear_instead(y, work, GEMM_BLOCK_N, expert_offsets, num_tiles, args)) return;

  const GemmTile tile = tile_at(tiles, work.tile, args);
  const int in_tile = threadIdx.x, row = tile.first_row + in_tile;
  if (in_tile < tile.num_rows) {
    const int x_row = token_of_row ? token_of_row[row] : row;
    shared.x_row[in_tile] = (uint32_t)x_row < (uint32_t)args.x_rows ? x_row : INACTIVE;
    if constexpr (WEIGHTED) shared.weight[in_tile] = row_weights.of(row);
  } else if (in_tile < GEMM_BLOCK_M) {
    shared.x_row[in_tile] = INACTIVE;
    if constexpr (WEIGHTED) shared.weight[in_tile] = 0.0f;
  }
  __syncthreads();

  const int columns = args.out_features - work.first_column;
  const Problem<Elem> problem = {
      x,
      w + tile.expert * args.expert_stride + (int64_t)work.first_column * args.out_stride,
      (int64_t)HALF_FEATURES * args.out_stride,
      {columns, columns - HALF_FEATURES},
      args.out_stride,
      args.in_stride,
      args.in_features,
      tile.num_rows};
  const Elem* const tile_bias =
      bias ? bias + (int64_t)tile.expert * args.out_features + work.first_column : nullptr;
  multiply_any<Elem, IN_OUT, WEIGHTED>(problem, shared, args.vector_load, tile_bias, columns);
  store_outputs(y, shared.stages[0].x, tile, work.first_column, args);
}

template <bool IN_OUT, typename Elem>
__device__ __forceinline__ void grouped_gemm_fwd_gate_up(
    Elem* act,                  // [R, I]
    const Elem* x,              // [T, in] or [R, in]
    const Elem* gate,           // the first of its features, or nullptr
    const Elem* up,             // the first of its features
    const Elem* gate_bias,      // the first, or nullptr
    const Elem* up_bias,        // the first, or nullptr
    const float* weights,       // [T, K] or nullptr
    const int* row_of_slot,     // [T * K], for weights
    const int* token_of_row,    // [R], to gather and for weights
    const int* expert_offsets,  // [E + 1]
    const GemmTile* tiles,      // [num_tiles]
    const int* num_tiles,       // [1]
    const GateUpArgs& args) {
  SHARED_DYNAMIC(shared_bytes);
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const int block_columns = args.gated ? HALF_FEATURES : GEMM_BLOCK_N;
  const Work work(args.gemm.out_features, block_columns);
  if (clear_instead(act, work, block_columns, expert_offsets, num_tiles, args.gemm)) return;

  const GemmTile tile = tile_at(tiles, work.tile, args.gemm);
  const int in_tile = threadIdx.x, row = tile.first_row + in_tile;
  if (in_tile < tile.num_rows) {
    const int token = token_of_row ? token_of_row[row] : row;
    const int x_row = args.gather ? token : row;
    shared.x_row[in_tile] = (uint32_t)x_row < (uint32_t)args.gemm.x_rows ? x_row : INACTIVE;
    if (weights) {
      const int num_tokens = args.gemm.rows / args.top_k;
      shared.weight[in_tile] =
          weight_of_row(weights, row_of_slot, token, row, args.top_k, num_tokens);
    }
  } else if (in_tile < GEMM_BLOCK_M) {
    shared.x_row[in_tile] = INACTIVE;
  }
  __syncthreads();

  // Interleaved features are apart by strides; where neighbours share a chunk, it is the epilogue
  // that parts them, and the tile is 128 neighbours.
  const bool interleaved = IN_OUT && args.gated && args.gemm.out_stride == 2;
  const int stride = interleaved ? 1 : args.gemm.out_stride;
  const int scale = interleaved ? 2 : 1;
  const bool apart = args.gated && !interleaved;
  const int columns = (args.gemm.out_features - work.first_column) * scale;
  const Problem<Elem> problem = {x,
                                 (args.gated ? gate : up) + tile.expert * args.gemm.expert_stride +
                                     (int64_t)work.first_column * args.gemm.out_stride,
                                 apart ? up - gate : (int64_t)HALF_FEATURES * stride,
                                 {columns, apart ? columns : columns - HALF_FEATURES},
                                 stride,
                                 args.gemm.in_stride,
                                 args.gemm.in_features,
                                 tile.num_rows};
  multiply_any<float, IN_OUT>(problem, shared, args.gemm.vector_load);

  const int64_t bias = (int64_t)tile.expert * args.bias_expert_stride;
  const GateUp<Elem> gate_up = {gate_bias ? gate_bias + bias : nullptr,
                                up_bias ? up_bias + bias : nullptr, weights != nullptr,
                                interleaved};
  store_activations(act, shared, gate_up, tile, work.first_column, args);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
    moe_grouped_gemm_fwd_f32(float* y, const float* x, const float* w, const float* bias,
                             const int* token_of_row, const int* expert_offsets,
                             const GemmTile* tiles, const int* num_tiles,
                             const GroupedGemmArgs args) {
  grouped_gemm_fwd<false>(y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_f16(f16* y, const f16* x, const f16* w, const f16* bias,
                             const int* token_of_row, const int* expert_offsets,
                             const GemmTile* tiles, const int* num_tiles,
                             const GroupedGemmArgs args) {
  grouped_gemm_fwd<false>(y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_bf16(bf16* y, const bf16* x, const bf16* w, const bf16* bias,
                              const int* token_of_row, const int* expert_offsets,
                              const GemmTile* tiles, const int* num_tiles,
                              const GroupedGemmArgs args) {
  grouped_gemm_fwd<false>(y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
    moe_grouped_gemm_fwd_in_out_f32(float* y, const float* x, const float* w, const float* bias,
                                    const int* token_of_row, const int* expert_offsets,
                                    const GemmTile* tiles, const int* num_tiles,
                                    const GroupedGemmArgs args) {
  grouped_gemm_fwd<true>(y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_in_out_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_in_out_f16(f16* y, const f16* x, const f16* w, const f16* bias,
                                    const int* token_of_row, const int* expert_offsets,
                                    const GemmTile* tiles, const int* num_tiles,
                                    const GroupedGemmArgs args) {
  grouped_gemm_fwd<true>(y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_in_out_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_in_out_bf16(bf16* y, const bf16* x, const bf16* w, const bf16* bias,
                                     const int* token_of_row, const int* expert_offsets,
                                     const GemmTile* tiles, const int* num_tiles,
                                     const GroupedGemmArgs args) {
  grouped_gemm_fwd<true>(y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_in_out_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA) moe_grouped_gemm_fwd_weighted_f16(
    f16* y, const f16* x, const f16* w, const f16* bias, const float* weights,
    const int* row_of_slot, const int* token_of_row, const int* expert_offsets,
    const GemmTile* tiles, const int* num_tiles, const WeightedGemmArgs args) {
  grouped_gemm_fwd<false, true>(y, x, w, bias, args.gather ? token_of_row : nullptr,
                                expert_offsets, tiles, num_tiles, args.gemm,
                                {weights, row_of_slot, token_of_row, args.top_k, args.gemm.rows / args.top_k});
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_weighted_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_weighted_in_out_f16(f16* y, const f16* x, const f16* w, const f16* bias,
                                             const float* weights, const int* row_of_slot,
                                             const int* token_of_row, const int* expert_offsets,
                                             const GemmTile* tiles, const int* num_tiles,
                                             const WeightedGemmArgs args) {
  grouped_gemm_fwd<true, true>(y, x, w, bias, args.gather ? token_of_row : nullptr,
                               expert_offsets, tiles, num_tiles, args.gemm,
                               {weights, row_of_slot, token_of_row, args.top_k, args.gemm.rows / args.top_k});
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_weighted_in_out_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1) moe_grouped_gemm_fwd_gate_up_f32(
    float* act, const float* x, const float* gate, const float* up, const float* gate_bias,
    const float* up_bias, const float* weights, const int* row_of_slot, const int* token_of_row,
    const int* expert_offsets, const GemmTile* tiles, const int* num_tiles, const GateUpArgs args) {
  grouped_gemm_fwd_gate_up<false>(act, x, gate, up, gate_bias, up_bias, weights, row_of_slot,
                                  token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_gate_up_f16(f16* act, const f16* x, const f16* gate, const f16* up,
                                     const f16* gate_bias, const f16* up_bias, const float* weights,
                                     const int* row_of_slot, const int* token_of_row,
                                     const int* expert_offsets, const GemmTile* tiles,
                                     const int* num_tiles, const GateUpArgs args) {
  grouped_gemm_fwd_gate_up<false>(act, x, gate, up, gate_bias, up_bias, weights, row_of_slot,
                                  token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA) moe_grouped_gemm_fwd_gate_up_bf16(
    bf16* act, const bf16* x, const bf16* gate, const bf16* up, const bf16* gate_bias,
    const bf16* up_bias, const float* weights, const int* row_of_slot, const int* token_of_row,
    const int* expert_offsets, const GemmTile* tiles, const int* num_tiles, const GateUpArgs args) {
  grouped_gemm_fwd_gate_up<false>(act, x, gate, up, gate_bias, up_bias, weights, row_of_slot,
                                  token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA, 1)
    moe_grouped_gemm_fwd_gate_up_in_out_f32(float* act, const float* x, const float* gate,
                                            const float* up, const float* gate_bias,
                                            const float* up_bias, const float* weights,
                                            const int* row_of_slot, const int* token_of_row,
                                            const int* expert_offsets, const GemmTile* tiles,
                                            const int* num_tiles, const GateUpArgs args) {
  grouped_gemm_fwd_gate_up<true>(act, x, gate, up, gate_bias, up_bias, weights, row_of_slot,
                                 token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_in_out_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_gate_up_in_out_f16(f16* act, const f16* x, const f16* gate, const f16* up,
                                            const f16* gate_bias, const f16* up_bias,
                                            const float* weights, const int* row_of_slot,
                                            const int* token_of_row, const int* expert_offsets,
                                            const GemmTile* tiles, const int* num_tiles,
                                            const GateUpArgs args) {
  grouped_gemm_fwd_gate_up<true>(act, x, gate, up, gate_bias, up_bias, weights, row_of_slot,
                                 token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_in_out_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_gate_up_in_out_bf16(bf16* act, const bf16* x, const bf16* gate,
                                             const bf16* up, const bf16* gate_bias,
                                             const bf16* up_bias, const float* weights,
                                             const int* row_of_slot, const int* token_of_row,
                                             const int* expert_offsets, const GemmTile* tiles,
                                             const int* num_tiles, const GateUpArgs args) {
  grouped_gemm_fwd_gate_up<true>(act, x, gate, up, gate_bias, up_bias, weights, row_of_slot,
                                 token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_gate_up_in_out_bf16, GEMM_THREADS_MMA)
