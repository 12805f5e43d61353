//! The arrays of a block in a kind of checkpoint.

use moe_kernels::{GateUpLayout, MoeConfig, Selection, WeightOrder};

use crate::block_info::{BlockInfo, LogitsFrom};
use crate::error::{Error, Result};
use crate::names::{
    Array, ExpertNames, LatentNames, Layout, Part, Role, RouterNames, SharedNames, Stored,
};

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
