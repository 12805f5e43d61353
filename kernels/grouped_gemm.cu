// grouped_gemm: each expert's weights times the rows that are its own, for groups of any length.
//   fwd         y[r, n]   = sum_k row(r)[k] * w[e(r), n, k]
//   fwd_swiglu  act[r, i] = silu(gate) * up with silu(g) = g / (1 + exp(-g)), all in f32, where
//               gate = sum_k row(r)[k] * gate_up[e(r), i, k], and up the same with I + i for i
//   row(r) is x[token_of_row[r]] where there is a map, so that a gather costs no pass of its own,
//   else x[r]. Rows from expert_offsets[E] on are nobody's and become zero: y is written whole.
// Tiles   128 rows of one expert (the plan's list) by 128 rows of its weights by 128 bytes of K.
//         SwiGLU takes 64 rows of gate and the 64 of up, so that both meet in one thread.
// Launch  grid (bound on tiles, in whole groups of GEMM_TILE_GROUP, times column tiles); block
//         GEMM_THREADS_MMA for f16 and bf16, GEMM_THREADS_FMA for f32; GROUPED_GEMM_SMEM_BYTES.
//         Blocks past the device's own number of tiles clear the rows that are nobody's.
// Order   tiles of a group fastest, then columns: blocks that run together read the same weights,
//         and the group's rows of x stay in L2 until its last column is done.
// Blocks  two an SM on sm_90 and sm_100, one elsewhere (shared memory); f32: one (registers).
// Types   f16, bf16: mma.sync m16n8k16, summed in f32. f32: FFMA, never TF32.
// Floor   2*R*N*K FLOPs (SwiGLU: 4*R*I*K); bytes of the weights of experts with rows, of x and y.
//         T4096 H2048 I768 E128 K8 bf16, SwiGLU: 206 GFLOP, 872 MB (805 weights, 17 x, 50 act).
// Padding a short tile costs MMAs for 32, 64 or 128 rows, whichever is enough, and reads no row
//         that is not its own.
// Writers one thread per element, and k in order: deterministic, and a row's bits depend neither on
//         the tile it is in nor on the rows beside it.
#include "kernel.cuh"

// A stage of the pipeline holds 128 bytes of K of every row. Each row is eight 16-byte chunks;
// chunk c lies at place c ^ (row % 8), so that eight rows' same chunk, which is what ldmatrix and
// the FMA loop read at once, lies in eight different groups of banks.
constexpr int ROW_BYTES = 128;
constexpr int CHUNK_BYTES = 16;
constexpr int ROW_CHUNKS = ROW_BYTES / CHUNK_BYTES;

struct alignas(1024) Stage {
  unsigned char x[GEMM_BLOCK_M * ROW_BYTES];
  unsigned char w[GEMM_BLOCK_N * ROW_BYTES];
};

struct SharedStorage {
  Stage stages[GEMM_STAGES];  // and, once all is summed, the outputs
  int x_row[GEMM_BLOCK_M];  // the row of x that each row of the tile reads, -1 past the tile's end
};
static_assert(GEMM_STAGES * sizeof(Stage) + GEMM_BLOCK_M * sizeof(int) == GROUPED_GEMM_SMEM_BYTES,
              "what the launch asks for");
static_assert(GEMM_BLOCK_M * GEMM_BLOCK_N * sizeof(float) <= GEMM_STAGES * sizeof(Stage),
              "the outputs pass through the stages' memory");
static_assert(GEMM_BLOCK_M == 128 && GEMM_BLOCK_N == 128, "what the warp layouts below cover");

// What a block multiplies.
template <typename Elem>
struct Problem {
  const Elem* x;            // [T, K] with a map, else [R, K]
  const Elem* w;            // [N, K], or [2I, K] for SwiGLU: the weights of this tile's expert
  int first_row, num_rows;  // of the tile
  int first_column;         // of the output
  int n, k;                 // columns of the output, depth
};

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * ROW_BYTES + ((chunk ^ (row % 8)) * CHUNK_BYTES);
}

// Fills stages. A thread answers for one chunk column and every THREADS / 8th row, so a warp's
// copies read whole 128-byte lines. VECTOR: bases and pitches are multiples of 16 bytes. Otherwise
// elements are copied one by one, which is slow and right for any alignment.
template <typename Elem, int THREADS, bool SWIGLU, bool VECTOR>
struct StageLoader {
  static constexpr int PASS_ROWS = THREADS / ROW_CHUNKS;
  static constexpr int PASSES = GEMM_BLOCK_M / PASS_ROWS;
  static constexpr int BLOCK_K = ROW_BYTES / sizeof(Elem);
  static_assert(GEMM_BLOCK_M == GEMM_BLOCK_N && PASS_ROWS % 8 == 0,
                "one loop serves both operands");

  const Problem<Elem>& problem;
  SharedStorage& shared;

  // Rows and columns past an end become zero in both operands, so they add nothing.
  __device__ __forceinline__ void load(int stage_index, int block) const {
    Stage& stage = shared.stages[stage_index];
    const int thread_row = threadIdx.x / ROW_CHUNKS, thread_chunk = threadIdx.x % ROW_CHUNKS;
    const int offset = chunk_offset(thread_row, thread_chunk);
    const int k = block * BLOCK_K + thread_chunk * Vec<Elem>::LEN;
    // Rows of w lie at fixed distances: one pointer and steps that all threads share name them.
    const int first_column = problem.first_column + thread_row;
    const Elem* w = problem.w + (int64_t)first_column * problem.k + k;
#pragma unroll VECTOR ? PASSES : 1
    for (int i = 0; i < PASSES; i++) {
      const int row = shared.x_row[thread_row + i * PASS_ROWS];
      const Elem* x = problem.x + (int64_t)row * problem.k + k;
      copy(stage.x + offset + i * PASS_ROWS * ROW_BYTES, x, row >= 0, k);
    }
#pragma unroll VECTOR ? PASSES : 1
    for (int i = 0; i < PASSES; i++) {
      // SwiGLU: the second half of the passes takes up's rows, which lie I rows after gate's.
      const bool up = SWIGLU && i >= PASSES / 2;
      const int step = (up ? i - PASSES / 2 : i) * PASS_ROWS;
      const int64_t distance = ((int64_t)step + (up ? problem.n : 0)) * problem.k;
      copy(stage.w + offset + i * PASS_ROWS * ROW_BYTES, w + distance,
           first_column + step < problem.n, k);
    }
  }

 private:
  // `source` may be formed past the matrix, but is read only where the row and k are inside.
  __device__ __forceinline__ void copy(unsigned char* target, const Elem* source, bool row_inside,
                                       int k) const {
    if constexpr (VECTOR) {
      const bool inside = row_inside && k < problem.k;
      ptx::cp_async16(ptx::smem_u32(target), inside ? source : problem.x, inside ? CHUNK_BYTES : 0);
    } else {
      Vec<Elem> chunk;
#pragma unroll
      for (int i = 0; i < Vec<Elem>::LEN; i++) {
        chunk.at[i] = row_inside && k + i < problem.k ? source[i] : from_f32<Elem>(0.0f);
      }
      store_vec(reinterpret_cast<Elem*>(target), chunk);
    }
  }
};

// ---- Outputs ------------------------------------------------------------------------------------

__device__ __forceinline__ float swiglu(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

// The block's outputs on their way from the threads that summed them to coalesced 16-byte stores.
template <typename Elem, bool SWIGLU>
struct OutputTile {
  static constexpr int THREADS = sizeof(Elem) == 4 ? GEMM_THREADS_FMA : GEMM_THREADS_MMA;
  static constexpr int COLUMNS = SWIGLU ? GEMM_BLOCK_N / 2 : GEMM_BLOCK_N;
  static constexpr int CHUNKS = COLUMNS / Vec<Elem>::LEN;  // of a row
  static constexpr int PASS_ROWS = THREADS / CHUNKS;

  // Where the staging tile keeps an element, in bytes: swizzled as the stages are, against
  // conflicts between the eight rows that a warp writes at once.
  __device__ __forceinline__ static int offset(int row, int column) {
    const int chunk = column / Vec<Elem>::LEN;
    return (row * CHUNKS + (chunk ^ (row % 8))) * CHUNK_BYTES +
           column % Vec<Elem>::LEN * (int)sizeof(Elem);
  }

  // Writes the rows of the tile, and no other.
  __device__ __forceinline__ static void store(Elem* y, const unsigned char* staging,
                                               const Problem<Elem>& problem, bool vector) {
    const int in_tile = threadIdx.x % CHUNKS * Vec<Elem>::LEN;
    const int column = problem.first_column + in_tile;
    for (int row = threadIdx.x / CHUNKS; row < problem.num_rows; row += PASS_ROWS) {
      const Vec<Elem> chunk =
          load_vec(reinterpret_cast<const Elem*>(staging + offset(row, in_tile)));
      store_chunk(y + (int64_t)(problem.first_row + row) * problem.n, chunk, column, problem.n,
                  vector);
    }
  }

  // Zeroes the block's columns of the rows that belong to no expert: block `part` of `parts` takes
  // every `parts`-th group of PASS_ROWS rows.
  __device__ __forceinline__ static void clear(Elem* y, int first_row, int first_column, int part,
                                               int parts, const GroupedGemmArgs& args) {
    Vec<Elem> zero;
#pragma unroll
    for (int i = 0; i < Vec<Elem>::LEN; i++) zero.at[i] = from_f32<Elem>(0.0f);
    const int column = first_column + threadIdx.x % CHUNKS * Vec<Elem>::LEN;
    const int64_t start = first_row + (int64_t)part * PASS_ROWS + threadIdx.x / CHUNKS;
    for (int64_t row = start; row < args.rows; row += (int64_t)parts * PASS_ROWS) {
      store_chunk(y + row * args.n, zero, column, args.n, args.vector_store);
    }
  }

 private:
  __device__ __forceinline__ static void store_chunk(Elem* row, const Vec<Elem>& chunk, int column,
                                                     int n, bool vector) {
    if (vector) {
      if (column < n) store_vec(row + column, chunk);
    } else {
#pragma unroll
      for (int i = 0; i < Vec<Elem>::LEN; i++) {
        if (column + i < n) row[column + i] = chunk.at[i];
      }
    }
  }
};

// ---- f16 and bf16: tensor cores -----------------------------------------------------------------

__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b,
                                    bf16) {
  ptx::mma_bf16(sum, a, b);
}
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b,
                                    f16) {
  ptx::mma_f16(sum, a, b);
}

// Four warps, two by two. Warp (wm, wn) owns the 16-row strips 32*i + 16*wm of x and the 16-row
// strips 32*p + 16*wn of weights: strips alternate between warps, so that a tile of few rows still
// keeps all four tensor cores busy, and so that a SwiGLU column's gate (p < 2) and up (p + 2) have
// one owner. FRAGMENTS: how many strips of x the tile's rows need.
template <typename Elem, int FRAGMENTS>
struct MmaTile {
  static constexpr int THREADS = GEMM_THREADS_MMA;
  static constexpr int STEPS = ROW_BYTES / 32;  // of k16
  static_assert(STEPS % 2 == 0, "every block of K begins with the same set of registers");
  static constexpr int STRIPS = GEMM_BLOCK_N / 32;

  float sum[FRAGMENTS][2 * STRIPS][4] = {};

  __device__ __forceinline__ static int warp_m() { return threadIdx.x / WARP_SIZE / 2; }
  __device__ __forceinline__ static int warp_n() { return threadIdx.x / WARP_SIZE % 2; }

  __device__ __forceinline__ static void load_x(uint32_t (&x)[FRAGMENTS][4], const Stage& stage,
                                                int step) {
    const int lane = threadIdx.x % WARP_SIZE;
    const unsigned char* rows =
        stage.x + chunk_offset(16 * warp_m() + lane % 16, 2 * step + lane / 16);
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++)
      ptx::ldmatrix_x4(x[i], ptx::smem_u32(rows + i * 32 * ROW_BYTES));
  }

  __device__ __forceinline__ static void load_w(uint32_t (&w)[4], const Stage& stage, int step,
                                                int strip) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int row = 16 * warp_n() + lane / 16 * 8 + lane % 8;
    const unsigned char* rows = stage.w + chunk_offset(row, 2 * step + lane / 8 % 2);
    ptx::ldmatrix_x4(w, ptx::smem_u32(rows + strip * 32 * ROW_BYTES));
  }

  template <typename Loader>
  __device__ __forceinline__ void multiply(const Loader& loader, int blocks) {
    Stage* const stages = loader.shared.stages;
#pragma unroll
    for (int i = 0; i < GEMM_STAGES - 1; i++) {
      if (i < blocks) loader.load(i, i);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<GEMM_STAGES - 2>();
    __syncthreads();

    // Operands of the next k16 step are loaded while this one's are multiplied: x into the other of
    // two sets, w strip by strip into the registers that the multiplications have just left.
    uint32_t x[2][FRAGMENTS][4], w[STRIPS][4];
    load_x(x[0], stages[0], 0);
#pragma unroll
    for (int p = 0; p < STRIPS; p++) load_w(w[p], stages[0], 0, p);

    int stage = 0;  // that the next operands come from
    for (int block = 0; block < blocks; block++) {
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        // The barrier before the last step's multiplications says two things: the next stage has
        // arrived for everybody, and nobody will read this one again, since its last operands are
        // in registers.
        if (step == STEPS - 1) {
          stage = stage + 1 == GEMM_STAGES ? 0 : stage + 1;
          ptx::cp_async_wait<GEMM_STAGES - 2>();
          __syncthreads();
        }
        // After the last block this reads a stage that nobody filled, and nobody uses what it read:
        // a branch would cost more.
        const int next_step = (step + 1) % STEPS;
        load_x(x[next_step % 2], stages[stage], next_step);
        if (step == 0) {
          const int next = block + GEMM_STAGES - 1;
          if (next < blocks) loader.load(stage == 0 ? GEMM_STAGES - 1 : stage - 1, next);
          ptx::cp_async_commit();  // an empty group keeps the count that the wait relies on
        }
#pragma unroll
        for (int p = 0; p < STRIPS; p++) {
#pragma unroll
          for (int i = 0; i < FRAGMENTS; i++) {
            mma(sum[i][2 * p], x[step % 2][i], &w[p][0], Elem());
            mma(sum[i][2 * p + 1], x[step % 2][i], &w[p][2], Elem());
          }
          load_w(w[p], stages[stage], next_step, p);
        }
      }
    }
  }

  // Hands the outputs over to the block: rounded, at their places in the staging tile.
  template <bool SWIGLU>
  __device__ __forceinline__ void stage_outputs(unsigned char* staging) const {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = 32 * i + 16 * warp_m() + 8 * half + lane / 4;
#pragma unroll
        for (int j = 0; j < (SWIGLU ? STRIPS : 2 * STRIPS); j++) {
          const int column = 32 * (j / 2) + 16 * warp_n() + 8 * (j % 2) + 2 * (lane % 4);
          float first = sum[i][j][2 * half], second = sum[i][j][2 * half + 1];
          if constexpr (SWIGLU) {
            first = swiglu(first, sum[i][j + STRIPS][2 * half]);
            second = swiglu(second, sum[i][j + STRIPS][2 * half + 1]);
          }
          const Pair pair = {from_f32<Elem>(first), from_f32<Elem>(second)};
          *reinterpret_cast<Pair*>(staging + OutputTile<Elem, SWIGLU>::offset(row, column)) = pair;
        }
      }
    }
  }

 private:
  struct alignas(2 * sizeof(Elem)) Pair {
    Elem first, second;
  };
};

// ---- f32: fused multiply-adds -------------------------------------------------------------------

// Eight warps of 4 x 8 threads. Thread (tm, tn) of the 16 x 16 owns the rows tm + 16*i and the
// columns tn + 16*j: its loads of 16 bytes along K then meet no bank conflict (x is a broadcast, w
// eight rows), and column j's gate has its up in column j + 4.
template <int FRAGMENTS>
struct FmaTile {
  static constexpr int THREADS = GEMM_THREADS_FMA;
  static constexpr int ROWS = 2 * FRAGMENTS;
  static constexpr int COLUMNS = GEMM_BLOCK_N / 16;

  float sum[ROWS][COLUMNS] = {};

  __device__ __forceinline__ static int thread_m() {
    return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8;
  }
  __device__ __forceinline__ static int thread_n() {
    return threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8;
  }

  template <typename Loader>
  __device__ __forceinline__ void multiply(const Loader& loader, int blocks) {
#pragma unroll
    for (int i = 0; i < GEMM_STAGES - 1; i++) {
      if (i < blocks) loader.load(i, i);
      ptx::cp_async_commit();
    }
    int stage = 0;  // being multiplied
    for (int block = 0; block < blocks; block++) {
      // After the barrier this stage is filled for everybody, and the one before it is free.
      ptx::cp_async_wait<GEMM_STAGES - 2>();
      __syncthreads();
      const int next = block + GEMM_STAGES - 1;
      const int free = stage == 0 ? GEMM_STAGES - 1 : stage - 1;
      if (next < blocks) loader.load(free, next);
      ptx::cp_async_commit();  // an empty group keeps the count that the wait relies on
      multiply_stage(loader.shared.stages[stage]);
      stage = stage + 1 == GEMM_STAGES ? 0 : stage + 1;
    }
  }

  __device__ __forceinline__ void multiply_stage(const Stage& stage) {
#pragma unroll
    for (int chunk = 0; chunk < ROW_CHUNKS; chunk++) {
      Vec<float> w[COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) w[j] = load_chunk(stage.w, thread_n() + 16 * j, chunk);
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const Vec<float> x = load_chunk(stage.x, thread_m() + 16 * i, chunk);
#pragma unroll
        for (int k = 0; k < Vec<float>::LEN; k++) {
#pragma unroll
          for (int j = 0; j < COLUMNS; j++) sum[i][j] += x.at[k] * w[j].at[k];
        }
      }
    }
  }

  // Hands the outputs over to the block, at their places in the staging tile.
  template <bool SWIGLU>
  __device__ __forceinline__ void stage_outputs(unsigned char* staging) const {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
#pragma unroll
      for (int j = 0; j < (SWIGLU ? COLUMNS / 2 : COLUMNS); j++) {
        float value = sum[i][j];
        if constexpr (SWIGLU) value = swiglu(value, sum[i][j + COLUMNS / 2]);
        const int offset =
            OutputTile<float, SWIGLU>::offset(thread_m() + 16 * i, thread_n() + 16 * j);
        *reinterpret_cast<float*>(staging + offset) = value;
      }
    }
  }

 private:
  __device__ __forceinline__ static Vec<float> load_chunk(const unsigned char* rows, int row,
                                                          int chunk) {
    return load_vec(reinterpret_cast<const float*>(rows + chunk_offset(row, chunk)));
  }
};

template <typename Elem, int FRAGMENTS>
struct TileOf {
  using Type = MmaTile<Elem, FRAGMENTS>;
};
template <int FRAGMENTS>
struct TileOf<float, FRAGMENTS> {
  using Type = FmaTile<FRAGMENTS>;
};

// ---- A block ------------------------------------------------------------------------------------

template <typename Elem, bool SWIGLU, int FRAGMENTS, bool VECTOR>
__device__ __forceinline__ void compute_tile(Elem* y, const Problem<Elem>& problem,
                                             SharedStorage& shared, bool vector_store) {
  using Tile = typename TileOf<Elem, FRAGMENTS>::Type;
  using Loader = StageLoader<Elem, Tile::THREADS, SWIGLU, VECTOR>;
  Tile tile;
  tile.multiply(Loader{problem, shared}, (problem.k + Loader::BLOCK_K - 1) / Loader::BLOCK_K);

  // The stages' memory becomes the staging tile once every warp has read its last operands from it.
  unsigned char* staging = shared.stages[0].x;
  ptx::cp_async_wait<0>();
  __syncthreads();
  tile.template stage_outputs<SWIGLU>(staging);
  __syncthreads();
  OutputTile<Elem, SWIGLU>::store(y, staging, problem, vector_store);
}

template <bool SWIGLU, typename Elem>
__device__ __forceinline__ void grouped_gemm_fwd(Elem* y,                  // [R, N] out; act [R, I]
                                                 const Elem* x,            // [T, K] or [R, K]
                                                 const Elem* w,            // [E, N, K]; [E, 2I, K]
                                                 const int* token_of_row,  // [R] or nullptr
                                                 const int* expert_offsets,  // [E + 1]
                                                 const GemmTile* tiles,      // [num_tiles]
                                                 const int* num_tiles,       // [1]
                                                 const GroupedGemmArgs& args) {
  using Output = OutputTile<Elem, SWIGLU>;
  SHARED_DYNAMIC(shared_bytes);

  const int n_tiles = (args.n + Output::COLUMNS - 1) / Output::COLUMNS;
  const int group_blocks = n_tiles * GEMM_TILE_GROUP;
  const int in_group = blockIdx.x % group_blocks;
  const int tile_index = blockIdx.x / group_blocks * GEMM_TILE_GROUP + in_group % GEMM_TILE_GROUP;
  const int first_column = in_group / GEMM_TILE_GROUP * Output::COLUMNS;

  const int used_tiles = *num_tiles;
  if (tile_index >= used_tiles) {
    // Where rows are without owner, the host's bound leaves at least one block per column for them.
    const int surplus_tiles = gridDim.x / n_tiles - used_tiles;
    Output::clear(y, expert_offsets[args.num_experts], first_column, tile_index - used_tiles,
                  surplus_tiles, args);
    return;
  }

  const GemmTile tile = tiles[tile_index];
  const int64_t weight_rows = SWIGLU ? 2 * (int64_t)args.n : args.n;
  const Problem<Elem> problem = {x,
                                 w + tile.expert * weight_rows * args.k,
                                 tile.first_row,
                                 tile.num_rows,
                                 first_column,
                                 args.n,
                                 args.k};

  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  if (threadIdx.x < GEMM_BLOCK_M) {
    const int row = threadIdx.x;
    const int source = token_of_row && row < tile.num_rows ? token_of_row[tile.first_row + row]
                                                           : tile.first_row + row;
    shared.x_row[row] = row < tile.num_rows ? source : INACTIVE;
  }
  __syncthreads();

  if (!args.vector_load) {
    compute_tile<Elem, SWIGLU, 4, false>(y, problem, shared, args.vector_store);
  } else if (tile.num_rows <= 32) {
    compute_tile<Elem, SWIGLU, 1, true>(y, problem, shared, args.vector_store);
  } else if (tile.num_rows <= 64) {
    compute_tile<Elem, SWIGLU, 2, true>(y, problem, shared, args.vector_store);
  } else {
    compute_tile<Elem, SWIGLU, 4, true>(y, problem, shared, args.vector_store);
  }
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA)
    moe_grouped_gemm_fwd_f32(float* y, const float* x, const float* w, const int* token_of_row,
                             const int* expert_offsets, const GemmTile* tiles, const int* num_tiles,
                             const GroupedGemmArgs args) {
  grouped_gemm_fwd<false>(y, x, w, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_f16(f16* y, const f16* x, const f16* w, const int* token_of_row,
                             const int* expert_offsets, const GemmTile* tiles, const int* num_tiles,
                             const GroupedGemmArgs args) {
  grouped_gemm_fwd<false>(y, x, w, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_bf16(bf16* y, const bf16* x, const bf16* w, const int* token_of_row,
                              const int* expert_offsets, const GemmTile* tiles,
                              const int* num_tiles, const GroupedGemmArgs args) {
  grouped_gemm_fwd<false>(y, x, w, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_bf16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_FMA)
    moe_grouped_gemm_fwd_swiglu_f32(float* act, const float* x, const float* gate_up,
                                    const int* token_of_row, const int* expert_offsets,
                                    const GemmTile* tiles, const int* num_tiles,
                                    const GroupedGemmArgs args) {
  grouped_gemm_fwd<true>(act, x, gate_up, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_swiglu_f32, GEMM_THREADS_FMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_swiglu_f16(f16* act, const f16* x, const f16* gate_up,
                                    const int* token_of_row, const int* expert_offsets,
                                    const GemmTile* tiles, const int* num_tiles,
                                    const GroupedGemmArgs args) {
  grouped_gemm_fwd<true>(act, x, gate_up, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_swiglu_f16, GEMM_THREADS_MMA)

extern "C" __global__ void __launch_bounds__(GEMM_THREADS_MMA)
    moe_grouped_gemm_fwd_swiglu_bf16(bf16* act, const bf16* x, const bf16* gate_up,
                                     const int* token_of_row, const int* expert_offsets,
                                     const GemmTile* tiles, const int* num_tiles,
                                     const GroupedGemmArgs args) {
  grouped_gemm_fwd<true>(act, x, gate_up, token_of_row, expert_offsets, tiles, num_tiles, args);
}
EXPORT_KERNEL(moe_grouped_gemm_fwd_swiglu_bf16, GEMM_THREADS_MMA)
