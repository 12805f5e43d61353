// Functions of f32 with the same bits on every device and on the host, which expf and logf do not
// guarantee: correctly rounded operations alone, as intrinsics that the compiler never contracts.
// src/reference/route/exact.rs is the same in Rust. Errors are in units of 2^-24 of the value, or
// of 2^-149 if the value is subnormal, for the arguments that each function states.
#pragma once

// exp(x) = value * 2^n for -104 <= x <= 0, with the value between 0.7 and 1.42.
__device__ __forceinline__ float exp_parts_f32(float x, int* n) {
  // Adding 1.5 * 2^23 rounds x / ln 2 to the integer n in the low bits.
  constexpr float ROUND = 12582912.0f;
  const float shifted = __fmaf_rn(x, 1.44269504f, ROUND);
  *n = __float_as_int(shifted) - 0x4b400000;
  const float whole = __fsub_rn(shifted, ROUND);
  // r = x - n ln 2, with ln 2 as a sum of two floats.
  const float r = __fmaf_rn(whole, 1.90465430e-9f, __fmaf_rn(whole, -0.693147182f, x));
  // exp(r) = 1 + (r + r^2 q(r)), q through the Chebyshev points of |r| <= ln(2) / 2.
  float q = 1.39263261e-3f;
  q = __fmaf_rn(q, r, 8.36329255e-3f);
  q = __fmaf_rn(q, r, 4.16665524e-2f);
  q = __fmaf_rn(q, r, 1.66665763e-1f);
  q = __fmaf_rn(q, r, 0.5f);
  return __fadd_rn(1.0f, __fmaf_rn(__fmul_rn(r, r), q, r));
}

// exp(x) for x <= 0; off by at most 1.6.
__device__ __forceinline__ float exp_f32(float x) {
  if (x < -104.0f) return 0.0f;  // below half of the least subnormal number, and -inf
  int n;
  const float value = exp_parts_f32(x, &n);
  // Times 2^n in two exact factors, as 2^-150 underflows; only the second product rounds.
  const int half = n / 2;
  const float scaled = __fmul_rn(value, __int_as_float((half + 127) << 23));
  return __fmul_rn(scaled, __int_as_float((n - half + 127) << 23));
}

// 2 atanh(s) = ln((1 + s) / (1 - s)) for |s| <= 1/3; off by at most 1.6, and by what s is off.
__device__ __forceinline__ float two_atanh_f32(float s) {
  // 2 s (1 + x q(x)) with x = s^2, q through the Chebyshev points of 0 to 1/9.
  const float x = __fmul_rn(s, s);
  float q = 0.11612165f;
  q = __fmaf_rn(q, x, 0.108532876f);
  q = __fmaf_rn(q, x, 0.142961785f);
  q = __fmaf_rn(q, x, 0.199998528f);
  q = __fmaf_rn(q, x, 0.333333343f);
  const float twice = __fadd_rn(s, s);
  return __fmaf_rn(twice, __fmul_rn(x, q), twice);
}

// ln(1 + t) for 0 <= t <= 1; off by at most 4.
__device__ __forceinline__ float log1p_f32(float t) {
  return two_atanh_f32(__fdiv_rn(t, __fadd_rn(2.0f, t)));
}

// ln(1 + exp(z)) for any number; off by at most 4.
__device__ __forceinline__ float softplus_f32(float z) {
  return __fadd_rn(z > 0.0f ? z : 0.0f, log1p_f32(exp_f32(-fabsf(z))));
}

// x = 2^n * f with f from sqrt(1/2) to sqrt(2), for positive normal x.
__device__ __forceinline__ float log_parts_f32(float x, int* n) {
  const int bits = __float_as_int(x);
  *n = (bits - 0x3f3504f3) >> 23;
  return __int_as_float(bits - (int)((unsigned)*n << 23));
}

// ln(x) for positive normal x; off by at most 4.
__device__ __forceinline__ float log_f32(float x) {
  int n;
  const float f = log_parts_f32(x, &n);
  const float r = two_atanh_f32(__fdiv_rn(__fsub_rn(f, 1.0f), __fadd_rn(f, 1.0f)));
  const float whole = __int2float_rn(n);
  return __fmaf_rn(whole, 0.693147182f, __fmaf_rn(whole, -1.90465430e-9f, r));
}

// ln(x) for positive normal x; off by at most 1.5. Noise is specified with this one, and powers of
// scores with the one above: their bits differ.
__device__ __forceinline__ float precise_log_f32(float x) {
  int n;
  const float f = __fsub_rn(log_parts_f32(x, &n), 1.0f);
  // ln(1 + f) = 2 atanh(s) with s = f / (2 + f): 2s is f - f^2 / 2 + s f^2 / 2, and s z q the rest,
  // q through the Chebyshev points of z = s^2.
  const float s = __fdiv_rn(f, __fadd_rn(2.0f, f));
  const float z = __fmul_rn(s, s);
  float q = 0.233304679f;
  q = __fmaf_rn(q, z, 0.285508215f);
  q = __fmaf_rn(q, z, 0.400001228f);
  q = __fmaf_rn(q, z, 0.666666687f);
  const float half_square = __fmul_rn(0.5f, __fmul_rn(f, f));
  const float small = __fmul_rn(s, __fmaf_rn(z, q, half_square));
  // ln 2 as a sum of two floats; n times the first is exact.
  const float whole = __int2float_rn(n);
  const float tail = __fmaf_rn(whole, 1.42860677e-6f, small);
  return __fmaf_rn(whole, 0.693145752f, __fsub_rn(f, __fsub_rn(half_square, tail)));
}

// tanh(x) for any number; off by at most 4.
__device__ __forceinline__ float tanh_f32(float x) {
  const float size = fabsf(x);
  if (size < 0.55f) {
    // x + x^3 q(x^2), q through the Chebyshev points; the fraction below would cancel.
    const float y = __fmul_rn(x, x);
    float q = -6.61022775e-3f;
    q = __fmaf_rn(q, y, 2.13093888e-2f);
    q = __fmaf_rn(q, y, -5.39094284e-2f);
    q = __fmaf_rn(q, y, 0.133331135f);
    q = __fmaf_rn(q, y, -0.333333313f);
    return __fmaf_rn(x, __fmul_rn(y, q), x);
  }
  const float t = exp_f32(__fmul_rn(-2.0f, size));
  return copysignf(__fdiv_rn(__fsub_rn(1.0f, t), __fadd_rn(1.0f, t)), x);
}

// x to the power of p for 0 <= x <= 1 <= p; off by at most 2 + 5 p |ln x|. Subnormal x counts as 0.
__device__ __forceinline__ float pow_f32(float x, float p) {
  if (!(x >= 1.17549435e-38f)) return 0.0f;
  return exp_f32(__fmul_rn(p, log_f32(x)));
}
