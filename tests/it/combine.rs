//! combine: a short sum in f32, in a stated order.

use half::{bf16, f16};
use moe_kernels::ops::combine::{self, CombineBuffers};
use moe_kernels::ops::plan;
use moe_kernels::{DType, Dtype, Error, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, skew, values};
use cudarc::driver::DeviceRepr;

/// What one combination starts from. Rows in no use and weights of inactive slots are NaN: nobody
/// may look at them.
struct Case<D> {
    shape: RoutingShape,
    hidden: usize,
    ids: Vec<u32>,
    plan: reference::Plan,
    yp: Vec<D>,
    weights: Vec<f32>,
}

impl<D: Dtype + DeviceRepr> Case<D> {
    fn new(shape: RoutingShape, skew: Skew, hidden: usize, seed: u64) -> Self {
        let ids = routing_ids(shape, skew, seed);
        let plan = reference::plan_fwd(&shape, 128, &ids).unwrap();
        let mut yp = values::<D>(shape.slots() * hidden, 2.0, seed ^ 1);
        let mut weights = values::<f32>(shape.slots(), 1.0, seed ^ 2);
        yp[plan.rows_in_use() * hidden..].fill(D::from_f32(f32::NAN));
        for (weight, row) in weights.iter_mut().zip(&plan.row_of_slot) {
            if *row < 0 {
                *weight = f32::NAN;
            }
        }
        Self { shape, hidden, ids, plan, yp, weights }
    }

    /// Combines with `yp` and `y` starting `offset` elements into their buffers; checks what lies before.
    fn run(&self, gpu: &Gpu, offset: usize) -> Vec<D> {
        self.run_apart(gpu, offset, offset)
    }

    /// The same, with an offset for each.
    fn run_apart(&self, gpu: &Gpu, yp_offset: usize, offset: usize) -> Vec<D> {
        let ids = gpu.upload(&self.ids);
        let yp = gpu.upload(&[&vec![D::from_f32(f32::NAN); yp_offset], &self.yp[..]].concat());
        let weights = gpu.upload(&self.weights);
        let mut y = gpu.poisoned::<D>(offset + self.shape.num_tokens * self.hidden);
        let plan = plan::plan_fwd(&gpu.device, &gpu.stream, self.shape, &ids.view()).unwrap();
        combine::combine_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            self.hidden,
            &yp.view().slice(yp_offset..),
            &weights.view(),
            &mut y.view_mut().slice_mut(offset..),
        )
        .unwrap();
        let mut got = gpu.download(&y.view());
        assert!(
            got[..offset].iter().all(|value| value.to_f32().is_nan()),
            "what lies before is left alone"
        );
        got.split_off(offset)
    }

    /// The kernel's own arithmetic: one fma after the other, rounded once.
    fn exact(&self) -> Vec<D> {
        let (k, hidden) = (self.shape.top_k, self.hidden);
        let element = |index: usize| {
            let (token, column) = (index / hidden, index % hidden);
            let slots = token * k..(token + 1) * k;
            let active = slots.filter(|&slot| self.plan.row_of_slot[slot] >= 0);
            let sum = active.fold(0.0f32, |sum, slot| {
                let row = self.plan.row_of_slot[slot] as usize;
                self.weights[slot].mul_add(self.yp[row * hidden + column].to_f32(), sum)
            });
            D::from_f32(sum)
        };
        (0..self.shape.num_tokens * hidden).map(element).collect()
    }

    fn check(&self, gpu: &Gpu, offset: usize) {
        let what = format!("{} H{} {} offset {offset}", self.shape, self.hidden, D::DTYPE);
        let got = self.run(gpu, offset);
        // The bound sums magnitudes, of inactive slots' weights too, so they get numbers there.
        let weights: Vec<f32> =
            self.weights.iter().map(|w| if w.is_nan() { 0.0 } else { *w }).collect();
        let (shape, plan) = (&self.shape, &self.plan);
        let want =
            reference::bound::combine(shape, plan, self.hidden, &self.yp, &weights, D::DTYPE)
                .unwrap();
        assert_within(&got, &want, &what);
        assert_eq!(bits(&got), bits(&self.exact()), "{what}: the order of summation");
    }
}

fn check<D: Dtype + DeviceRepr>(
    gpu: &Gpu,
    shape: RoutingShape,
    skew: Skew,
    hidden: usize,
    seed: u64,
) {
    Case::<D>::new(shape, skew, hidden, seed).check(gpu, (seed % 3) as usize);
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn matches_reference(
        tokens in 0usize..12, experts in 1usize..20, k in 1usize..11, hidden in 1usize..600,
        skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let gpu = gpu();
        gpu.reschedule(seed);
        check::<f32>(&gpu, shape, skew, hidden, seed);
        check::<f16>(&gpu, shape, skew, hidden, seed);
        check::<bf16>(&gpu, shape, skew, hidden, seed);
    }
}

/// Aligned rows and others, rows of one block and of several, and every K around the unrolling.
#[test]
fn edges() {
    let gpu = gpu();
    for hidden in [1, 7, 8, 248, 256, 1024, 1032, 2048, 2049, 4104] {
        for k in [1, 3, 4, 5, 8, 9] {
            let shape = RoutingShape::new(2, 9, k).unwrap();
            check::<f32>(&gpu, shape, Skew::Uniform, hidden, 3 * hidden as u64);
            check::<bf16>(&gpu, shape, Skew::Inactive, hidden, 3 * hidden as u64);
            check::<f16>(&gpu, shape, Skew::OneHot, hidden, 3 * hidden as u64 + 1);
        }
    }
    check::<f16>(&gpu, RoutingShape::new(0, 4, 2).unwrap(), Skew::Uniform, 16, 0);
    check::<f16>(&gpu, RoutingShape::new(1, 1, 1).unwrap(), Skew::Uniform, 16, 0);
}

/// Rows of whole vectors, of which one buffer's alone do not start at a 16-byte boundary.
#[test]
fn either_view_may_start_anywhere() {
    let gpu = gpu();
    let case = Case::<bf16>::new(RoutingShape::new(4, 5, 3).unwrap(), Skew::Uniform, 64, 4);
    for (yp_offset, y_offset) in [(1, 0), (0, 1)] {
        assert_eq!(bits(&case.run_apart(&gpu, yp_offset, y_offset)), bits(&case.exact()));
    }
}

#[test]
fn a_token_without_experts_is_zero() {
    let gpu = gpu();
    let (shape, hidden) = (RoutingShape::new(3, 4, 2).unwrap(), 40);
    let mut case = Case::<bf16>::new(shape, Skew::Uniform, hidden, 1);
    case.ids = vec![4, u32::MAX, 0, 1, 9, 5];
    case.plan = reference::plan_fwd(&shape, 128, &case.ids).unwrap();
    case.yp[2 * hidden..].fill(bf16::NAN);
    let y = case.run(&gpu, 0);
    assert_eq!(bits(&y[..hidden]), vec![0; hidden]);
    assert_eq!(bits(&y[2 * hidden..]), vec![0; hidden]);
    assert_eq!(bits(&y), bits(&case.exact()));
}

/// A NaN or an infinity in a row that a token does use belongs into its result, and nowhere else.
#[test]
fn undefined_rows_stay_with_their_token() {
    let gpu = gpu();
    let (shape, hidden) = (RoutingShape::new(8, 8, 2).unwrap(), 24);
    let mut case = Case::<f32>::new(shape, Skew::Uniform, hidden, 6);
    let row = case.plan.row_of_slot[2 * 3] as usize;
    case.yp[row * hidden..(row + 1) * hidden].fill(f32::NAN);
    let y = case.run(&gpu, 0);
    for (token, row) in y.chunks_exact(hidden).enumerate() {
        assert!(row.iter().all(|value| value.is_nan() == (token == 3)), "token {token}");
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let case = Case::<f16>::new(RoutingShape::new(20, 9, 3).unwrap(), Skew::Zipf, 72, 5);
    let runs: Vec<_> = (0..12)
        .map(|seed| {
            gpu.reschedule(seed);
            bits(&case.run(&gpu, seed as usize % 2))
        })
        .collect();
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn the_allocating_form_agrees() {
    let gpu = gpu();
    let case = Case::<f16>::new(RoutingShape::new(6, 5, 2).unwrap(), Skew::Uniform, 48, 3);
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, case.shape, &gpu.upload(&case.ids).view())
        .unwrap();
    let (yp, weights) = (gpu.upload(&case.yp), gpu.upload(&case.weights));
    let y = combine::combine_fwd(&gpu.device, &gpu.stream, &plan, 48, &yp.view(), &weights.view())
        .unwrap();
    assert_eq!(bits(&gpu.download(&y.as_view())), bits(&case.run(&gpu, 0)));
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let shape = RoutingShape::new(4, 4, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let yp = gpu.upload(&values::<f32>(8 * 8, 1.0, 0));
    let weights = gpu.upload(&values::<f32>(8, 1.0, 0));
    let mut y = gpu.poisoned::<f32>(4 * 8);
    let mut call = |hidden: usize, lens: [usize; 3]| {
        combine::combine_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            hidden,
            &yp.view().slice(..lens[0]),
            &weights.view().slice(..lens[1]),
            &mut y.view_mut().slice_mut(..lens[2]),
        )
    };
    let length =
        |argument, wanted, got| Err(Error::Length { op: "combine_fwd", argument, wanted, got });
    assert_eq!(call(8, [63, 8, 32]), length("yp", 64, 63));
    assert_eq!(call(8, [64, 7, 32]), length("weights", 8, 7));
    assert_eq!(call(8, [64, 8, 31]), length("y", 32, 31));
    assert!(matches!(
        call(usize::MAX, [64, 8, 32]),
        Err(Error::Unsupported { op: "combine_fwd", .. })
    ));
    assert!(call(8, [64, 8, 32]).is_ok());
    assert!(matches!(call(0, [0, 8, 0]), Err(Error::Unsupported { argument: "hidden", .. })));
}

#[test]
fn raw_arguments_are_checked() {
    let gpu = gpu();
    let shape = RoutingShape::new(1, 4, 2).unwrap();
    let good = CombineBuffers { y: 256, yp: 256, weights: 256, row_of_slot: 256 };
    let call = |hidden: usize, buffers: CombineBuffers| {
        // SAFETY: every call here fails before it launches anything.
        unsafe {
            combine::combine_fwd_raw(
                &gpu.device,
                gpu.stream.cu_stream(),
                DType::F16,
                shape,
                hidden,
                buffers,
            )
        }
    };
    for (argument, buffers) in [
        ("y", CombineBuffers { y: 257, ..good }),
        ("yp", CombineBuffers { yp: 257, ..good }),
        ("weights", CombineBuffers { weights: 258, ..good }),
        ("row_of_slot", CombineBuffers { row_of_slot: 258, ..good }),
    ] {
        let result = call(8, buffers);
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
    // More than a grid has blocks for, and more than an int holds.
    for hidden in [1 << 30, 1 << 40] {
        let too_wide = call(hidden, good);
        assert!(
            matches!(too_wide, Err(Error::Unsupported { argument: "hidden", .. })),
            "{too_wide:?}"
        );
    }
}
