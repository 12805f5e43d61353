// ldmatrix, stmatrix and mma.sync, with the fragment layouts of the PTX documentation.
#include "multiply.h"
#include "state.h"

namespace simt {

// ---- ldmatrix and stmatrix ----
// Register i of lane l holds the elements (l/4, 2(l%4)) and (l/4, 2(l%4)+1) of matrix i, or of its
// transpose. Lanes 8i to 8i+7 give the row addresses of matrix i.

struct Matrices {
  uint16_t row[8];  // the lane's row, if it gives one
  uint32_t r[4];
  int matrices;
  bool transposed;

  static void load(Matrices** ops, uint32_t) {
    for (int i = 0; i < ops[0]->matrices; i++) {
      for (int lane = 0; lane < 32; lane++) {
        const int major = lane / 4, minor = 2 * (lane % 4);
        const auto element = [&](int r, int c) -> uint32_t { return ops[8 * i + r]->row[c]; };
        ops[lane]->r[i] = ops[0]->transposed
                              ? element(minor, major) | element(minor + 1, major) << 16
                              : element(major, minor) | element(major, minor + 1) << 16;
      }
    }
  }

  static void store(Matrices** ops, uint32_t) {
    for (int i = 0; i < ops[0]->matrices; i++) {
      for (int lane = 0; lane < 32; lane++) {
        const int major = lane / 4, minor = 2 * (lane % 4);
        for (int half = 0; half < 2; half++) {
          const uint16_t value = static_cast<uint16_t>(ops[lane]->r[i] >> 16 * half);
          const int r = ops[0]->transposed ? minor + half : major;
          const int c = ops[0]->transposed ? major : minor + half;
          ops[8 * i + r]->row[c] = value;
        }
      }
    }
  }
};

// The row address that the calling lane gives, or nullptr if its address is unused.
static unsigned char* row_of_lane(uint32_t row, int matrices, const char* kind, Site site) {
  if (static_cast<int>(current_fiber()->lane) >= 8 * matrices) return nullptr;
  return shared_at(row, 16, 16, kind, site);
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, uint32_t row, Site site) {
  Matrices op;
  op.matrices = matrices;
  op.transposed = transposed;
  if (const unsigned char* from = row_of_lane(row, matrices, "ldmatrix", site)) {
    if (counter != nullptr) counter->lane(WarpEvent::SharedRead, from, 16, site);
    tsan_read(from, 16);
    TsanQuiet quiet;
    std::memcpy(op.row, from, 16);
  }
  Matrices* operands = &op;
  warp_op(
      WHOLE_WARP, operands,
      [](void** ops, uint32_t mask) { Matrices::load(reinterpret_cast<Matrices**>(ops), mask); },
      OrderMemory::No, "ldmatrix", site);
  for (int i = 0; i < matrices; i++) r[i] = op.r[i];
}

void stmatrix(uint32_t row, const uint32_t* r, int matrices, bool transposed, Site site) {
  Matrices op;
  op.matrices = matrices;
  op.transposed = transposed;
  for (int i = 0; i < matrices; i++) op.r[i] = r[i];
  unsigned char* const to = row_of_lane(row, matrices, "stmatrix", site);
  if (counter != nullptr && to != nullptr) counter->lane(WarpEvent::SharedWrite, to, 16, site);
  warp_op(
      WHOLE_WARP, &op,
      [](void** ops, uint32_t mask) { Matrices::store(reinterpret_cast<Matrices**>(ops), mask); },
      OrderMemory::No, "stmatrix", site);
  if (to != nullptr) {
    tsan_write(to, 16);
    TsanQuiet quiet;
    std::memcpy(to, op.row, 16);
  }
}

// ---- mma.sync.m16n8k16 ----

struct Mma {
  float* d;
  const uint32_t *a, *b;

  // With g = lane/4 and t = lane%4, register i of `a` holds row g + 8(i%2), columns 2t + 8(i/2) and
  // the next; register i of `b` holds column g, rows 2t + 8i and the next; `d` holds (g, 2t),
  // (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
  static void apply(Mma** ops, Half half) {
    alignas(32) uint16_t a16[16][16], b16[8][16];
    alignas(32) float a[16][16], b_columns[8][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const Mma& op = *ops[lane];
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 4; i++) std::memcpy(&a16[g + 8 * (i % 2)][t + 8 * (i / 2)], &op.a[i], 4);
      for (int i = 0; i < 2; i++) std::memcpy(&b16[g][t + 8 * i], &op.b[i], 4);
      std::memcpy(&c[g][t], op.d, 8);
      std::memcpy(&c[g + 8][t], op.d + 2, 8);
    }
    widen(&a16[0][0], &a[0][0], 256, half);
    widen(&b16[0][0], &b_columns[0][0], 128, half);
    for (int k = 0; k < 16; k++) {
      for (int n = 0; n < 8; n++) b[k][n] = b_columns[n][k];
    }
    multiply_add(&a[0][0], &b[0][0], &c[0][0], 16, 8);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = 2 * (lane % 4);
      std::memcpy(ops[lane]->d, &c[g][t], 8);
      std::memcpy(ops[lane]->d + 2, &c[g + 8][t], 8);
    }
  }
};

void mma(float* d, const uint32_t* a, const uint32_t* b, Half half, Site site) {
  Mma op{d, a, b};
  const WarpFn apply = half == Half::Bf16 ? WarpFn([](void** ops, uint32_t) {
    Mma::apply(reinterpret_cast<Mma**>(ops), Half::Bf16);
  })
                                          : WarpFn([](void** ops, uint32_t) {
                                              Mma::apply(reinterpret_cast<Mma**>(ops), Half::F16);
                                            });
  warp_op(WHOLE_WARP, &op, apply, OrderMemory::No, "mma.sync", site);
}

}  // namespace simt
