//! The experts: their activation, biases and norms, and the memory layout of their weights.

use super::field::{Checked, finite, positive};
use crate::dtype::DType;
use crate::error::Result;

/// The function of the routed experts.
///
/// A gated expert computes `down(act(gate(x), up(x)))`, one without a gate `down(act(up(x)))`. The
/// projections may have biases.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct ExpertConfig {
    /// The activation between the projections.
    pub activation: Activation,
    /// The experts have a gate projection in addition to the up projection.
    pub gated: bool,
    /// The gate and up projections have biases: `[E, 2I]`, or `[E, I]` without a gate, in the order
    /// of the features of `gate_up`.
    pub gate_up_bias: bool,
    /// The down projection has a bias `[E, H]`, which the routing weight multiplies as well.
    pub down_bias: bool,
    /// The sum of the routed experts has a bias `[H]`, which no routing weight multiplies.
    pub output_bias: bool,
    /// The arrangement of gate and up in memory.
    pub gate_up: GateUpLayout,
    /// The contiguous dimension of the gate and up weights.
    pub gate_up_order: WeightOrder,
    /// The contiguous dimension of the down weights.
    pub down_order: WeightOrder,
    /// The tensor that the routing weight multiplies.
    pub weight_position: WeightPosition,
    /// An RMS norm of every expert's output, before the routing weight.
    pub post_norm: Option<RmsNorm>,
}

/// The activation `h = f(gate) * (up + up_offset)`, or `h = f(up)` for experts without a gate, in
/// f32.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Activation {
    /// The function `f`.
    pub function: ActivationFunction,
    /// The factor inside the sigmoid of SiLU, `g * sigmoid(alpha * g)`; must be 1 for other
    /// functions.
    pub alpha: f32,
    /// The bound on gate and up.
    pub limit: Limit,
    /// The offset added to up; must be 0 without a gate.
    pub up_offset: f32,
}

/// The function `f` of an activation.
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

/// A bound on gate `g` and up `u` of an activation with function `f`. For experts without a gate,
/// the bound of the gate applies to up.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum Limit {
    /// No bound.
    None,
    /// `f(min(g, limit)) * clamp(u, -limit, limit)`
    Before {
        /// A finite number above 0.
        limit: f32,
    },
    /// `min(f(g), limit) * clamp(u, -limit, limit)`
    After {
        /// A finite number above 0.
        limit: f32,
    },
    /// `cg * tanh(g / cg) * sigmoid(alpha * g)` with SiLU, and `cu * tanh(u / cu)` in place of `u`.
    SoftCap {
        /// `cg`, a finite number above 0.
        gate: f32,
        /// `cu`, a finite number above 0.
        up: f32,
    },
}

/// The arrangement of the rows (output features) of gate and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum GateUpLayout {
    /// One tensor of `2I` features: all features of gate, then all of up.
    Concatenated,
    /// One tensor of `2I` features: gate and up alternate.
    Interleaved,
    /// Two tensors of `I` features each.
    Separate,
}

/// The contiguous dimension of a weight tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum WeightOrder {
    /// Input features: `[E, out, in]`, as in `nn.Linear`.
    OutIn,
    /// Output features: `[E, in, out]`.
    InOut,
}

/// The tensor that the routing weight `w` multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum WeightPosition {
    /// The expert's output.
    Output,
    /// The expert's input: gate and up read `w * x` (Llama 4).
    Input,
    /// The input of the down projection: `down(w * h)`.
    Inside,
}

/// An RMS norm, `x / sqrt(mean(x^2) + epsilon) * (offset + weight)`. With `scale_first` it
/// normalises `x * (offset + weight)` instead.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RmsNorm {
    /// Added to the mean square; a finite number, at least 0.
    pub epsilon: f32,
    /// Added to every weight: 1 if a checkpoint stores weights around 0, else 0.
    pub offset: f32,
    /// The weights multiply the input of the norm instead of its result (Muse Spark's experts).
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
    /// Returns whether the down product multiplies rows of type `dtype` by their routing weights
    /// before it rounds them: an output in f16 may exceed the range of f16 before its weight is
    /// applied. With a norm of outputs the weights are applied later.
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
            at.require(
                "experts.gate_up",
                good,
                "concatenated for experts without a gate",
                "another",
            )?;
            let offset = self.activation.up_offset;
            at.require_number(
                "experts.activation.up_offset",
                offset,
                |offset| offset == 0.0,
                "0 for experts without a gate",
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
        at.require_number(
            "activation.alpha",
            self.alpha,
            good,
            "a finite number, and 1 except for SiLU",
        )?;
        at.require_number("activation.up_offset", self.up_offset, finite, "a finite number")?;
        let bound = |value| {
            at.require_number("activation.limit", value, positive, "a finite number above 0")
        };
        match self.limit {
            Limit::None => Ok(()),
            Limit::Before { limit } | Limit::After { limit } => bound(limit),
            Limit::SoftCap { gate, up } => {
                at.require(
                    "activation.limit",
                    silu,
                    "a soft-cap only with SiLU",
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
        at.require_number(argument, self.epsilon, good, "a finite epsilon of at least 0")?;
        at.require_number(argument, self.offset, finite, "a finite offset")
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
        for (enabled, name) in biases {
            if enabled {
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
            (GateUpLayout::Separate, _) => f.write_str(", gate and up separate")?,
        }
        match (self.gate_up_order, self.down_order) {
            (WeightOrder::OutIn, WeightOrder::OutIn) => Ok(()),
            (WeightOrder::InOut, WeightOrder::InOut) => f.write_str(", transposed"),
            (WeightOrder::InOut, WeightOrder::OutIn) => f.write_str(", gate_up transposed"),
            (WeightOrder::OutIn, WeightOrder::InOut) => f.write_str(", down transposed"),
        }
    }
}
