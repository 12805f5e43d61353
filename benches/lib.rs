//! Microbenchmarks of `moe-kernels`: named layers, random routings, rooflines, and each operation
//! as a [`Workload`] on the CPU reference or on a CUDA device.
//!
//! `main.rs` runs the workloads under criterion; the program's `bench` writes tables, files and
//! plots. Each operation has a module that calls it; `common/` has what these modules share, and
//! `loaded_model.rs` chooses the module of an operation.

mod capacity;
mod combine;
mod common;
mod expert_choice;
mod grouped_gemm;
mod jitter;
mod layer;
mod loaded_model;
mod noise;
mod permute;
mod plan;
mod rms_norm;
mod route;
mod router_gemm;

pub use common::ceiling::{Ceilings, Dense};
pub use common::error::{Error, Result};
pub use common::model::{Model, TOKENS, models};
pub use common::op::Op;
pub use common::roofline::{Bound, Roofline, Work, expected_distinct, least_work, work};
pub use common::routing::{Draw, Routing};
pub use common::target::{Element, Gpu, Target};
pub use common::timing::{Repeater, Samples};
pub use common::values::normal;
pub use common::weights::Tensors;
pub use common::workload::Workload;
pub use loaded_model::LoadedModel;
