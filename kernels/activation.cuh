// The activation between an expert's projections, in f32. Specification:
// src/reference/activation.rs; parameters: ActivationArgs in abi.h.
#pragma once

namespace activation {

// A comparison instead of fminf: NaN propagates.
__device__ __forceinline__ float at_most(float value, float limit) {
  return value > limit ? limit : value;
}

__device__ __forceinline__ float clamp(float value, float limit) {
  return value < -limit ? -limit : at_most(value, limit);
}

// x * sigmoid(s)
__device__ __forceinline__ float times_sigmoid(float x, float s) { return x / (1.0f + expf(-s)); }

// GELU with erfc, and with the sigmoid that (1 + tanh(z)) / 2 equals: neither cancels if g is
// negative.
__device__ __forceinline__ float gelu(float g) { return 0.5f * g * erfcf(-0.70710678f * g); }
__device__ __forceinline__ float gelu_tanh(float g) {
  return times_sigmoid(g, 1.5957691f * (g + 0.044715f * (g * g * g)));
}

__device__ __forceinline__ float relu(float g) { return g < 0.0f ? 0.0f : g; }

// gate[i] = f(gate[i]) * (up[i] + up_offset), or f(gate[i]) without a gate. Branches are uniform,
// and each handles all LEN values.
template <int LEN>
__device__ __forceinline__ void apply(float (&gate)[LEN], float (&up)[LEN], bool gated,
                                      const ActivationArgs& args) {
#pragma unroll
  for (int i = 0; i < LEN; i++) gate[i] = at_most(gate[i], args.limit_before);
  switch (args.function) {
    case ACTIVATION_SILU:
      if (args.soft_cap) {
#pragma unroll
        for (int i = 0; i < LEN; i++) {
          const float capped = args.gate_cap * tanhf(gate[i] / args.gate_cap);
          gate[i] = times_sigmoid(capped, args.alpha * gate[i]);
          up[i] = args.up_cap * tanhf(up[i] / args.up_cap);
        }
      } else {
#pragma unroll
        for (int i = 0; i < LEN; i++) gate[i] = times_sigmoid(gate[i], args.alpha * gate[i]);
      }
      break;
    case ACTIVATION_GELU:
#pragma unroll
      for (int i = 0; i < LEN; i++) gate[i] = gelu(gate[i]);
      break;
    case ACTIVATION_GELU_TANH:
#pragma unroll
      for (int i = 0; i < LEN; i++) gate[i] = gelu_tanh(gate[i]);
      break;
    case ACTIVATION_RELU:
#pragma unroll
      for (int i = 0; i < LEN; i++) gate[i] = relu(gate[i]);
      break;
    default:  // ACTIVATION_RELU_SQUARED
#pragma unroll
      for (int i = 0; i < LEN; i++) gate[i] = relu(gate[i]) * relu(gate[i]);
  }
#pragma unroll
  for (int i = 0; i < LEN; i++) {
    gate[i] = at_most(gate[i], args.limit_after);
    if (gated) gate[i] *= clamp(up[i], args.limit_up) + args.up_offset;
  }
}

}  // namespace activation
