//! The plain product with both orders of weights and with biases.

use half::{bf16, f16};
use moe_kernels::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_fwd_into};
use moe_kernels::ops::plan;
use moe_kernels::reference::{self, bound};
use moe_kernels::{Dtype, RoutingShape, WeightOrder};
use proptest::prelude::*;

use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, skew, values};

/// A product with random weights `[E, out, in]`, where `n` is out and `k` is in.
struct Product<D> {
    shape: RoutingShape,
    n: usize,
    k: usize,
    ids: Vec<u32>,
    x: Vec<D>,
    w: Vec<D>,
    bias: Option<Vec<D>>,
}

/// `[E, out, in]` as `[E, in, out]`, where `n` is out and `k` is in.
pub fn transposed<D: Copy>(w: &[D], n: usize, k: usize) -> Vec<D> {
    w.chunks(n * k).flat_map(|w| (0..k * n).map(|at| w[at % n * k + at / n])).collect()
}

impl<D: Dtype> Product<D> {
    fn new(shape: RoutingShape, skew: Skew, n: usize, k: usize, biased: bool, seed: u64) -> Self {
        let features = shape.num_experts * n;
        Self {
            shape,
            n,
            k,
            ids: routing_ids(shape, skew, seed),
            x: values(shape.num_tokens * k, 2.0, seed ^ 1),
            w: values(features * k, 1.0, seed ^ 2),
            bias: biased.then(|| values(features, 20.0, seed ^ 3)),
        }
    }

    /// The device's result; weights and biases start `offset` elements after a 16-byte boundary.
    fn run(&self, gpu: &Gpu, order: WeightOrder, offset: usize) -> Vec<D> {
        let Self { shape, n, k, .. } = *self;
        let (device, stream) = (&gpu.device, &gpu.stream);
        let plan = plan::plan_fwd(device, stream, shape, &gpu.upload(&self.ids).view()).unwrap();
        let shifted =
            |data: &[D]| gpu.upload(&[&vec![D::from_f32(f32::NAN); offset], data].concat());
        let w = match order {
            WeightOrder::OutIn => shifted(&self.w),
            WeightOrder::InOut => shifted(&transposed(&self.w, n, k)),
        };
        let (x, bias) = (gpu.upload(&self.x), self.bias.as_deref().map(shifted));
        let (x, w) = (x.view(), w.view());
        let (w, bias) = (w.slice(offset..), bias.as_ref().map(|bias| bias.view()));
        let bias = bias.as_ref().map(|bias| bias.slice(offset..));
        let mut y = gpu.poisoned::<D>(shape.slots() * n);
        let (w, y_view) = (LinearWeights { w: &w, bias: bias.as_ref(), order }, &mut y.view_mut());
        grouped_gemm_fwd_into(device, stream, &plan, n, k, Rows::Gathered, &x, w, y_view).unwrap();
        gpu.download(&y.view())
    }

    /// Both orders give the same bits, which are within their bounds; returns them.
    fn check(&self, gpu: &Gpu) -> Vec<u32> {
        let Self { shape, n, k, ids, x, w, bias } = self;
        let got = self.run(gpu, WeightOrder::OutIn, 0);
        let plan = reference::plan_fwd(shape, ids).unwrap();
        let bias = bias.as_deref();
        let linear = reference::LinearWeights { w: &w[..], bias, order: WeightOrder::OutIn };
        let want = bound::grouped_gemm(&plan, *n, *k, x, linear, true, D::DTYPE).unwrap();
        let what = format!("{shape} out {n} in {k} {} bias {}", D::DTYPE, bias.is_some());
        assert_within(&got, &want, &what);
        let got = bits(&got);
        assert!(
            got[plan.rows_in_use() * n..].iter().all(|&bits| bits == 0),
            "{what}: unused rows are +0"
        );
        assert_eq!(bits(&self.run(gpu, WeightOrder::InOut, 0)), got, "{what}");
        got
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn both_orders_match_the_reference(
        tokens in 0usize..70, experts in 1usize..6, top_k in 1usize..4, n in 1usize..160, k in 1usize..150,
        whole_chunks: bool, biased: bool, skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, top_k.min(experts)).unwrap();
        let width = |width: usize| if whole_chunks { width.next_multiple_of(8) } else { width };
        let (n, k) = (width(n), width(k));
        let gpu = gpu();
        gpu.reschedule(seed);
        Product::<f32>::new(shape, skew, n, k, biased, seed).check(&gpu);
        Product::<f16>::new(shape, skew, n, k, biased, seed).check(&gpu);
        Product::<bf16>::new(shape, skew, n, k, biased, seed).check(&gpu);
    }
}

/// Tiles of every height, halves of every width, and blocks of inputs with any end.
#[test]
fn tails() {
    let gpu = gpu();
    for tokens in [1, 32, 33, 64, 65, 129] {
        let shape = RoutingShape::new(tokens, 1, 1).unwrap();
        Product::<f32>::new(shape, Skew::Uniform, 24, 40, true, 1).check(&gpu);
        Product::<bf16>::new(shape, Skew::Uniform, 24, 40, true, 2).check(&gpu);
    }
    let shape = RoutingShape::new(9, 2, 1).unwrap();
    for n in [8, 56, 64, 72, 120, 128, 136, 200, 63, 129] {
        Product::<f32>::new(shape, Skew::Uniform, n, 16, true, 3).check(&gpu);
        Product::<f16>::new(shape, Skew::Uniform, n, 16, true, 4).check(&gpu);
    }
    for k in [8, 24, 32, 64, 72, 128, 136, 200, 264, 65] {
        Product::<f32>::new(shape, Skew::Uniform, 16, k, false, 5).check(&gpu);
        Product::<bf16>::new(shape, Skew::Uniform, 16, k, false, 6).check(&gpu);
    }
}

#[test]
fn weights_and_biases_start_at_any_element() {
    let gpu = gpu();
    let shape = RoutingShape::new(40, 3, 2).unwrap();
    let narrow = Product::<bf16>::new(shape, Skew::Zipf, 72, 136, true, 7);
    let wide = Product::<f32>::new(shape, Skew::Zipf, 72, 136, true, 8);
    let want = (narrow.check(&gpu), wide.check(&gpu));
    for order in [WeightOrder::OutIn, WeightOrder::InOut] {
        for offset in [1, 2, 3] {
            assert_eq!(bits(&narrow.run(&gpu, order, offset)), want.0, "{order:?} {offset}");
            assert_eq!(bits(&wide.run(&gpu, order, offset)), want.1, "{order:?} {offset}");
        }
    }
}

#[test]
fn unused_experts_are_not_read() {
    fn check<D: Dtype>(gpu: &Gpu) {
        let shape = RoutingShape::new(30, 4, 2).unwrap();
        let mut product = Product::<D>::new(shape, Skew::Empty, 40, 72, true, 9);
        let want = product.check(gpu);
        let matrix = product.n * product.k;
        for expert in [1, 3] {
            product.w[expert * matrix..][..matrix].fill(D::from_f32(f32::NAN));
            let bias = product.bias.as_mut().unwrap();
            bias[expert * product.n..][..product.n].fill(D::from_f32(f32::INFINITY));
        }
        for order in [WeightOrder::OutIn, WeightOrder::InOut] {
            assert_eq!(bits(&product.run(gpu, order, 0)), want, "{} {order:?}", D::DTYPE);
        }
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<bf16>(&gpu);
}

/// In both orders, NaN and infinity affect only their own row, column and expert.
#[test]
fn nan_affects_only_its_expert_and_column() {
    fn check<D: Dtype>(gpu: &Gpu) {
        let shape = RoutingShape::new(50, 2, 1).unwrap();
        let mut product = Product::<D>::new(shape, Skew::Uniform, 72, 40, true, 14);
        let clean = product.check(gpu);
        let (n, k, column) = (product.n, product.k, 70);
        product.w[(n + column + 1) * k - 1] = D::from_f32(f32::INFINITY);
        product.bias.as_mut().unwrap()[n + 3] = D::from_f32(f32::NAN);
        let plan = reference::plan_fwd(&shape, &product.ids).unwrap();
        for order in [WeightOrder::OutIn, WeightOrder::InOut] {
            for (index, value) in product.run(gpu, order, 0).iter().enumerate() {
                let of_expert = (index / n) as i32 >= plan.expert_offsets[1];
                let touched = of_expert && [3, column].contains(&(index % n));
                assert_eq!(!value.to_f32().is_finite(), touched, "{} {order:?} {index}", D::DTYPE);
                assert!(touched || value.to_f32().to_bits() == clean[index]);
            }
        }
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<f16>(&gpu);
}
