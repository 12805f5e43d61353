//! The device that counts memory traffic: first kernels with known exact counts, then the shipped
//! kernels of moe-kernels against the traffic that their shapes need.

#[path = "../it/common.rs"]
#[allow(dead_code, reason = "shared with the tests of the plain device, which use all of it")]
mod common;
mod dense;
mod device;
mod exact;
mod hopper;
mod measure;
mod shipped;
