//! CUDA kernels for Mixture-of-Experts layers, with a safe API over `cudarc`.
//!
//! A layer sends each of `T` tokens to `K` of `E` experts and adds up what they make of it:
//!
//! ```text
//! logits [T, E] -route-> expert_ids [T, K], weights [T, K] -plan-> RoutingPlan
//! x [T, H] -grouped_gemm + activation (gate_up [E, 2I, H])-> act [R, I]
//!          -grouped_gemm (down [E, H, I])-> yp [R, H] -combine-> y [T, H]
//! ```
//!
//! [`MoeLayer`] runs all of it in a [`Workspace`] of the caller's; [`ops`] has the operations one by
//! one; [`mod@reference`] computes the same on the CPU and is their specification. Experts are chosen
//! exactly, ties to the lower expert, and results are the same bits from run to run: every output
//! element has one owner and a fixed order of summation.
//!
//! ```no_run
//! use cudarc::driver::CudaContext;
//! use half::bf16;
//! use moe_kernels::{DType, Device, MoeConfig, MoeInputs, MoeLayer, MoeWeights, RouterConfig, RouterStep, Workspace};
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
//! - `hf`: [`MoeConfig::from_hf`] and the names of the tensors, for every family of Hugging Face's transformers
//!   whose block is a routed FFN.
//! - `cuda-12000` ... `cuda-13040`: one explicit version of the driver API, handed on to cudarc. Without
//!   one, cudarc takes that of the `nvcc` on `PATH`, or its newest. CUDA 12.0 is the oldest.
//! - `bindgen`: generates the argument structs afresh in the build, instead of the committed copy.
//!
//! # Streams and capture
//!
//! Every call enqueues on the given stream and returns. Nothing synchronises, reads the device, or
//! (but for the forms that return new buffers) allocates. Images load on first use;
//! [`Device::warm_up`] loads all that a layer of an element type needs, before a stream capture for example.

#[cfg(not(feature = "bindgen"))]
#[allow(dead_code, reason = "some constants are for the kernels alone")]
#[rustfmt::skip]
mod abi;
#[cfg(feature = "bindgen")]
#[allow(dead_code, reason = "some constants are for the kernels alone")]
mod abi {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));
}
mod buffer;
mod config;
mod device;
mod dtype;
mod error;
pub mod format;
#[cfg(feature = "hf")]
pub mod hf;
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
pub use device::{
    CUdeviceptr, CUstream, Device, KernelFile, kernel_files, kernel_symbols, kernel_toolkit,
};
pub use dtype::{DType, Dtype};
pub use error::{Error, Result};
pub use layer::{MoeLayer, OnDevice, OnDeviceMut, OwnedOnDevice, RoutingOutputs};
pub use routing_plan::{PlanLayout, RoutingPlan};
pub use shape::{MAX_EXPERTS, RoutingShape};
pub use tensors::{
    ExpertWeights, GateUpTensors, Host, LatentWeights, Memory, MoeInputs, MoeWeights, Owned,
    RouterWeights, SharedWeights, Typed,
};
pub use workspace::Workspace;
