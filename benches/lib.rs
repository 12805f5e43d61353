//! Microbenchmarks of `moe-kernels`: named layers, random routings, the roofline below which no time can
//! be, and each operation as a [`Workload`] on the CPU reference or on a CUDA device.
//!
//! `main.rs` runs them under criterion, the program's `bench` for tables, files and pictures. A
//! module per operation says how it is called; `common/` has what they share.

mod capacity;
mod combine;
mod common;
mod expert_choice;
mod grouped_gemm;
mod jitter;
mod layer;
mod noise;
mod permute;
mod plan;
mod rms_norm;
mod route;
mod router_gemm;

pub use common::ceiling::{Ceilings, Dense};
pub use common::error::{Error, Result};
pub use common::model::{Model, TOKENS, models};
pub use common::roofline::{Bound, Roofline, Work, expected_distinct, work};
pub use common::routing::{Draw, Routing};
pub use common::stage::{Stage, Tensors, Workload, least_work};
pub use common::target::{Element, Gpu, Target};
pub use common::timing::{Repeater, Samples};
pub use common::values::normal;

/// What is measured. Each is forward; a backward pass will be an operation of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// From tokens to logits.
    RouterGemm,
    /// From logits to ids and weights.
    Route,
    /// Random numbers, one for each logit.
    Noise,
    /// Tokens times factors near 1.
    Jitter,
    /// From ids and weights to what experts have room for.
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

    /// As on the command line.
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

    /// From what to what: a time without it cannot be compared.
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
            Self::LayerFromX => "layer from x with the gate",
        }
    }

    /// Whether a distribution of tokens over experts can be asked of it: where the gate is inside, the
    /// routing follows from random tokens, and is uniform.
    pub fn has_routing(self, routing: Routing) -> bool {
        self != Self::LayerFromX || routing == Routing::Uniform
    }

    /// Whether it reads weights of the layer, which are then most of its bytes.
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
