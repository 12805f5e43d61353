// The products' epilogues: from sums or rounded outputs in shared memory to rows in global memory.
// grouped_gemm.cu calls them; EpilogueTile of gemm_tile.cuh is the layout in shared memory.
#pragma once

namespace gemm_epilogue {

using gemm_tile::EpilogueTile;
using gemm_tile::HALF_FEATURES;
using gemm_tile::SharedStorage;

// The chunks that a thread stores: one column of chunks, in every pass_rows-th row.
template <typename Elem>
struct ThreadChunks {
  static constexpr int THREADS = sizeof(Elem) == 4 ? GEMM_THREADS_FMA : GEMM_THREADS_MMA;

  int column;     // in the block's columns
  int first_row;  // in the tile
  int pass_rows;

  __device__ __forceinline__ explicit ThreadChunks(int columns) {
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

// Stores the tile's rows of rounded outputs from shared memory.
template <typename Elem>
__device__ __forceinline__ void store_outputs(Elem* y, const unsigned char* outputs,
                                              const GemmTile& tile, int first_column,
                                              const GroupedGemmArgs& args) {
  const ThreadChunks<Elem> chunks(GEMM_BLOCK_N);
  const int out_features = args.out_features, vector = args.vector_store;
  for (int row = chunks.first_row; row < tile.num_rows; row += chunks.pass_rows) {
    const int offset = EpilogueTile<Elem>::offset(row, chunks.column);
    store_chunk(y + (int64_t)(tile.first_row + row) * out_features,
                load_vec(reinterpret_cast<const Elem*>(outputs + offset)),
                first_column + chunks.column, out_features, vector);
  }
}

// Zeroes the block's columns of the unused rows: block `part` of `parts` takes every `parts`-th
// group of rows.
template <typename Elem>
__device__ __forceinline__ void clear_rows(Elem* y, int first_row, int first_column, int columns,
                                           int part, int parts, const GroupedGemmArgs& args) {
  Vec<Elem> zero;
#pragma unroll
  for (int i = 0; i < Vec<Elem>::LEN; i++) zero.at[i] = from_f32<Elem>(0.0f);
  const ThreadChunks<Elem> chunks(columns);
  const int64_t start = first_row + (int64_t)part * chunks.pass_rows + chunks.first_row;
  const int rows = args.rows, out_features = args.out_features, vector = args.vector_store;
  for (int64_t row = start; row < rows; row += (int64_t)parts * chunks.pass_rows) {
    store_chunk(y + row * out_features, zero, first_column + chunks.column, out_features, vector);
  }
}

// ---- Gate and up --------------------------------------------------------------------------------

// The operands of gate_up's epilogue besides the sums. A null bias is ignored.
template <typename Elem>
struct GateUpEpilogue {
  const Elem* gate_bias;  // of the tile's expert
  const Elem* up_bias;    // of the tile's expert
  bool weighted;          // shared.weight has the rows' weights
  bool interleaved;       // the tile's features are gate, up, gate, up ...; else all of gate first
};

// Loads the sums of LEN adjacent outputs. Interleaved sums are adjacent pairs of gate and up.
template <int LEN>
__device__ __forceinline__ void load_sums(float (&gate)[LEN], float (&up)[LEN],
                                          const unsigned char* sums, int row, int column,
                                          bool gated, bool interleaved) {
  constexpr int STEP = Vec<float>::LEN;
  const auto load = [&](int at) {
    return load_vec(reinterpret_cast<const float*>(sums + EpilogueTile<float>::offset(row, at)));
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

// Computes the tile's outputs from its f32 sums in shared memory, and stores them.
template <typename Elem>
__device__ __forceinline__ void store_activations(Elem* act, const SharedStorage& shared,
                                                  const GateUpEpilogue<Elem>& epilogue,
                                                  const GemmTile& tile, int first_column,
                                                  const GateUpArgs& args) {
  constexpr int LEN = Vec<Elem>::LEN;
  const unsigned char* sums = shared.epilogue_tile();
  const ThreadChunks<Elem> chunks(args.gated ? HALF_FEATURES : GEMM_BLOCK_N);
  const int out_features = args.gemm.out_features, column = first_column + chunks.column;
  const int vector = args.gemm.vector_store;
  float gate_bias[LEN], up_bias[LEN];
  // Without a gate, `gate` has the sums and biases of up.
  const Elem* const first_bias = args.gated ? epilogue.gate_bias : epilogue.up_bias;
  load_bias(gate_bias, first_bias, column, out_features, args.bias_out_stride);
  load_bias(up_bias, epilogue.up_bias, column, out_features, args.bias_out_stride);

  for (int row = chunks.first_row; row < tile.num_rows; row += chunks.pass_rows) {
    float gate[LEN], up[LEN];
    load_sums(gate, up, sums, row, chunks.column, args.gated, epilogue.interleaved);
    const float weight = epilogue.weighted ? shared.weight[row] : 1.0f;
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
                vector);
  }
}

}  // namespace gemm_epilogue
