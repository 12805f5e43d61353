//! Names of tensors that several families share.

use moe_kernels::{GateUpLayout, WeightOrder};

use crate::names::{ExpertNames, LatentNames, Layout, RouterNames, SharedNames, Stored};

/// Decoders of text models.
pub const DECODER: &[&str] = &["model.layers.{layer}.", "layers.{layer}."];

/// Decoders of models with a vision tower, nested as on the Hub and as in transformers.
pub const TEXT: &[&str] = &[
    "model.language_model.layers.{layer}.",
    "language_model.model.layers.{layer}.",
    "language_model.layers.{layer}.",
    "model.layers.{layer}.",
    "layers.{layer}.",
];

const NO_EXPERTS: ExpertNames = ExpertNames {
    gate: "",
    up: "",
    down: "",
    up_bias: "",
    down_bias: "",
    output_bias: "",
    post_norm: "",
    gate_up: GateUpLayout::Concatenated,
    gate_up_order: WeightOrder::OutIn,
    down_order: WeightOrder::OutIn,
    flat: false,
    stored: Stored::Plain,
    sinks: ("", ""),
};

/// The names of most families on the Hub: three matrices for each expert.
pub const EACH: Layout = Layout {
    router: RouterNames {
        gate: "mlp.gate.weight",
        transposed: false,
        bias: "",
        norm: "",
        selection_bias: "mlp.gate.e_score_correction_bias",
        row: (0, 0),
        expert_scale: "",
        table: "",
    },
    experts: ExpertNames {
        gate: "mlp.experts.{expert}.gate_proj.weight",
        up: "mlp.experts.{expert}.up_proj.weight",
        down: "mlp.experts.{expert}.down_proj.weight",
        ..NO_EXPERTS
    },
    latent: LatentNames { proj_in: "", norm: "", proj_out: "" },
    shared: shared(
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    ),
    output_norm: "",
    unread: &[],
};

/// The names of transformers' modules since version 5, in a state dict without conversion.
pub const FUSED: Layout =
    EACH.with_experts(fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj"));

/// Mixtral's names.
pub const MIXTRAL: Layout = Layout {
    router: RouterNames {
        gate: "block_sparse_moe.gate.weight",
        selection_bias: "block_sparse_moe.e_score_correction_bias",
        ..EACH.router
    },
    experts: each(
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
        "block_sparse_moe.experts.{expert}.w2.weight",
    ),
    shared: shared(
        "block_sparse_moe.shared_experts.gate_proj.weight",
        "block_sparse_moe.shared_experts.up_proj.weight",
        "block_sparse_moe.shared_experts.down_proj.weight",
    ),
    ..EACH
};

/// Qwen's shared expert with its sigmoid gate.
pub const QWEN_SHARED: SharedNames = SharedNames {
    sigmoid_gate: "mlp.shared_expert_gate.weight",
    ..shared(
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert.down_proj.weight",
    )
};

/// Two tensors for all experts, each expert's matrix `[out, in]`.
pub const fn fused(gate_up: &'static str, down: &'static str) -> ExpertNames {
    ExpertNames { up: gate_up, down, ..NO_EXPERTS }
}

/// Three tensors: for each expert, or, without `{expert}` in the names, for all.
pub const fn each(gate: &'static str, up: &'static str, down: &'static str) -> ExpertNames {
    ExpertNames { gate, up, down, ..NO_EXPERTS }
}

/// For families whose layers have another module with the usual name of a shared expert.
pub const NO_SHARED_NAMES: SharedNames = shared("", "", "");

/// The shared expert's three matrices.
pub const fn shared(gate: &'static str, up: &'static str, down: &'static str) -> SharedNames {
    SharedNames { gate, up, down, sigmoid_gate: "" }
}

impl Layout {
    pub(super) const fn with_experts(self, experts: ExpertNames) -> Self {
        Self { experts, ..self }
    }

    pub(super) const fn with_shared(self, shared: SharedNames) -> Self {
        Self { shared, ..self }
    }

    pub(super) const fn with_unread(self, unread: &'static [&'static str]) -> Self {
        Self { unread, ..self }
    }

    pub(super) const fn with_gate(self, gate: &'static str) -> Self {
        Self { router: RouterNames { gate, ..self.router }, ..self }
    }

    pub(super) const fn with_bias(self, selection_bias: &'static str) -> Self {
        Self { router: RouterNames { selection_bias, ..self.router }, ..self }
    }
}
