//! Tensors of more than 2^31 elements: every address is 64-bit.

use half::{bf16, f16};
use moe_kernels::ops::grouped_gemm::{Rows, grouped_gemm_fwd_into};
use moe_kernels::ops::{combine, permute, plan};
use moe_kernels::reference::{self, bound};
use moe_kernels::{DType, RoutingShape};

use crate::common::{assert_within, gpu, values};

const LIMIT: usize = 1 << 31;

/// Bytes that the host has free, on Linux; without a limit elsewhere.
fn free_memory() -> usize {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.map_or(usize::MAX, |kib| kib << 10)
}

/// 4.3 GB of rows: one token goes to 33 experts, and comes back as the sum of 33 equal rows.
#[test]
fn rows_past_2_31_elements() {
    let gpu = gpu();
    // Below 8 GiB of free memory the same on rows of 2^22: then this is not the test it is named after.
    let hidden = if free_memory() > 8 << 30 { 1 << 26 } else { 1 << 22 };
    let shape = RoutingShape::new(1, 33, 33).unwrap();
    let limit = 32 * hidden;
    println!("{} elements, the limit is at {limit}", shape.slots() * hidden);
    let (device, stream) = (&gpu.device, &gpu.stream);
    // The pattern repeats at no power of two, so an address that wraps around reads something else.
    let x: Vec<bf16> = (0..hidden).map(|h| bf16::from_f64((h % 251) as f64)).collect();
    let ids: Vec<u32> = (0..33).collect();
    let (x_device, ids) = (gpu.upload(&x), gpu.upload(&ids));
    let plan = plan::plan_fwd(device, stream, shape, &ids.view()).unwrap();

    let xp = permute::permute_fwd(device, stream, &plan, hidden, &x_device.view()).unwrap();
    let end = xp.len();
    let tail = 4096;
    assert!(gpu.download(&xp.slice(end - tail..)) == x[hidden - tail..], "the end of xp");
    let across = limit - tail / 2;
    let want: Vec<bf16> = (across..across + tail).map(|at| x[at % hidden]).collect();
    assert!(gpu.download(&xp.slice(across..across + tail)) == want, "xp around the limit");

    // Only the last row, which lies past element 2^31, counts: 2 times x.
    let mut weights = vec![0f32; 33];
    weights[32] = 2.0;
    let weights = gpu.upload(&weights);
    let mut y = gpu.poisoned::<bf16>(hidden);
    combine::combine_fwd_into(
        device,
        stream,
        &plan,
        hidden,
        &xp.as_view(),
        &weights.view(),
        &mut y.view_mut(),
    )
    .unwrap();
    let y = gpu.download(&y.view());
    let wrong = y.iter().zip(&x).position(|(y, x)| y.to_f32() != 2.0 * x.to_f32());
    assert_eq!(wrong, None, "y is twice x");
}

/// Weights of 4096 experts, of which the last one alone has been written and is read.
#[test]
fn weights_past_2_31_elements() {
    let gpu = gpu();
    let (experts, n, k) = (4096, 728, 728);
    assert!((experts - 1) * n * k > LIMIT);
    let shape = RoutingShape::new(3, experts, 1).unwrap();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let ids = gpu.upload(&[4095u32; 3]);
    let plan = plan::plan_fwd(device, stream, shape, &ids.view()).unwrap();
    let x: Vec<f16> = values::<f16>(3 * k, 1.0, 1);
    let last: Vec<f16> = values::<f16>(n * k, 1.0, 2);
    // SAFETY: the product reads the weights of experts with rows, and those are written below.
    let mut w = unsafe { stream.alloc::<f16>(experts * n * k) }.unwrap();
    stream.memcpy_htod(&last, &mut w.slice_mut((experts - 1) * n * k..)).unwrap();
    let mut y = gpu.poisoned::<f16>(3 * n);
    let x_device = gpu.upload(&x);
    grouped_gemm_fwd_into(
        device,
        stream,
        &plan,
        n,
        k,
        Rows::Grouped,
        &x_device.view(),
        &w.as_view(),
        &mut y.view_mut(),
    )
    .unwrap();
    // To the reference these are the weights of a layer with one expert.
    let one = reference::plan_fwd(&RoutingShape::new(3, 1, 1).unwrap(), 128, &[0; 3]).unwrap();
    let want = bound::grouped_gemm(&one, n, k, &x, &last, false, DType::F16).unwrap();
    assert_within(&gpu.download(&y.view()), &want, "the last expert");
}
