//! Families whose scores are sigmoids, without groups.

use moe_kernels::{
    ActivationFunction, GateUpLayout, LatentConfig, Limit, Normalization, RmsNorm, RouterConfig,
    Scoring, Selection,
};

use super::layouts::{DECODER, EACH, FUSED, MIXTRAL, QWEN_SHARED, TEXT, each, fused, shared};
use super::logit::gpt_oss_activation;
use super::softmax::{PLAIN, QWEN_KEYS};
use crate::block_info::BlockInfo;
use crate::error::Result;
use crate::family::{
    Family, Flag, Function, Rule, SIGMOID, Scale, SizeKeys, shared_count, shared_width,
};
use crate::keys::Keys;
use crate::names::{ExpertNames, LatentNames, Layout, RouterNames, SharedNames};
use crate::schedule::{Dense, layers};

/// Mixtral's keys and tensor names with a biased sigmoid.
const MINIMAX: Family = Family {
    model_types: &["minimax_m2"],
    schedule: layers(62),
    sizes: [3072, 1536, 256, 8],
    rule: SIGMOID,
    layouts: &[MIXTRAL, FUSED.with_bias("mlp.e_score_correction_bias"), FUSED],
    ..PLAIN
};

const QWEN: Family = Family { keys: QWEN_KEYS, layouts: &[EACH, FUSED], ..MINIMAX };

const fn sum_plus(epsilon: f32) -> Rule {
    Rule { normalization: Normalization::Sum { epsilon }, ..SIGMOID }
}

const LFM2: Layout = EACH
    .with_gate("feed_forward.gate.weight")
    .with_bias("feed_forward.expert_bias")
    .with_experts(each(
        "feed_forward.experts.{expert}.w1.weight",
        "feed_forward.experts.{expert}.w3.weight",
        "feed_forward.experts.{expert}.w2.weight",
    ));

const STEP: Layout = EACH
    .with_gate("moe.gate.weight")
    .with_bias("moe.router_bias")
    .with_experts(each("moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight"))
    .with_shared(shared(
        "share_expert.gate_proj.weight",
        "share_expert.up_proj.weight",
        "share_expert.down_proj.weight",
    ));

const AFMOE: Layout = EACH.with_gate("mlp.router.gate.weight").with_bias("mlp.expert_bias");

/// Gate and up are interleaved, as in Inkling's own code.
const INKLING: Layout = Layout {
    router: RouterNames {
        selection_bias: "mlp.gate.bias",
        expert_scale: "mlp.gate.global_scale",
        ..EACH.router
    },
    experts: ExpertNames {
        gate_up: GateUpLayout::Interleaved,
        sinks: ("mlp.shared_experts.shared_w13_weight", "mlp.shared_experts.shared_w2_weight"),
        ..fused("mlp.experts.w13_weight", "mlp.experts.w2_weight")
    },
    ..EACH
};

const INKLING_PREFIXES: &[&str] =
    &["model.llm.layers.{layer}.", "model.language_model.layers.{layer}.", DECODER[0]];

const MUSE: Layout = Layout {
    experts: ExpertNames { post_norm: "mlp.experts.post_expert_norm.weight", ..FUSED.experts },
    latent: LatentNames {
        proj_in: "mlp.pre_expert_proj.weight",
        norm: "mlp.pre_expert_norm.weight",
        proj_out: "mlp.post_expert_proj.weight",
    },
    ..FUSED
};

/// Qwen's shared expert without a sigmoid gate.
const SHARED: SharedNames = SharedNames { sigmoid_gate: "", ..QWEN_SHARED };

const SHARED_WIDTH: &[&str] = &["shared_expert_intermediate_size"];

pub const FAMILIES: &[Family] = &[
    MINIMAX,
    Family {
        model_types: &["minimax_m3_vl", "minimax_m3_vl_text"],
        schedule: layers(60).typed(Dense::Frequency),
        path: &[&["text_config"]],
        sizes: [6144, 3072, 128, 4],
        activation: Function::Fixed(ActivationFunction::Silu),
        // transformers scales the routed output instead of the weights.
        rule: Rule { scale: Scale::Key(&["routed_scaling_factor"], 2.0), ..SIGMOID },
        shared: shared_width(&["shared_intermediate_size"], 3072),
        special: gpt_oss_gate,
        prefixes: TEXT,
        layouts: &[MIXTRAL, FUSED],
        ..MINIMAX
    },
    Family {
        model_types: &["step3p7", "step3p5"],
        schedule: layers(45).typed(Dense::Enumerated),
        path: &[&["text_config"]],
        keys: SizeKeys {
            experts: &["n_routed_experts", "moe_num_experts"],
            top_k: &["num_experts_per_tok", "moe_top_k"],
            ..QWEN_KEYS
        },
        sizes: [4096, 1280, 288, 8],
        // transformers overwrites `hidden_act`.
        activation: Function::Fixed(ActivationFunction::Silu),
        rule: Rule { scale: Scale::Key(&["moe_router_scaling_factor"], 1.0), ..SIGMOID },
        shared: shared_width(&["share_expert_dim", "share_expert_dims"], 1280)
            .with_bias(&["mlp_bias"]),
        special: step,
        prefixes: TEXT,
        layouts: &[STEP, FUSED],
        ..MINIMAX
    },
    Family {
        model_types: &["laguna"],
        schedule: layers(40).typed(Dense::First(&[], 1)),
        sizes: [2048, 512, 256, 8],
        rule: Rule { scale: Scale::Key(&["moe_routed_scaling_factor"], 1.0), ..SIGMOID },
        shared: shared_width(SHARED_WIDTH, 512),
        special: laguna,
        layouts: &[
            EACH.with_bias("mlp.experts.e_score_correction_bias").with_shared(SHARED),
            FUSED,
        ],
        ..QWEN
    },
    Family {
        model_types: &["afmoe"],
        schedule: layers(32).dense(Dense::First(&["num_dense_layers"], 1)),
        sizes: [2048, 1408, 64, 6],
        rule: Rule {
            scale: Scale::Key(&["route_scale"], 1.0),
            only: &[("score_func", &["sigmoid"])],
            ..sum_plus(1e-20)
        },
        shared: shared_count(&["num_shared_experts"], 2),
        layouts: &[
            AFMOE,
            AFMOE.with_experts(fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
        ],
        ..QWEN
    },
    Family {
        model_types: &["flint"],
        schedule: layers(49).dense(Dense::Steps(&[0, 1])),
        sizes: [2048, 512, 256, 6],
        f32_logits: true,
        rule: Rule {
            base: RouterConfig { selection_bias: false, ..SIGMOID.base },
            renormalize: Flag::Key(&["norm_topk_prob"], true),
            ..SIGMOID
        },
        shared: shared_width(SHARED_WIDTH, 1024),
        layouts: &[EACH.with_shared(SHARED), FUSED.with_shared(SHARED)],
        ..QWEN
    },
    Family {
        model_types: &["kolibri1"],
        schedule: layers(50),
        sizes: [2560, 512, 384, 6],
        f32_logits: true,
        // The bias is added to the logits; the sigmoid is that of the selected logits.
        rule: Rule {
            base: RouterConfig { selection: Selection::Logit, ..SIGMOID.base },
            renormalize: Flag::Key(&["norm_topk_prob"], false),
            ..SIGMOID
        },
        shared: shared_width(SHARED_WIDTH, 512),
        layouts: &[EACH.with_bias("moe.router.expert_bias"), FUSED],
        ..QWEN
    },
    Family {
        model_types: &["lfm2_moe"],
        schedule: layers(32).dense(Dense::First(&["num_dense_layers"], 2)),
        sizes: [2048, 1792, 32, 4],
        activation: Function::Fixed(ActivationFunction::Silu),
        rule: Rule {
            renormalize: Flag::Key(&["norm_topk_prob"], true),
            scale: Scale::Key(&["routed_scaling_factor"], 1.0),
            ..sum_plus(1e-6)
        },
        special: lfm2,
        layouts: &[
            LFM2,
            LFM2.with_experts(fused(
                "feed_forward.experts.gate_up_proj",
                "feed_forward.experts.down_proj",
            )),
        ],
        ..QWEN
    },
    Family {
        model_types: &["inkling_mm_model", "inkling_text"],
        schedule: layers(66).typed(Dense::First(&["dense_mlp_idx"], 0)),
        path: &[&["text_config"]],
        keys: SizeKeys { experts: &["n_routed_experts", "num_local_experts"], ..QWEN_KEYS },
        sizes: [6144, 3072, 256, 6],
        f32_logits: true,
        rule: Rule { scale: Scale::Key(&["route_scale"], 8.0), ..SIGMOID },
        special: inkling,
        prefixes: INKLING_PREFIXES,
        layouts: &[INKLING],
        ..QWEN
    },
    Family {
        model_types: &["inkling2", "inkling2_text"],
        schedule: layers(48),
        path: &[&["text_config"]],
        keys: SizeKeys {
            intermediate: &["moe_intermediate_size", "intermediate_size"],
            experts: &["n_routed_experts", "num_local_experts"],
            ..QWEN_KEYS
        },
        sizes: [4608, 2304, 384, 8],
        activation: Function::Fixed(ActivationFunction::Silu),
        f32_logits: true,
        rule: Rule {
            scale: Scale::Key(&["route_scale", "routed_scaling_factor"], 8.0),
            ..sum_plus(1e-20)
        },
        special: inkling2,
        prefixes: INKLING_PREFIXES,
        layouts: &[INKLING, FUSED],
        ..QWEN
    },
    Family {
        model_types: &["muse_spark", "muse_spark_text"],
        schedule: layers(62).typed(Dense::None),
        path: &[&["text_config"]],
        sizes: [8192, 4096, 256, 8],
        f32_logits: true,
        rule: Rule { scale: Scale::Key(&["routed_scaling_factor"], 1.0), ..sum_plus(1e-15) },
        special: muse,
        prefixes: TEXT,
        layouts: &[MUSE],
        ..QWEN
    },
    Family {
        model_types: &["deepseek_v4"],
        schedule: layers(43),
        keys: SizeKeys {
            intermediate: &["moe_intermediate_size", "intermediate_size"],
            experts: &["n_routed_experts", "num_local_experts"],
            ..QWEN_KEYS
        },
        sizes: [4096, 2048, 256, 6],
        // transformers and the model ignore `norm_topk_prob` and renormalise.
        rule: Rule { scale: Scale::Key(&["routed_scaling_factor"], 1.5), ..sum_plus(1e-20) },
        shared: shared_count(&[], 1).with_bias(&["mlp_bias"]),
        special: deepseek_v4,
        layouts: &[DEEPSEEK_V4, FUSED_V4],
        ..QWEN
    },
];

const DEEPSEEK_V4: Layout = Layout {
    router: RouterNames {
        gate: "ffn.gate.weight",
        selection_bias: "ffn.gate.bias",
        table: "ffn.gate.tid2eid",
        ..EACH.router
    },
    experts: each(
        "ffn.experts.{expert}.w1.weight",
        "ffn.experts.{expert}.w3.weight",
        "ffn.experts.{expert}.w2.weight",
    ),
    shared: shared(
        "ffn.shared_experts.w1.weight",
        "ffn.shared_experts.w3.weight",
        "ffn.shared_experts.w2.weight",
    ),
    ..EACH
};

const FUSED_V4: Layout =
    Layout { router: RouterNames { table: "mlp.gate.tid2eid", ..FUSED.router }, ..FUSED };

fn gpt_oss_gate(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let activation = gpt_oss_activation(keys)?;
    block.config.experts.activation = activation;
    if let Some(shared) = &mut block.config.shared {
        shared.activation = activation;
    }
    Ok(())
}

/// Clamped after the activation, with limits by layer; 0 is no limit.
fn step(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let limit = |name| -> Result<Limit> {
        let Some(value) = keys.by_layer(name)? else { return Ok(Limit::None) };
        let number = if value.is_null() { Some(0.0) } else { value.as_f64() };
        let number = number
            .ok_or_else(|| keys.error(name, value, "a list of numbers, one for each layer"))?;
        Ok(if number == 0.0 { Limit::None } else { Limit::After { limit: number as f32 } })
    };
    let config = &mut block.config;
    config.experts.activation.limit = limit("swiglu_limits")?;
    if let Some(shared) = &mut config.shared {
        shared.activation.limit = limit("swiglu_limits_shared")?;
    }
    Ok(())
}

fn laguna(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    // transformers rejects it, too.
    keys.off("moe_apply_router_weight_on_input", "false")?;
    let cap = keys.number(&["moe_router_logit_softcapping"], Some(0.0))?.unwrap_or(0.0);
    block.config.router.logit_softcap = (cap > 0.0).then_some(cap as f32);
    Ok(())
}

fn lfm2(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    block.config.router.selection_bias = keys.boolean(&["use_expert_bias"], true)?;
    Ok(())
}

/// The shared experts are sinks, which the router weighs together with the selected experts: here
/// they are the last experts, selected by every token. One learned number scales all weights.
fn inkling(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    if !keys.boolean(&["shared_expert_sink"], true)? {
        let wanted = "true: other shared experts are not supported";
        return Err(keys.error("shared_expert_sink", &false.into(), wanted));
    }
    let sinks = keys.size(&["n_shared_experts"], 2)?;
    let config = &mut block.config;
    if keys.has("dense_intermediate_size") {
        // In such configurations `intermediate_size` is the width of the experts, and not of dense
        // layers.
        config.intermediate = keys.size(&["intermediate_size"], 0)?;
    }
    config.num_experts = config.num_experts.saturating_add(sinks);
    config.top_k = config.top_k.saturating_add(sinks);
    config.router.num_sinks = sinks;
    config.router.expert_scale = true;
    Ok(())
}

fn inkling2(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    config.router.scoring = scoring(keys, "sigmoid")?;
    config.experts.activation.limit = Limit::SoftCap {
        gate: keys.f32(&["mlp_gate_softcap"], 4.0)?,
        up: keys.f32(&["mlp_up_softcap"], 25.0)?,
    };
    Ok(())
}

fn scoring(keys: &Keys<'_>, default: &str) -> Result<Scoring> {
    let known = [("sigmoid", Scoring::Sigmoid), ("sqrtsoftplus", Scoring::SqrtSoftplus)];
    keys.word(&["scoring_func"], default, &known)
}

/// The experts are between two projections; each expert's output is scaled and then normed.
fn muse(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    config.router.logit_multiplier = keys.f32(&["output_multiplier"], 0.1767766952966369)?;
    let norm = |key, default, scale_first| -> Result<Option<RmsNorm>> {
        Ok(Some(RmsNorm { epsilon: keys.f32(&[key], default)?, offset: 1.0, scale_first }))
    };
    config.latent = Some(LatentConfig {
        hidden: keys.size(&["moe_hidden_size"], 4096)?,
        norm: norm("rms_norm_eps", 1e-5, false)?,
    });
    config.experts.post_norm = norm("post_norm_eps", 1e-8, true)?;
    Ok(())
}

/// Some layers select experts by token id, from a table.
fn deepseek_v4(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    super::deepseek::clamped(keys, block)?;
    let router = &mut block.config.router;
    router.scoring = scoring(keys, "sqrtsoftplus")?;
    let hash = match keys.by_layer("mlp_layer_types")? {
        Some(kind) if kind == "hash_moe" => true,
        Some(kind) if kind == "moe" => false,
        Some(kind) => {
            return Err(keys.error("mlp_layer_types", kind, "hash_moe or moe for the layer"));
        }
        None => block.layer < keys.count(&["num_hash_layers"], 3)?,
    };
    if hash {
        router.selection = Selection::Given;
        router.selection_bias = false;
        block.vocabulary = keys.size(&["vocab_size"], 129_280)?;
    }
    Ok(())
}
