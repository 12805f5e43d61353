//! The device that counts memory traffic: first kernels whose counts are known by construction,
//! then the kernels of moe-kernels against what their shapes ask for.

#[path = "../it/common.rs"]
#[allow(dead_code, reason = "written for the tests of the plain device, which use all of it")]
mod common;
mod dense;
mod device;
mod exact;
mod hopper;
mod measure;
mod product;
