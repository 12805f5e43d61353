//! Differential tests: every operation on a device against the CPU reference. They form one binary,
//! since a process has one driver.

#[cfg(feature = "bindgen")]
mod abi;
mod any_bits;
mod capacity;
mod capture;
mod combine;
mod common;
mod contexts;
mod device;
mod expert_choice;
mod grouped_gemm;
mod jitter;
mod large;
mod layer;
mod noise;
mod permute;
mod plan;
mod rms_norm;
mod route;
mod router_gemm;
mod tidy;
mod unmade_plan;
mod warm_up;
