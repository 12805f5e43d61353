// The products' main loop: 128 rows of x by 128 features of weights by 128 bytes of inputs, with
// f32 sums in registers. grouped_gemm.cu chooses rows and features, gemm_epilogue.cuh stores
// outputs.
//
// Weights are OUT_IN (a feature's inputs are adjacent) or IN_OUT (an input's features are
// adjacent). Stages keep the order of global memory. A tile's features are two halves of 64 at any
// two addresses: one after the other, or gate and up. `k` runs over inputs.
#pragma once

namespace gemm_tile {

// A stage of the pipeline has 128 bytes of inputs of every row of x and, for OUT_IN weights, of
// every feature. Each row is eight 16-byte chunks; chunk c is stored at c ^ (row % 8): ldmatrix and
// the FMA loop read the same chunk of eight rows at once, from eight different groups of banks.
constexpr int ROW_BYTES = 128;
constexpr int CHUNK_BYTES = 16;
constexpr int ROW_CHUNKS = ROW_BYTES / CHUNK_BYTES;
constexpr int HALF_FEATURES = GEMM_BLOCK_N / 2;

struct alignas(1024) Stage {
  unsigned char x[GEMM_BLOCK_M * ROW_BYTES];
  unsigned char w[GEMM_BLOCK_N * ROW_BYTES];
};

struct SharedStorage {
  Stage stages[GEMM_STAGES];   // then the epilogue's tile
  int x_row[GEMM_BLOCK_M];     // the row of x of each row of the tile, INACTIVE past the tile's end
  float weight[GEMM_BLOCK_M];  // the routing weight of each row, in the operations that use it

  __device__ __forceinline__ unsigned char* epilogue_tile() { return stages[0].x; }
  __device__ __forceinline__ const unsigned char* epilogue_tile() const { return stages[0].x; }
};
static_assert(sizeof(SharedStorage::stages) + GEMM_BLOCK_M * (sizeof(int) + sizeof(float)) ==
                  GROUPED_GEMM_SMEM_BYTES,
              "the launch requests this size");
static_assert(GEMM_BLOCK_M * GEMM_BLOCK_N * sizeof(float) <= GEMM_STAGES * sizeof(Stage),
              "the epilogue's tile fits into the stages");
static_assert(GEMM_BLOCK_M == 128 && GEMM_BLOCK_N == 128, "the warp layouts below cover this tile");

// The operands of a block.
template <typename Elem>
struct Problem {
  const Elem* x;        // [T, in] with a map, else [R, in]
  const Elem* w;        // the first feature of the tile
  int64_t half_offset;  // elements from the first half's first feature to the second half's
  int features[2];      // of each half: at most 64 are used, none if it is 0 or negative
  int out_stride;       // elements between features of a half
  int in_stride;        // elements between inputs of a feature
  int in_features;
  int num_rows;  // of the tile
};

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * ROW_BYTES + ((chunk ^ (row % 8)) * CHUNK_BYTES);
}

// IN_OUT weights in a stage: a row per input, with all features. ldmatrix reads the same chunk of
// eight rows, hence the swizzle; the FMA loop reads adjacent chunks of a row and needs none.
template <typename Elem>
struct InOutLayout {
  static constexpr int CHUNKS = GEMM_BLOCK_N / Vec<Elem>::LEN;  // of a row
  static constexpr int PITCH = CHUNKS * CHUNK_BYTES;

  __device__ __forceinline__ static int offset(int k, int chunk) {
    return k * PITCH + (sizeof(Elem) == 2 ? chunk ^ (k % 8) : chunk) * CHUNK_BYTES;
  }
};

// Fills stages. VECTOR: bases and pitches are multiples of 16 bytes, and copies are asynchronous.
// Otherwise elements are copied one by one, for any alignment and any strides: the stage is then
// OUT_IN for weights of either order.
template <typename Elem, int THREADS, bool IN_OUT, bool VECTOR>
struct StageLoader {
  static_assert(VECTOR || !IN_OUT, "without VECTOR stages are OUT_IN");
  static constexpr int PASS_ROWS = THREADS / ROW_CHUNKS;
  static constexpr int PASSES = GEMM_BLOCK_M / PASS_ROWS;
  static constexpr int BLOCK_K = ROW_BYTES / sizeof(Elem);
  static_assert(GEMM_BLOCK_M == GEMM_BLOCK_N && PASS_ROWS % 8 == 0,
                "the passes serve both operands");

  const Problem<Elem>& problem;
  SharedStorage& shared;

  // Loads block `block` of inputs. Rows, features and inputs past an end become zero in both
  // operands, so that they add nothing.
  __device__ __forceinline__ void load(int stage, int block) const {
    load_x(shared.stages[stage].x, block);
    if constexpr (IN_OUT) {
      load_in_out(shared.stages[stage].w, block);
    } else {
      load_out_in(shared.stages[stage].w, block);
    }
  }

 private:
  // Each thread copies one chunk column of every THREADS / 8th row, so that a warp reads whole
  // 128-byte lines.
  __device__ __forceinline__ void load_x(unsigned char* rows, int block) const {
    const int thread_row = threadIdx.x / ROW_CHUNKS, thread_chunk = threadIdx.x % ROW_CHUNKS;
    const int offset = chunk_offset(thread_row, thread_chunk);
    const int k = block * BLOCK_K + thread_chunk * Vec<Elem>::LEN;
#pragma unroll VECTOR ? PASSES : 1
    for (int i = 0; i < PASSES; i++) {
      const int row = shared.x_row[thread_row + i * PASS_ROWS];
      const Elem* x = problem.x + (int64_t)row * problem.in_features + k;
      copy(rows + offset + i * PASS_ROWS * ROW_BYTES, x, 1, row >= 0, k);
    }
  }

  // Features are equidistant: one pointer per thread, and steps that all threads share.
  __device__ __forceinline__ void load_out_in(unsigned char* rows, int block) const {
    const int thread_row = threadIdx.x / ROW_CHUNKS, thread_chunk = threadIdx.x % ROW_CHUNKS;
    const int offset = chunk_offset(thread_row, thread_chunk);
    const int k = block * BLOCK_K + thread_chunk * Vec<Elem>::LEN;
    const int in_stride = VECTOR ? 1 : problem.in_stride;
    const Elem* w = problem.w + (int64_t)thread_row * problem.out_stride + (int64_t)k * in_stride;
#pragma unroll VECTOR ? PASSES : 1
    for (int i = 0; i < PASSES; i++) {
      const int half = i >= PASSES / 2;
      const int step = (i - half * (PASSES / 2)) * PASS_ROWS;
      const int64_t distance =
          (int64_t)step * problem.out_stride + (half ? problem.half_offset : 0);
      copy(rows + offset + i * PASS_ROWS * ROW_BYTES, w + distance, in_stride,
           thread_row + step < (half ? problem.features[1] : problem.features[0]), k);
    }
  }

  // Each thread copies one chunk of features of every THREADS / CHUNKS-th row.
  __device__ __forceinline__ void load_in_out(unsigned char* rows, int block) const {
    using Layout = InOutLayout<Elem>;
    constexpr int PASS_K = THREADS / Layout::CHUNKS;
    static_assert(PASS_K % 8 == 0, "all chunks of a thread have the same swizzle");
    const int thread_k = threadIdx.x / Layout::CHUNKS, thread_chunk = threadIdx.x % Layout::CHUNKS;
    const int half = thread_chunk >= Layout::CHUNKS / 2;
    const int feature = thread_chunk % (Layout::CHUNKS / 2) * Vec<Elem>::LEN;
    const bool inside = feature < (half ? problem.features[1] : problem.features[0]);
    const int offset = Layout::offset(thread_k, thread_chunk);
    const int k = block * BLOCK_K + thread_k;
    const Elem* w = problem.w + (half ? problem.half_offset : 0) + feature;
    w += (int64_t)k * problem.in_stride;
#pragma unroll
    for (int i = 0; i < BLOCK_K / PASS_K; i++) {
      const int step = i * PASS_K;
      copy(rows + offset + step * Layout::PITCH, w + (int64_t)step * problem.in_stride, 1, inside,
           k + step);
    }
  }

  // `source` may point past the matrix; it is read only if the row and k are inside.
  __device__ __forceinline__ void copy(unsigned char* target, const Elem* source, int stride,
                                       bool row_inside, int k) const {
    if constexpr (VECTOR) {
      const bool inside = row_inside && k < problem.in_features;
      ptx::cp_async16(ptx::smem_u32(target), inside ? source : problem.x, inside ? CHUNK_BYTES : 0);
    } else {
      Vec<Elem> chunk;
#pragma unroll
      for (int i = 0; i < Vec<Elem>::LEN; i++) {
        const bool inside = row_inside && k + i < problem.in_features;
        chunk.at[i] = inside ? source[(int64_t)i * stride] : from_f32<Elem>(0.0f);
      }
      store_vec(reinterpret_cast<Elem*>(target), chunk);
    }
  }
};

// The epilogue's tile in shared memory: 128 x 128 outputs or f32 sums, written by the threads that
// summed them and read by those that store them. Chunks are swizzled against bank conflicts between
// the rows that a warp writes at once and, for sums, between the chunks that its lanes read: every
// one, every second or every fourth.
template <typename Value>
struct EpilogueTile {
  static constexpr int CHUNKS = GEMM_BLOCK_N / Vec<Value>::LEN;  // of a row

  // In bytes.
  __device__ __forceinline__ static int offset(int row, int column) {
    const int chunk = column / Vec<Value>::LEN;
    const int swizzle = sizeof(Value) == 4 ? row % 4 * 2 ^ chunk / 8 : row % 8;
    return (row * CHUNKS + (chunk ^ swizzle)) * CHUNK_BYTES +
           column % Vec<Value>::LEN * (int)sizeof(Value);
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

// Four warps, two by two. Warp (wm, wn) computes the 16-row strips 32*i + 16*wm of x and the strips
// 32*p + 16*wn of 16 features: strips alternate between warps, so that a tile of few rows still
// uses all four tensor cores. FRAGMENTS: strips of x per warp that the tile's rows need.
template <typename Elem, int FRAGMENTS, bool IN_OUT>
struct MmaTile {
  static constexpr int THREADS = GEMM_THREADS_MMA;
  static constexpr int STEPS = ROW_BYTES / 32;  // of k16
  static_assert(STEPS % 2 == 0, "every block of inputs begins with the same set of registers");
  static constexpr int STRIPS = GEMM_BLOCK_N / 32;

  float sum[FRAGMENTS][2 * STRIPS][4] = {};

  __device__ __forceinline__ static int warp_m() { return threadIdx.x / WARP_SIZE / 2; }
  __device__ __forceinline__ static int warp_n() { return threadIdx.x / WARP_SIZE % 2; }

  // The row and the column of sum[i][j][2 * half]; sum[i][j][2 * half + 1] is the next column.
  __device__ __forceinline__ static int row_of(int i, int half) {
    return 32 * i + 16 * warp_m() + 8 * half + threadIdx.x % WARP_SIZE / 4;
  }
  __device__ __forceinline__ static int column_of(int j) {
    return 32 * (j / 2) + 16 * warp_n() + 8 * (j % 2) + 2 * (threadIdx.x % 4);
  }

  __device__ __forceinline__ static void load_x(uint32_t (&x)[FRAGMENTS][4], const Stage& stage,
                                                int step) {
    const int lane = threadIdx.x % WARP_SIZE;
    const unsigned char* rows =
        stage.x + chunk_offset(16 * warp_m() + lane % 16, 2 * step + lane / 16);
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++)
      ptx::ldmatrix_x4(x[i], ptx::smem_u32(rows + i * 32 * ROW_BYTES));
  }

  // The matrices of 8 features by 8 inputs: inputs first, then features.
  __device__ __forceinline__ static void load_w(uint32_t (&w)[4], const Stage& stage, int step,
                                                int strip) {
    const int lane = threadIdx.x % WARP_SIZE;
    if constexpr (IN_OUT) {
      const int k = 16 * step + lane % 16;
      const int chunk = 4 * strip + 2 * warp_n() + lane / 16;
      ptx::ldmatrix_x4_trans(w, ptx::smem_u32(stage.w + InOutLayout<Elem>::offset(k, chunk)));
    } else {
      const int row = 16 * warp_n() + lane / 16 * 8 + lane % 8;
      const unsigned char* rows = stage.w + chunk_offset(row, 2 * step + lane / 8 % 2);
      ptx::ldmatrix_x4(w, ptx::smem_u32(rows + strip * 32 * ROW_BYTES));
    }
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
        // After the barrier before the last step's multiplications, the next stage has arrived for
        // all threads, and no thread reads this one again: its last operands are in registers.
        if (step == STEPS - 1) {
          stage = stage + 1 == GEMM_STAGES ? 0 : stage + 1;
          ptx::cp_async_wait<GEMM_STAGES - 2>();
          __syncthreads();
        }
        // After the last block this loads from a stage that was not filled, and the operands are
        // not used: a branch would cost more.
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

  // Adds bias[c] to every sum of column c, of which there are `columns`.
  __device__ __forceinline__ void add_bias(const Elem* bias, int columns) {
#pragma unroll
    for (int j = 0; j < 2 * STRIPS; j++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int column = column_of(j) + c;
        const float value = column < columns ? to_f32(bias[column]) : 0.0f;
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) {
          sum[i][j][c] += value;
          sum[i][j][2 + c] += value;
        }
      }
    }
  }

  // Multiplies every sum of row r by weights[r].
  __device__ __forceinline__ void scale_rows(const float* weights) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float weight = weights[row_of(i, half)];
#pragma unroll
        for (int j = 0; j < 2 * STRIPS; j++) {
          sum[i][j][2 * half] *= weight;
          sum[i][j][2 * half + 1] *= weight;
        }
      }
    }
  }

  // Stores the sums into the epilogue's tile as `Value`: f32, or rounded to Elem.
  template <typename Value>
  __device__ __forceinline__ void store_sums(unsigned char* tile) const {
    struct alignas(2 * sizeof(Value)) Pair {
      Value first, second;
    };
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < 2 * STRIPS; j++) {
          const Pair pair = {from_f32<Value>(sum[i][j][2 * half]),
                             from_f32<Value>(sum[i][j][2 * half + 1])};
          const int offset = EpilogueTile<Value>::offset(row_of(i, half), column_of(j));
          *reinterpret_cast<Pair*>(tile + offset) = pair;
        }
      }
    }
  }
};

// ---- f32: fused multiply-adds -------------------------------------------------------------------

// Eight warps of 4 x 8 threads. Thread (tm, tn) of the 16 x 16 computes the rows tm + 16*i. Its
// 16-byte loads have no bank conflicts: x is a broadcast, and of the weights a warp reads eight
// rows (OUT_IN, where the thread computes the columns tn + 16*j) or eight chunks of one row
// (IN_OUT, where it computes four adjacent columns of each half).
template <int FRAGMENTS, bool IN_OUT>
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
  __device__ __forceinline__ static int column_of(int j) {
    return IN_OUT ? 4 * thread_n() + HALF_FEATURES * (j / 4) + j % 4 : thread_n() + 16 * j;
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
      // After the barrier this stage has arrived for all threads, and the one before it is free.
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
      float w[COLUMNS][Vec<float>::LEN];
      load_w(w, stage, chunk);
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const Vec<float> x = load_at(stage.x + chunk_offset(thread_m() + 16 * i, chunk));
#pragma unroll
        for (int k = 0; k < Vec<float>::LEN; k++) {
#pragma unroll
          for (int j = 0; j < COLUMNS; j++) sum[i][j] += x.at[k] * w[j][k];
        }
      }
    }
  }

  // Adds bias[c] to every sum of column c, of which there are `columns`.
  __device__ __forceinline__ void add_bias(const float* bias, int columns) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
      const float value = column_of(j) < columns ? bias[column_of(j)] : 0.0f;
#pragma unroll
      for (int i = 0; i < ROWS; i++) sum[i][j] += value;
    }
  }

  // Stores the sums into the epilogue's tile.
  template <typename Value>
  __device__ __forceinline__ void store_sums(unsigned char* tile) const {
    constexpr int WIDTH = IN_OUT ? Vec<float>::LEN : 1;  // adjacent columns of the thread
    struct alignas(WIDTH * sizeof(float)) Columns {
      float at[WIDTH];
    };
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
#pragma unroll
      for (int j = 0; j < COLUMNS; j += WIDTH) {
        Columns values;
#pragma unroll
        for (int c = 0; c < WIDTH; c++) values.at[c] = sum[i][j + c];
        const int offset = EpilogueTile<float>::offset(thread_m() + 16 * i, column_of(j));
        *reinterpret_cast<Columns*>(tile + offset) = values;
      }
    }
  }

 private:
  __device__ __forceinline__ static void load_w(float (&w)[COLUMNS][Vec<float>::LEN],
                                                const Stage& stage, int chunk) {
    constexpr int LEN = Vec<float>::LEN;
    if constexpr (IN_OUT) {
#pragma unroll
      for (int i = 0; i < 2 * LEN; i++) {
        const int k = i / 2, half = i % 2;
        const int column_chunk = thread_n() + half * (HALF_FEATURES / LEN);
        const Vec<float> columns =
            load_at(stage.w + InOutLayout<float>::offset(chunk * LEN + k, column_chunk));
#pragma unroll
        for (int j = 0; j < LEN; j++) w[half * LEN + j][k] = columns.at[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
        const Vec<float> inputs = load_at(stage.w + chunk_offset(thread_n() + 16 * j, chunk));
#pragma unroll
        for (int k = 0; k < LEN; k++) w[j][k] = inputs.at[k];
      }
    }
  }

  __device__ __forceinline__ static Vec<float> load_at(const unsigned char* chunk) {
    return load_vec(reinterpret_cast<const float*>(chunk));
  }
};

template <typename Elem, int FRAGMENTS, bool IN_OUT>
struct TileOf {
  using Type = MmaTile<Elem, FRAGMENTS, IN_OUT>;
};
template <int FRAGMENTS, bool IN_OUT>
struct TileOf<float, FRAGMENTS, IN_OUT> {
  using Type = FmaTile<FRAGMENTS, IN_OUT>;
};

}  // namespace gemm_tile
