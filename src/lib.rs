//! CUDA kernels for Mixture-of-Experts layers, with a safe API over `cudarc`.
//!
//! A layer routes each of `T` tokens to `K` of `E` experts and sums their outputs, each times its
//! routing weight. `H` is the width of a token, `I` that of an expert, and `R = T * K` the number
//! of rows, of which each is one token at one expert:
//!
//! ```text
//! logits [T, E] -route-> expert_ids [T, K], routing_weights [T, K] -plan-> RoutingPlan
//! x [T, H] -grouped_gemm + activation (gate_up [E, 2I, H])-> act [R, I]
//!          -grouped_gemm (down [E, H, I])-> yp [R, H] -combine-> y [T, H]
//! ```
//!
//! - [`MoeLayer`] runs the whole layer in a [`Workspace`] that the caller owns.
//! - [`ops`] has each operation on its own.
//! - [`mod@reference`] computes the same on the CPU and is the specification of the kernels.
//!
//! The choice of experts is exact, with ties to the lower expert. Results are the same bits on
//! every execution: each output element has one writer and a fixed order of summation.
//!
//! ```no_run
//! use cudarc::driver::CudaContext;
//! use half::bf16;
//! use moe_kernels::{
//!     DType, Device, MoeConfig, MoeInputs, MoeLayer, MoeWeights, RouterConfig, Workspace,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let context = CudaContext::new(0)?;
//! let stream = context.new_stream()?;
//! let router = RouterConfig::softmax_top_k(true);
//! let config = MoeConfig { router, ..MoeConfig::new(4096, 14336, 8, 2) };
//! let layer = MoeLayer::new(&Device::new(&context)?, config)?;
//!
//! let tokens = 64;
//! let x = stream.alloc_zeros::<bf16>(tokens * 4096)?;
//! let logits = stream.alloc_zeros::<bf16>(tokens * 8)?;
//! let gate_up = stream.alloc_zeros::<bf16>(config.gate_up_len())?; // [E, 2I, H]
//! let down = stream.alloc_zeros::<bf16>(config.down_len())?; // [E, H, I]
//! let mut y = stream.alloc_zeros::<bf16>(tokens * 4096)?;
//!
//! let bytes = MoeLayer::workspace_bytes(&config, DType::BF16, tokens)?;
//! let mut workspace = Workspace::alloc(&stream, bytes)?;
//! let weights = MoeWeights::plain(gate_up.as_view(), down.as_view());
//! let inputs = MoeInputs::with_logits(x.as_view(), logits.as_view());
//! layer.forward(&stream, &inputs, &weights, &mut workspace, &mut y.as_view_mut())?;
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! - `serde`: `Serialize` and `Deserialize` for the configuration types.
//! - `cuda-12000` ... `cuda-13040`: one explicit version of the driver API, forwarded to cudarc.
//!   Without one, cudarc uses that of the `nvcc` on `PATH`, or else its newest. CUDA 12.0 is the
//!   oldest.
//! - `bindgen`: generates the argument structs in the build instead of using the committed copy.
//!
//! # Streams and capture
//!
//! Every call enqueues work on the given stream and returns. No call synchronises or reads device
//! memory from the host, and only the forms that return new buffers allocate. Kernel images load on
//! first use. [`Device::warm_up`] loads all images that a layer of an element type needs; call it
//! before a stream capture.

#[cfg(not(feature = "bindgen"))]
#[allow(dead_code, reason = "only kernels use some of the constants")]
#[rustfmt::skip]
mod abi;
#[cfg(feature = "bindgen")]
#[allow(dead_code, reason = "only kernels use some of the constants")]
mod abi {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}
mod buffer;
mod config;
mod device;
mod driver;
mod dtype;
mod error;
mod images;
mod kernels;
mod layer;
pub mod ops;
pub mod reference;
mod routing_plan;
mod shape;
mod tensors;
mod workspace;

pub use config::*;
pub use device::{Device, kernel_symbols};
pub use driver::{CUdeviceptr, CUstream};
pub use dtype::{DType, Dtype};
pub use error::{Error, Result};
pub use images::{KernelFile, kernel_files, kernel_toolkit};
pub use layer::{MoeLayer, OnDevice, OnDeviceMut, OwnedOnDevice, RoutingOutputs};
pub use routing_plan::{PlanLayout, RoutingPlan};
pub use shape::{MAX_EXPERTS, RoutingShape};
pub use tensors::{
    ExpertWeights, GateUpTensors, Host, LatentWeights, Memory, MoeInputs, MoeWeights, Owned,
    RouterWeights, SharedWeights, Typed,
};
pub use workspace::Workspace;
