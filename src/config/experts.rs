//! The experts: what each makes of a row, and how its weights lie in memory.

use super::field::{Checked, finite, positive};
use crate::dtype::DType;
use crate::error::Result;

/// What every routed expert computes.
///
/// Gated: `down(act(gate(x), up(x)))`; not gated: `down(act(up(x)))`, where the projections may have biases.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct ExpertConfig {
    /// What lies between the projections.
    pub activation: Activation,
    /// There is a gate projection beside the up projection.
    pub gated: bool,
    /// Gate and up have biases: `[E, 2I]`, or `[E, I]` without a gate, in the order of `gate_up`'s features.
    pub gate_up_bias: bool,
    /// Down has a bias `[E, H]`, which the routing weight multiplies as well.
    pub down_bias: bool,
    /// There is a bias `[H]` on the layer's routed output, which no weight multiplies.
    pub output_bias: bool,
    /// How gate and up lie beside each other.
    pub gate_up: GateUpLayout,
    /// Which dimension of the gate and up weights is contiguous.
    pub gate_up_order: WeightOrder,
    /// Which dimension of the down weights is contiguous.
    pub down_order: WeightOrder,
    /// What the routing weight multiplies.
    pub weight_position: WeightPosition,
    /// An RMS norm of every expert's output, before its weight.
    pub post_norm: Option<RmsNorm>,
}

/// `h = f(gate) * (up + up_offset)`, or `f(up)` for experts without a gate; all in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Activation {
    /// `f`
    pub function: ActivationFunction,
    /// The slope inside the sigmoid of SiLU, `g * sigmoid(alpha * g)`; 1 for the other functions.
    pub alpha: f32,
    /// Keeps gate and up in bounds.
    pub limit: Limit,
    /// Added to up.
    pub up_offset: f32,
}

/// The function of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum ActivationFunction {
    /// `g * sigmoid(alpha * g)`
    Silu,
    /// `g * (1 + erf(g / sqrt(2))) / 2`
    Gelu,
    /// `g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))) / 2`
    GeluTanh,
    /// `max(g, 0)`
    Relu,
    /// `max(g, 0)^2`
    ReluSquared,
}

/// What keeps gate `g` and up `u` in bounds. Without a gate, what is said of the gate holds for up.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum Limit {
    /// Nothing.
    None,
    /// `f(min(g, limit)) * clamp(u, -limit, limit)`
    Before {
        /// A number above 0.
        limit: f32,
    },
    /// `min(f(g), limit) * clamp(u, -limit, limit)`
    After {
        /// A number above 0.
        limit: f32,
    },
    /// `cg * tanh(g / cg) * sigmoid(alpha * g)` with SiLU, and `cu * tanh(u / cu)` in place of `u`.
    SoftCap {
        /// `cg`, a number above 0.
        gate: f32,
        /// `cu`, a number above 0.
        up: f32,
    },
}

/// How the rows (output features) of gate and up lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum GateUpLayout {
    /// One tensor of `2I` features: first all of gate, then all of up.
    Concatenated,
    /// One tensor of `2I` features: gate and up in turn.
    Interleaved,
    /// Two tensors of `I` features each.
    Separate,
}

/// Which dimension of a weight tensor is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum WeightOrder {
    /// Input features are: `[E, out, in]`, as `nn.Linear` has them.
    OutIn,
    /// Output features are: `[E, in, out]`.
    InOut,
}

/// What the routing weight `w` multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum WeightPosition {
    /// The expert's output.
    Output,
    /// The expert's input: gate and up see `w * x` (Llama 4).
    Input,
    /// What down reads: `down(w * h)`.
    Inside,
}

/// `x / sqrt(mean(x^2) + epsilon) * (offset + weight)`, or with `scale_first` the same norm of
/// `x * (offset + weight)`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RmsNorm {
    /// Added to the mean square; a number from 0 on.
    pub epsilon: f32,
    /// Added to every weight: 1 where a checkpoint stores weights around 0, else 0.
    pub offset: f32,
    /// Weights multiply what is normed, and not the result (Muse Spark's experts).
    #[cfg_attr(feature = "serde", serde(default))]
    pub scale_first: bool,
}

impl Default for ExpertConfig {
    /// SwiGLU without biases, `[E, 2I, H]` and `[E, H, I]`.
    fn default() -> Self {
        Self {
            activation: Activation::default(),
            gated: true,
            gate_up_bias: false,
            down_bias: false,
            output_bias: false,
            gate_up: GateUpLayout::Concatenated,
            gate_up_order: WeightOrder::OutIn,
            down_order: WeightOrder::OutIn,
            weight_position: WeightPosition::Output,
            post_norm: None,
        }
    }
}

impl Default for Activation {
    /// SiLU.
    fn default() -> Self {
        Self { function: ActivationFunction::Silu, alpha: 1.0, limit: Limit::None, up_offset: 0.0 }
    }
}

impl ExpertConfig {
    /// Whether the down product multiplies rows of that type by the routing's weights, before it rounds them: an
    /// output may leave the range of f16 until its weight brings it back. A norm of outputs comes before weights.
    pub(crate) fn weighs_rows(&self, dtype: DType) -> bool {
        dtype == DType::F16
            && self.weight_position == WeightPosition::Output
            && self.post_norm.is_none()
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        self.activation.check(op)?;
        let at = Checked { op };
        if !self.gated {
            let good = self.gate_up == GateUpLayout::Concatenated;
            at.require("experts.gate_up", good, "concatenated for experts without a gate", "another")?;
            let offset = self.activation.up_offset;
            at.require_number(
                "experts.activation.up_offset",
                offset,
                |offset| offset == 0.0,
                "0 without a gate",
            )?;
        }
        self.post_norm.map_or(Ok(()), |norm| norm.check(op, "experts.post_norm"))
    }
}

impl Activation {
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let at = Checked { op };
        let silu = self.function == ActivationFunction::Silu;
        let good = |alpha: f32| finite(alpha) && (silu || alpha == 1.0);
        at.require_number("activation.alpha", self.alpha, good, "a finite number, and 1 but for SiLU")?;
        at.require_number("activation.up_offset", self.up_offset, finite, "a finite number")?;
        let bound = |value| at.require_number("activation.limit", value, positive, "a finite number above 0");
        match self.limit {
            Limit::None => Ok(()),
            Limit::Before { limit } | Limit::After { limit } => bound(limit),
            Limit::SoftCap { gate, up } => {
                at.require(
                    "activation.limit",
                    silu,
                    "soft-caps beside SiLU alone",
                    "another function",
                )?;
                bound(gate)?;
                bound(up)
            }
        }
    }
}

impl RmsNorm {
    pub(crate) fn check(&self, op: &'static str, argument: &'static str) -> Result<()> {
        let at = Checked { op };
        let good = |value: f32| finite(value) && value >= 0.0;
        at.require_number(argument, self.epsilon, good, "an epsilon that is a finite number from 0 on")?;
        at.require_number(argument, self.offset, finite, "an offset that is a finite number")
    }
}

impl std::fmt::Display for Activation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.function {
            ActivationFunction::Silu => "SiLU",
            ActivationFunction::Gelu => "GELU",
            ActivationFunction::GeluTanh => "GELU (tanh)",
            ActivationFunction::Relu => "ReLU",
            ActivationFunction::ReluSquared => "squared ReLU",
        })?;
        if self.alpha != 1.0 {
            write!(f, ", alpha {}", self.alpha)?;
        }
        match self.limit {
            Limit::None => {}
            Limit::Before { limit } => write!(f, ", clamped at {limit}")?,
            Limit::After { limit } => write!(f, ", clamped at {limit} after")?,
            Limit::SoftCap { gate, up } => write!(f, ", soft-capped at {gate} and {up}")?,
        }
        if self.up_offset != 0.0 {
            write!(f, ", up + {}", self.up_offset)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for ExpertConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", if self.gated { "gated " } else { "" }, self.activation)?;
        let biases = [
            (self.gate_up_bias, "gate_up"),
            (self.down_bias, "down"),
            (self.output_bias, "output"),
        ];
        for (there, name) in biases {
            if there {
                write!(f, ", {name} bias")?;
            }
        }
        match self.weight_position {
            WeightPosition::Output => {}
            WeightPosition::Input => f.write_str(", weight on the input")?,
            WeightPosition::Inside => f.write_str(", weight inside")?,
        }
        if let Some(RmsNorm { scale_first, .. }) = self.post_norm {
            f.write_str(if scale_first {
                ", outputs scaled and normed"
            } else {
                ", outputs normed"
            })?;
        }
        match (self.gate_up, self.gated) {
            (GateUpLayout::Concatenated, _) | (_, false) => {}
            (GateUpLayout::Interleaved, _) => f.write_str(", interleaved")?,
            (GateUpLayout::Separate, _) => f.write_str(", gate and up apart")?,
        }
        match (self.gate_up_order, self.down_order) {
            (WeightOrder::OutIn, WeightOrder::OutIn) => Ok(()),
            (WeightOrder::InOut, WeightOrder::InOut) => f.write_str(", transposed"),
            (WeightOrder::InOut, WeightOrder::OutIn) => f.write_str(", gate_up transposed"),
            (WeightOrder::OutIn, WeightOrder::InOut) => f.write_str(", down transposed"),
        }
    }
}
