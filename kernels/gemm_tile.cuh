// The products' main loop: 128 rows of x by 128 features of weights by 128 bytes of inputs, f32 sums
// in registers. grouped_gemm.cu says which rows and features, and what becomes of the sums.
//
// Weights lie OUT_IN, a feature's inputs next to each other, or IN_OUT, an input's features next to
// each other. Both pass through the same stages as they are in memory; a tile's features are two
// halves of 64, each wherever the caller says: one after the other, or gate and up.
#pragma once

namespace gemm_tile {

// A stage of the pipeline holds 128 bytes of inputs of every row of x, and of every feature of weights
// that lie OUT_IN. Each row is eight 16-byte chunks; chunk c lies at place c ^ (row % 8), so that
// eight rows' same chunk, which is what ldmatrix and the FMA loop read at once, lies in eight
// different groups of banks.
constexpr int ROW_BYTES = 128;
constexpr int CHUNK_BYTES = 16;
constexpr int ROW_CHUNKS = ROW_BYTES / CHUNK_BYTES;
constexpr int HALF_FEATURES = GEMM_BLOCK_N / 2;

struct alignas(1024) Stage {
  unsigned char x[GEMM_BLOCK_M * ROW_BYTES];
  unsigned char w[GEMM_BLOCK_N * ROW_BYTES];
};

struct SharedStorage {
  Stage stages[GEMM_STAGES];  // and, once all is summed, the outputs
  int x_row[GEMM_BLOCK_M];  // the row of x that each row of the tile reads, -1 past the tile's end
  float weight[GEMM_BLOCK_M];  // that the routing gave the row, where the operation reads it
};
static_assert(sizeof(SharedStorage::stages) + GEMM_BLOCK_M * (sizeof(int) + sizeof(float)) ==
                  GROUPED_GEMM_SMEM_BYTES,
              "what the launch asks for");
static_assert(GEMM_BLOCK_M * GEMM_BLOCK_N * sizeof(float) <= GEMM_STAGES * sizeof(Stage),
              "the outputs pass through the stages' memory");
static_assert(GEMM_BLOCK_M == 128 && GEMM_BLOCK_N == 128, "what the warp layouts below cover");

// What a block multiplies.
template <typename Elem>
struct Problem {
  const Elem* x;       // [T, in] with a map, else [R, in]
  const Elem* w;       // the first feature of the tile
  int64_t second;      // where the 65th is, in elements from the first
  int features[2];     // of each half, how many there are; 64 count, and none from 0 down
  int out_stride;      // elements between neighbours in a half
  int in_stride;       // elements between inputs of a feature
  int in_features;     // that k runs over
  int num_rows;        // of the tile
};

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * ROW_BYTES + ((chunk ^ (row % 8)) * CHUNK_BYTES);
}

// A stage of weights that lie IN_OUT: a row for each input, of all features. ldmatrix reads eight
// rows' same chunk, hence the swizzle; the FMA loop reads a row's neighbours, and needs none.
template <typename Elem>
struct InOutStage {
  static constexpr int CHUNKS = GEMM_BLOCK_N / Vec<Elem>::LEN;  // of a row
  static constexpr int PITCH = CHUNKS * CHUNK_BYTES;

  __device__ __forceinline__ static int offset(int k, int chunk) {
    return k * PITCH + (sizeof(Elem) == 2 ? chunk ^ (k % 8) : chunk) * CHUNK_BYTES;
  }
};

// Fills stages. VECTOR: bases and pitches are multiples of 16 bytes, and copies are asynchronous.
// Otherwise elements are copied one by one, which is slow and right for any alignment and any
// strides: such weights come out as OUT_IN, however they lay.
template <typename Elem, int THREADS, bool IN_OUT, bool VECTOR>
struct StageLoader {
  static_assert(VECTOR || !IN_OUT, "the slow path knows one order");
  static constexpr int PASS_ROWS = THREADS / ROW_CHUNKS;
  static constexpr int PASSES = GEMM_BLOCK_M / PASS_ROWS;
  static constexpr int BLOCK_K = ROW_BYTES / sizeof(Elem);
  static_assert(GEMM_BLOCK_M == GEMM_BLOCK_N && PASS_ROWS % 8 == 0,
                "the passes serve both operands");

  const Problem<Elem>& problem;
  SharedStorage& shared;

  // Rows, features and inputs past an end become zero in both operands, so they add nothing.
  __device__ __forceinline__ void load(int stage_index, int block) const {
    Stage& stage = shared.stages[stage_index];
    load_x(stage.x, block);
    if constexpr (IN_OUT) {
      load_in_out(stage.w, block);
    } else {
      load_out_in(stage.w, block);
    }
  }

 private:
  // A thread answers for one chunk column and every THREADS / 8th row, so a warp's copies read
  // whole 128-byte lines.
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

  // Features lie at fixed distances: one pointer and steps that all threads share name them.
  __device__ __forceinline__ void load_out_in(unsigned char* rows, int block) const {
    const int thread_row = threadIdx.x / ROW_CHUNKS, thread_chunk = threadIdx.x % ROW_CHUNKS;
    const int offset = chunk_offset(thread_row, thread_chunk);
    const int k = block * BLOCK_K + thread_chunk * Vec<Elem>::LEN;
    const int in_stride = VECTOR ? 1 : problem.in_stride;
    const Elem* w =
        problem.w + (int64_t)thread_row * problem.out_stride + (int64_t)k * in_stride;
#pragma unroll VECTOR ? PASSES : 1
    for (int i = 0; i < PASSES; i++) {
      const int half = i >= PASSES / 2;
      const int step = (i - half * (PASSES / 2)) * PASS_ROWS;
      const int64_t distance = (int64_t)step * problem.out_stride + (half ? problem.second : 0);
      copy(rows + offset + i * PASS_ROWS * ROW_BYTES, w + distance, in_stride,
           thread_row + step < (half ? problem.features[1] : problem.features[0]), k);
    }
  }

  // A thread answers for one chunk of features and every THREADS / CHUNKS-th row.
  __device__ __forceinline__ void load_in_out(unsigned char* rows, int block) const {
    using Rows = InOutStage<Elem>;
    constexpr int PASS_K = THREADS / Rows::CHUNKS;
    static_assert(PASS_K % 8 == 0, "a thread's chunks have one place in their rows");
    const int thread_k = threadIdx.x / Rows::CHUNKS, thread_chunk = threadIdx.x % Rows::CHUNKS;
    const int half = thread_chunk >= Rows::CHUNKS / 2;
    const int feature = thread_chunk % (Rows::CHUNKS / 2) * Vec<Elem>::LEN;
    const bool inside = feature < (half ? problem.features[1] : problem.features[0]);
    const int offset = Rows::offset(thread_k, thread_chunk);
    const int k = block * BLOCK_K + thread_k;
    const Elem* w = problem.w + (half ? problem.second : 0) + feature;
    w += (int64_t)k * problem.in_stride;
#pragma unroll
    for (int i = 0; i < BLOCK_K / PASS_K; i++) {
      const int step = i * PASS_K;
      copy(rows + offset + step * Rows::PITCH, w + (int64_t)step * problem.in_stride, 1, inside,
           k + step);
    }
  }

  // `source` may be formed past the matrix, but is read only where the row and k are inside.
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

// What passes from the threads that summed it to those that store it: 128 x 128 outputs, or sums.
// Chunks are swizzled against conflicts between the rows that a warp writes at once, and, for
// sums, between the chunks that its lanes read: every one, every second or every fourth.
template <typename Value>
struct Staging {
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

// Four warps, two by two. Warp (wm, wn) owns the 16-row strips 32*i + 16*wm of x and the strips
// 32*p + 16*wn of 16 features: strips alternate between warps, so that a tile of few rows still
// keeps all four tensor cores busy. FRAGMENTS: how many strips of x the tile's rows need.
template <typename Elem, int FRAGMENTS, bool IN_OUT>
struct MmaTile {
  static constexpr int THREADS = GEMM_THREADS_MMA;
  static constexpr int STEPS = ROW_BYTES / 32;  // of k16
  static_assert(STEPS % 2 == 0, "every block of K begins with the same set of registers");
  static constexpr int STRIPS = GEMM_BLOCK_N / 32;

  float sum[FRAGMENTS][2 * STRIPS][4] = {};

  __device__ __forceinline__ static int warp_m() { return threadIdx.x / WARP_SIZE / 2; }
  __device__ __forceinline__ static int warp_n() { return threadIdx.x / WARP_SIZE % 2; }

  // The row and the column of sum[i][j][2 * half]; the next column's is beside it.
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
      ptx::ldmatrix_x4_trans(w, ptx::smem_u32(stage.w + InOutStage<Elem>::offset(k, chunk)));
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

  // Hands the sums over to the block as `Value`: f32, or rounded to Elem.
  template <typename Value>
  __device__ __forceinline__ void stage(unsigned char* staging) const {
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
          const int offset = Staging<Value>::offset(row_of(i, half), column_of(j));
          *reinterpret_cast<Pair*>(staging + offset) = pair;
        }
      }
    }
  }
};

// ---- f32: fused multiply-adds -------------------------------------------------------------------

// Eight warps of 4 x 8 threads. Thread (tm, tn) of the 16 x 16 owns the rows tm + 16*i. Its loads
// of 16 bytes then meet no bank conflict: x is a broadcast, and of weights a warp reads eight rows
// (OUT_IN, where the thread owns the columns tn + 16*j) or eight chunks of one row (IN_OUT, where
// it owns four neighbours of each half).
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

  // Hands the sums over to the block.
  template <typename Value>
  __device__ __forceinline__ void stage(unsigned char* staging) const {
    constexpr int WIDTH = IN_OUT ? Vec<float>::LEN : 1;  // neighbours that the thread owns
    struct alignas(WIDTH * sizeof(float)) Neighbours {
      float at[WIDTH];
    };
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
#pragma unroll
      for (int j = 0; j < COLUMNS; j += WIDTH) {
        Neighbours values;
#pragma unroll
        for (int c = 0; c < WIDTH; c++) values.at[c] = sum[i][j + c];
        const int offset = Staging<float>::offset(thread_m() + 16 * i, column_of(j));
        *reinterpret_cast<Neighbours*>(staging + offset) = values;
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
            load_at(stage.w + InOutStage<float>::offset(chunk * LEN + k, column_chunk));
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
