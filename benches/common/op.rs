//! The operations that are measured: their names, boundaries and inputs.

use crate::common::routing::Routing;

/// An operation or the whole layer, forward only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// From tokens to logits.
    RouterGemm,
    /// From logits to ids and weights.
    Route,
    /// A random number for each logit.
    Noise,
    /// Tokens times factors near 1.
    Jitter,
    /// From ids and weights to the slots that the experts' capacities admit.
    Capacity,
    /// From scores to each expert's tokens.
    ExpertChoice,
    /// From ids to maps.
    Plan,
    /// Rows in expert order.
    Permute,
    /// The first product, with the gather and SwiGLU.
    GateUp,
    /// The second product.
    Down,
    /// Both products.
    Experts,
    /// A norm of each row of the second product.
    RmsNorm,
    /// The weighted sum of a token's rows.
    Combine,
    /// The layer from its logits.
    Layer,
    /// The layer with its router projection.
    LayerFromX,
}

impl Op {
    /// All of them, in the order of a forward pass.
    pub const ALL: [Self; 15] = [
        Self::RouterGemm,
        Self::Route,
        Self::Noise,
        Self::Jitter,
        Self::Capacity,
        Self::ExpertChoice,
        Self::Plan,
        Self::Permute,
        Self::GateUp,
        Self::Down,
        Self::Experts,
        Self::RmsNorm,
        Self::Combine,
        Self::Layer,
        Self::LayerFromX,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::RouterGemm => "router_gemm",
            Self::Route => "route",
            Self::Noise => "noise",
            Self::Jitter => "jitter",
            Self::Capacity => "capacity",
            Self::ExpertChoice => "expert_choice",
            Self::Plan => "plan",
            Self::Permute => "permute",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Experts => "experts",
            Self::RmsNorm => "rms_norm",
            Self::Combine => "combine",
            Self::Layer => "layer",
            Self::LayerFromX => "layer_from_x",
        }
    }

    /// The inputs and outputs of the measured call. Only times of one boundary can be compared.
    pub fn boundary(self) -> &'static str {
        match self {
            Self::RouterGemm => "router projection alone",
            Self::Route => "router alone",
            Self::Noise => "noise alone",
            Self::Jitter => "jitter alone",
            Self::Capacity => "capacity from a plan",
            Self::ExpertChoice => "expert choice alone",
            Self::Plan => "plan alone",
            Self::Permute => "permute alone",
            Self::GateUp | Self::Down | Self::Experts => "GEMM alone",
            Self::RmsNorm => "norm alone",
            Self::Combine => "combine alone",
            Self::Layer => "layer from logits",
            Self::LayerFromX => "layer from x with the router",
        }
    }

    /// Returns whether the operation can be measured with `routing`. The router projection of
    /// [`Op::LayerFromX`] reads random tokens, so that its routing is always uniform.
    pub fn has_routing(self, routing: Routing) -> bool {
        self != Self::LayerFromX || routing == Routing::Uniform
    }

    /// Returns whether the operation reads weights of the layer. They are then most of its bytes.
    pub fn has_weights(self) -> bool {
        matches!(
            self,
            Self::RouterGemm
                | Self::GateUp
                | Self::Down
                | Self::Experts
                | Self::Layer
                | Self::LayerFromX
        )
    }
}
