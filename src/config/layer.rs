//! The layer: its dimensions, its router projection, and the parts around the routed experts.

use super::capacity::CapacityConfig;
use super::experts::{Activation, ExpertConfig, RmsNorm};
use super::field::Checked;
use super::router::{Normalization, RouterConfig, Scoring, Selection};
use crate::error::{Error, Result};
use crate::shape::{MAX_EXPERTS, RoutingShape};

/// The configuration of a layer: the router, `E` routed experts, and the optional parts around
/// them.
///
/// [`MoeConfig::new`] is the plain layer (softmax, top-k, SwiGLU experts); struct update syntax
/// changes other fields.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct MoeConfig {
    /// `H`, the width of a token.
    pub hidden: usize,
    /// `I`, the width of an expert.
    pub intermediate: usize,
    /// `E`, the number of experts with weights.
    pub num_experts: usize,
    /// `K`, experts per token.
    pub top_k: usize,
    /// The projection from tokens to logits.
    #[cfg_attr(feature = "serde", serde(default))]
    pub projection: RouterProjection,
    /// The router, from logits to expert ids and routing weights.
    #[cfg_attr(feature = "serde", serde(default))]
    pub router: RouterConfig,
    /// Experts without weights, which the router numbers after those with weights.
    #[cfg_attr(feature = "serde", serde(default))]
    pub zero_experts: Option<ZeroExperts>,
    /// A limit on the rows of each expert; `None` is dropless.
    #[cfg_attr(feature = "serde", serde(default))]
    pub capacity: Option<CapacityConfig>,
    /// The function and layout of the routed experts.
    #[cfg_attr(feature = "serde", serde(default))]
    pub experts: ExpertConfig,
    /// Projections into and out of a latent width, in which the routed experts compute.
    #[cfg_attr(feature = "serde", serde(default))]
    pub latent: Option<LatentConfig>,
    /// A shared expert, which processes every token.
    #[cfg_attr(feature = "serde", serde(default))]
    pub shared: Option<SharedConfig>,
    /// An RMS norm of the layer's output, including the part of the shared expert.
    #[cfg_attr(feature = "serde", serde(default))]
    pub output_norm: Option<RmsNorm>,
}

/// The projection of the router: `logits = x * router_gate^T`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RouterProjection {
    /// Logits are f32; otherwise they are rounded to the layer's element type, as by `nn.Linear`.
    pub f32_logits: bool,
    /// The logits have a bias `[E]`.
    pub bias: bool,
    /// An RMS norm of the tokens that the router reads.
    pub norm: Option<RmsNorm>,
    /// A matrix `[E, H]` scales the noise: the noise is multiplied by `softplus` of the product of
    /// the router's input with the matrix (noisy top-k). A pass without noise ignores it.
    pub noise_gate: bool,
}

/// Experts without weights. Their ids start at `num_experts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct ZeroExperts {
    /// The number of zero experts.
    pub count: usize,
    /// Their output.
    pub output: ZeroOutput,
}

/// The output of a zero expert for a token `x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum ZeroOutput {
    /// `x` (LongCat).
    Identity,
    /// 0: the slot adds nothing to the output (Zaya).
    Zero,
}

/// Routed experts of another width than `H`: tokens are projected to that width before the experts,
/// and the sum of the experts is projected back. The router and the shared expert read the tokens
/// themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct LatentConfig {
    /// `L`, the width that replaces `H` in the weights of the routed experts.
    pub hidden: usize,
    /// An RMS norm of the result of the first projection.
    #[cfg_attr(feature = "serde", serde(default))]
    pub norm: Option<RmsNorm>,
}

/// The shared expert: a dense FFN with gate and up concatenated in `[2I, H]` and down in `[H, I]`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct SharedConfig {
    /// Its width `I`.
    pub intermediate: usize,
    /// The activation between its projections.
    #[cfg_attr(feature = "serde", serde(default))]
    pub activation: Activation,
    /// It has a gate projection in addition to the up projection.
    pub gated: bool,
    /// Its gate and up projections have biases `[2I]`, or `[I]` without a gate.
    #[cfg_attr(feature = "serde", serde(default))]
    pub gate_up_bias: bool,
    /// Its down projection has a bias `[H]`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub down_bias: bool,
    /// Its output is multiplied by `sigmoid(dot(x, w))`, with a weight vector `w` `[H]`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub sigmoid_gate: bool,
    /// The layer's output is the mean of the routed and the shared output instead of their sum.
    #[cfg_attr(feature = "serde", serde(default))]
    pub average: bool,
}

impl SharedConfig {
    /// A SwiGLU expert of width `intermediate`, without biases, whose output is added unscaled.
    pub fn new(intermediate: usize) -> Self {
        Self {
            intermediate,
            activation: Activation::default(),
            gated: true,
            gate_up_bias: false,
            down_bias: false,
            sigmoid_gate: false,
            average: false,
        }
    }

    /// The shared expert as the configuration of routed experts, of which there is one.
    pub(crate) fn experts(&self) -> ExpertConfig {
        let Self { activation, gated, gate_up_bias, down_bias, .. } = *self;
        ExpertConfig { activation, gated, gate_up_bias, down_bias, ..ExpertConfig::default() }
    }
}

impl MoeConfig {
    /// The plain layer: the softmax of all logits, whose `K` largest values are the routing
    /// weights, and SwiGLU experts with weights `[E, 2I, H]` and `[E, H, I]`.
    pub fn new(hidden: usize, intermediate: usize, num_experts: usize, top_k: usize) -> Self {
        Self {
            hidden,
            intermediate,
            num_experts,
            top_k,
            projection: RouterProjection::default(),
            router: RouterConfig::default(),
            zero_experts: None,
            capacity: None,
            experts: ExpertConfig::default(),
            latent: None,
            shared: None,
            output_norm: None,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Unsupported`], which names the field.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "MoeConfig";
        let width = |argument, value: usize| {
            if (1..=MAX_WIDTH).contains(&value) {
                return Ok(());
            }
            let wanted = format!("1 to {MAX_WIDTH}");
            Err(Error::Unsupported { op: OP, argument, wanted, got: value.to_string() })
        };
        width("hidden", self.hidden)?;
        width("intermediate", self.intermediate)?;
        if let Some(latent) = self.latent {
            width("latent.hidden", latent.hidden)?;
            latent.norm.map_or(Ok(()), |norm| norm.check(OP, "latent.norm"))?;
        }
        if let Some(shared) = self.shared {
            width("shared.intermediate", shared.intermediate)?;
            shared.activation.check(OP)?;
        }
        let at = Checked { op: OP };
        if let Some(zero) = self.zero_experts {
            let good = (1..=MAX_EXPERTS).contains(&zero.count);
            at.require("zero_experts.count", good, &format!("1 to {MAX_EXPERTS}"), zero.count)?;
            let good = self.router.num_sinks == 0;
            at.require("zero_experts", good, "no zero experts with sinks", zero.count)?;
            let widths = zero.output == ZeroOutput::Zero || self.latent.is_none();
            at.require("zero_experts.output", widths, "zero with a latent width", "identity")?;
            let limit = self.capacity.is_some();
            at.require(
                "capacity",
                !limit,
                "none with zero experts, which have no rows",
                "a limit",
            )?;
        }
        self.routing(0).check(OP)?;
        self.router.check(OP, self.router_experts(), self.top_k)?;
        self.experts.check(OP)?;
        let norms = [(self.projection.norm, "projection.norm"), (self.output_norm, "output_norm")];
        for (norm, name) in norms {
            norm.map_or(Ok(()), |norm| norm.check(OP, name))?;
        }
        if self.capacity.is_some_and(|capacity| capacity.overflow > 0) {
            self.check_overflow(OP)?;
        }
        self.capacity.map_or(Ok(()), |capacity| capacity.check(OP))
    }

    /// Checks the router of a layer with overflow: its weights must not depend on the selection.
    fn check_overflow(&self, op: &'static str) -> Result<()> {
        let RouterConfig { scoring, selection, normalization, num_sinks, .. } = self.router;
        let at = Checked { op };
        let of_all = !matches!(scoring, Scoring::SoftmaxSelected | Scoring::Sparsemixer { .. });
        let wanted = "scores that do not depend on the selection, with overflow";
        at.require("router.scoring", of_all, wanted, format!("{scoring:?}"))?;
        let wanted = "a selection by value, with overflow";
        at.require("router.selection", selection != Selection::Given, wanted, "given")?;
        let wanted = "none with overflow; `capacity.normalization` normalises the kept weights";
        let none = normalization == Normalization::None;
        at.require("router.normalization", none, wanted, format!("{normalization:?}"))?;
        at.require("router.num_sinks", num_sinks == 0, "0 with overflow", num_sinks)
    }

    /// The number of candidates of a token: the experts of the largest values, including its own
    /// choices, to which overflow may assign its slots; 0 without overflow.
    pub(crate) fn candidates(&self) -> usize {
        match self.capacity.map_or(0, |capacity| capacity.overflow) {
            0 => 0,
            rounds => rounds.saturating_add(1).saturating_mul(self.top_k).min(self.num_experts),
        }
    }

    /// The router whose weights capacity reads: without scales if the kept weights are normalised,
    /// since scales apply after the normalisation.
    pub(crate) fn router_before_capacity(&self) -> RouterConfig {
        match self.capacity.map(|capacity| capacity.normalization) {
            None | Some(Normalization::None) => self.router,
            Some(_) => self.router.unscaled(),
        }
    }

    /// The number of experts that the router selects from: those with weights and the zero experts.
    pub fn router_experts(&self) -> usize {
        self.num_experts.saturating_add(self.zero_experts.map_or(0, |zero| zero.count))
    }

    /// The shape of a routing of `num_tokens` tokens, as the router sees it.
    pub fn routing(&self, num_tokens: usize) -> RoutingShape {
        RoutingShape { num_tokens, num_experts: self.router_experts(), top_k: self.top_k }
    }

    /// The width of the input and output of the routed experts: the latent width, or else `H`.
    pub fn expert_hidden(&self) -> usize {
        self.latent.map_or(self.hidden, |latent| latent.hidden)
    }

    /// The number of elements of `gate_up` `[E, 2I, H]`, or `[E, I, H]` without a gate; of both
    /// tensors if gate and up are separate.
    pub fn gate_up_len(&self) -> usize {
        let parts = if self.experts.gated { 2usize } else { 1 };
        parts.saturating_mul(self.down_len())
    }

    /// The number of elements of `down` `[E, H, I]`.
    pub fn down_len(&self) -> usize {
        self.num_experts.saturating_mul(self.expert_hidden()).saturating_mul(self.intermediate)
    }
}

/// The largest width: twice a width plus a tile must fit an `i32`.
const MAX_WIDTH: usize = 1 << 24;

impl std::fmt::Display for MoeConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { hidden, intermediate, num_experts, top_k, .. } = self;
        write!(f, "H{hidden} I{intermediate} E{num_experts} K{top_k}, ")?;
        if self.projection.norm.is_some() {
            f.write_str("normed tokens, ")?;
        }
        match (self.projection.f32_logits, self.projection.bias) {
            (false, false) => {}
            (true, false) => f.write_str("f32 logits, ")?,
            (false, true) => f.write_str("logits + bias, ")?,
            (true, true) => f.write_str("f32 logits + bias, ")?,
        }
        if self.projection.noise_gate {
            f.write_str("gated noise, ")?;
        }
        write!(f, "{}", self.router)?;
        if let Some(ZeroExperts { count, output }) = self.zero_experts {
            let output = if output == ZeroOutput::Identity { "identity" } else { "skip" };
            write!(f, "; {count} {output} experts")?;
        }
        if let Some(capacity) = self.capacity {
            write!(f, "; {capacity}")?;
        }
        if self.experts != ExpertConfig::default() {
            write!(f, "; {}", self.experts)?;
        }
        if let Some(latent) = self.latent {
            let norm = if latent.norm.is_some() { ", normed" } else { "" };
            write!(f, "; latent {}{norm}", latent.hidden)?;
        }
        if let Some(shared) = self.shared {
            let SharedConfig { intermediate, activation, gated, .. } = shared;
            write!(
                f,
                "; shared I{intermediate} {}{activation}",
                if gated { "gated " } else { "" }
            )?;
            if shared.gate_up_bias {
                f.write_str(", gate_up bias")?;
            }
            if shared.down_bias {
                f.write_str(", down bias")?;
            }
            if shared.sigmoid_gate {
                f.write_str(", sigmoid-gated")?;
            }
            if shared.average {
                f.write_str(", averaged")?;
            }
        }
        if self.output_norm.is_some() {
            f.write_str("; output normed")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        ActivationFunction, CapacityLimit, GateUpLayout, GroupScore, Groups, Limit, Masked,
        Priority,
    };

    #[test]
    fn display_is_one_line() {
        let plain = MoeConfig::new(64, 48, 8, 2);
        assert_eq!(plain.to_string(), "H64 I48 E8 K2, softmax, top-k");
        let router = RouterConfig::softmax_top_k(true);
        let line = MoeConfig { router, ..plain }.to_string();
        assert_eq!(line, "H64 I48 E8 K2, softmax, top-k, renormalised");
        let router = RouterConfig::top_k_softmax();
        assert_eq!(MoeConfig { router, ..plain }.to_string(), "H64 I48 E8 K2, top-k, softmax");
        let deepseek = RouterConfig::deepseek_v3(4, 2, 2.5);
        let shared = SharedConfig::new(96);
        let scoring = Scoring::Sparsemixer { jitter: 0.01, training: true };
        let sampled = RouterConfig { scoring, ..RouterConfig::default() };
        let line = MoeConfig { router: sampled, ..plain }.to_string();
        assert_eq!(line, "H64 I48 E8 K2, sparsemixer of training, top-k");
        let config = MoeConfig { router: deepseek, shared: Some(shared), ..plain };
        config.check().unwrap();
        assert_eq!(
            config.to_string(),
            "H64 I48 E8 K2, sigmoid + bias, 2 of 4 groups by top-2 sum, top-k, renormalised + 1e-20, * 2.5; \
             shared I96 gated SiLU"
        );
        let biased = SharedConfig { gate_up_bias: true, down_bias: true, ..shared };
        let config = MoeConfig { shared: Some(biased), ..plain };
        assert_eq!(
            config.to_string(),
            "H64 I48 E8 K2, softmax, top-k; shared I96 gated SiLU, gate_up bias, down bias"
        );
    }

    /// The error of each invalid field names the field.
    #[test]
    fn errors_name_the_field() {
        let plain = MoeConfig::new(64, 48, 8, 2);
        let router = plain.router;
        let experts = plain.experts;
        let groups =
            Groups { num_groups: 4, top_groups: 2, score: GroupScore::Max, masked: Masked::Zero };
        let with = |router| MoeConfig { router, ..plain };
        let acts =
            |activation| MoeConfig { experts: ExpertConfig { activation, ..experts }, ..plain };
        let act = Activation::default();
        let bad: Vec<(MoeConfig, &str)> = vec![
            (MoeConfig { hidden: 0, ..plain }, "`hidden`"),
            (MoeConfig { intermediate: 0, ..plain }, "`intermediate`"),
            (MoeConfig { top_k: 9, ..plain }, "`top_k`"),
            (MoeConfig { num_experts: 0, ..plain }, "`num_experts`"),
            (
                MoeConfig { latent: Some(LatentConfig { hidden: 0, norm: None }), ..plain },
                "`latent.hidden`",
            ),
            (with(RouterConfig { noise_deviation: 0.0, ..router }), "`router.noise_deviation`"),
            (with(RouterConfig { logit_multiplier: 0.0, ..router }), "`router.logit_multiplier`"),
            (with(RouterConfig { logit_softcap: Some(-1.0), ..router }), "`router.logit_softcap`"),
            (with(RouterConfig { scale: f32::NAN, ..router }), "`router.scale`"),
            (with(RouterConfig { num_sinks: 2, ..router }), "`router.num_sinks`"),
            (
                with(RouterConfig { groups: Some(Groups { num_groups: 3, ..groups }), ..router }),
                "`router.groups.num_groups`",
            ),
            (
                with(RouterConfig { groups: Some(Groups { top_groups: 5, ..groups }), ..router }),
                "`router.groups.top_groups`",
            ),
            (
                with(RouterConfig { normalization: Normalization::PNorm { p: 0.5 }, ..router }),
                "`router.normalization.p`",
            ),
            (
                with(RouterConfig {
                    scoring: Scoring::Sparsemixer { jitter: 0.01, training: false },
                    selection_bias: true,
                    ..router
                }),
                "`router.scoring`",
            ),
            (
                with(RouterConfig {
                    scoring: Scoring::SoftmaxSelected,
                    selection_bias: true,
                    ..router
                }),
                "`router.scoring`",
            ),
            (acts(Activation { limit: Limit::Before { limit: 0.0 }, ..act }), "`activation.limit`"),
            (
                acts(Activation { function: ActivationFunction::Relu, alpha: 2.0, ..act }),
                "`activation.alpha`",
            ),
            (
                MoeConfig {
                    output_norm: Some(RmsNorm { epsilon: -1.0, offset: 0.0, scale_first: false }),
                    ..plain
                },
                "`output_norm`",
            ),
            (
                MoeConfig {
                    experts: ExpertConfig {
                        gated: false,
                        gate_up: GateUpLayout::Separate,
                        ..experts
                    },
                    ..plain
                },
                "`experts.gate_up`",
            ),
        ];
        let limit = CapacityLimit::Rows { rows: 3 };
        let capacity = CapacityConfig::new(limit, Priority::Token);
        let again = |router| {
            let capacity = Some(CapacityConfig { overflow: 1, ..capacity });
            MoeConfig { capacity, router, ..plain }
        };
        again(router).check().unwrap();
        let p_norm = Normalization::PNorm { p: 2.0 };
        let zero = ZeroExperts { count: 1, output: ZeroOutput::Zero };
        let of_capacity: Vec<(MoeConfig, &str)> = vec![
            (again(RouterConfig::softmax_top_k(true)), "`router.normalization`"),
            (again(RouterConfig::top_k_softmax()), "`router.scoring`"),
            (again(RouterConfig { selection: Selection::Given, ..router }), "`router.selection`"),
            (again(RouterConfig { num_sinks: 1, ..router }), "`router.num_sinks`"),
            (
                MoeConfig {
                    capacity: Some(CapacityConfig { normalization: p_norm, ..capacity }),
                    ..plain
                },
                "`capacity.normalization`",
            ),
            (
                MoeConfig { capacity: Some(capacity), zero_experts: Some(zero), ..plain },
                "`capacity`",
            ),
        ];
        for (config, field) in bad.into_iter().chain(of_capacity) {
            let message = config.check().unwrap_err().to_string();
            assert!(message.contains(field), "{message} does not name {field}");
        }
    }
}
