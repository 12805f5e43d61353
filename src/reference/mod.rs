//! The CPU reference: every operation in plain Rust.
//!
//! Each function is generic over [`Accum`], the type it computes in: `f64` for the specification
//! that tests compare with, `f32` for a faster CPU path. Kernels are optimisations of these
//! functions, and [`bound`] has the largest allowed difference between their results.
//!
//! Inputs are slices and results are vectors; shapes and names are those of the device operations.
//! A wrong length is an [`Error`](crate::Error), never a panic.

mod accum;
mod activation;
pub mod bound;
mod capacity;
mod combine;
mod expert_choice;
mod expert_weights;
mod grouped_gemm;
mod jitter;
mod layer;
mod matmul;
mod noise;
mod parallel;
mod permute;
mod plan;
mod rms_norm;
mod route;
mod router_gemm;
#[cfg(test)]
mod sample;

pub use accum::{Accum, Element};
pub use activation::activate;
pub use capacity::{
    Capacity, capacity_fwd, capacity_later_fwd, capacity_normalize_fwd, capacity_reassign_fwd,
};
pub use combine::{CombineInputs, Identity, Shared, combine_fwd};
pub use expert_choice::expert_choice_fwd;
pub use expert_weights::{GateUpTensors, GateUpWeights, LinearWeights};
pub use grouped_gemm::{grouped_gemm_fwd, grouped_gemm_gate_up_fwd, grouped_gemm_weighted_fwd};
pub use jitter::jitter_fwd;
pub use layer::{
    LayerRouting, moe_layer_experts_fwd, moe_layer_fwd, moe_layer_route_fwd, noise_logits, round,
    router_logits, router_scores,
};
pub use noise::{noise_fwd, philox};
pub use permute::permute_fwd;
pub use plan::{Plan, Tile, plan_fwd, plan_range_fwd};
pub use rms_norm::{RmsNormInputs, rms_norm_fwd};
pub use route::{RouteInputs, Routing, route_fwd, route_scores_fwd};
pub use router_gemm::{RouterGemmInputs, router_gemm_fwd};
