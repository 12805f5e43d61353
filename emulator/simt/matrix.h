// The warp-wide matrix operations behind simt_ptx.h: ldmatrix, stmatrix, mma and wgmma.
#pragma once
#include "thread.h"
#include "warp.h"

namespace simt {

// The two 16-bit formats.
enum class Half { Bf16, F16 };

// One lane's part of a wgmma: matrix descriptors `a` and `b`, and the lane's fragment `d`.
struct Wgmma {
  float* d;
  uint64_t a, b;
  int n;
  bool scale_d, trans_a, trans_b;
  Half half;
};

// matrix.cpp
void ldmatrix(uint32_t* r, int matrices, bool transposed, uint32_t row, Site site);
void stmatrix(uint32_t row, const uint32_t* r, int matrices, bool transposed, Site site);
void mma(float* d, const uint32_t* a, const uint32_t* b, Half half, Site site);

// wgmma.cpp
void wgmma(const Wgmma& operation, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(uint32_t groups_left, Site site);

// warp.cpp
bool elect(Site site);
void rendezvous_whole_warp(const char* kind, Site site);

}  // namespace simt
