//! DeepSeek-V3 and families with its router; DeepSeek-V2 and others with groups of softmax scores.

use moe_kernels::{
    Activation, ActivationFunction, GroupScore, Groups, LatentConfig, Limit, Masked, Normalization,
    RmsNorm, RouterConfig,
};

use super::layouts::{DECODER, EACH, FUSED, TEXT, each, fused, shared};
use super::softmax::{PLAIN, QWEN_KEYS};
use crate::block_info::BlockInfo;
use crate::error::Result;
use crate::family::{
    Family, Flag, Function, GroupRule, NO_SHARED, Rule, SOFTMAX, Scale, Shared, SizeKeys, Width,
    deepseek, shared_count, shared_width, top_two_groups,
};
use crate::keys::Keys;
use crate::names::{LatentNames, Layout, RouterNames, SharedNames};
use crate::schedule::{Dense, first_k, layers};

const KEYS: SizeKeys =
    SizeKeys { experts: &["n_routed_experts", "num_local_experts"], ..QWEN_KEYS };

/// The names of the same keys in Kimi Linear and later families.
const KIMI_KEYS: SizeKeys =
    SizeKeys { top_k: &["num_experts_per_token", "num_experts_per_tok"], ..QWEN_KEYS };

const KIMI_SHARED: Shared = shared_count(&["num_shared_experts", "n_shared_experts"], 1);

const fn kimi(scale: f64, groups: (usize, usize)) -> Rule {
    Rule {
        renormalize: Flag::Key(&["moe_renormalize", "norm_topk_prob"], true),
        groups: Some(GroupRule {
            count: &["num_expert_group", "n_group"],
            ..top_two_groups(groups)
        }),
        ..deepseek(scale, groups)
    }
}

const fn shared_experts(default: usize) -> Shared {
    shared_count(&["n_shared_experts"], default)
}

const V3: Family = Family {
    model_types: &["deepseek_v3", "kimi_k2"],
    schedule: layers(61).dense(first_k(3)),
    keys: KEYS,
    sizes: [7168, 2048, 256, 8],
    f32_logits: true,
    rule: Rule {
        only: &[("scoring_func", &["sigmoid"]), ("topk_method", &["noaux_tc"])],
        ..deepseek(2.5, (8, 4))
    },
    shared: shared_experts(1),
    layouts: &[EACH, FUSED],
    ..PLAIN
};

const KIMI: Layout = Layout {
    router: RouterNames {
        gate: "block_sparse_moe.gate.weight",
        selection_bias: "block_sparse_moe.gate.e_score_correction_bias",
        ..EACH.router
    },
    ..super::layouts::MIXTRAL
};

const DOTS_VISION: Layout =
    EACH.with_gate("mlp.gate_weight").with_bias("mlp.router_bias").with_experts(each(
        "mlp.experts.{expert}.fc1.weight",
        "mlp.experts.{expert}.fc3.weight",
        "mlp.experts.{expert}.fc2.weight",
    ));

const HY_V3: Layout =
    EACH.with_gate("mlp.router.gate.weight").with_bias("mlp.expert_bias").with_shared(shared(
        "mlp.shared_mlp.gate_proj.weight",
        "mlp.shared_mlp.up_proj.weight",
        "mlp.shared_mlp.down_proj.weight",
    ));

const HY_V4: Layout = FUSED.with_shared(shared(
    "mlp.shared_experts.linear_gate.weight",
    "mlp.shared_experts.up_proj.weight",
    "mlp.shared_experts.down_proj.weight",
));

const NEMOTRON: Layout = Layout {
    latent: LatentNames {
        proj_in: "mixer.fc1_latent_proj.weight",
        norm: "",
        proj_out: "mixer.fc2_latent_proj.weight",
    },
    shared: SharedNames {
        gate: "",
        ..shared("", "mixer.shared_experts.up_proj.weight", "mixer.shared_experts.down_proj.weight")
    },
    ..EACH
        .with_gate("mixer.gate.weight")
        .with_bias("mixer.gate.e_score_correction_bias")
        .with_experts(fused(
            "mixer.experts.{expert}.up_proj.weight",
            "mixer.experts.{expert}.down_proj.weight",
        ))
};

pub const FAMILIES: &[Family] = &[
    V3,
    Family {
        model_types: &["kimi_k25"],
        path: &[&["text_config"]],
        nested_types: V3.model_types,
        prefixes: TEXT,
        ..V3
    },
    Family { model_types: &["deepseek_v32"], schedule: layers(61).typed(first_k(3)), ..V3 },
    Family {
        model_types: &["axk1"],
        schedule: layers(61).typed(Dense::FirstAndFrequency),
        sizes: [7168, 2048, 192, 8],
        rule: deepseek(2.5, (8, 4)),
        special: output_norm,
        layouts: &[
            Layout { output_norm: "post_mlp_layernorm.weight", ..EACH },
            Layout { output_norm: "mlp.post_mlp_layernorm.weight", ..FUSED },
        ],
        ..V3
    },
    Family {
        model_types: &["bailing_hybrid"],
        schedule: layers(42).typed(first_k(2)),
        keys: KIMI_KEYS,
        sizes: [2560, 768, 512, 8],
        rule: kimi(2.5, (8, 4)),
        shared: KIMI_SHARED,
        layouts: &[EACH.with_bias("mlp.gate.expert_bias"), EACH, FUSED],
        ..V3
    },
    Family {
        model_types: &["kimi_linear"],
        schedule: layers(27).typed(first_k(1)),
        keys: KIMI_KEYS,
        sizes: [2304, 1024, 256, 8],
        rule: kimi(2.446, (1, 1)),
        shared: KIMI_SHARED,
        layouts: &[KIMI, EACH, FUSED],
        ..V3
    },
    Family {
        model_types: &["dots1"],
        schedule: layers(62).dense(first_k(0)),
        sizes: [4608, 1408, 0, 0],
        rule: Rule { renormalize: Flag::Key(&["norm_topk_prob"], false), ..deepseek(1.0, (1, 1)) },
        shared: shared_experts(0),
        ..V3
    },
    Family {
        model_types: &["glm4_moe"],
        schedule: layers(46).dense(first_k(1)),
        sizes: [4096, 1408, 128, 8],
        rule: deepseek(1.0, (1, 1)),
        ..V3
    },
    Family {
        model_types: &["glm4_moe_lite"],
        schedule: layers(47).typed(Dense::First(&[], 1)),
        sizes: [2048, 1536, 64, 4],
        rule: deepseek(1.8, (1, 1)),
        ..V3
    },
    Family {
        model_types: &["glm4v_moe", "glm4v_moe_text"],
        schedule: layers(46).dense(first_k(1)),
        path: &[&["text_config"]],
        sizes: [4096, 1408, 128, 8],
        rule: deepseek(1.0, (1, 1)),
        prefixes: TEXT,
        ..V3
    },
    Family {
        model_types: &["glm_moe_dsa"],
        schedule: layers(78).typed(first_k(3)),
        sizes: [6144, 2048, 256, 8],
        rule: deepseek(2.5, (1, 1)),
        ..V3
    },
    Family {
        model_types: &["exaone_moe"],
        schedule: layers(32).typed(first_k(1)),
        keys: QWEN_KEYS,
        sizes: [4096, 1024, 64, 8],
        rule: deepseek(2.5, (1, 1)),
        shared: shared_count(&["num_shared_experts"], 1),
        layouts: &[EACH.with_bias("mlp.e_score_correction_bias"), FUSED],
        ..V3
    },
    Family {
        model_types: &["solar_open"],
        schedule: layers(48),
        sizes: [4096, 1280, 128, 8],
        rule: deepseek(1.0, (1, 1)),
        ..V3
    },
    Family {
        model_types: &["mimo_v2_flash"],
        schedule: layers(48).typed(Dense::First(&[], 1)),
        sizes: [4096, 2048, 256, 8],
        rule: deepseek(1.0, (1, 1)),
        shared: NO_SHARED,
        ..V3
    },
    Family {
        model_types: &["dots3_note", "dots3_note_text"],
        schedule: layers(46).typed(Dense::FirstAndFrequency),
        path: &[&["text_config"]],
        part: "text",
        sizes: [5120, 1536, 256, 8],
        rule: deepseek(1.0, (1, 1)),
        shared: Shared {
            width: Width::Key(
                &["moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"],
                1536,
            ),
            ..shared_experts(1)
        },
        prefixes: TEXT,
        ..V3
    },
    Family {
        model_types: &["dots3_note"],
        schedule: layers(42).dense(Dense::Pyramid),
        path: &[&["vision_config"]],
        part: "vision",
        optional: true,
        keys: SizeKeys {
            hidden: &["embed_dim", "hidden_size"],
            experts: &["num_local_experts"],
            top_k: &["num_experts_per_tok", "capacity_factor"],
            ..QWEN_KEYS
        },
        sizes: [1536, 2112, 64, 2],
        rule: Rule {
            renormalize: Flag::Always,
            scale: Scale::Key(&["router_scaling_factor", "router_scale"], 1.0),
            groups: None,
            ..deepseek(1.0, (0, 0))
        },
        shared: NO_SHARED,
        special: pyramid,
        prefixes: &["vision_encoder.blocks.{layer}.", "model.vision_tower.blocks.{layer}."],
        layouts: &[DOTS_VISION, FUSED.with_bias("mlp.e_score_correction_bias")],
        ..V3
    },
    Family {
        model_types: &["glm5_next", "glm5_next_text"],
        schedule: layers(45).typed(Dense::First(&[], 3)),
        path: &[&["text_config"]],
        sizes: [4096, 2048, 288, 8],
        rule: deepseek(2.5, (1, 1)),
        special: glm5_next,
        prefixes: TEXT,
        ..V3
    },
    Family {
        model_types: &["hy_v4"],
        schedule: layers(34).typed(Dense::First(&[], 1)),
        sizes: [2816, 768, 256, 8],
        rule: deepseek(2.827, (1, 1)),
        special: hy_v4,
        layouts: &[HY_V4, FUSED, EACH],
        ..V3
    },
    Family {
        model_types: &["hy_v3"],
        schedule: layers(80).typed(Dense::First(&[], 1)),
        keys: QWEN_KEYS,
        sizes: [4096, 1536, 192, 8],
        rule: Rule {
            renormalize: Flag::Always,
            scale: Scale::Key(&["router_scaling_factor"], 2.826),
            groups: None,
            ..deepseek(1.0, (0, 0))
        },
        shared: shared_count(&["num_shared_experts"], 1).with_bias(&["mlp_bias"]),
        layouts: &[HY_V3, FUSED.with_bias("mlp.e_score_correction_bias")],
        ..V3
    },
    Family {
        model_types: &["axk2"],
        schedule: layers(48).typed(Dense::FirstAndFrequency),
        sizes: [2048, 512, 128, 8],
        // The score of masked experts is 0, not minus infinity, so that they are selected before
        // negative scores.
        rule: Rule { groups: Some(masked_at_zero((0, 0))), ..deepseek(2.5, (0, 0)) },
        ..V3
    },
    Family {
        model_types: &["beam"],
        schedule: layers(52).typed(Dense::First(&[], 3)),
        keys: QWEN_KEYS,
        sizes: [5120, 2560, 256, 8],
        rule: deepseek(2.5, (8, 4)),
        shared: NO_SHARED,
        ..V3
    },
    Family {
        model_types: &["nemotron_h"],
        schedule: layers(4).dense(Dense::Pattern),
        sizes: [4096, 7688, 8, 2],
        activation: Function::Key("mlp_hidden_act", "relu2"),
        gated: false,
        rule: deepseek(1.0, (1, 1)),
        shared: shared_width(&["moe_shared_expert_intermediate_size"], 7688)
            .with_bias(&["mlp_bias"]),
        special: nemotron,
        prefixes: &["backbone.layers.{layer}.", "model.layers.{layer}."],
        layouts: &[
            NEMOTRON,
            NEMOTRON.with_experts(fused("mixer.experts.up_proj", "mixer.experts.down_proj")),
        ],
        ..V3
    },
];

/// DeepSeek-V2 selects groups by their largest score and does not renormalise.
const V2: Family = Family {
    model_types: &["deepseek_v2"],
    schedule: layers(32).dense(first_k(0)),
    keys: SizeKeys { experts: &["n_routed_experts", "num_experts"], ..KEYS },
    sizes: [4096, 1407, 64, 0],
    rule: Rule {
        scale: Scale::Key(&["routed_scaling_factor"], 1.0),
        only: &[("scoring_func", &["softmax"])],
        ..SOFTMAX
    },
    shared: shared_experts(2).with_bias(&["mlp_bias"]),
    special: v2,
    ..V3
};

const MISTRAL: Family = Family {
    model_types: &["mistral4"],
    schedule: layers(36).dense(first_k(0)),
    sizes: [4096, 2048, 128, 4],
    f32_logits: false,
    rule: Rule {
        base: RouterConfig::softmax_top_k(false),
        groups: Some(masked_at_zero((1, 1))),
        ..deepseek(1.0, (1, 1))
    },
    layouts: &[FUSED, EACH],
    ..V3
};

const MISTRAL_LARGE: Layout = EACH
    .with_gate("gate.weight")
    .with_experts(each(
        "experts.{expert}.w1.weight",
        "experts.{expert}.w3.weight",
        "experts.{expert}.w2.weight",
    ))
    .with_shared(shared(
        "shared_experts.w1.weight",
        "shared_experts.w3.weight",
        "shared_experts.w2.weight",
    ));

pub const SOFTMAX_FAMILIES: &[Family] = &[
    V2,
    Family {
        model_types: &["deepseek_ocr2", "deepseek_ocr2_text"],
        schedule: layers(32).typed(first_k(0)),
        path: &[&["text_config", "language_config"]],
        prefixes: TEXT,
        ..V2
    },
    Family {
        model_types: &["unlimited_ocr", "unlimited_ocr_text"],
        schedule: layers(12).typed(first_k(1)),
        path: &[&["text_config", "language_config"]],
        sizes: [1280, 896, 64, 6],
        prefixes: TEXT,
        ..V2
    },
    MISTRAL,
    Family {
        model_types: &["mistral_large4", "mistral_large4_text"],
        schedule: layers(72).typed(first_k(1)),
        path: &[&["text_config"]],
        sizes: [6144, 6144, 128, 4],
        f32_logits: true,
        rule: Rule { renormalize: Flag::Always, ..MISTRAL.rule },
        prefixes: &["layers.{layer}.", "model.language_model.layers.{layer}.", DECODER[0]],
        layouts: &[MISTRAL_LARGE, FUSED, EACH],
        ..MISTRAL
    },
];

const fn masked_at_zero(defaults: (usize, usize)) -> GroupRule {
    GroupRule { masked: Masked::Zero, ..top_two_groups(defaults) }
}

fn output_norm(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let epsilon = keys.f32(&["rms_norm_eps"], 1e-6)?;
    block.config.output_norm = Some(RmsNorm { epsilon, offset: 0.0, scale_first: false });
    Ok(())
}

/// The limit of gate and up; an infinite limit is no limit.
fn limit(keys: &Keys<'_>) -> Result<Limit> {
    let limit = keys.number(&["swiglu_limit"], Some(10.0))?.filter(|limit| *limit != f64::INFINITY);
    Ok(limit.map_or(Limit::None, |limit| Limit::Before { limit: limit as f32 }))
}

/// Clamps the routed experts and the shared one.
pub fn clamped(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    config.experts.activation.limit = limit(keys)?;
    if let Some(shared) = &mut config.shared {
        shared.activation.limit = config.experts.activation.limit;
    }
    Ok(())
}

/// The key of the activation function applies to the shared expert alone.
fn glm5_next(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    clamped(keys, block)?;
    block.config.experts.activation.function = ActivationFunction::Silu;
    Ok(())
}

/// The key of the activation function applies to the shared expert alone, which is not clamped.
fn hy_v4(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    block.config.experts.activation = Activation { limit: limit(keys)?, ..Activation::default() };
    Ok(())
}

/// The number of experts in the vision tower of dots3 grows with the layer. Older configurations
/// have one list or no key; others have keys by layer.
fn pyramid(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let name = "pyramid_num_routed";
    let experts = match keys.by_layer(name)? {
        _ if keys.has("per_layer_config") => return Ok(()),
        Some(value) => {
            let experts = value.as_u64().and_then(|count| usize::try_from(count).ok());
            let wanted = "a list of whole numbers, at least 1 where a layer has experts";
            experts.filter(|count| *count > 0).ok_or_else(|| keys.error(name, value, wanted))?
        }
        None if keys.has("mlp_layer_types") => return Ok(()),
        None => block.layer.saturating_sub(24).saturating_mul(4).clamp(4, 64),
    };
    block.config.num_experts = experts;
    block.config.top_k = block.config.top_k.min(experts);
    Ok(())
}

/// The experts may be between two projections.
fn nemotron(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let latent = keys.count(&["moe_latent_size"], 0)?;
    if latent > 0 {
        keys.off(
            "mlp_bias",
            "false: biases of the projections around the experts are not supported",
        )?;
    }
    block.config.latent = (latent > 0).then_some(LatentConfig { hidden: latent, norm: None });
    Ok(())
}

fn v2(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let router = &mut block.config.router;
    if keys.word(
        &["topk_method"],
        "greedy",
        &[("greedy", false), ("group_limited_greedy", true)],
    )? {
        let rule = GroupRule { score: GroupScore::Max, ..masked_at_zero((0, 0)) };
        router.groups = rule.read(keys)?.filter(|groups: &Groups| groups.num_groups > 1);
    }
    // transformers ignores this key. The model's own code renormalises instead of scaling if it is
    // true; it is not in any released model.
    if keys.boolean(&["norm_topk_prob"], false)? {
        router.normalization = Normalization::Sum { epsilon: 1e-20 };
        router.scale = 1.0;
    }
    Ok(())
}
