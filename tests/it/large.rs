//! Tensors of more than 2^31 elements: every address is 64-bit.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{DevicePtr, DevicePtrMut};
use half::{bf16, f16};
use moe_kernels::ops::combine::{CombineBuffers, CombineInputs, CombineOptions, combine_fwd_raw};
use moe_kernels::ops::grouped_gemm::{
    GroupedGemmBuffers, LinearWeights, Rows, grouped_gemm_fwd_into, grouped_gemm_fwd_raw,
};
use moe_kernels::ops::permute::{PermuteBuffers, permute_fwd_raw};
use moe_kernels::ops::{combine, permute, plan};
use moe_kernels::reference::{self, bound};
use moe_kernels::{DType, RoutingShape, WeightOrder};

use crate::common::{assert_within, bits, gpu, values};

const LIMIT: usize = 1 << 31;

/// One of these tests at a time: together they ask for more memory than a small device has.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    let _alone = alone();
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
        &CombineInputs::new(&xp.as_view(), &weights.view()),
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
    let _alone = alone();
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
        LinearWeights::new(&w.as_view()),
        &mut y.view_mut(),
    )
    .unwrap();
    // To the reference these are the weights of a layer with one expert.
    let one = reference::plan_fwd(&RoutingShape::new(3, 1, 1).unwrap(), &[0; 3]).unwrap();
    let want = bound::grouped_gemm(
        &one,
        n,
        k,
        &x,
        reference::LinearWeights::new(&last),
        false,
        DType::F16,
    )
    .unwrap();
    assert_within(&gpu.download(&y.view()), &want, "the last expert");
}

/// Rows of odd width go element by element. Maps of the test's own have but one active slot, so that
/// this is quick; its row is the last one but one, and the last one has no owner.
#[test]
fn unaligned_rows_past_2_31_elements() {
    let _alone = alone();
    let gpu = gpu();
    let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
    let (shape, hidden) = (RoutingShape::new(128, 4096, 4096).unwrap(), 4099);
    let (slots, active) = (shape.slots(), 127 * 4096 + 5);
    let mut rows = vec![-1i32; slots];
    rows[active] = slots as i32 - 2;
    let mut offsets = vec![0i32; 4097];
    offsets[4096] = slots as i32 - 1;
    let (rows, offsets) = (gpu.upload(&rows), gpu.upload(&offsets));
    let x = gpu.upload(&values::<f16>(128 * hidden, 1.0, 3));
    let weights = gpu.upload(&vec![2f32; slots]);
    let mut y = gpu.poisoned::<f16>(128 * hidden);
    assert!((slots - 2) * hidden > LIMIT);
    // SAFETY: the rows that are read are written by permute.
    let mut xp = unsafe { gpu.stream.alloc::<f16>(slots * hidden) }.unwrap();
    {
        let (x, rows, offsets, weights) = (x.view(), rows.view(), offsets.view(), weights.view());
        let mut y = y.view_mut();
        let (x, _x) = x.device_ptr(&gpu.stream);
        let (row_of_slot, _rows) = rows.device_ptr(&gpu.stream);
        let (expert_offsets, _offsets) = offsets.device_ptr(&gpu.stream);
        let (weights, _weights) = weights.device_ptr(&gpu.stream);
        let (xp, _xp) = xp.device_ptr_mut(&gpu.stream);
        let (y, _y) = y.device_ptr_mut(&gpu.stream);
        let permuted = PermuteBuffers { xp, x, row_of_slot, expert_offsets };
        let combined =
            CombineBuffers { y, yp: xp, weights, row_of_slot, ..CombineBuffers::default() };
        let options = CombineOptions::default();
        // SAFETY: the buffers are as long as the shape says, and live on.
        unsafe {
            permute_fwd_raw(device, stream, DType::F16, shape, hidden, permuted).unwrap();
            combine_fwd_raw(device, stream, DType::F16, shape, hidden, &options, combined).unwrap();
        }
    }
    let x = gpu.download(&x.view().slice(127 * hidden..));
    let end = gpu.download(&xp.slice((slots - 2) * hidden..));
    assert!(end[..hidden] == x && bits(&end[hidden..]) == vec![0; hidden]);
    let y = gpu.download(&y.view().slice(126 * hidden..));
    assert_eq!(bits(&y[..hidden]), vec![0; hidden]);
    assert!(y[hidden..].iter().zip(&x).all(|(y, x)| y.to_f32() == 2.0 * x.to_f32()));
}

/// One tile of one row, the last but one of x and of y; the last row of y has no owner.
#[test]
fn rows_of_products_past_2_31_elements() {
    let _alone = alone();
    let gpu = gpu();
    let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
    let tokens = 1 << 20;
    let shape = RoutingShape::new(tokens, 1, 1).unwrap();
    for (n, k) in [(8, 2056), (2056, 8), (2057, 8)] {
        assert!((tokens - 2) * n.max(k) > LIMIT);
        let last: Vec<f16> = values(k, 1.0, 4);
        let w: Vec<f16> = values(n * k, 1.0, 5);
        let one = reference::plan_fwd(&RoutingShape::new(1, 1, 1).unwrap(), &[0]).unwrap();
        let want = bound::grouped_gemm(
            &one,
            n,
            k,
            &last,
            reference::LinearWeights::new(&w),
            false,
            DType::F16,
        )
        .unwrap();
        // SAFETY: the rows that are read are written below.
        let mut x = unsafe { gpu.stream.alloc::<f16>(tokens * k) }.unwrap();
        // SAFETY: as above.
        let mut y = unsafe { gpu.stream.alloc::<f16>(tokens * n) }.unwrap();
        gpu.stream
            .memcpy_htod(&last, &mut x.slice_mut((tokens - 2) * k..(tokens - 1) * k))
            .unwrap();
        let row = tokens as i32 - 2;
        let (w, offsets) = (gpu.upload(&w), gpu.upload(&[0, row + 1]));
        let (tiles, num_tiles) = (gpu.upload(&[0, row, 1, 0]), gpu.upload(&[1i32]));
        {
            let (w, offsets, tiles, num_tiles) =
                (w.view(), offsets.view(), tiles.view(), num_tiles.view());
            let (x, _x) = x.device_ptr(&gpu.stream);
            let (w, _w) = w.device_ptr(&gpu.stream);
            let (expert_offsets, _offsets) = offsets.device_ptr(&gpu.stream);
            let (tiles, _tiles) = tiles.device_ptr(&gpu.stream);
            let (num_tiles, _num_tiles) = num_tiles.device_ptr(&gpu.stream);
            let (y, _y) = y.device_ptr_mut(&gpu.stream);
            let (bias, token_of_row) = (0, 0);
            let buffers = GroupedGemmBuffers {
                y,
                x,
                w,
                bias,
                token_of_row,
                expert_offsets,
                tiles,
                num_tiles,
            };
            let order = WeightOrder::OutIn;
            // SAFETY: the buffers are as long as the shape says, and live on.
            unsafe {
                grouped_gemm_fwd_raw(device, stream, DType::F16, shape, n, k, order, buffers)
            }
            .unwrap();
        }
        let end = gpu.download(&y.slice((tokens - 2) * n..));
        assert_within(&end[..n], &want, "the last tile");
        assert_eq!(bits(&end[n..]), vec![0; n]);
    }
}
