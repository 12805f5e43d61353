//! Families that select by logit and compute the softmax, or sigmoids, of the selected logits.

use moe_kernels::{
    Activation, ActivationFunction, GateUpLayout, Limit, Normalization, RouterConfig, Scoring,
    Selection, WeightOrder, WeightPosition,
};

use super::layouts::{DECODER, EACH, FUSED, MIXTRAL, TEXT, each, fused, shared};
use super::softmax::{MIXTRAL_KEYS, OLMOE_KEYS, PLAIN};
use crate::block_info::BlockInfo;
use crate::error::Result;
use crate::family::{
    Family, Function, Rule, SOFTMAX, SizeKeys, TOP_K_SOFTMAX, shared_count, shared_width,
};
use crate::keys::Keys;
use crate::names::{ExpertNames, Layout, RouterNames, SharedNames, Stored};
use crate::schedule::{Dense, first_k, layers};

const TOP_K: Family = Family { rule: TOP_K_SOFTMAX, ..PLAIN };

/// gpt-oss in 16 bits.
const GPT_OSS: Layout = Layout {
    router: RouterNames { gate: "mlp.router.weight", bias: "mlp.router.bias", ..EACH.router },
    experts: ExpertNames {
        up_bias: "mlp.experts.gate_up_proj_bias",
        down_bias: "mlp.experts.down_proj_bias",
        gate_up: GateUpLayout::Interleaved,
        ..fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    },
    ..EACH
}
.in_out();

/// gpt-oss in MXFP4, the usual form. Blocks are along the products' inputs, so that each expert's
/// matrices are `[out, in]`.
const GPT_OSS_MXFP4: Layout = GPT_OSS.with_experts(ExpertNames {
    gate_up_order: WeightOrder::OutIn,
    down_order: WeightOrder::OutIn,
    stored: Stored::Mxfp4,
    ..GPT_OSS.experts
});

const PRIVACY_FILTER: Layout =
    GPT_OSS.with_experts(ExpertNames { gate_up: GateUpLayout::Concatenated, ..GPT_OSS.experts });

const LLAMA4: Layout = EACH
    .with_gate("feed_forward.router.weight")
    .with_experts(fused("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"))
    .with_shared(shared(
        "feed_forward.shared_expert.gate_proj.weight",
        "feed_forward.shared_expert.up_proj.weight",
        "feed_forward.shared_expert.down_proj.weight",
    ))
    .in_out();

/// The names of FP8 checkpoints, whose quantisation supports single matrices only.
const LLAMA4_EACH: Layout = Layout {
    experts: each(
        "feed_forward.experts.{expert}.gate_proj.weight",
        "feed_forward.experts.{expert}.up_proj.weight",
        "feed_forward.experts.{expert}.down_proj.weight",
    ),
    ..LLAMA4
};

const GRANITE_SHARED: SharedNames =
    shared("", "shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight");

/// Granite's names on the Hub, and those of transformers' modules.
const GRANITE: &[Layout] = &[
    MIXTRAL
        .with_gate("block_sparse_moe.router.layer.weight")
        .with_experts(fused(
            "block_sparse_moe.input_linear.weight",
            "block_sparse_moe.output_linear.weight",
        ))
        .with_shared(GRANITE_SHARED),
    MIXTRAL
        .with_gate("block_sparse_moe.router.weight")
        .with_experts(fused(
            "block_sparse_moe.experts.gate_up_proj",
            "block_sparse_moe.experts.down_proj",
        ))
        .with_shared(GRANITE_SHARED),
];

const GRANITE_MOE: Family = Family {
    model_types: &["granitemoe"],
    schedule: layers(32),
    sizes: [4096, 11008, 8, 2],
    layouts: GRANITE,
    ..TOP_K
};

pub const FAMILIES: &[Family] = &[
    Family {
        model_types: &["gpt_oss"],
        schedule: layers(36),
        sizes: [2880, 2880, 128, 4],
        activation: Function::Fixed(ActivationFunction::Silu),
        special: gpt_oss,
        layouts: &[GPT_OSS_MXFP4, GPT_OSS],
        ..TOP_K
    },
    Family {
        model_types: &["openai_privacy_filter"],
        schedule: layers(8),
        sizes: [640, 640, 128, 4],
        activation: Function::Fixed(ActivationFunction::Silu),
        // transformers divides the weights by K and multiplies the output by K; both are omitted
        // here.
        special: gpt_oss,
        f32_logits: true,
        layouts: &[PRIVACY_FILTER],
        ..TOP_K
    },
    Family {
        model_types: &["llama4", "llama4_text"],
        schedule: layers(48).dense(Dense::Listed),
        path: &[&["text_config"]],
        sizes: [5120, 8192, 16, 1],
        weight_position: WeightPosition::Input,
        rule: SELECTED_SIGMOID,
        shared: shared_count(&[], 1),
        prefixes: TEXT_AND_LLAMA,
        layouts: &[LLAMA4, LLAMA4_EACH],
        ..TOP_K
    },
    GRANITE_MOE,
    Family {
        model_types: &["granitemoe_swa"],
        shared: shared_width(&["shared_intermediate_size"], 0),
        ..GRANITE_MOE
    },
    Family {
        model_types: &["granitemoeshared"],
        shared: shared_width(&["shared_intermediate_size"], 0),
        ..GRANITE_MOE
    },
    Family {
        model_types: &["granitemoehybrid"],
        shared: shared_width(&["shared_intermediate_size"], 1024),
        ..GRANITE_MOE
    },
    // The FFN alone: attention, which selects among projections in the same way, is not supported.
    Family {
        model_types: &["jetmoe"],
        schedule: layers(12),
        sizes: [2048, 5632, 8, 2],
        activation: Function::Key("activation_function", "silu"),
        special: output_bias,
        layouts: &[EACH.with_gate("mlp.router.layer.weight").with_experts(ExpertNames {
            output_bias: "mlp.bias",
            ..fused("mlp.input_linear.weight", "mlp.output_linear.weight")
        })],
        ..TOP_K
    },
    Family {
        model_types: &["aria", "aria_text"],
        schedule: layers(32),
        path: &[&["text_config"]],
        keys: SizeKeys { experts: &["moe_num_experts"], top_k: &["moe_topk"], ..MIXTRAL_KEYS },
        sizes: [4096, 4096, 8, 2],
        shared: shared_count(&["moe_num_shared_experts"], 2).with_bias(&["mlp_bias"]),
        special: routed_silu,
        prefixes: TEXT,
        layouts: &[
            EACH.with_gate("mlp.router.weight")
                .with_experts(fused("mlp.experts.fc1.weight", "mlp.experts.fc2.weight"))
                .in_out(),
            FUSED.with_gate("mlp.router.weight").in_out(),
        ],
        ..TOP_K
    },
    Family {
        model_types: &["cohere2_moe"],
        schedule: layers(40).typed(first_k(0)),
        keys: OLMOE_KEYS,
        sizes: [8192, 22528, 8, 2],
        shared: shared_count(&["num_shared_experts"], 0),
        special: cohere,
        layouts: &[EACH, FUSED],
        ..TOP_K
    },
];

/// The sigmoid of the selected logits.
const SELECTED_SIGMOID: Rule = Rule {
    base: RouterConfig {
        scoring: Scoring::Sigmoid,
        selection: Selection::Logit,
        ..RouterConfig::softmax_top_k(false)
    },
    ..SOFTMAX
};

const TEXT_AND_LLAMA: &[&str] = &[
    "language_model.model.layers.{layer}.",
    "model.language_model.layers.{layer}.",
    DECODER[0],
    DECODER[1],
];

/// `(up + 1) * gate * sigmoid(alpha * gate)`, both clamped.
pub fn gpt_oss_activation(keys: &Keys<'_>) -> Result<Activation> {
    Ok(Activation {
        alpha: keys.f32(&["swiglu_alpha"], 1.702)?,
        limit: Limit::Before { limit: keys.f32(&["swiglu_limit"], 7.0)? },
        up_offset: 1.0,
        ..Activation::default()
    })
}

fn gpt_oss(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    config.projection.bias = true;
    config.experts.activation = gpt_oss_activation(keys)?;
    config.experts.gate_up_bias = true;
    config.experts.down_bias = true;
    Ok(())
}

fn output_bias(_: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    block.config.experts.output_bias = true;
    Ok(())
}

/// The key of the activation function applies to the shared expert alone.
fn routed_silu(_: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    block.config.experts.activation = Activation::default();
    Ok(())
}

fn cohere(keys: &Keys<'_>, block: &mut BlockInfo) -> Result<()> {
    let config = &mut block.config;
    if keys.word(&["expert_selection_fn"], "softmax", &[("softmax", false), ("sigmoid", true)])? {
        config.router = SELECTED_SIGMOID.base;
        if keys.boolean(&["norm_topk_prob"], true)? {
            config.router.normalization = Normalization::Sum { epsilon: 0.0 };
        }
    }
    let strategies = [("average", true), ("sum", false)];
    let average = keys.word(&["shared_expert_combination_strategy"], "average", &strategies)?;
    if let Some(shared) = &mut config.shared {
        shared.average = average;
    }
    Ok(())
}
