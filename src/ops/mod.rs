//! The operations of a layer, one module each, in the order of a forward pass.
//!
//! Each has three forms: `X_fwd_into` writes into the caller's views, `X_fwd` allocates what it
//! returns, and the unsafe `X_fwd_raw` takes addresses, for engines that own their memory. All of
//! them only enqueue work on the given stream: none synchronises or reads the device, and the
//! `_into` and `_raw` forms do not allocate.
//!
//! Views carry their element offset, and may start anywhere; where bases and rows lie at 16-byte
//! boundaries, memory moves in 16-byte pieces.

pub mod capacity;
pub mod combine;
pub mod expert_choice;
pub mod grouped_gemm;
pub mod jitter;
pub mod noise;
pub mod permute;
pub mod plan;
pub mod rms_norm;
pub mod route;
pub mod router_gemm;
