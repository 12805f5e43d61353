//! The names of a block's tensors, and the parts of each array.

use std::ops::Range;

use moe_kernels::{GateUpLayout, MoeConfig, Selection, WeightOrder};

use crate::config::{BlockInfo, LogitsFrom};
use crate::error::{Error, Result};

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

impl Layout {
    /// Sets the order of the experts' weights to that of this kind of checkpoint.
    fn apply(&self, config: &mut MoeConfig) {
        let names = &self.experts;
        let experts = &mut config.experts;
        experts.gate_up_order = names.gate_up_order;
        experts.down_order = names.down_order;
        experts.gate_up = match (experts.gated, names.gate.is_empty()) {
            (false, _) => GateUpLayout::Concatenated,
            (true, true) => names.gate_up,
            (true, false) if names.up.contains(EXPERT) => GateUpLayout::Concatenated,
            (true, false) => GateUpLayout::Separate,
        };
    }

    /// The configuration of a block with weights in the order of this kind of checkpoint.
    pub fn config(&self, block: &BlockInfo) -> MoeConfig {
        let mut config = block.config;
        self.apply(&mut config);
        config
    }

    /// The prefixes, each with a dot at its end, of the names of all tensors in the block's
    /// modules. The block needs `arrays`. Another tensor with such a prefix belongs to another
    /// block than config.json describes, unless [`may_stay_unread`](Self::may_stay_unread) is true.
    pub fn modules(&self, arrays: &[Array], prefix: &str) -> Vec<String> {
        let SharedNames { gate, up, down, sigmoid_gate } = self.shared;
        let shared = [gate, up, down, sigmoid_gate];
        let parts = arrays.iter().flat_map(|array| &array.parts);
        let used = parts.filter_map(|part| part.name.strip_prefix(prefix));
        // A shared expert may have a module of its own, which belongs to the block.
        let names = used.chain(shared).filter_map(|name| name.split_once('.'));
        let mut modules: Vec<String> =
            names.map(|(module, _)| format!("{prefix}{module}.")).collect();
        modules.sort_unstable();
        modules.dedup();
        modules
    }

    /// Returns whether checkpoints of this kind have a tensor of this name (without the layer's
    /// prefix) that the block does not need.
    pub fn may_stay_unread(&self, name: &str) -> bool {
        self.unread.contains(&name)
    }

    /// All arrays of a block in checkpoints of this kind; `prefix` is the prefix of the layer's
    /// tensors.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration needs a tensor for which this kind of checkpoint has
    /// no name.
    pub fn arrays(&self, block: &BlockInfo, prefix: &str) -> Result<Vec<Array>> {
        let arrays = Arrays { block, prefix, config: self.config(block), arrays: Vec::new() };
        arrays.router(&self.router)?.experts(&self.experts)?.latent(&self.latent)?.shared(self)
    }
}

const EXPERT: &str = "{expert}";

/// Collects the arrays of a block.
struct Arrays<'a> {
    block: &'a BlockInfo,
    prefix: &'a str,
    config: MoeConfig,
    arrays: Vec<Array>,
}

impl Arrays<'_> {
    fn part(&self, role: Role, name: &str, shape: &[usize]) -> Result<Part> {
        if name.is_empty() {
            return Err(Error::Config {
                key: "model_type".into(),
                got: format!("{:?}", self.block.model_type),
                wanted: format!("a family with a tensor for {role:?}"),
            });
        }
        Ok(Part {
            name: format!("{}{name}", self.prefix),
            shape: shape.to_vec(),
            elements: 0..product(shape),
            stored: Stored::Plain,
        })
    }

    fn push(&mut self, role: Role, shape: &[usize], parts: Vec<Part>) {
        let shape = shape.to_vec();
        self.arrays.push(Array { role, shape, parts, transposed: false, repeated: false });
    }

    /// An array that is one tensor of the same shape.
    fn whole(&mut self, role: Role, name: &str, shape: &[usize]) -> Result<()> {
        let part = self.part(role, name, shape)?;
        self.push(role, shape, vec![part]);
        Ok(())
    }

    fn router(mut self, names: &RouterNames) -> Result<Self> {
        let MoeConfig { hidden, top_k, projection, router, .. } = self.config;
        let experts = self.config.router_experts();
        if self.block.logits != LogitsFrom::Caller {
            let shape = [experts, hidden];
            let on_disk = if names.transposed { [hidden, experts] } else { shape };
            let part = self.part(Role::RouterGate, names.gate, &on_disk)?;
            self.arrays.push(Array {
                role: Role::RouterGate,
                shape: shape.to_vec(),
                parts: vec![part],
                transposed: names.transposed,
                repeated: false,
            });
        }
        if projection.bias {
            self.whole(Role::RouterBias, names.bias, &[experts])?;
        }
        if projection.norm.is_some() {
            self.whole(Role::RouterNorm, names.norm, &[hidden])?;
        }
        if router.selection_bias {
            let routed = experts.saturating_sub(router.num_sinks);
            let (row, rows) = names.row;
            let shape = if rows == 0 { vec![routed] } else { vec![rows, routed] };
            let mut part = self.part(Role::SelectionBias, names.selection_bias, &shape)?;
            let first = row.saturating_mul(routed);
            part.elements = first..first.saturating_add(routed);
            self.push(Role::SelectionBias, &[routed], vec![part]);
        }
        if router.expert_scale {
            // Inkling has one number for all experts.
            let repeated = router.num_sinks > 0;
            let on_disk = if repeated { 1 } else { experts };
            let part = self.part(Role::ExpertScale, names.expert_scale, &[on_disk])?;
            let (shape, parts) = (vec![experts], vec![part]);
            let role = Role::ExpertScale;
            self.arrays.push(Array { role, shape, parts, transposed: false, repeated });
        }
        if router.selection == Selection::Given {
            self.whole(Role::Table, names.table, &[self.block.vocabulary, top_k])?;
        }
        Ok(self)
    }

    fn experts(mut self, names: &ExpertNames) -> Result<Self> {
        let MoeConfig { intermediate, experts, .. } = self.config;
        let hidden = self.config.expert_hidden();
        let features = |parts: usize| parts.saturating_mul(intermediate);
        let both = if experts.gated { 2 } else { 1 };
        let gate_up = |parts| match names.gate_up_order {
            WeightOrder::OutIn => [features(parts), hidden],
            WeightOrder::InOut => [hidden, features(parts)],
        };
        let down = match names.down_order {
            WeightOrder::OutIn => [hidden, intermediate],
            WeightOrder::InOut => [intermediate, hidden],
        };
        match experts.gate_up {
            GateUpLayout::Separate => {
                self.stack(Role::Gate, &[(names.gate, &gate_up(1))], &gate_up(1), names, "")?;
                self.stack(Role::Up, &[(names.up, &gate_up(1))], &gate_up(1), names, "")?;
            }
            _ if experts.gated && !names.gate.is_empty() => {
                let parts: [(&str, &[usize]); 2] =
                    [(names.gate, &gate_up(1)), (names.up, &gate_up(1))];
                self.stack(Role::GateUp, &parts, &gate_up(2), names, "")?;
            }
            _ => {
                let shape = gate_up(both);
                let (role, sinks) = (Role::GateUp, names.sinks.0);
                self.stack(role, &[(names.up, &shape)], &shape, names, sinks)?;
            }
        }
        self.stack(Role::Down, &[(names.down, &down)], &down, names, names.sinks.1)?;
        let plain = ExpertNames { stored: Stored::Plain, flat: false, ..*names };
        if experts.gate_up_bias {
            let shape = [features(both)];
            self.stack(Role::GateUpBias, &[(names.up_bias, &shape)], &shape, &plain, "")?;
        }
        if experts.down_bias {
            self.stack(Role::DownBias, &[(names.down_bias, &[hidden])], &[hidden], &plain, "")?;
        }
        if experts.output_bias {
            self.whole(Role::OutputBias, names.output_bias, &[self.config.hidden])?;
        }
        if experts.post_norm.is_some() {
            self.whole(Role::PostNorm, names.post_norm, &[hidden])?;
        }
        Ok(self)
    }

    /// An array with one matrix or vector of `shape` for each expert: `parts` of each expert; or
    /// one tensor of all experts, followed by one of the sinks if they have a name.
    fn stack(
        &mut self,
        role: Role,
        parts: &[(&str, &[usize])],
        shape: &[usize],
        names: &ExpertNames,
        sinks: &str,
    ) -> Result<()> {
        let experts = self.config.num_experts;
        let num_sinks = self.config.router.num_sinks;
        let mut found = Vec::new();
        for expert in 0..experts {
            for (name, shape) in parts.iter().filter(|(name, _)| name.contains(EXPERT)) {
                let number = self.block.first_expert.saturating_add(expert).to_string();
                found.push(self.part(role, &name.replace(EXPERT, &number), shape)?);
            }
        }
        if found.is_empty() {
            let separate = if sinks.is_empty() { 0 } else { num_sinks };
            for (name, shape) in parts {
                found.push(self.part(
                    role,
                    name,
                    &stacked(experts - separate, shape, names.flat),
                )?);
            }
            if separate > 0 {
                found.push(self.part(role, sinks, &stacked(separate, shape, names.flat))?);
            }
        }
        for part in &mut found {
            part.stored = names.stored;
        }
        self.push(role, &stacked(experts, shape, false), found);
        Ok(())
    }

    fn latent(mut self, names: &LatentNames) -> Result<Self> {
        let hidden = self.config.hidden;
        if let Some(latent) = self.config.latent {
            self.whole(Role::LatentIn, names.proj_in, &[latent.hidden, hidden])?;
            if latent.norm.is_some() {
                self.whole(Role::LatentNorm, names.norm, &[latent.hidden])?;
            }
            self.whole(Role::LatentOut, names.proj_out, &[hidden, latent.hidden])?;
        }
        Ok(self)
    }

    fn shared(mut self, layout: &Layout) -> Result<Vec<Array>> {
        let hidden = self.config.hidden;
        if let Some(shared) = self.config.shared {
            let SharedNames { gate, up, down, sigmoid_gate } = layout.shared;
            let (role, width) = (Role::SharedGateUp, shared.intermediate);
            let both = if shared.gated { 2 * width } else { width };
            if shared.gated && !gate.is_empty() {
                let gate = self.part(role, gate, &[width, hidden])?;
                let up = self.part(role, up, &[width, hidden])?;
                self.push(role, &[both, hidden], vec![gate, up]);
            } else {
                self.whole(role, up, &[both, hidden])?;
            }
            if shared.gate_up_bias {
                let role = Role::SharedGateUpBias;
                let names = [gate, up].into_iter().filter(|name| !name.is_empty());
                let size = if shared.gated && !gate.is_empty() { width } else { both };
                let parts = names.map(|name| self.part(role, &bias_of(name), &[size]));
                let parts = parts.collect::<Result<Vec<_>>>()?;
                self.push(role, &[both], parts);
            }
            if shared.down_bias {
                self.whole(Role::SharedDownBias, &bias_of(down), &[hidden])?;
            }
            self.whole(Role::SharedDown, down, &[hidden, width])?;
            if shared.sigmoid_gate {
                let part = self.part(Role::SharedSigmoidGate, sigmoid_gate, &[1, hidden])?;
                self.push(Role::SharedSigmoidGate, &[hidden], vec![part]);
            }
        }
        if self.config.output_norm.is_some() {
            self.whole(Role::OutputNorm, layout.output_norm, &[hidden])?;
        }
        Ok(self.arrays)
    }
}

/// The name of the bias of a linear layer, from the name of its weight; empty if that does not end
/// in `.weight`.
fn bias_of(weight: &str) -> String {
    weight.strip_suffix(".weight").map_or_else(String::new, |layer| format!("{layer}.bias"))
}

fn product(shape: &[usize]) -> usize {
    shape.iter().fold(1, |product: usize, size| product.saturating_mul(*size))
}

/// `[E, ...]`, or `[E * I, H]`.
fn stacked(experts: usize, shape: &[usize], flat: bool) -> Vec<usize> {
    match shape {
        [rows, rest @ ..] if flat => [&[experts.saturating_mul(*rows)], rest].concat(),
        _ => [&[experts], shape].concat(),
    }
}
