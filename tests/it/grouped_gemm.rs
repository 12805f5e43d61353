//! grouped_gemm: every element is within its own bound of the f64 reference, and its bits depend
//! neither on the schedule, nor on the order of tiles, the alignment or other rows. This file tests
//! the plain product and SwiGLU; the modules below test orders of weights, biases and other
//! activations.

mod errors;
mod gate_up;
mod layouts;
mod weighted;

use cudarc::driver::{DevicePtr, DevicePtrMut};
use half::{bf16, f16};
use moe_kernels::ops::grouped_gemm::{
    GateUpBuffers, GateUpWeights, GroupedGemmBuffers, LinearWeights, Rows, grouped_gemm_fwd,
    grouped_gemm_fwd_into, grouped_gemm_fwd_raw, grouped_gemm_gate_up_fwd,
    grouped_gemm_gate_up_fwd_into, grouped_gemm_gate_up_fwd_raw,
};
use moe_kernels::ops::{permute, plan};
use moe_kernels::reference::{self, bound};
use moe_kernels::{Dtype, ExpertConfig, RoutingShape, WeightOrder};
use proptest::prelude::*;

use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, skew, values};

/// One product, plain or with SwiGLU; `n` is the width of its output, `k` that of its input.
#[derive(Debug, Clone, Copy)]
struct Product {
    swiglu: bool,
    n: usize,
    k: usize,
    rows: Rows,
}

/// The host's side of a case.
struct Inputs<D> {
    ids: Vec<u32>,
    x: Vec<D>,
    w: Vec<D>,
}

impl<D: Dtype> Inputs<D> {
    fn new(shape: RoutingShape, skew: Skew, product: Product, seed: u64) -> Self {
        let Product { swiglu, n, k, rows } = product;
        let x_rows = if rows == Rows::Gathered { shape.num_tokens } else { shape.slots() };
        let w_rows = shape.num_experts * n * if swiglu { 2 } else { 1 };
        Self {
            ids: routing_ids(shape, skew, seed),
            x: values(x_rows * k, 2.0, seed ^ 1),
            w: values(w_rows * k, 1.0, seed ^ 2),
        }
    }

    /// The device's result. Buffers start `offset` elements after a 16-byte boundary.
    fn run(&self, gpu: &Gpu, shape: RoutingShape, product: Product, offset: usize) -> Vec<D> {
        self.run_with_offsets(gpu, shape, product, [offset; 3])
    }

    /// The same, with an offset for each of `x`, `w` and `y`.
    fn run_with_offsets(
        &self,
        gpu: &Gpu,
        shape: RoutingShape,
        product: Product,
        [x_offset, w_offset, offset]: [usize; 3],
    ) -> Vec<D> {
        let Product { swiglu, n, k, rows } = product;
        let shifted = |data: &[D], offset: usize| {
            gpu.upload(&[&vec![D::from_f32(f32::NAN); offset], data].concat())
        };
        let (x, w) = (shifted(&self.x, x_offset), shifted(&self.w, w_offset));
        let mut y = gpu.poisoned::<D>(offset + shape.slots() * n);
        let plan =
            plan::plan_fwd(&gpu.device, &gpu.stream, shape, &gpu.upload(&self.ids).view()).unwrap();
        let (device, stream) = (&gpu.device, &gpu.stream);
        let (x, w) = (x.view(), w.view());
        let (x, w) = (x.slice(x_offset..), w.slice(w_offset..));
        {
            let mut y = y.view_mut();
            let y = &mut y.slice_mut(offset..);
            if swiglu {
                let (experts, w) = (ExpertConfig::default(), GateUpWeights::fused(&w));
                grouped_gemm_gate_up_fwd_into(
                    device, stream, &plan, &experts, n, k, rows, &x, w, None, y,
                )
                .unwrap();
            } else {
                let w = LinearWeights::new(&w);
                grouped_gemm_fwd_into(device, stream, &plan, n, k, rows, &x, w, y).unwrap();
            }
        }
        let mut y = gpu.download(&y.view());
        assert!(
            y[..offset].iter().all(|value| value.to_f32().is_nan()),
            "elements before the view are not written"
        );
        y.split_off(offset)
    }
}

/// Checks the device's result against the reference, and returns its bits.
fn check<D: Dtype>(
    gpu: &Gpu,
    shape: RoutingShape,
    skew: Skew,
    product: Product,
    seed: u64,
) -> Vec<u32> {
    let inputs = Inputs::<D>::new(shape, skew, product, seed);
    let got = inputs.run(gpu, shape, product, 0);
    let Product { swiglu, n, k, rows } = product;
    let plan = reference::plan_fwd(&shape, &inputs.ids).unwrap();
    let (gather, w) = (rows == Rows::Gathered, &inputs.w[..]);
    let want = if swiglu {
        let (experts, w) = (ExpertConfig::default(), reference::GateUpWeights::fused(w));
        bound::grouped_gemm_gate_up(&plan, &experts, n, k, &inputs.x, w, None, gather, D::DTYPE)
    } else {
        let w = reference::LinearWeights::new(w);
        bound::grouped_gemm(&plan, n, k, &inputs.x, w, gather, D::DTYPE)
    }
    .unwrap();
    let what = format!("{shape} {skew:?} {product:?} {} seed {seed}", D::DTYPE);
    assert_within(&got, &want, &what);
    let got = bits(&got);
    assert!(
        got[plan.rows_in_use() * n..].iter().all(|&bits| bits == 0),
        "{what}: unused rows are +0"
    );
    got
}

fn check_all(gpu: &Gpu, shape: RoutingShape, skew: Skew, product: Product, seed: u64) {
    check::<f32>(gpu, shape, skew, product, seed);
    check::<f16>(gpu, shape, skew, product, seed);
    check::<bf16>(gpu, shape, skew, product, seed);
}

fn rows() -> impl Strategy<Value = Rows> {
    proptest::sample::select(vec![Rows::Gathered, Rows::Grouped])
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn matches_reference(
        tokens in 0usize..70, experts in 1usize..7, top_k in 1usize..4, n in 1usize..160, k in 1usize..200,
        whole_chunks: bool, swiglu: bool, rows in rows(), skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, top_k.min(experts)).unwrap();
        // Widths of whole 16-byte chunks take the asynchronous copies, others go element by
        // element.
        let width = |width: usize| if whole_chunks { width.next_multiple_of(8) } else { width };
        let product = Product { swiglu, n: width(n), k: width(k), rows };
        let gpu = gpu();
        gpu.reschedule(seed);
        check_all(&gpu, shape, skew, product, seed);
    }
}

#[test]
fn tails_of_rows() {
    let gpu = gpu();
    for tokens in [1, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 161, 257] {
        let shape = RoutingShape::new(tokens, 1, 1).unwrap();
        for swiglu in [false, true] {
            let product = Product { swiglu, n: 24, k: 40, rows: Rows::Gathered };
            check::<f32>(&gpu, shape, Skew::Uniform, product, 1);
            check::<bf16>(&gpu, shape, Skew::Uniform, product, 2);
        }
    }
}

#[test]
fn tails_of_columns() {
    let gpu = gpu();
    let shape = RoutingShape::new(9, 2, 1).unwrap();
    for n in [1, 2, 7, 8, 31, 32, 33, 56, 63, 64, 65, 72, 127, 128, 129, 136, 200] {
        for swiglu in [false, true] {
            let product = Product { swiglu, n, k: 16, rows: Rows::Grouped };
            check::<f32>(&gpu, shape, Skew::Uniform, product, 3);
            check::<f16>(&gpu, shape, Skew::Uniform, product, 4);
        }
    }
}

#[test]
fn tails_of_inputs() {
    let gpu = gpu();
    let shape = RoutingShape::new(9, 2, 1).unwrap();
    // Around one stage and around all stages of the pipeline, with 32 and 64 elements per stage.
    for k in [
        1, 2, 7, 8, 9, 24, 31, 32, 33, 63, 64, 65, 72, 96, 104, 127, 128, 136, 192, 200, 256, 264,
        321,
    ] {
        for swiglu in [false, true] {
            let product = Product { swiglu, n: 16, k, rows: Rows::Gathered };
            check::<f32>(&gpu, shape, Skew::Uniform, product, 5);
            check::<bf16>(&gpu, shape, Skew::Uniform, product, 6);
        }
    }
}

#[test]
fn extreme_routings() {
    let gpu = gpu();
    // With 8 slots of 8 experts the list and the grid are full.
    for (tokens, experts, top_k) in
        [(0, 4, 2), (1, 64, 1), (1, 8, 8), (3, 3, 3), (150, 5, 1), (40, 12, 4)]
    {
        let shape = RoutingShape::new(tokens, experts, top_k).unwrap();
        for skew in [Skew::Uniform, Skew::OneHot, Skew::Empty, Skew::Inactive] {
            for swiglu in [false, true] {
                let product = Product { swiglu, n: 72, k: 24, rows: Rows::Gathered };
                check_all(&gpu, shape, skew, product, 7);
            }
        }
    }
}

#[test]
fn no_active_slot_gives_zeros() {
    let gpu = gpu();
    let shape = RoutingShape::new(37, 3, 2).unwrap();
    for n in [64, 65] {
        for swiglu in [false, true] {
            let product = Product { swiglu, n, k: 8, rows: Rows::Gathered };
            let mut inputs = Inputs::<bf16>::new(shape, Skew::Uniform, product, 8);
            inputs.ids.fill(u32::MAX);
            assert_eq!(bits(&inputs.run(&gpu, shape, product, 0)), vec![0; shape.slots() * n]);
        }
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let shape = RoutingShape::new(45, 3, 2).unwrap();
    for swiglu in [false, true] {
        let product = Product { swiglu, n: 136, k: 264, rows: Rows::Gathered };
        let run = |seed| {
            gpu.reschedule(seed);
            let inputs = Inputs::<f32>::new(shape, Skew::Zipf, product, 9);
            let wide = bits(&inputs.run(&gpu, shape, product, 0));
            (wide, check::<f16>(&gpu, shape, Skew::Zipf, product, 9))
        };
        let first = run(0);
        assert!((1..12).all(|seed| run(seed) == first));
    }
}

#[test]
fn tile_order_does_not_change_bits() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(150, 3, 2).unwrap();
    for swiglu in [false, true] {
        let product = Product { swiglu, n: 72, k: 64, rows: Rows::Gathered };
        let inputs = Inputs::<bf16>::new(shape, Skew::OneHot, product, 10);
        let want = inputs.run(&gpu, shape, product, 0);
        let plan = reference::plan_fwd(&shape, &inputs.ids).unwrap();
        let reversed = plan.tiles.iter().rev();
        let tiles: Vec<i32> =
            reversed.flat_map(|tile| [tile.expert, tile.first_row, tile.num_rows, -1]).collect();
        let (x, w) = (gpu.upload(&inputs.x), gpu.upload(&inputs.w));
        let tokens = gpu.upload(&plan.token_of_row);
        let (offsets, tiles) = (gpu.upload(&plan.expert_offsets), gpu.upload(&tiles));
        let num_tiles = gpu.upload(&[plan.tiles.len() as i32]);
        let mut y = gpu.poisoned::<bf16>(shape.slots() * product.n);
        {
            let (x, w, tokens) = (x.view(), w.view(), tokens.view());
            let (offsets, tiles, num_tiles) = (offsets.view(), tiles.view(), num_tiles.view());
            let mut y = y.view_mut();
            let (x, _x) = x.device_ptr(stream);
            let (w, _w) = w.device_ptr(stream);
            let (token_of_row, _tokens) = tokens.device_ptr(stream);
            let (expert_offsets, _offsets) = offsets.device_ptr(stream);
            let (tiles, _tiles) = tiles.device_ptr(stream);
            let (num_tiles, _num_tiles) = num_tiles.device_ptr(stream);
            let (y, _y) = y.device_ptr_mut(stream);
            let Product { n, k, rows, .. } = product;
            let (cu_stream, dtype) = (stream.cu_stream(), bf16::DTYPE);
            if swiglu {
                let buffers = GateUpBuffers {
                    act: y,
                    x,
                    gate_up: w,
                    up: 0,
                    bias: 0,
                    routing_weights: 0,
                    row_of_slot: 0,
                    token_of_row,
                    expert_offsets,
                    tiles,
                    num_tiles,
                };
                let experts = ExpertConfig::default();
                // SAFETY: the buffers are of one plan and have the lengths of its shape; they
                // outlive the kernel.
                unsafe {
                    grouped_gemm_gate_up_fwd_raw(
                        device, cu_stream, dtype, shape, &experts, n, k, rows, buffers,
                    )
                }
                .unwrap();
            } else {
                let (bias, order) = (0, WeightOrder::OutIn);
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
                // SAFETY: as above.
                unsafe {
                    grouped_gemm_fwd_raw(device, cu_stream, dtype, shape, n, k, order, buffers)
                }
                .unwrap();
            }
        }
        assert_eq!(bits(&gpu.download(&y.view())), bits(&want));
    }
}

#[test]
fn row_does_not_depend_on_other_rows() {
    let gpu = gpu();
    for swiglu in [false, true] {
        let product = Product { swiglu, n: 24, k: 136, rows: Rows::Gathered };
        let all = RoutingShape::new(130, 1, 1).unwrap();
        let inputs = Inputs::<f16>::new(all, Skew::Uniform, product, 11);
        let want = inputs.run(&gpu, all, product, 0);
        for tokens in [1, 20, 40, 100] {
            let shape = RoutingShape::new(tokens, 1, 1).unwrap();
            let (ids, x) = (vec![0; tokens], inputs.x[..tokens * product.k].to_vec());
            let few = Inputs { ids, x, w: inputs.w.clone() };
            let got = few.run(&gpu, shape, product, 0);
            assert_eq!(bits(&got), bits(&want[..tokens * product.n]), "{tokens} tokens");
        }
    }
}

#[test]
fn views_start_at_any_element() {
    fn check<D: Dtype>(gpu: &Gpu) {
        let shape = RoutingShape::new(40, 3, 2).unwrap();
        for swiglu in [false, true] {
            let product = Product { swiglu, n: 72, k: 136, rows: Rows::Gathered };
            let inputs = Inputs::<D>::new(shape, Skew::Zipf, product, 12);
            let want = bits(&inputs.run(gpu, shape, product, 0));
            // All of x, w and y together, and each alone.
            for offsets in [[1; 3], [2; 3], [3; 3], [1, 0, 0], [0, 1, 0], [0, 0, 1]] {
                assert_eq!(
                    bits(&inputs.run_with_offsets(gpu, shape, product, offsets)),
                    want,
                    "{} offsets {offsets:?}",
                    D::DTYPE
                );
            }
        }
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<bf16>(&gpu);
}

#[test]
fn gathering_equals_permuting_first() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let (shape, n, k) = (RoutingShape::new(33, 5, 3).unwrap(), 40, 72);
    for skew in [Skew::Zipf, Skew::Inactive] {
        let product = Product { swiglu: false, n, k, rows: Rows::Gathered };
        let inputs = Inputs::<bf16>::new(shape, skew, product, 13);
        let plan = plan::plan_fwd(device, stream, shape, &gpu.upload(&inputs.ids).view()).unwrap();
        let (x, w) = (gpu.upload(&inputs.x), gpu.upload(&inputs.w));
        let xp = permute::permute_fwd(device, stream, &plan, k, &x.view()).unwrap();
        let (x, w, xp) = (x.view(), w.view(), xp.as_view());
        let linear = LinearWeights::new(&w);
        let gathered =
            grouped_gemm_fwd(device, stream, &plan, n, k, Rows::Gathered, &x, linear).unwrap();
        let grouped =
            grouped_gemm_fwd(device, stream, &plan, n, k, Rows::Grouped, &xp, linear).unwrap();
        assert_eq!(
            bits(&gpu.download(&gathered.as_view())),
            bits(&gpu.download(&grouped.as_view()))
        );
        let swiglu = |rows, x| {
            let (experts, w) = (ExpertConfig::default(), GateUpWeights::fused(&w));
            grouped_gemm_gate_up_fwd(device, stream, &plan, &experts, n / 2, k, rows, x, w, None)
                .unwrap()
        };
        let (gathered, grouped) = (swiglu(Rows::Gathered, &x), swiglu(Rows::Grouped, &xp));
        assert_eq!(
            bits(&gpu.download(&gathered.as_view())),
            bits(&gpu.download(&grouped.as_view()))
        );
    }
}

#[test]
fn swiglu_follows_ieee() {
    fn check<D: Dtype>(gpu: &Gpu) {
        let shape = RoutingShape::new(1, 1, 1).unwrap();
        let (gate, up): (Vec<f32>, Vec<f32>) = [
            (0.0, 3.0),
            (-0.0, 3.0),
            (200.0, 0.5),
            (-200.0, 0.5), // exp overflows: -200 / inf
            (f32::INFINITY, 2.0),
            (f32::NEG_INFINITY, 2.0), // -inf / inf
            (f32::NAN, 1.0),
            (1.0, f32::NAN),
            (1.0, f32::NEG_INFINITY),
            (0.0, f32::INFINITY), // 0 * inf
        ]
        .into_iter()
        .unzip();
        let product = Product { swiglu: true, n: gate.len(), k: 1, rows: Rows::Gathered };
        let w = gate.iter().chain(&up).map(|&value| D::from_f32(value)).collect();
        let inputs = Inputs { ids: vec![0], x: vec![D::from_f32(1.0)], w };
        let got: Vec<f32> =
            inputs.run(gpu, shape, product, 0).iter().map(|value| value.to_f32()).collect();
        let inf = f32::INFINITY;
        assert_eq!([got[0], got[2], got[4], got[8]], [0.0, 100.0, inf, -inf], "{}", D::DTYPE);
        assert!(got[3] == 0.0 && got[3].is_sign_negative(), "{}: {}", D::DTYPE, got[3]);
        assert!([5, 6, 7, 9].iter().all(|&i| got[i].is_nan()), "{}: {got:?}", D::DTYPE);
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<f16>(&gpu);
    check::<bf16>(&gpu);
}

/// Products are exact, and every sum rounds: another order of inputs gives other bits.
#[test]
fn f32_sums_inputs_in_order() {
    let gpu = gpu();
    let shape = RoutingShape::new(3, 1, 1).unwrap();
    for k in [70, 72] {
        let product = Product { swiglu: false, n: 40, k, rows: Rows::Grouped };
        let mut inputs = Inputs::<f32>::new(shape, Skew::Uniform, product, 15);
        inputs.x.fill(1.0);
        let fold = |w: &[f32]| w.iter().fold(0.0f32, |sum, w| sum + w).to_bits();
        let row: Vec<u32> = inputs.w.chunks_exact(k).map(fold).collect();
        assert_eq!(bits(&inputs.run(&gpu, shape, product, 0)), row.repeat(3), "k {k}");
    }
}

#[test]
fn nan_affects_only_its_row_and_column() {
    fn check<D: Dtype>(gpu: &Gpu) {
        let shape = RoutingShape::new(50, 2, 1).unwrap();
        // Neither rows, nor columns, nor inputs fill their tiles.
        let product = Product { swiglu: false, n: 72, k: 40, rows: Rows::Grouped };
        let mut inputs = Inputs::<D>::new(shape, Skew::Uniform, product, 14);
        let plan = reference::plan_fwd(&shape, &inputs.ids).unwrap();
        let clean = bits(&inputs.run(gpu, shape, product, 0));
        let (row, expert, column) = (plan.expert_offsets[1] as usize - 1, 1, 70);
        inputs.x[(row + 1) * product.k - 1] = D::from_f32(f32::NAN);
        inputs.w[(expert * product.n + column + 1) * product.k - 1] = D::from_f32(f32::INFINITY);
        let got = inputs.run(gpu, shape, product, 0);
        for (index, value) in got.iter().enumerate() {
            let (r, c) = (index / product.n, index % product.n);
            let touched = r == row || (r >= plan.expert_offsets[1] as usize && c == column);
            assert_eq!(!value.to_f32().is_finite(), touched, "{} row {r} column {c}", D::DTYPE);
            assert!(touched || value.to_f32().to_bits() == clean[index]);
        }
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<bf16>(&gpu);
}
