//! Checks of the weights and inputs of a layer against its configuration.

use super::{ExpertWeights, GateUpTensors, Memory, MoeInputs, MoeWeights, Typed};
use crate::config::{GateUpLayout, MoeConfig, RouteLengths, Selection};
use crate::dtype::Dtype;
use crate::error::{Error, Result, check_len, check_presence, product};
use crate::shape::RoutingShape;

impl<M: Memory, D: Dtype> MoeWeights<M, D> {
    /// Checks the configuration, and every tensor against it.
    pub(crate) fn check(&self, op: &'static str, config: &MoeConfig) -> Result<()> {
        config.check()?;
        let at = Checked { op };
        self.check_router(&at, config)?;
        self.check_experts(&at, config)?;
        let (hidden, inner) = (config.hidden, config.expert_hidden());

        at.require_presence("latent", self.latent.is_some(), config.latent.is_some())?;
        if let (Some(weights), Some(latent)) = (&self.latent, config.latent) {
            let matrix = at.product(inner, hidden)?;
            check_len(op, "latent.proj_in", M::len(&weights.proj_in), matrix)?;
            let norm = latent.norm.is_some();
            at.require_optional::<M, _>("latent.norm", &weights.norm, norm, inner)?;
            check_len(op, "latent.proj_out", M::len(&weights.proj_out), matrix)?;
        }
        at.require_presence("shared", self.shared.is_some(), config.shared.is_some())?;
        if let (Some(weights), Some(shared)) = (&self.shared, config.shared) {
            let matrix = at.product(shared.intermediate, hidden)?;
            let parts = if shared.gated { 2 } else { 1 };
            check_len(op, "shared.gate_up", M::len(&weights.gate_up), at.product(parts, matrix)?)?;
            let (bias, features) = (&weights.gate_up_bias, parts * shared.intermediate);
            at.require_optional::<M, _>(
                "shared.gate_up_bias",
                bias,
                shared.gate_up_bias,
                features,
            )?;
            check_len(op, "shared.down", M::len(&weights.down), matrix)?;
            let bias = &weights.down_bias;
            at.require_optional::<M, _>("shared.down_bias", bias, shared.down_bias, hidden)?;
            let gate = &weights.sigmoid_gate;
            at.require_optional::<M, _>("shared.sigmoid_gate", gate, shared.sigmoid_gate, hidden)?;
        }
        let norm = config.output_norm.is_some();
        at.require_optional::<M, _>("output_norm", &self.output_norm, norm, hidden)
    }

    fn check_router(&self, at: &Checked, config: &MoeConfig) -> Result<()> {
        let (hidden, experts, router) = (config.hidden, config.router_experts(), &self.router);
        if let Some(router_gate) = &router.router_gate {
            check_len(
                at.op,
                "router.router_gate",
                router_gate.len(),
                at.product(experts, hidden)?,
            )?;
        }
        at.require_presence("router.bias", router.bias.is_some(), config.projection.bias)?;
        if let Some(bias) = &router.bias {
            check_len(at.op, "router.bias", bias.len(), experts)?;
        }
        if let (Some(router_gate), Some(bias)) = (&router.router_gate, &router.bias)
            && router_gate.is_f32() != bias.is_f32()
        {
            return at.mismatch("`router.bias` and `router.router_gate` differ in type");
        }
        let norm = config.projection.norm.is_some();
        at.require_optional::<M, _>("router.norm", &router.norm, norm, hidden)?;
        at.require_presence(
            "router.noise_gate",
            router.noise_gate.is_some(),
            config.projection.noise_gate,
        )?;
        if let Some(noise_gate) = &router.noise_gate {
            check_len(at.op, "router.noise_gate", noise_gate.len(), at.product(experts, hidden)?)?;
        }
        let (bias, chosen) = (config.router.selects_with_bias(), experts - config.router.num_sinks);
        at.require_optional::<M, _>("router.selection_bias", &router.selection_bias, bias, chosen)?;
        let scale = config.router.expert_scale;
        at.require_optional::<M, _>("router.expert_scale", &router.expert_scale, scale, experts)?;
        match (&router.table, config.router.selection) {
            (Some(_), Selection::Score | Selection::Logit) => {
                at.require_presence("router.table", true, false)
            }
            (Some(table), Selection::Given) => {
                let rows = M::len(table) / config.top_k;
                check_len(at.op, "router.table", M::len(table), rows * config.top_k)
            }
            (None, _) => Ok(()),
        }
    }

    fn check_experts(&self, at: &Checked, config: &MoeConfig) -> Result<()> {
        let (op, inner, wanted) = (at.op, config.expert_hidden(), config.experts);
        let parts = if wanted.gated { 2 } else { 1 };
        let features = at.product(config.num_experts, config.intermediate)?;
        let half = at.product(features, inner)?;
        let ExpertWeights { gate_up, gate_up_bias, down, down_bias, output_bias, post_norm } =
            &self.experts;
        match (gate_up, wanted.gate_up) {
            (
                GateUpTensors::Fused(gate_up),
                GateUpLayout::Concatenated | GateUpLayout::Interleaved,
            ) => {
                check_len(op, "experts.gate_up", M::len(gate_up), at.product(parts, half)?)?;
            }
            (GateUpTensors::Separate { gate, up }, GateUpLayout::Separate) => {
                check_len(op, "experts.gate", M::len(gate), half)?;
                check_len(op, "experts.up", M::len(up), half)?;
            }
            (GateUpTensors::Fused(_), GateUpLayout::Separate) => {
                return at.mismatch(
                    "gate and up are separate in the configuration but fused in the weights",
                );
            }
            (GateUpTensors::Separate { .. }, _) => {
                return at.mismatch(
                    "gate and up are fused in the configuration but separate in the weights",
                );
            }
        }
        let (bias, features) = (wanted.gate_up_bias, at.product(parts, features)?);
        at.require_optional::<M, _>("experts.gate_up_bias", gate_up_bias, bias, features)?;
        check_len(op, "experts.down", M::len(down), half)?;
        let rows = at.product(config.num_experts, inner)?;
        at.require_optional::<M, _>("experts.down_bias", down_bias, wanted.down_bias, rows)?;
        let bias = wanted.output_bias;
        at.require_optional::<M, _>("experts.output_bias", output_bias, bias, config.hidden)?;
        at.require_optional::<M, _>(
            "experts.post_norm",
            post_norm,
            wanted.post_norm.is_some(),
            inner,
        )
    }
}

impl<M: Memory, D: Dtype> MoeInputs<M, D> {
    /// Checks the lengths of tokens and logits against the configuration. Returns the shape of the
    /// routing, whose number of tokens follows from the length of `x`.
    pub(crate) fn check(&self, op: &'static str, config: &MoeConfig) -> Result<RoutingShape> {
        let shape = shape_of(op, config, M::len(&self.x))?;
        if let Some(router_x) = &self.router_x {
            check_len(op, "router_x", M::len(router_x), M::len(&self.x))?;
        }
        if let Some(logits) = &self.logits {
            check_len(op, "logits", logits.len(), shape.logits())?;
        }
        if let Some(noise_logits) = &self.noise_logits {
            check_len(op, "noise_logits", noise_logits.len(), shape.logits())?;
            let f32_logits = self.logits.as_ref().map(Typed::is_f32);
            if noise_logits.is_f32() != f32_logits.unwrap_or(config.projection.f32_logits) {
                let why = "`noise_logits` and the logits differ in type".into();
                return Err(Error::Mismatch { op, why });
            }
        }
        Ok(shape)
    }
}

impl<M: Memory, D: Dtype> MoeInputs<M, D> {
    /// Checks every other tensor that the router reads, so that no operation fails on one after a
    /// launch.
    pub(crate) fn check_route<W: Memory>(
        &self,
        op: &'static str,
        config: &MoeConfig,
        weights: &MoeWeights<W, D>,
    ) -> Result<()> {
        let (shape, router) = (shape_of(op, config, M::len(&self.x))?, &weights.router);
        if self.logits.is_none() && router.router_gate.is_none() {
            return Err(no_router_gate(op));
        }
        let given_ids = self.given_ids.as_ref().map(|ids| M::len(ids));
        let lengths = RouteLengths {
            logits: shape.logits(),
            selection_bias: router.selection_bias.as_ref().map(|bias| W::len(bias)),
            expert_scale: router.expert_scale.as_ref().map(|scale| W::len(scale)),
            noise: self.noise.as_ref().map(|noise| M::len(noise)),
            noise_logits: self.noise_logits.as_ref().map(Typed::len),
            selection_noise: self.selection_noise.as_ref().map(|noise| M::len(noise)),
            midpoint_draws: self.midpoint_draws.as_ref().map(|draws| M::len(draws)),
            given_ids: given_ids.or(router.table.as_ref().map(|table| W::len(table))),
            token_ids: self.token_ids.as_ref().map(|ids| M::len(ids)),
            active: self.active.as_ref().map(|active| M::len(active)),
        };
        lengths.check(op, &shape, &config.router)?;
        if self.sequence_tokens == Some(0) {
            let (wanted, got) = ("1 or more".into(), "0".into());
            return Err(Error::Unsupported { op, argument: "sequence_tokens", wanted, got });
        }
        Ok(())
    }
}

/// The shape of a routing of the tokens `x` `[T, H]`, from their length.
pub(crate) fn shape_of(op: &'static str, config: &MoeConfig, x_len: usize) -> Result<RoutingShape> {
    let num_tokens = x_len / config.hidden.max(1);
    check_len(op, "x", x_len, num_tokens * config.hidden)?;
    let shape = config.routing(num_tokens);
    shape.check(op)?;
    Ok(shape)
}

/// The error of a pass without logits.
pub(crate) fn no_router_gate(op: &'static str) -> Error {
    Error::Mismatch { op, why: "neither `logits` nor `router.router_gate` is given".into() }
}

/// The error of noise logits without a noise gate.
pub(crate) fn no_noise_gate(op: &'static str) -> Error {
    Error::Mismatch { op, why: "`noise_logits` need `router.noise_gate`, which is missing".into() }
}

impl<M: Memory, D: Dtype> Typed<M, D> {
    /// The number of elements.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Element(tensor) => M::len(tensor),
            Self::F32(tensor) => M::len(tensor),
        }
    }

    pub(crate) fn is_f32(&self) -> bool {
        matches!(self, Self::F32(_))
    }

    /// The tensor, if it is in the layer's element type.
    pub(crate) fn element(&self) -> Option<&M::Of<D>> {
        match self {
            Self::Element(tensor) => Some(tensor),
            Self::F32(_) => None,
        }
    }

    /// The tensor, if it is in f32.
    pub(crate) fn f32(&self) -> Option<&M::Of<f32>> {
        match self {
            Self::F32(tensor) => Some(tensor),
            Self::Element(_) => None,
        }
    }
}

/// The checks of one operation, which their errors name.
struct Checked {
    op: &'static str,
}

impl Checked {
    fn product(&self, a: usize, b: usize) -> Result<usize> {
        product(self.op, "elements of the weights", a, b)
    }

    fn mismatch<T>(&self, why: impl Into<String>) -> Result<T> {
        Err(Error::Mismatch { op: self.op, why: why.into() })
    }

    fn require_presence(&self, name: &'static str, given: bool, enabled: bool) -> Result<()> {
        check_presence(self.op, name, given, enabled)
    }

    /// Requires a tensor of length `len` if the configuration enables it, else none.
    fn require_optional<M: Memory, T: 'static>(
        &self,
        name: &'static str,
        tensor: &Option<M::Of<T>>,
        enabled: bool,
        len: usize,
    ) -> Result<()> {
        self.require_presence(name, tensor.is_some(), enabled)?;
        tensor.as_ref().map_or(Ok(()), |tensor| check_len(self.op, name, M::len(tensor), len))
    }
}
