//! The configuration of each fixture's layer, as a line.

pub const LINES: &[(&str, &str)] = &[
    (
        "afmoe-tiny",
        "H20 I10 E6 K3, sigmoid + bias, top-k, renormalised + 1e-20, * 1.6; shared I20 gated SiLU",
    ),
    ("aria-tiny", "H20 I10 E6 K3, top-k, softmax; gated SiLU, transposed; shared I20 gated SiLU"),
    (
        "axk1-tiny",
        "H20 I12 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I12 gated SiLU; output normed",
    ),
    (
        "axk2-tiny",
        "H24 I10 E8 K3, f32 logits, sigmoid + bias, 2 of 4 groups by top-2 sum, others at 0, top-k, \
         renormalised + 1e-20, * 2.5; shared I10 gated SiLU",
    ),
    (
        "bailing-hybrid-tiny",
        "H22 I10 E8 K3, f32 logits, sigmoid + bias, 2 of 4 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I10 gated SiLU",
    ),
    (
        "beam-tiny",
        "H22 I12 E8 K3, f32 logits, sigmoid + bias, 2 of 4 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5",
    ),
    (
        "cohere2-moe-tiny",
        "H24 I12 E6 K3, top-k, sigmoid, renormalised; shared I24 gated SiLU, averaged",
    ),
    (
        "dbrx-tiny",
        "H20 I14 E6 K3, softmax, top-k, 1-norm; gated SiLU, gate and up separate, down transposed",
    ),
    (
        "deepseek-ocr2-tiny",
        "H20 I10 E6 K3, f32 logits, softmax, top-k, * 1.5; shared I20 gated SiLU",
    ),
    (
        "deepseek-v2-tiny",
        "H22 I12 E8 K3, f32 logits, softmax, 2 of 4 groups by max, others at 0, top-k, * 1.7; shared I24 \
         gated SiLU",
    ),
    (
        "deepseek-v3-fp8-tiny",
        "H136 I20 E4 K2, f32 logits, sigmoid + bias, 1 of 2 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I20 gated SiLU",
    ),
    (
        "deepseek-v3-tiny",
        "H26 I12 E8 K3, f32 logits, sigmoid + bias, 2 of 4 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I12 gated SiLU",
    ),
    (
        "deepseek-v32-tiny",
        "H22 I10 E6 K2, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I10 gated SiLU",
    ),
    (
        "deepseek-v4-hash-tiny",
        "H20 I14 E6 K2, sqrt-softplus, given ids, renormalised + 1e-20, * 1.5; gated SiLU, clamped at \
         2.5; shared I14 gated SiLU, clamped at 2.5",
    ),
    (
        "deepseek-v4-tiny",
        "H22 I12 E6 K3, sqrt-softplus + bias, top-k, renormalised + 1e-20, * 1.5; gated SiLU, clamped at \
         2.7; shared I12 gated SiLU, clamped at 2.7",
    ),
    (
        "diffusion-gemma-tiny",
        "H20 I14 E6 K2, normed tokens, logits * 0.2236068, softmax, top-k, renormalised, scaled by \
         expert; gated GELU (tanh)",
    ),
    (
        "dots1-tiny",
        "H20 I14 E6 K3, f32 logits, sigmoid + bias, top-k, renormalised + 1e-20, * 2.5; shared I14 gated \
         SiLU",
    ),
    (
        "dots3-note-tiny",
        "text: H26 I10 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, \
         renormalised + 1e-20, * 2.5; shared I14 gated SiLU",
    ),
    (
        "dots3-note-vision-tiny",
        "vision: H24 I12 E6 K2, f32 logits, sigmoid + bias, top-k, renormalised + 1e-20, * 1.6",
    ),
    (
        "ernie4-5-moe-tiny",
        "H22 I10 E6 K3, f32 logits, softmax + bias, top-k, renormalised by 1e-12 at least; shared I20 \
         gated SiLU",
    ),
    (
        "ernie4-5-vl-moe-tiny",
        "text: H20 I14 E5 K2, f32 logits, softmax + bias, top-k, renormalised by 1e-12 at least; shared \
         I28 gated SiLU | vision: H20 I10 E5 K2, f32 logits, softmax + bias, top-k, renormalised by \
         1e-12 at least; shared I28 gated SiLU",
    ),
    (
        "exaone-moe-tiny",
        "H24 I10 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I20 gated SiLU",
    ),
    ("flex-olmo-tiny", "H20 I14 E7 K4, softmax, top-k"),
    (
        "flint-tiny",
        "H24 I10 E6 K3, f32 logits, sigmoid, top-k, renormalised; shared I14 gated SiLU",
    ),
    (
        "gemma4-tiny",
        "H22 I12 E6 K3, normed tokens, logits * 0.21320072, softmax, top-k, renormalised, scaled by \
         expert; gated GELU (tanh)",
    ),
    (
        "glm-moe-dsa-tiny",
        "H20 I12 E6 K2, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I12 gated SiLU",
    ),
    (
        "glm4-moe-lite-tiny",
        "H24 I10 E6 K2, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I10 gated SiLU",
    ),
    (
        "glm4-moe-tiny",
        "H22 I12 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I12 gated SiLU",
    ),
    (
        "glm4v-moe-tiny",
        "H26 I10 E6 K2, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I10 gated SiLU",
    ),
    (
        "glm5-next-tiny",
        "H24 I12 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; gated SiLU, clamped at 2.6; shared I12 gated SiLU, clamped at 2.6",
    ),
    (
        "gpt-oss-mxfp4-tiny",
        "H96 I32 E4 K2, logits + bias, top-k, softmax; gated SiLU, alpha 1.702, clamped at 2.5, up + 1, \
         gate_up bias, down bias, interleaved",
    ),
    (
        "gpt-oss-tiny",
        "H22 I14 E5 K2, logits + bias, top-k, softmax; gated SiLU, alpha 1.702, clamped at 2.2, up + 1, \
         gate_up bias, down bias, interleaved, transposed",
    ),
    ("granitemoe-swa-tiny", "H22 I10 E6 K3, top-k, softmax; shared I14 gated SiLU"),
    ("granitemoe-tiny", "H20 I12 E6 K2, top-k, softmax"),
    ("granitemoehybrid-tiny", "H26 I10 E6 K3, top-k, softmax; shared I12 gated SiLU"),
    ("granitemoeshared-tiny", "H24 I12 E5 K2, top-k, softmax; shared I16 gated SiLU"),
    (
        "hunyuan-v1-moe-tiny",
        "H20 I14 E5 K3, f32 logits, softmax, top-k, renormalised; shared I14 gated SiLU",
    ),
    (
        "hy-v3-tiny",
        "H26 I10 E6 K3, f32 logits, sigmoid + bias, top-k, renormalised + 1e-20, * 2.2; shared I20 gated \
         SiLU",
    ),
    (
        "hy-v4-tiny",
        "H22 I12 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; gated SiLU, clamped at 2.4; shared I12 gated SiLU",
    ),
    (
        "inkling-tiny",
        "H22 I12 E8 K5, f32 logits, sigmoid + bias, top-k, renormalised, 2 sinks, scaled by expert, * 2; \
         gated SiLU, interleaved",
    ),
    (
        "inkling2-tiny",
        "H24 I12 E6 K3, f32 logits, sigmoid + bias, top-k, renormalised + 1e-20, * 2; gated SiLU, \
         soft-capped at 1.3 and 1.7, interleaved",
    ),
    ("jamba-tiny", "H22 I12 E6 K2, softmax, top-k"),
    ("jetmoe-tiny", "H22 I12 E6 K2, top-k, softmax; gated SiLU, output bias"),
    (
        "kimi-linear-tiny",
        "H24 I12 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.446; shared I12 gated SiLU",
    ),
    (
        "kolibri1-tiny",
        "H26 I12 E6 K3, f32 logits, logits + bias, top-k, sigmoid; shared I10 gated SiLU",
    ),
    (
        "laguna-tiny",
        "H22 I12 E6 K3, soft-capped at 1.5, sigmoid + bias, top-k, renormalised, * 1.8; shared I14 gated \
         SiLU",
    ),
    ("lfm2-moe-tiny", "H26 I12 E6 K3, sigmoid + bias, top-k, renormalised + 1e-6, * 1.7"),
    (
        "llama4-tiny",
        "H24 I14 E5 K2, top-k, sigmoid; gated SiLU, weight on the input, transposed; shared I14 gated \
         SiLU",
    ),
    (
        "longcat-flash-tiny",
        "H24 I12 E5 K3, f32 logits, softmax + bias, top-k, * 2.5; 3 identity experts",
    ),
    ("mellum-tiny", "H24 I14 E6 K3, softmax, top-k, renormalised"),
    (
        "mimo-v2-flash-tiny",
        "H22 I14 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5",
    ),
    ("minimax-m2-tiny", "H20 I14 E6 K3, sigmoid + bias, top-k, renormalised"),
    (
        "minimax-m3-vl-tiny",
        "H22 I10 E6 K3, sigmoid + bias, top-k, renormalised, * 2; gated SiLU, alpha 1.702, clamped at \
         2.5, up + 1; shared I14 gated SiLU, alpha 1.702, clamped at 2.5, up + 1",
    ),
    ("minimax-tiny", "H22 I14 E5 K2, softmax, top-k, renormalised"),
    (
        "mistral-large4-tiny",
        "H26 I10 E8 K3, f32 logits, softmax, 2 of 4 groups by top-2 sum, others at 0, top-k, \
         renormalised + 1e-20, * 1.4; shared I10 gated SiLU",
    ),
    (
        "mistral4-tiny",
        "H20 I12 E8 K3, softmax, 2 of 4 groups by top-2 sum, others at 0, top-k, renormalised + 1e-20, * \
         1.6; shared I12 gated SiLU",
    ),
    ("mixtral-tiny", "H40 I20 E5 K2, softmax, top-k, renormalised"),
    (
        "muse-spark-tiny",
        "H26 I12 E6 K3, f32 logits, logits * 0.6, sigmoid + bias, top-k, renormalised + 1e-15, * 1.5; \
         gated SiLU, outputs scaled and normed; latent 14, normed",
    ),
    (
        "nemotron-h-tiny",
        "H24 I14 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; squared ReLU; latent 10; shared I18 squared ReLU",
    ),
    (
        "nllb-moe-tiny",
        "encoder: H20 I14 E5 K2, f32 logits, softmax, top-k, renormalised by 1.1920929e-7 at least, * \
         0.8; ReLU, gate_up bias, down bias",
    ),
    ("olmoe-tiny", "H28 I12 E6 K3, softmax, top-k"),
    (
        "openai-privacy-filter-tiny",
        "H20 I12 E6 K3, f32 logits + bias, top-k, softmax; gated SiLU, alpha 1.702, clamped at 2.3, up + \
         1, gate_up bias, down bias, transposed",
    ),
    ("phimoe-tiny", "H24 I12 E6 K2, sparsemixer, top-k"),
    ("qwen2-moe-tiny", "H26 I12 E6 K3, softmax, top-k; shared I18 gated SiLU, sigmoid-gated"),
    (
        "qwen3-5-moe-tiny",
        "H20 I12 E6 K2, softmax, top-k, renormalised; shared I10 gated SiLU, sigmoid-gated",
    ),
    ("qwen3-moe-tiny", "H36 I20 E16 K4, softmax, top-k, renormalised"),
    (
        "qwen3-next-tiny",
        "H24 I10 E7 K3, softmax, top-k, renormalised; shared I14 gated SiLU, sigmoid-gated",
    ),
    (
        "qwen3-omni-moe-talker-tiny",
        "talker: H20 I10 E6 K2, softmax, top-k; shared I14 gated SiLU, sigmoid-gated",
    ),
    ("qwen3-omni-moe-thinker-tiny", "thinker: H22 I12 E6 K3, softmax, top-k, renormalised"),
    ("qwen3-vl-moe-tiny", "H26 I14 E5 K2, softmax, top-k, renormalised; gated SiLU, transposed"),
    (
        "qwen4-exp-tiny",
        "H28 I10 E5 K2, softmax, top-k, renormalised; shared I12 gated SiLU, sigmoid-gated",
    ),
    (
        "solar-open-tiny",
        "H22 I10 E6 K3, f32 logits, sigmoid + bias, 2 of 3 groups by top-2 sum, top-k, renormalised + \
         1e-20, * 2.5; shared I10 gated SiLU",
    ),
    (
        "step3p7-tiny",
        "H24 I12 E6 K3, sigmoid + bias, top-k, renormalised, * 2.2; gated SiLU, clamped at 1.6 after, \
         gate and up separate; shared I14 gated SiLU, clamped at 1.9 after",
    ),
    (
        "switch-transformers-tiny",
        "encoder: H20 I14 E5 K1, f32 logits, softmax, top-k; capacity 64 in token order; ReLU",
    ),
    (
        "unlimited-ocr-tiny",
        "H24 I10 E6 K2, f32 logits, softmax, top-k, * 1.3; shared I20 gated SiLU",
    ),
    ("zaya-tiny", "H22 I12 E5 K1, softmax + bias, top-k; 1 skip experts"),
];

/// Tensors of a fixture outside of the block.
pub const OTHER_TENSORS: &[(&str, &str)] = &[
    ("diffusion-gemma-tiny", "layernorm"),
    ("gemma4-tiny", "layernorm"),
    ("mixtral-tiny", "layernorm"),
    ("mixtral-tiny", "self_attn"),
    ("qwen3-moe-tiny", "layernorm"),
    ("qwen3-moe-tiny", "self_attn"),
    ("zaya-tiny", "mlp.gate."),
];
