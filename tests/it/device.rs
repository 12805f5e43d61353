//! The device: images, argument sizes, and errors that do not belong to one operation.

use moe_kernels::{DType, kernel_files, kernel_symbols};

use crate::common::gpu;

#[test]
fn warm_up_loads_every_kernel() {
    let gpu = gpu();
    for dtype in DType::ALL {
        gpu.device.warm_up(dtype).unwrap();
    }
}

#[test]
fn every_kernel_file_is_in_the_binary() {
    let names: Vec<_> = kernel_files().map(|file| file.name).collect();
    assert_eq!(names, ["combine", "grouped_gemm", "permute", "plan", "route"]);
}

/// The software device knows every kernel of the table, and no other of ours.
#[test]
fn the_kernel_table_is_complete() {
    let mut ours: Vec<String> = kernel_symbols().collect();
    ours.sort();
    let mut exported: Vec<String> = moe_emulator::kernels()
        .into_iter()
        .map(|kernel| kernel.symbol)
        .filter(|s| s.starts_with("moe_"))
        .collect();
    exported.sort();
    assert_eq!(ours, exported);
}
