//! Families with a router of their own.

use moe_kernels::{
    ActivationFunction, CapacityConfig, CapacityLimit, Normalization, Priority, RmsNorm,
    RouterConfig, Scoring, WeightOrder, ZeroExperts, ZeroOutput,
};

use super::layouts::{EACH, FUSED, MIXTRAL, NO_SHARED_NAMES, TEXT, each, fused};
use super::softmax::{MIXTRAL_KEYS, PLAIN, QWEN_KEYS};
use crate::block_info::{BlockInfo, LogitsFrom};
use crate::error::Result;
use crate::family::{
    Family, Flag, Function, Rule, SOFTMAX, Scale, SizeKeys, function, shared_count,
};
use crate::keys::Keys;
use crate::names::{ExpertNames, Layout, RouterNames};
use crate::schedule::{Dense, layers};

/// The network that computes Zaya's logits, which is not part of the block.
const ZAYA_ROUTER: &[&str] = &[
    "mlp.gate.down_proj.weight",
    "mlp.gate.down_proj.bias",
    "mlp.gate.router_states_scale",
    "mlp.gate.router_mlp.norm.weight",
    "mlp.gate.router_mlp.fc1.weight",
    "mlp.gate.router_mlp.fc1.bias",
    "mlp.gate.router_mlp.fc2.weight",
    "mlp.gate.router_mlp.fc2.bias",
    "mlp.gate.router_mlp.out_proj.weight",
];

const BIASED_SOFTMAX: Rule = Rule {
    base: RouterConfig { selection_bias: true, ..RouterConfig::softmax_top_k(false) },
    ..SOFTMAX
};

/// Clamps the divisor to `f32::EPSILON`.
const NLLB_SUM: Normalization = Normalization::SumAtLeast { min: f32::EPSILON };

const ERNIE: Family = Family {
    model_types: &["ernie4_5_moe"],
    schedule: layers(28).dense(Dense::Range),
    keys: SizeKeys {
        experts: &["moe_num_experts", "num_experts"],
        top_k: &["moe_k", "num_experts_per_tok"],
        ..QWEN_KEYS
    },
    sizes: [2560, 1536, 64, 6],
    f32_logits: true,
    rule: Rule { renormalize: Flag::Always, ..BIASED_SOFTMAX },
    shared: shared_count(&["moe_num_shared_experts"], 2).with_bias(&["use_bias"]),
    special: ernie,
    layouts: &[ernie_names(EACH, "mlp.gate.weight", false, (0, 1))],
    ..PLAIN
};

const fn ernie_names(
    layout: Layout,
    gate: &'static str,
    transposed: bool,
    row: (usize, usize),
) -> Layout {
    let selection_bias = "mlp.moe_statics.e_score_correction_bias";
    Layout {
        router: RouterNames { gate, transposed, selection_bias, row, ..layout.router },
        ..layout
    }
}

const GEMMA: Family = Family {
    model_types: &["gemma4", "gemma4_text"],
    schedule: layers(30),
    path: &[&["text_config"]],
    keys: SizeKeys { top_k: &["top_k_experts"], ..QWEN_KEYS },
    sizes: [2304, 0, 0, 0],
    activation: Function::Key("hidden_activation", "gelu_pytorch_tanh"),
    rule: Rule { renormalize: Flag::Always, ..SOFTMAX },
    logits: LogitsFrom::ProjectionOfResidual,
    special: gemma4,
    prefixes: TEXT,
    layouts: &[GEMMA_NAMES],
    ..PLAIN
};

const GEMMA_NAMES: Layout = Layout {
    router: RouterNames {
        gate: "router.proj.weight",
        norm: "router.scale",
        expert_scale: "router.per_expert_scale",
        ..EACH.router
    },
    // `mlp` is the dense branch in parallel to the block.
    ..FUSED
        .with_experts(fused("experts.gate_up_proj", "experts.down_proj"))
        .with_shared(NO_SHARED_NAMES)
};

const SWITCH: Family = Family {
    model_types: &["switch_transformers"],
    schedule: layers(12).counted_by(&["num_hidden_layers", "num_layers"]).dense(Dense::Spread(
        &["num_layers"],
        &["num_sparse_encoder_layers"],
        &["encoder_sparse_step"],
    )),
    part: "encoder",
    keys: SizeKeys {
        hidden: &["d_model", "hidden_size"],
        intermediate: &["d_ff"],
        experts: &["num_experts"],
        top_k: &[],
    },
    sizes: [768, 2048, 8, 1],
    activation: Function::Key("dense_act_fn", "relu"),
    gated: false,
    f32_logits: true,
    rule: SOFTMAX,
    special: switch,
    prefixes: &["encoder.block.{layer}.layer.1."],
    layouts: &[Layout {
        router: RouterNames {
            gate: "mlp.router.classifier.weight",
            bias: "mlp.router.classifier.bias",
            ..EACH.router
        },
        experts: fused(
            "mlp.experts.expert_{expert}.wi.weight",
            "mlp.experts.expert_{expert}.wo.weight",
        ),
        ..EACH
    }],
    ..PLAIN
};

const NLLB: Family = Family {
    model_types: &["nllb-moe"],
    schedule: layers(12)
        .counted_by(&["num_hidden_layers", "encoder_layers"])
        .dense(Dense::Every(&["encoder_sparse_step"])),
    part: "encoder",
    keys: SizeKeys { intermediate: &["encoder_ffn_dim"], ..SWITCH.keys },
    sizes: [1024, 4096, 128, 2],
    activation: Function::Key("activation_function", "relu"),
    // transformers 5's block runs experts 0 and 1 alone, with the weights of others. This is the
    // block of transformers 4, with which the model was trained.
    rule: Rule { renormalize: Flag::Always, normalization: NLLB_SUM, ..SOFTMAX },
    special: nllb,
    prefixes: &["model.encoder.layers.{layer}.", "encoder.layers.{layer}."],
    layouts: &[Layout {
        router: RouterNames {
            gate: "ffn.router.classifier.weight",
            bias: "ffn.router.classifier.bias",
            ..EACH.router
        },
        experts: ExpertNames {
            up_bias: "ffn.experts.expert_{expert}.fc1.bias",
            down_bias: "ffn.experts.expert_{expert}.fc2.bias",
            ..fused(
                "ffn.experts.expert_{expert}.fc1.weight",
                "ffn.experts.expert_{expert}.fc2.weight",
            )
        },
        ..EACH
    }],
    ..SWITCH
};

pub const FAMILIES: &[Family] = &[
    ERNIE,
    Family {
        model_types: &["ernie4_5_vl_moe", "ernie4_5_vl_moe_text"],
        schedule: layers(28).typed(Dense::First(&[], 1)),
        path: &[&["text_config"]],
        part: "text",
        element: Some(0),
        prefixes: TEXT,
        layouts: &[ernie_names(EACH, "mlp.gate.weight", true, (0, 2))],
        ..ERNIE
    },
    Family {
        model_types: &["ernie4_5_vl_moe", "ernie4_5_vl_moe_text"],
        schedule: layers(28).typed(Dense::First(&[], 1)),
        path: &[&["text_config"]],
        part: "vision",
        element: Some(1),
        sizes: [2560, 512, 64, 6],
        special: ernie_vision,
        prefixes: TEXT,
        layouts: &[ernie_names(EACH, "mlp.gate.weight_1", true, (1, 2))],
        ..ERNIE
    },
    Family {
        model_types: &["phimoe"],
        // The sparse mixer selects two experts and ignores `num_experts_per_tok`.
        keys: SizeKeys { top_k: &[], ..MIXTRAL_KEYS },
        schedule: layers(32),
        sizes: [4096, 6400, 16, 2],
        rule: SOFTMAX,
        special: phimoe,
        layouts: &[MIXTRAL, FUSED.with_gate("mlp.router.weight")],
        ..PLAIN
    },
    Family {
        model_types: &["dbrx"],
        schedule: layers(24).counted_at_top(&["num_hidden_layers", "n_layers"]),
        path: &[&["ffn_config"]],
        keys: SizeKeys {
            hidden: &["hidden_size"],
            intermediate: &["ffn_hidden_size"],
            experts: &["moe_num_experts"],
            top_k: &["moe_top_k"],
        },
        sizes: [2048, 3584, 4, 1],
        activation: Function::Fixed(ActivationFunction::Silu),
        rule: SOFTMAX,
        special: dbrx,
        prefixes: &["transformer.blocks.{layer}."],
        layouts: &[EACH.with_gate("ffn.router.layer.weight").with_experts(ExpertNames {
            flat: true,
            down_order: WeightOrder::InOut,
            ..each("ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2")
        })],
        ..PLAIN
    },
    GEMMA,
    Family {
        model_types: &["diffusion_gemma", "diffusion_gemma_text"],
        special: gemma,
        prefixes: &[
            "model.encoder.language_model.layers.{layer}.",
            "model.decoder.layers.{layer}.",
            "model.language_model.layers.{layer}.",
        ],
        ..GEMMA
    },
    Family {
        model_types: &["longcat_flash"],
        schedule: layers(28).dense(Dense::Pairs),
        keys: SizeKeys {
            intermediate: &["expert_ffn_hidden_size", "moe_intermediate_size"],
            experts: &["n_routed_experts", "num_local_experts"],
            top_k: &["moe_topk", "num_experts_per_tok"],
            ..MIXTRAL_KEYS
        },
        sizes: [6144, 2048, 512, 12],
        f32_logits: true,
        rule: Rule {
            scale: Scale::Key(&["routed_scaling_factor"], 6.0),
            only: &[("zero_expert_type", &["identity"])],
            ..BIASED_SOFTMAX
        },
        // transformers creates a bias of the logits if `router_bias` is true, and does not add it.
        special: longcat,
        layouts: &[EACH
            .with_gate("mlp.router.classifier.weight")
            .with_bias("mlp.router.e_score_correction_bias")
            .with_unread(&["mlp.router.classifier.bias"])],
        ..PLAIN
    },
    Family {
        model_types: &["zaya"],
        schedule: layers(40),
        keys: QWEN_KEYS,
        sizes: [2048, 2048, 16, 1],
        rule: BIASED_SOFTMAX,
        logits: LogitsFrom::Caller,
        special: zaya,
        layouts: &[
            FUSED.with_bias("mlp.gate.balancing_biases").with_unread(ZAYA_ROUTER),
            EACH.with_bias("mlp.gate.balancing_biases").with_unread(ZAYA_ROUTER),
        ],
        ..PLAIN
    },
    SWITCH,
    Family {
        part: "decoder",
        schedule: layers(12).counted_by(&["num_decoder_layers"]).dense(Dense::Spread(
            &["num_decoder_layers"],
            &["num_sparse_decoder_layers"],
            &["decoder_sparse_step"],
        )),
        prefixes: &["decoder.block.{layer}.layer.2."],
        ..SWITCH
    },
    NLLB,
    Family {
        part: "decoder",
        schedule: layers(12)
            .counted_by(&["decoder_layers"])
            .dense(Dense::Every(&["decoder_sparse_step"])),
        keys: SizeKeys { intermediate: &["decoder_ffn_dim"], ..NLLB.keys },
        prefixes: &["model.decoder.layers.{layer}.", "decoder.layers.{layer}."],
        ..NLLB
    },
];

fn ernie(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let min = keys.f32(&["moe_norm_min"], 1e-12)?;
    block.config.router.normalization = Normalization::SumAtLeast { min };
    Ok(())
}

/// The second of two sets of experts with different widths; a token's modality selects the set. The
/// numbers of its experts follow those of the first set, and the shared expert is the same.
fn ernie_vision(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    ernie(keys, block)?;
    let mut first = keys.clone();
    first.element = 0;
    block.first_expert = first.size(ERNIE.keys.experts, 64)?;
    block.config.shared = ERNIE.shared.read(
        &first,
        first.size(ERNIE.keys.intermediate, 1536)?,
        block.config.experts.activation,
        true,
    )?;
    Ok(())
}

fn phimoe(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    // In training it is the range of a jitter; here it determines which logits are near the
    // largest.
    let jitter = keys.f32(&["router_jitter_noise"], 0.01)?;
    block.config.router.scoring = Scoring::Sparsemixer { jitter, training: false };
    Ok(())
}

fn dbrx(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    config.hidden = keys.top().size(&["d_model"], 2048)?;
    config.experts.activation.function =
        function(&keys.clone().nested(&["ffn_act_fn"])?, "name", "silu")?;
    if let Some(p) = keys.number(&["moe_normalize_expert_weights"], Some(1.0))? {
        config.router.normalization = Normalization::PNorm { p: p as f32 };
    }
    Ok(())
}

fn gemma4(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    if !keys.boolean(&["enable_moe_block"], false)? {
        let wanted = "true: without it the model has no experts";
        return Err(keys.error("enable_moe_block", &false.into(), wanted));
    }
    gemma(keys, block)
}

/// The router's input is the layer's residual, normed with a learned scale and multiplied by `1 /
/// sqrt(H)`. The dense MLP in parallel has norms of its input and output: it is not the block's
/// shared expert.
fn gemma(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    let epsilon = keys.f32(&["rms_norm_eps"], 1e-6)?;
    config.projection.norm = Some(RmsNorm { epsilon, offset: 0.0, scale_first: false });
    config.router.logit_multiplier = (config.hidden as f64).powf(-0.5) as f32;
    config.router.expert_scale = true;
    Ok(())
}

fn longcat(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let count = keys.count(&["zero_expert_num"], 256)?;
    let output = ZeroOutput::Identity;
    block.config.zero_experts = (count > 0).then_some(ZeroExperts { count, output });
    Ok(())
}

/// One more class after the experts skips the token.
fn zaya(_: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    block.config.zero_experts = Some(ZeroExperts { count: 1, output: ZeroOutput::Zero });
    Ok(())
}

/// In each sequence an expert takes its first tokens up to its capacity; the others are dropped.
fn switch(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    block.config.projection.bias = keys.boolean(&["router_bias"], false)?;
    keys.word(&["router_dtype"], "float32", &[("float32", ())])?;
    let limit = CapacityLimit::Rows { rows: keys.size(&["expert_capacity"], 64)? };
    block.config.capacity = Some(CapacityConfig::new(limit, Priority::Token));
    Ok(())
}

fn nllb(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    config.projection.bias = keys.boolean(&["router_bias"], false)?;
    keys.word(&["router_dtype"], "float32", &[("float32", ())])?;
    // The other policies select the second expert at random, also in evaluation.
    keys.word(&["second_expert_policy"], "all", &[("all", ())])?;
    config.experts.gate_up_bias = true;
    config.experts.down_bias = true;
    // In training outputs were dropped with this probability, without scaling the others.
    config.router.scale = (1.0 - keys.f64(&["moe_token_dropout"], 0.2)?) as f32;

    // In evaluation an expert takes this fraction of all tokens. A fraction of 1 is no limit: a
    // token's experts differ.
    let fraction = keys.f64(&["moe_eval_capacity_token_fraction"], 1.0)?;
    let limit = if fraction > 0.0 {
        (fraction < 1.0).then_some(CapacityLimit::TokenFraction { fraction })
    } else {
        Some(CapacityLimit::Rows { rows: keys.size(&["expert_capacity"], 64)? })
    };
    let Some(limit) = limit else { return Ok(()) };
    let before = keys.boolean(&["normalize_router_prob_before_dropping"], false)?;
    let prioritized = keys.boolean(&["batch_prioritized_routing"], false)?;
    let priority = if prioritized { Priority::ChoiceByTopWeight } else { Priority::Choice };
    let mut capacity = CapacityConfig::new(limit, priority);
    if !before {
        // The normalisation is over kept slots: the only kept expert of a token has the whole
        // weight.
        capacity.normalization =
            std::mem::replace(&mut config.router.normalization, Normalization::None);
    }
    config.capacity = Some(capacity);
    Ok(())
}
