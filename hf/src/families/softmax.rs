//! Families whose scores are a softmax over all experts, without groups.

use moe_kernels::WeightPosition;

use super::layouts::{DECODER, EACH, FUSED, MIXTRAL, QWEN_SHARED, TEXT, each, fused, shared};
use crate::block_info::LogitsFrom;
use crate::family::{
    Family, Flag, Function, NO_SHARED, Rule, SOFTMAX, Shared, SizeKeys, plain, shared_count,
    shared_width,
};
use crate::names::Layout;
use crate::schedule::{Dense, layers};

pub const MIXTRAL_KEYS: SizeKeys = SizeKeys {
    hidden: &["hidden_size"],
    intermediate: &["intermediate_size"],
    experts: &["num_local_experts", "num_experts"],
    top_k: &["num_experts_per_tok"],
};

pub const QWEN_KEYS: SizeKeys = SizeKeys {
    intermediate: &["moe_intermediate_size"],
    experts: &["num_experts", "num_local_experts"],
    ..MIXTRAL_KEYS
};

/// OLMoE's keys: Mixtral's except for the number of experts.
pub const OLMOE_KEYS: SizeKeys = SizeKeys { intermediate: &["intermediate_size"], ..QWEN_KEYS };

const RENORMALIZED: Rule = Rule { renormalize: Flag::Always, ..SOFTMAX };

/// Renormalised if `norm_topk_prob` is true.
const fn by_key(default: bool) -> Rule {
    Rule { renormalize: Flag::Key(&["norm_topk_prob"], default), ..SOFTMAX }
}

pub const PLAIN: Family = Family {
    model_types: &["mixtral"],
    schedule: layers(32),
    path: &[],
    part: "",
    nested_types: &[],
    optional: false,
    element: None,
    keys: MIXTRAL_KEYS,
    sizes: [4096, 14336, 8, 2],
    activation: Function::Key("hidden_act", "silu"),
    gated: true,
    weight_position: WeightPosition::Output,
    f32_logits: false,
    rule: RENORMALIZED,
    shared: NO_SHARED,
    logits: LogitsFrom::Projection,
    special: plain,
    prefixes: DECODER,
    layouts: &[MIXTRAL, FUSED],
};

const QWEN: Family =
    Family { keys: QWEN_KEYS, rule: by_key(false), layouts: &[EACH, FUSED], ..PLAIN };

const fn sigmoid_gated(default: usize) -> Shared {
    Shared { sigmoid_gate: true, ..shared_width(&["shared_expert_intermediate_size"], default) }
}

/// Qwen's names with a shared expert.
const QWEN_WITH_SHARED: &[Layout] =
    &[EACH.with_shared(QWEN_SHARED), FUSED.with_shared(QWEN_SHARED)];

const HUNYUAN: Layout = EACH.with_gate("mlp.gate.wg.weight").with_shared(shared(
    "mlp.shared_mlp.gate_proj.weight",
    "mlp.shared_mlp.up_proj.weight",
    "mlp.shared_mlp.down_proj.weight",
));

pub const FAMILIES: &[Family] = &[
    PLAIN,
    Family { model_types: &["minimax"], ..PLAIN },
    Family {
        model_types: &["qwen2_moe"],
        schedule: layers(24).dense(Dense::Steps(&[])),
        sizes: [2048, 1408, 60, 4],
        shared: sigmoid_gated(5632),
        layouts: QWEN_WITH_SHARED,
        ..QWEN
    },
    Family {
        model_types: &["qwen3_moe"],
        schedule: layers(24).dense(Dense::Steps(&[])),
        sizes: [2048, 768, 128, 8],
        ..QWEN
    },
    Family {
        model_types: &["qwen3_next"],
        schedule: layers(48).dense(Dense::Steps(&[])),
        sizes: [2048, 512, 512, 10],
        rule: by_key(true),
        shared: sigmoid_gated(512),
        layouts: QWEN_WITH_SHARED,
        ..QWEN
    },
    Family {
        model_types: &["qwen3_5_moe", "qwen3_5_moe_text"],
        schedule: layers(40),
        path: &[&["text_config"]],
        sizes: [2048, 512, 256, 8],
        rule: RENORMALIZED,
        shared: sigmoid_gated(512),
        prefixes: TEXT,
        layouts: QWEN_WITH_SHARED,
        ..QWEN
    },
    Family {
        model_types: &["qwen4_exp", "qwen4_exp_text"],
        schedule: layers(40),
        path: &[&["text_config"]],
        sizes: [2048, 512, 512, 10],
        rule: by_key(true),
        shared: sigmoid_gated(512),
        prefixes: TEXT,
        layouts: QWEN_WITH_SHARED,
        ..QWEN
    },
    Family {
        model_types: &["qwen3_vl_moe", "qwen3_vl_moe_text"],
        schedule: layers(24).dense(Dense::Steps(&[])),
        path: &[&["text_config"]],
        sizes: [2048, 1408, 60, 4],
        rule: RENORMALIZED,
        prefixes: TEXT,
        // The fused tensors are transposed in released checkpoints, and not in those that
        // transformers writes.
        layouts: &[FUSED.in_out(), FUSED, EACH],
        ..QWEN
    },
    Family {
        model_types: &["qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_text"],
        schedule: layers(28).dense(Dense::Steps(&[])),
        path: &[&["thinker_config"], &["text_config"]],
        part: "thinker",
        sizes: [2048, 768, 128, 8],
        rule: by_key(true),
        prefixes: &[
            "thinker.model.layers.{layer}.",
            "thinker.model.language_model.layers.{layer}.",
            "model.layers.{layer}.",
        ],
        ..QWEN
    },
    Family {
        model_types: &["qwen3_omni_moe"],
        // The talker's code ignores `mlp_only_layers` and `decoder_sparse_step`.
        schedule: layers(20),
        path: &[&["talker_config"], &["text_config"]],
        part: "talker",
        optional: true,
        sizes: [1024, 384, 128, 8],
        // The class has no default for the width of the shared expert.
        shared: sigmoid_gated(0),
        prefixes: &["talker.model.layers.{layer}."],
        layouts: QWEN_WITH_SHARED,
        ..QWEN
    },
    Family {
        model_types: &["mellum"],
        schedule: layers(28).typed(Dense::None),
        sizes: [2304, 896, 64, 8],
        rule: by_key(true),
        ..QWEN
    },
    Family {
        model_types: &["olmoe"],
        schedule: layers(16),
        keys: OLMOE_KEYS,
        sizes: [2048, 2048, 64, 8],
        ..QWEN
    },
    Family {
        model_types: &["flex_olmo"],
        schedule: layers(32),
        keys: OLMOE_KEYS,
        sizes: [4096, 11008, 7, 5],
        ..QWEN
    },
    Family {
        model_types: &["jamba"],
        schedule: layers(32).dense(Dense::Period),
        keys: OLMOE_KEYS,
        sizes: [4096, 14336, 16, 2],
        rule: SOFTMAX,
        layouts: &[
            EACH.with_gate("feed_forward.router.weight").with_experts(each(
                "feed_forward.experts.{expert}.gate_proj.weight",
                "feed_forward.experts.{expert}.up_proj.weight",
                "feed_forward.experts.{expert}.down_proj.weight",
            )),
            EACH.with_gate("feed_forward.router.weight").with_experts(fused(
                "feed_forward.experts.gate_up_proj",
                "feed_forward.experts.down_proj",
            )),
        ],
        ..QWEN
    },
    Family {
        model_types: &["hunyuan_v1_moe"],
        schedule: layers(32),
        // The number of experts and K may be lists by layer.
        keys: SizeKeys { top_k: &["moe_topk", "num_experts_per_tok"], ..OLMOE_KEYS },
        sizes: [4096, 11008, 1, 1],
        f32_logits: true,
        rule: RENORMALIZED,
        shared: shared_count(&[], 1),
        layouts: &[
            HUNYUAN,
            HUNYUAN.with_experts(fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        ],
        ..QWEN
    },
];
