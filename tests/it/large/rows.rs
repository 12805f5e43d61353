//! permute, combine and rms_norm on rows and tokens past element 2^31.

use cudarc::driver::{CudaSlice, DevicePtr};
use half::f16;
use moe_kernels::ops::combine::{CombineBuffers, CombineOptions, combine_fwd_raw};
use moe_kernels::ops::permute::{PermuteBuffers, permute_fwd_raw};
use moe_kernels::ops::rms_norm::{
    RmsNormBuffers, RmsNormInputs, RmsNormShape, rms_norm_fwd, rms_norm_fwd_raw,
};
use moe_kernels::{DType, RmsNorm, RoutingShape};

use super::{LIMIT, alone, end_of, ending_in, without_blocks};
use crate::common::{Gpu, bits, values};

/// Handmade maps: the slots that have a row, and the number of rows in use.
struct Maps {
    row_of_slot: CudaSlice<i32>,
    expert_offsets: CudaSlice<i32>,
}

impl Maps {
    fn new(gpu: &Gpu, shape: RoutingShape, rows: &[(usize, usize)], rows_in_use: usize) -> Self {
        let mut row_of_slot = vec![-1i32; shape.slots()];
        for &(slot, row) in rows {
            row_of_slot[slot] = row as i32;
        }
        let mut expert_offsets = vec![0i32; shape.num_experts + 1];
        expert_offsets[shape.num_experts] = rows_in_use as i32;
        Self {
            row_of_slot: gpu.stream.clone_htod(&row_of_slot).unwrap(),
            expert_offsets: gpu.stream.clone_htod(&expert_offsets).unwrap(),
        }
    }
}

/// Permutes with `maps`. Only the rows in `maps` are written; the rest of `xp` is uninitialized.
fn permute(
    gpu: &Gpu,
    shape: RoutingShape,
    hidden: usize,
    x: &CudaSlice<f16>,
    maps: &Maps,
    left_out: usize,
) -> CudaSlice<f16> {
    let stream = &gpu.stream;
    // SAFETY: the rows that are read are written by permute.
    let xp = unsafe { stream.alloc::<f16>(shape.slots() * hidden) }.unwrap();
    let buffers = PermuteBuffers {
        xp: xp.device_ptr(stream).0,
        x: x.device_ptr(stream).0,
        row_of_slot: maps.row_of_slot.device_ptr(stream).0,
        expert_offsets: maps.expert_offsets.device_ptr(stream).0,
    };
    // SAFETY: the buffers are as long as the shape says, and live on; no two slots have one row.
    without_blocks(gpu, left_out, || unsafe {
        permute_fwd_raw(&gpu.device, stream.cu_stream(), DType::F16, shape, hidden, buffers)
            .unwrap();
    });
    xp
}

/// Combines the operands in `read`. The last two rows of `y` are NaN before.
fn combine(
    gpu: &Gpu,
    shape: RoutingShape,
    hidden: usize,
    options: &CombineOptions,
    read: CombineBuffers,
    left_out: usize,
) -> CudaSlice<f16> {
    let stream = &gpu.stream;
    let y = ending_in(gpu, shape.num_tokens * hidden, &vec![f16::NAN; 2 * hidden]);
    let buffers = CombineBuffers { y: y.device_ptr(stream).0, ..read };
    let (device, dtype) = (&gpu.device, DType::F16);
    // SAFETY: the buffers are as long as the shape says, and live on.
    without_blocks(gpu, left_out, || unsafe {
        combine_fwd_raw(device, stream.cu_stream(), dtype, shape, hidden, options, buffers)
            .unwrap();
    });
    y
}

/// The last two tokens have rows before, across and after element 2^31, in vectors and element by
/// element; the last row is unused.
#[test]
fn permutes_and_combines_rows_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let shape = RoutingShape::new(526_400, 2, 2).unwrap();
    let (tokens, slots) = (shape.num_tokens, shape.slots());
    for hidden in [2040, 2041] {
        let [before, across, after] = [3, LIMIT / hidden, slots - 2];
        assert!(across * hidden < LIMIT && after * hidden > LIMIT);
        let x = values::<f16>(2 * hidden, 1.0, 1);
        let far_x = ending_in(&gpu, tokens * hidden, &x);
        let rows = [(slots - 4, before), (slots - 2, across), (slots - 1, after)];
        let maps = Maps::new(&gpu, shape, &rows, slots - 1);
        let left_out = tokens - 2;
        let xp = permute(&gpu, shape, hidden, &far_x, &maps, left_out);
        let row = |row: usize| gpu.download(&xp.slice(row * hidden..(row + 1) * hidden));
        let (first, second) = x.split_at(hidden);
        assert!(row(before) == first, "row {before} of width {hidden}");
        assert!(row(across) == second, "row {across} of width {hidden}");
        assert!(row(after) == second, "row {after} of width {hidden}");
        assert_eq!(bits(&row(slots - 1)), vec![0; hidden], "the last row, of width {hidden}");

        let weights = ending_in(&gpu, slots, &[2f32, f32::NAN, 4.0, 1.0]);
        let stream = &gpu.stream;
        let read = CombineBuffers {
            yp: xp.device_ptr(stream).0,
            routing_weights: weights.device_ptr(stream).0,
            row_of_slot: maps.row_of_slot.device_ptr(stream).0,
            ..CombineBuffers::default()
        };
        let y = combine(&gpu, shape, hidden, &CombineOptions::default(), read, left_out);
        let y = end_of(&gpu, &y, 2 * hidden);
        let wanted = x.iter().enumerate().map(|(i, x)| {
            let (x, second) = (x.to_f32(), i >= hidden);
            f16::from_f32(if second { 1f32.mul_add(x, 4.0 * x) } else { 2.0 * x })
        });
        assert_eq!(bits(&y), bits(&wanted.collect::<Vec<_>>()), "y of width {hidden}");
    }
}

/// The second to last token has a row, and the last one an identity expert; both have a shared row.
#[test]
fn permutes_and_combines_tokens_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let stream = &gpu.stream;
    let shape = RoutingShape::new(1_053_000, 1, 1).unwrap();
    let tokens = shape.num_tokens;
    // One block of combine for each token.
    for hidden in [2040, 2041] {
        assert!((tokens - 2) * hidden > LIMIT);
        let x = values::<f16>(2 * hidden, 1.0, 1);
        let far_x = ending_in(&gpu, tokens * hidden, &x);
        let maps = Maps::new(&gpu, shape, &[(tokens - 2, 0)], 1);
        let left_out = tokens - 2;
        let xp = permute(&gpu, shape, hidden, &far_x, &maps, left_out);
        assert!(gpu.download(&xp.slice(..hidden)) == x[..hidden], "the row of width {hidden}");

        let weights = ending_in(&gpu, tokens, &[2f32, 4.0]);
        let expert_ids = ending_in(&gpu, tokens, &[0u32, 1]);
        let x_at = far_x.device_ptr(stream).0;
        // x and shared are one buffer, because two exceed the memory of the software device.
        let read = CombineBuffers {
            yp: xp.device_ptr(stream).0,
            routing_weights: weights.device_ptr(stream).0,
            row_of_slot: maps.row_of_slot.device_ptr(stream).0,
            expert_ids: expert_ids.device_ptr(stream).0,
            x: x_at,
            shared: x_at,
            ..CombineBuffers::default()
        };
        let options = CombineOptions { identity: 1..2, ..CombineOptions::default() };
        let y = combine(&gpu, shape, hidden, &options, read, left_out);
        let y = end_of(&gpu, &y, 2 * hidden);
        let wanted = x.iter().enumerate().map(|(i, x)| {
            let (x, weight) = (x.to_f32(), if i < hidden { 2.0 } else { 4.0 });
            f16::from_f32(weight * x + x)
        });
        assert_eq!(bits(&y), bits(&wanted.collect::<Vec<_>>()), "y of width {hidden}");
    }
}

/// The second to last row, in vectors and element by element; the last row is unused.
#[test]
fn normalizes_rows_past_2_31_elements() {
    let (gpu, _turn) = alone();
    let norm = RmsNorm { epsilon: 1e-5, offset: 1.0, scale_first: false };
    let rows = 1 << 20;
    for hidden in [2056, 2057] {
        assert!((rows - 2) * hidden > LIMIT);
        let (row, weight) = (values::<f16>(hidden, 2.0, 1), values::<f16>(hidden, 1.0, 2));
        let end = [&row[..], &vec![f16::NAN; hidden]].concat();
        let (x, weight) = (ending_in(&gpu, rows * hidden, &end), gpu.upload(&weight));
        let (row, weight) = (gpu.upload(&row), weight.view());
        let inputs = RmsNormInputs { weight: Some(&weight), plan: None };
        let stream = &gpu.stream;
        let near = rms_norm_fwd(&gpu.device, stream, &norm, hidden, &row.view(), &inputs).unwrap();
        let near = gpu.download(&near.as_view());
        assert!(near.iter().all(|y| y.is_finite()) && near.iter().any(|y| y.to_f32() != 0.0));

        let y = ending_in::<f16>(&gpu, rows * hidden, &[]);
        let expert_offsets = stream.clone_htod(&[0, rows as i32 - 1]).unwrap();
        let buffers = RmsNormBuffers {
            y: y.device_ptr(stream).0,
            x: x.device_ptr(stream).0,
            weight: weight.device_ptr(stream).0,
            expert_offsets: expert_offsets.device_ptr(stream).0,
        };
        let shape = RmsNormShape { rows, hidden, num_experts: 1 };
        // SAFETY: the buffers are as long as the shape says, and live until the kernel has run.
        without_blocks(&gpu, rows - 2, || unsafe {
            rms_norm_fwd_raw(&gpu.device, stream.cu_stream(), DType::F16, &norm, shape, buffers)
                .unwrap();
        });
        let end = end_of(&gpu, &y, 2 * hidden);
        assert_eq!(bits(&end[..hidden]), bits(&near), "width {hidden}");
        assert_eq!(bits(&end[hidden..]), vec![0; hidden], "width {hidden}");
    }
}
