//! Holding the weights of a layer against its configuration.

use super::{ExpertWeights, GateUpWeights, Memory, Typed, Weights};
use crate::config::{GateUp, MoeConfig};
use crate::dtype::Dtype;
use crate::error::{Error, Result, check_len, product};

impl<M: Memory, D: Dtype> Weights<M, D> {
    /// Holds every tensor against the configuration.
    pub(crate) fn check(&self, op: &'static str, config: &MoeConfig) -> Result<()> {
        let at = Held { op };
        let (hidden, experts) = (config.hidden, config.router_experts());
        let inner = config.expert_hidden();
        let router = &self.router;
        let gate_len = at.product(experts, hidden)?;
        match &router.gate {
            None => {}
            Some(Typed::Element(gate)) => check_len(op, "router.gate", M::len(gate), gate_len)?,
            Some(Typed::F32(gate)) => check_len(op, "router.gate", M::len(gate), gate_len)?,
        }
        at.optional::<M, _>("router.bias", &router.bias, config.projection.bias, experts)?;
        if router.norm.is_some() {
            let wanted = config.projection.norm.is_some();
            at.optional::<M, _>("router.norm", &router.norm, wanted, hidden)?;
        }
        let chosen = experts - config.router.num_sinks;
        let bias = config.router.selection_bias;
        at.optional::<M, _>("router.selection_bias", &router.selection_bias, bias, chosen)?;
        let scale = config.router.expert_scale;
        at.optional::<M, _>("router.expert_scale", &router.expert_scale, scale, experts)?;

        let half = at.product(at.product(config.num_experts, config.intermediate)?, inner)?;
        let parts = if config.experts.gated { 2 } else { 1 };
        match (&self.experts.gate_up, config.experts.gate_up) {
            (GateUpWeights::Fused(gate_up), GateUp::Concatenated | GateUp::Interleaved) => {
                check_len(op, "experts.gate_up", M::len(gate_up), at.product(parts, half)?)?;
            }
            (GateUpWeights::Separate { gate, up }, GateUp::Separate) => {
                check_len(op, "experts.gate", M::len(gate), half)?;
                check_len(op, "experts.up", M::len(up), half)?;
            }
            (GateUpWeights::Fused(_), GateUp::Separate) => {
                return at
                    .mismatch("the configuration has gate and up separate, the weights fused");
            }
            (GateUpWeights::Separate { .. }, _) => {
                return at
                    .mismatch("the configuration has gate and up fused, the weights separate");
            }
        }
        let features = parts * config.num_experts * config.intermediate;
        let ExpertWeights { gate_up_bias, down, down_bias, output_bias, post_norm, .. } =
            &self.experts;
        let wanted = config.experts;
        at.optional::<M, _>("experts.gate_up_bias", gate_up_bias, wanted.gate_up_bias, features)?;
        check_len(op, "experts.down", M::len(down), half)?;
        let rows = at.product(config.num_experts, inner)?;
        at.optional::<M, _>("experts.down_bias", down_bias, wanted.down_bias, rows)?;
        at.optional::<M, _>("experts.output_bias", output_bias, wanted.output_bias, inner)?;
        at.optional::<M, _>("experts.post_norm", post_norm, wanted.post_norm.is_some(), inner)?;

        at.there("latent", self.latent.is_some(), config.latent.is_some())?;
        if let (Some(weights), Some(latent)) = (&self.latent, config.latent) {
            let matrix = at.product(latent.hidden, hidden)?;
            check_len(op, "latent.before", M::len(&weights.before), matrix)?;
            at.optional::<M, _>(
                "latent.norm",
                &weights.norm,
                latent.norm.is_some(),
                latent.hidden,
            )?;
            check_len(op, "latent.after", M::len(&weights.after), matrix)?;
        }
        at.there("shared", self.shared.is_some(), config.shared.is_some())?;
        if let (Some(weights), Some(shared)) = (&self.shared, config.shared) {
            let matrix = at.product(shared.intermediate, hidden)?;
            let parts = if shared.gated { 2 } else { 1 };
            check_len(op, "shared.gate_up", M::len(&weights.gate_up), at.product(parts, matrix)?)?;
            check_len(op, "shared.down", M::len(&weights.down), matrix)?;
            let gate = &weights.sigmoid_gate;
            at.optional::<M, _>("shared.sigmoid_gate", gate, shared.sigmoid_gate, hidden)?;
        }
        Ok(())
    }
}

/// Whose tensors they are: the operation that errors name.
struct Held {
    op: &'static str,
}

impl Held {
    fn product(&self, a: usize, b: usize) -> Result<usize> {
        product(self.op, "elements of the weights", a, b)
    }

    fn mismatch<T>(&self, why: impl Into<String>) -> Result<T> {
        Err(Error::Mismatch { op: self.op, why: why.into() })
    }

    fn there(&self, name: &str, there: bool, wanted: bool) -> Result<()> {
        match (there, wanted) {
            (true, false) => {
                self.mismatch(format!("`{name}` is there, and the configuration has none"))
            }
            (false, true) => {
                self.mismatch(format!("`{name}` is not there, and the configuration has it"))
            }
            _ => Ok(()),
        }
    }

    /// A tensor that is there exactly where the configuration says so, and of that length.
    fn optional<M: Memory, T: 'static>(
        &self,
        name: &'static str,
        tensor: &Option<M::Of<T>>,
        wanted: bool,
        len: usize,
    ) -> Result<()> {
        self.there(name, tensor.is_some(), wanted)?;
        tensor.as_ref().map_or(Ok(()), |tensor| check_len(self.op, name, M::len(tensor), len))
    }
}
