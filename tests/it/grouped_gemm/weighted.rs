//! The product for f16 that multiplies rows by their routing weights before rounding.

use half::{bf16, f16};
use moe_kernels::ops::grouped_gemm::{
    GroupedGemmBuffers, LinearWeights, Rows, WeightedGemmBuffers, grouped_gemm_weighted_fwd,
    grouped_gemm_weighted_fwd_into, grouped_gemm_weighted_fwd_raw,
};
use moe_kernels::ops::plan;
use moe_kernels::reference::bound::Bounded;
use moe_kernels::reference::{self, bound};
use moe_kernels::{DType, Error, RoutingShape, WeightOrder};
use proptest::prelude::*;

use super::layouts::transposed;
use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, skew, values};

/// A product with random weights `[E, out, in]`, where `n` is out and `k` is in.
struct Product {
    shape: RoutingShape,
    n: usize,
    k: usize,
    rows: Rows,
    ids: Vec<u32>,
    x: Vec<f16>,
    w: Vec<f16>,
    bias: Option<Vec<f16>>,
    weights: Vec<f32>,
}

impl Product {
    fn new(shape: RoutingShape, skew: Skew, [n, k]: [usize; 2], rows: Rows, seed: u64) -> Self {
        let features = shape.num_experts * n;
        let x_rows = if rows == Rows::Gathered { shape.num_tokens } else { shape.slots() };
        Self {
            shape,
            n,
            k,
            rows,
            ids: routing_ids(shape, skew, seed),
            x: values(x_rows * k, 2.0, seed ^ 1),
            w: values(features * k, 1.0, seed ^ 2),
            bias: (seed % 2 == 1).then(|| values(features, 20.0, seed ^ 3)),
            weights: values(shape.slots(), 1.5, seed ^ 4),
        }
    }

    /// The device's result; `x`, `w`, biases and `y` start `offset` elements after a 16-byte
    /// boundary.
    fn run(&self, gpu: &Gpu, order: WeightOrder, offset: usize) -> Vec<f16> {
        let Self { shape, n, k, rows, .. } = *self;
        let (device, stream) = (&gpu.device, &gpu.stream);
        let plan = plan::plan_fwd(device, stream, shape, &gpu.upload(&self.ids).view()).unwrap();
        let shifted = |data: &[f16]| gpu.upload(&[&vec![f16::NAN; offset], data].concat());
        let w = match order {
            WeightOrder::OutIn => shifted(&self.w),
            WeightOrder::InOut => shifted(&transposed(&self.w, n, k)),
        };
        let (x, bias) = (shifted(&self.x), self.bias.as_deref().map(shifted));
        let (x, w) = (x.view(), w.view());
        let (x, w) = (x.slice(offset..), w.slice(offset..));
        let bias = bias.as_ref().map(|bias| bias.view());
        let bias = bias.as_ref().map(|bias| bias.slice(offset..));
        let weights = gpu.upload(&self.weights);
        let mut y = gpu.poisoned::<f16>(offset + shape.slots() * n);
        {
            let (w, mut y) = (LinearWeights { w: &w, bias: bias.as_ref(), order }, y.view_mut());
            let (weights, to) = (&weights.view(), &mut y.slice_mut(offset..));
            grouped_gemm_weighted_fwd_into(device, stream, &plan, n, k, rows, &x, w, weights, to)
                .unwrap();
        }
        gpu.download(&y.view()).split_off(offset)
    }

    /// The reference's result and its bounds.
    fn wanted(&self, plan: &reference::Plan) -> Bounded {
        let Self { n, k, rows, x, w, bias, weights, .. } = self;
        let value = weights.iter().map(|&weight| f64::from(weight)).collect();
        let weights = Bounded { bound: vec![0.0; weights.len()], value };
        let order = WeightOrder::OutIn;
        let linear = reference::LinearWeights { w: &w[..], bias: bias.as_deref(), order };
        let gather = *rows == Rows::Gathered;
        bound::grouped_gemm_weighted(plan, *n, *k, x, linear, &weights, gather, DType::F16).unwrap()
    }

    /// Checks that both orders give the same bits from any address, within their bounds.
    fn check(&self, gpu: &Gpu) {
        let Self { shape, n, k, rows, .. } = self;
        let plan = reference::plan_fwd(shape, &self.ids).unwrap();
        let got = self.run(gpu, WeightOrder::OutIn, 0);
        let what = format!("{shape} out {n} in {k} {rows:?} bias {}", self.bias.is_some());
        assert_within(&got, &self.wanted(&plan), &what);
        let got = bits(&got);
        let unused = &got[plan.rows_in_use() * n..];
        assert!(unused.iter().all(|&bits| bits == 0), "{what}: unused rows are +0");
        assert_eq!(bits(&self.run(gpu, WeightOrder::InOut, 0)), got, "{what}");
        assert_eq!(bits(&self.run(gpu, WeightOrder::InOut, 1)), got, "{what}, off a boundary");
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn matches_reference(
        tokens in 0usize..70, experts in 1usize..6, top_k in 1usize..4, n in 1usize..160, k in 1usize..150,
        whole_chunks: bool, gather: bool, skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, top_k.min(experts)).unwrap();
        let width = |width: usize| if whole_chunks { width.next_multiple_of(8) } else { width };
        let rows = if gather { Rows::Gathered } else { Rows::Grouped };
        let gpu = gpu();
        gpu.reschedule(seed);
        Product::new(shape, skew, [width(n), width(k)], rows, seed).check(&gpu);
    }
}

/// Tiles of every height, and features and inputs with any end.
#[test]
fn tails() {
    let gpu = gpu();
    for tokens in [1, 32, 33, 64, 65, 129] {
        let shape = RoutingShape::new(tokens, 1, 1).unwrap();
        Product::new(shape, Skew::Uniform, [24, 40], Rows::Grouped, 1).check(&gpu);
    }
    let shape = RoutingShape::new(9, 4, 3).unwrap();
    for n in [8, 64, 72, 128, 136, 63, 129] {
        Product::new(shape, Skew::Uniform, [n, 16], Rows::Gathered, 3).check(&gpu);
    }
    for k in [8, 64, 72, 136, 65] {
        Product::new(shape, Skew::Inactive, [16, k], Rows::Grouped, 5).check(&gpu);
    }
}

/// Sums exceed the range of f16; their weighted outputs do not.
#[test]
fn sums_beyond_f16_are_weighted_before_rounding() {
    let gpu = gpu();
    let shape = RoutingShape::new(40, 3, 2).unwrap();
    for rows in [Rows::Gathered, Rows::Grouped] {
        let mut product = Product::new(shape, Skew::Zipf, [72, 48], rows, 7);
        product.x.iter_mut().for_each(|x| *x = f16::from_f32(x.to_f32() * 8192.0));
        product.weights.iter_mut().for_each(|weight| *weight /= 16.0);
        let plan = reference::plan_fwd(&shape, &product.ids).unwrap();
        let linear = reference::LinearWeights::new(&product.w[..]);
        let gather = rows == Rows::Gathered;
        let sums =
            reference::grouped_gemm_fwd::<f64, f16>(&plan, 72, 48, &product.x, linear, gather);
        assert!(sums.unwrap().iter().any(|sum| sum.abs() > 70_000.0));
        assert!(product.wanted(&plan).value.iter().all(|y| y.abs() < 65_000.0));
        product.check(&gpu);
    }
}

/// The weight of a row is that of its own slot; weights of slots without rows are ignored.
#[test]
fn weights_of_other_slots_are_ignored() {
    let gpu = gpu();
    let shape = RoutingShape::new(30, 4, 3).unwrap();
    let mut product = Product::new(shape, Skew::Inactive, [40, 72], Rows::Gathered, 9);
    let plan = reference::plan_fwd(&shape, &product.ids).unwrap();
    for (weight, row) in product.weights.iter_mut().zip(&plan.row_of_slot) {
        if *row < 0 {
            *weight = f32::NAN;
        }
    }
    let nan = product.weights.iter().filter(|weight| weight.is_nan()).count();
    assert!(nan > 0 && nan < shape.slots());
    product.check(&gpu);
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(4, 3, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let plan = plan::plan_fwd(device, stream, shape, &ids.view()).unwrap();
    let (x, w) = (gpu.upload(&[f16::ONE; 20]), gpu.upload(&[f16::ONE; 90]));
    let weights = gpu.upload(&[1.0f32; 8]);
    let mut y = gpu.poisoned::<f16>(48);
    let mut call = |lens: [usize; 4]| {
        let (x, w, weights, mut y) = (x.view(), w.view(), weights.view(), y.view_mut());
        let (x, w, weights) = (x.slice(..lens[0]), w.slice(..lens[1]), weights.slice(..lens[2]));
        let (w, to, rows) = (LinearWeights::new(&w), &mut y.slice_mut(..lens[3]), Rows::Gathered);
        grouped_gemm_weighted_fwd_into(device, stream, &plan, 6, 5, rows, &x, w, &weights, to)
    };
    let good = [20, 90, 8, 48];
    for (at, argument) in ["x", "w", "routing_weights", "y"].into_iter().enumerate() {
        let mut lens = good;
        lens[at] -= 1;
        let (wanted, got) = (good[at], lens[at]);
        let op = "grouped_gemm_weighted_fwd";
        assert_eq!(call(lens), Err(Error::Length { op, argument, wanted, got }));
    }
    assert_eq!(call(good), Ok(()));

    // The allocating form, with another type.
    let (x, w) = (gpu.upload(&[bf16::ONE; 20]), gpu.upload(&[bf16::ONE; 90]));
    let (x, w, weights) = (x.view(), w.view(), weights.view());
    let linear = LinearWeights::new(&w);
    let rows = Rows::Gathered;
    let error = grouped_gemm_weighted_fwd(device, stream, &plan, 6, 5, rows, &x, linear, &weights);
    assert!(matches!(error, Err(Error::Unsupported { argument: "dtype", .. })));

    let gemm = GroupedGemmBuffers {
        y: 256,
        x: 256,
        w: 256,
        bias: 0,
        token_of_row: 256,
        expert_offsets: 256,
        tiles: 256,
        num_tiles: 256,
    };
    let good = WeightedGemmBuffers { gemm, routing_weights: 256, row_of_slot: 256 };
    let raw = |dtype, n, buffers| {
        let (stream, order) = (stream.cu_stream(), WeightOrder::OutIn);
        // SAFETY: every call is refused before the launch.
        unsafe {
            grouped_gemm_weighted_fwd_raw(device, stream, dtype, shape, n, 5, rows, order, buffers)
        }
    };
    for null in [
        WeightedGemmBuffers { routing_weights: 0, ..good },
        WeightedGemmBuffers { row_of_slot: 0, ..good },
        WeightedGemmBuffers { gemm: GroupedGemmBuffers { token_of_row: 0, ..gemm }, ..good },
    ] {
        assert!(matches!(raw(DType::F16, 6, null), Err(Error::Mismatch { .. })));
    }
    let odd = WeightedGemmBuffers { routing_weights: 258, ..good };
    assert!(matches!(
        raw(DType::F16, 6, odd),
        Err(Error::Alignment { argument: "routing_weights", .. })
    ));
    assert!(matches!(
        raw(DType::F16, 0, good),
        Err(Error::Unsupported { argument: "out_features", .. })
    ));
    for dtype in [DType::F32, DType::BF16] {
        let error = raw(dtype, 6, good);
        assert!(matches!(error, Err(Error::Unsupported { argument: "dtype", .. })), "{error:?}");
    }
}
