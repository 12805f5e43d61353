// The arithmetic of the matrix instructions: 16-bit operands widened to f32, products summed in f32
// in the order of k. A GPU groups and truncates its sums differently, so only sums that are exact
// in f32 agree bit for bit.
#pragma once
#include <cstdint>
#include <cstring>

#include "matrix.h"

// An AVX2 version beside the plain one, selected when the library is loaded. Sanitizers do not
// support the indirect functions that this needs.
#if defined(__x86_64__) && !defined(SIMT_TSAN) && !defined(__SANITIZE_ADDRESS__)
#define SIMT_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define SIMT_CLONES
#endif

namespace simt {

using Float8 = float __attribute__((vector_size(32)));

// Widens `n` values.
void widen(const uint16_t* from, float* to, int n, Half half);

// c[m, n] += a[m, 16] * b[16, n]; m is a multiple of 4, n of 8.
void multiply_add(const float* a, const float* b, float* c, int rows, int columns);

}  // namespace simt
