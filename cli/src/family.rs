//! What each model family calls things and computes: a table.
//!
//! A family is one row of [`FAMILIES`]. It names the keys of config.json, the rule for the weights, and
//! the layouts in which its tensors are found. Adding a family whose router and experts the library
//! computes means adding a row.

/// One model family, as `model_type` in config.json names it.
pub struct Family {
    pub model_type: &'static str,
    /// Keys of config.json, the first that is there counts.
    pub hidden: &'static [&'static str],
    pub intermediate: &'static [&'static str],
    pub num_experts: &'static [&'static str],
    pub top_k: &'static [&'static str],
    pub router: Router,
    /// The layouts in which checkpoints of this family are found, the most frequent first.
    pub layouts: &'static [Layout],
}

/// How the family's router makes weights of logits.
pub enum Router {
    /// Softmax over all experts, the K largest, divided by their sum.
    SoftmaxTopKRenormalized,
    /// The same; whether the weights are divided by their sum says a key of config.json.
    SoftmaxTopK { renormalize: &'static str, default: bool },
}

/// The names of a block's tensors. `{layer}` and `{expert}` stand for their numbers.
pub struct Layout {
    /// [E, H]
    pub router: &'static str,
    pub experts: ExpertNames,
}

/// Where the three projections of the experts are.
pub enum ExpertNames {
    /// Three matrices for each expert: gate [I, H], up [I, H], down [H, I].
    Each { gate: &'static str, up: &'static str, down: &'static str },
    /// Two tensors for all: gate_up [E, 2I, H] with the gate's rows first, down [E, H, I].
    Fused { gate_up: &'static str, down: &'static str },
}

/// What stands before the names of a layer: in a whole model, and in one saved without its head.
pub const PREFIXES: &[&str] = &["model.layers.{layer}.", "layers.{layer}."];

/// The only activation that the experts of the library have.
pub const ACTIVATIONS: &[&str] = &["silu", "swish"];

/// The keys under which families name their activation.
pub const ACTIVATION_KEYS: &[&str] = &["hidden_act", "hidden_activation"];

pub const FAMILIES: &[Family] = &[
    Family {
        model_type: "mixtral",
        hidden: &["hidden_size"],
        intermediate: &["intermediate_size"],
        num_experts: &["num_local_experts", "num_experts"],
        top_k: &["num_experts_per_tok"],
        router: Router::SoftmaxTopKRenormalized,
        layouts: &[
            Layout {
                router: "block_sparse_moe.gate.weight",
                experts: ExpertNames::Each {
                    gate: "block_sparse_moe.experts.{expert}.w1.weight",
                    up: "block_sparse_moe.experts.{expert}.w3.weight",
                    down: "block_sparse_moe.experts.{expert}.w2.weight",
                },
            },
            MLP_FUSED,
        ],
    },
    Family {
        model_type: "qwen3_moe",
        hidden: &["hidden_size"],
        intermediate: &["moe_intermediate_size"],
        num_experts: &["num_experts", "num_local_experts"],
        top_k: &["num_experts_per_tok"],
        router: Router::SoftmaxTopK { renormalize: "norm_topk_prob", default: false },
        layouts: &[MLP_EACH, MLP_FUSED],
    },
];

/// The Hub's names of most families.
const MLP_EACH: Layout = Layout {
    router: "mlp.gate.weight",
    experts: ExpertNames::Each {
        gate: "mlp.experts.{expert}.gate_proj.weight",
        up: "mlp.experts.{expert}.up_proj.weight",
        down: "mlp.experts.{expert}.down_proj.weight",
    },
};

/// The names of transformers' modules since version 5, in a state dict that was saved as it is.
const MLP_FUSED: Layout = Layout {
    router: "mlp.gate.weight",
    experts: ExpertNames::Fused {
        gate_up: "mlp.experts.gate_up_proj",
        down: "mlp.experts.down_proj",
    },
};

impl Family {
    pub fn find(model_type: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }

    /// All families, as a message lists them.
    pub fn known() -> String {
        FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
    }
}

impl ExpertNames {
    /// A tensor that is there if the experts have this layout.
    pub fn first(&self) -> String {
        match self {
            ExpertNames::Each { gate, .. } => expert_name(gate, 0),
            ExpertNames::Fused { gate_up, .. } => (*gate_up).into(),
        }
    }
}

pub fn layer_name(prefix: &str, layer: usize, name: &str) -> String {
    prefix.replace("{layer}", &layer.to_string()) + name
}

pub fn expert_name(name: &str, expert: usize) -> String {
    name.replace("{expert}", &expert.to_string())
}

/// The layer number in `tensor` if it is `prefix` and `name` with some number for `{layer}`.
pub fn layer_of(tensor: &str, prefix: &str, name: &str) -> Option<usize> {
    let (before, after) = prefix.split_once("{layer}")?;
    tensor.strip_suffix(name)?.strip_suffix(after)?.strip_prefix(before)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let name = layer_name(PREFIXES[0], 31, MLP_EACH.router);
        assert_eq!(name, "model.layers.31.mlp.gate.weight");
        assert_eq!(layer_of(&name, PREFIXES[0], MLP_EACH.router), Some(31));
        assert_eq!(layer_of(&name, PREFIXES[1], MLP_EACH.router), None);
        assert_eq!(expert_name("experts.{expert}.w1.weight", 7), "experts.7.w1.weight");
    }
}
