//! The names of a block's tensors, and the parts of each array.

use std::ops::Range;

use moe_kernels::{GateUpLayout, WeightOrder};

/// The role of an array in a block. Shapes are those in memory; `E'` is the number of experts that
/// the router scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// The router's weights `[E', H]`.
    RouterGate,
    /// The bias of the logits `[E']`.
    RouterBias,
    /// The weights `[H]` of the norm of the router's input.
    RouterNorm,
    /// The bias that is added for the selection alone, `[E']` less the sinks.
    SelectionBias,
    /// A factor of each expert's routing weight, `[E']`.
    ExpertScale,
    /// Expert ids by token id, `[V, K]`.
    Table,
    /// Gate and up in one array, `[E, 2I, H]` or `[E, H, 2I]`; up alone for experts without a gate.
    GateUp,
    /// Gate in an array of its own, `[E, I, H]` or `[E, H, I]`.
    Gate,
    /// Up in an array of its own, of the same shape.
    Up,
    /// The biases of gate and up, `[E, 2I]`, in the order of the weights' features; of up alone
    /// without a gate.
    GateUpBias,
    /// `[E, H, I]` or `[E, I, H]`
    Down,
    /// `[E, H]`
    DownBias,
    /// The bias `[H]` of the layer's routed output.
    OutputBias,
    /// The weights `[H]` of the norm of each expert's output.
    PostNorm,
    /// The projection to the latent width, `[L, H]`.
    LatentIn,
    /// The weights `[L]` of the norm of its output.
    LatentNorm,
    /// The projection from the latent width, `[H, L]`.
    LatentOut,
    /// The shared expert's gate followed by its up, `[2I, H]`; up alone `[I, H]` without a gate.
    SharedGateUp,
    /// The biases of the shared expert's gate and up, `[2I]`; of up alone `[I]` without a gate.
    SharedGateUpBias,
    /// The shared expert's down, `[H, I]`.
    SharedDown,
    /// The bias of the shared expert's down, `[H]`.
    SharedDownBias,
    /// The weights `[H]` of the sigmoid gate of the shared expert's output.
    SharedSigmoidGate,
    /// The weights `[H]` of the norm of the layer's output.
    OutputNorm,
}

/// The tensors that store a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    /// One tensor of numbers, or of codes of 8 or 4 bits with a tensor of scales:
    /// [`scale_names`](Part::scale_names).
    Plain,
    /// MXFP4: blocks in `<name>_blocks`, scales in `<name>_scales`.
    Mxfp4,
}

/// A tensor of a checkpoint, or a range of its elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its full name.
    pub name: String,
    /// The shape of the whole tensor on disk.
    pub shape: Vec<usize>,
    /// The elements that belong to the array.
    pub elements: Range<usize>,
    /// The tensors that store it.
    pub stored: Stored,
}

impl Part {
    /// The possible names of the scales of a quantised tensor, the most frequent first: that of
    /// DeepSeek-V3; that of compressed-tensors, Inkling 2 and ModelOpt; that of DeepSeek-V4; that
    /// of Mistral Large 4.
    pub fn scale_names(&self) -> Vec<String> {
        let name = &self.name;
        let mut names = vec![format!("{name}_scale_inv"), format!("{name}_scale")];
        if let Some(module) = name.strip_suffix(".weight") {
            names.extend([format!("{module}.scale"), format!("{module}.qscale_weight")]);
        }
        names
    }

    /// The possible names of the scales with which a quantised model rounds the tensor's inputs.
    /// moe-kernels does not round inputs and ignores them.
    pub fn activation_scale_names(&self) -> Vec<String> {
        let name = &self.name;
        let mut names = vec![format!("{name}_activation_scale")];
        if let Some(module) = name.strip_suffix(".weight") {
            let of = |scale| format!("{module}.{scale}");
            names.extend(
                ["input_scale", "activation_scale", "act_scale", "output_scale", "qscale_act"]
                    .map(of),
            );
        }
        names
    }
}

/// An array of a block: its parts, concatenated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Its role.
    pub role: Role,
    /// Its shape in memory.
    pub shape: Vec<usize>,
    /// The tensors with its elements.
    pub parts: Vec<Part>,
    /// The parts are the transpose of a matrix of this shape.
    pub transposed: bool,
    /// The parts have one element; every element of the array is equal to it.
    pub repeated: bool,
}

/// The names of a family's tensors in one kind of checkpoint, without the layer's prefix.
/// `{expert}` is replaced by a number. An empty name is a tensor that no checkpoint of this kind
/// has.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub(super) router: RouterNames,
    pub(super) experts: ExpertNames,
    pub(super) latent: LatentNames,
    pub(super) shared: SharedNames,
    pub(super) output_norm: &'static str,
    /// Names in the block's modules that checkpoints have and that the block does not need.
    pub(super) unread: &'static [&'static str],
}

#[derive(Debug, Clone, Copy)]
pub(super) struct RouterNames {
    pub gate: &'static str,
    /// `gate` is stored as `[H, E']`.
    pub transposed: bool,
    pub bias: &'static str,
    pub norm: &'static str,
    pub selection_bias: &'static str,
    /// The selection bias is one row of a tensor: its index and the number of rows; (0, 0) for a
    /// whole tensor.
    pub row: (usize, usize),
    pub expert_scale: &'static str,
    pub table: &'static str,
}

/// Names of the experts' tensors. Those with `{expert}` are stacked. If `gate` is empty, `up` is
/// gate and up.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertNames {
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub up_bias: &'static str,
    pub down_bias: &'static str,
    pub output_bias: &'static str,
    pub post_norm: &'static str,
    /// The order of gate and up in one tensor.
    pub gate_up: GateUpLayout,
    pub gate_up_order: WeightOrder,
    pub down_order: WeightOrder,
    /// The experts' dimension is merged into the next one: `[E * I, H]`.
    pub flat: bool,
    pub stored: Stored,
    /// The last experts, which every token selects, in tensors of their own: gate and up, and down.
    pub sinks: (&'static str, &'static str),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct LatentNames {
    pub proj_in: &'static str,
    pub norm: &'static str,
    pub proj_out: &'static str,
}

/// If `gate` is empty, `up` is gate and up.
#[derive(Debug, Clone, Copy)]
pub(super) struct SharedNames {
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub sigmoid_gate: &'static str,
}
