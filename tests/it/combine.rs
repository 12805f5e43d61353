//! combine: matches its stated order bit for bit, and the reference in f64 within its bound.

mod errors;

use half::{bf16, f16};
use moe_kernels::ops::combine::{self, CombineInputs, Identity, Shared};
use moe_kernels::ops::plan;
use moe_kernels::{DType, Dtype, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, skew, values};

/// The terms besides rows and weights.
#[derive(Debug, Clone, Copy, Default)]
struct Options {
    /// Every weight is 1.
    unweighted: bool,
    /// The two ids from E on are identity experts.
    identity: bool,
    output_bias: bool,
    shared: bool,
    shared_gate: bool,
    average: bool,
    /// The weights are those of identity experts only; f16 only.
    rows_weighted: bool,
}

impl Options {
    /// Each bit of `number` is an option.
    fn new(number: u64) -> Self {
        let bit = |bit: u32| number >> bit & 1 == 1;
        let shared = bit(3);
        Self {
            unweighted: bit(0),
            identity: bit(1),
            output_bias: bit(2),
            shared,
            shared_gate: shared && bit(4),
            average: shared && bit(5),
            rows_weighted: bit(6) && bit(1) && !bit(0),
        }
    }

    /// True if the weights are those of all experts.
    fn weights_all(self) -> bool {
        !self.unweighted && !self.rows_weighted
    }

    /// True if the weights are those of identity experts only.
    fn weights_identities(self) -> bool {
        !self.unweighted && self.rows_weighted
    }
}

/// The inputs of one combination. Unused rows, weights of inactive slots, and tokens without
/// identity experts are NaN, because they must not be read.
struct Case<D> {
    shape: RoutingShape,
    hidden: usize,
    options: Options,
    ids: Vec<u32>,
    plan: reference::Plan,
    yp: Vec<D>,
    weights: Vec<f32>,
    x: Vec<D>,
    output_bias: Vec<D>,
    shared: Vec<D>,
    shared_gate: Vec<f32>,
}

impl<D: Dtype> Case<D> {
    fn new(shape: RoutingShape, skew: Skew, hidden: usize, seed: u64) -> Self {
        Self::with(shape, skew, hidden, seed, Options::default())
    }

    fn with(shape: RoutingShape, skew: Skew, hidden: usize, seed: u64, options: Options) -> Self {
        let mut ids = routing_ids(shape, skew, seed);
        if options.identity {
            // Two identity experts, and the id after them.
            for (slot, id) in ids.iter_mut().enumerate().skip(seed as usize % 2).step_by(4) {
                *id = (shape.num_experts + slot / 4 % 3) as u32;
            }
        }
        let plan = reference::plan_fwd(&shape, &ids).unwrap();
        let tokens = shape.num_tokens * hidden;
        let mut case = Self {
            shape,
            hidden,
            options,
            yp: values::<D>(shape.slots() * hidden, 2.0, seed ^ 1),
            weights: values::<f32>(shape.slots(), 1.0, seed ^ 2),
            x: values::<D>(tokens, 2.0, seed ^ 3),
            output_bias: values::<D>(hidden, 1.0, seed ^ 4),
            shared: values::<D>(tokens, 2.0, seed ^ 5),
            shared_gate: values::<f32>(shape.num_tokens, 9.0, seed ^ 6),
            ids,
            plan,
        };
        case.yp[case.plan.rows_in_use() * hidden..].fill(D::from_f32(f32::NAN));
        for slot in 0..shape.slots() {
            if case.plan.row_of_slot[slot] < 0 && !case.is_identity(slot) {
                case.weights[slot] = f32::NAN;
            }
        }
        for token in 0..shape.num_tokens {
            let mut slots = token * shape.top_k..(token + 1) * shape.top_k;
            if !slots.any(|slot| case.is_identity(slot)) {
                case.x[token * hidden..][..hidden].fill(D::from_f32(f32::NAN));
            }
        }
        case
    }

    fn is_identity(&self, slot: usize) -> bool {
        let experts = self.shape.num_experts as u32;
        self.options.identity && (experts..experts + 2).contains(&self.ids[slot])
    }

    /// Runs the operation with all buffers at `offset`; checks that nothing before `y` is written.
    fn run(&self, gpu: &Gpu, offset: usize) -> Vec<D> {
        self.run_at(gpu, [offset; 5])
    }

    /// The same, with one offset for each of `yp`, `y`, `x`, `output_bias` and `shared`.
    fn run_at(&self, gpu: &Gpu, offsets: [usize; 5]) -> Vec<D> {
        let upload = |offset: usize, values: &[D]| {
            gpu.upload(&[&vec![D::from_f32(f32::NAN); offset], values].concat())
        };
        let ids = gpu.upload(&self.ids);
        let plan = plan::plan_fwd(&gpu.device, &gpu.stream, self.shape, &ids.view()).unwrap();
        let yp = upload(offsets[0], &self.yp);
        let x = upload(offsets[2], &self.x);
        let output_bias = upload(offsets[3], &self.output_bias);
        let shared = upload(offsets[4], &self.shared);
        let (weights, gate) = (gpu.upload(&self.weights), gpu.upload(&self.shared_gate));
        let (yp, x) = (yp.view(), x.view());
        let (output_bias, shared) = (output_bias.view(), shared.view());
        let (yp, x) = (yp.slice(offsets[0]..), x.slice(offsets[2]..));
        let (output_bias, shared) = (output_bias.slice(offsets[3]..), shared.slice(offsets[4]..));
        let (ids, weights, gate) = (ids.view(), weights.view(), gate.view());
        let options = self.options;
        let experts = self.shape.num_experts as u32;
        let inputs = CombineInputs {
            yp: &yp,
            routing_weights: options.weights_all().then_some(&weights),
            identity: options.identity.then_some(Identity {
                experts: experts..experts + 2,
                expert_ids: &ids,
                x: &x,
                routing_weights: options.weights_identities().then_some(&weights),
            }),
            output_bias: options.output_bias.then_some(&output_bias),
            shared: options.shared.then_some(Shared {
                y: &shared,
                gate: options.shared_gate.then_some(&gate),
                average: options.average,
            }),
        };
        let offset = offsets[1];
        let mut y = gpu.poisoned::<D>(offset + self.shape.num_tokens * self.hidden);
        combine::combine_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            self.hidden,
            &inputs,
            &mut y.view_mut().slice_mut(offset..),
        )
        .unwrap();
        let mut got = gpu.download(&y.view());
        assert!(
            got[..offset].iter().all(|value| value.to_f32().is_nan()),
            "writes before the view"
        );
        got.split_off(offset)
    }

    /// The arithmetic of the kernel: fma after fma, rounded once.
    fn exact(&self) -> Vec<D> {
        let (k, hidden, options) = (self.shape.top_k, self.hidden, self.options);
        let element = |index: usize| {
            let (token, column) = (index / hidden, index % hidden);
            let mut sum = 0.0f32;
            for slot in token * k..(token + 1) * k {
                let (value, weighted) = match self.plan.row_of_slot[slot] {
                    row if row >= 0 => {
                        (self.yp[row as usize * hidden + column], options.weights_all())
                    }
                    _ if self.is_identity(slot) => (self.x[index], !options.unweighted),
                    _ => continue,
                };
                let weight = if weighted { self.weights[slot] } else { 1.0 };
                sum = weight.mul_add(value.to_f32(), sum);
            }
            if options.output_bias {
                sum += self.output_bias[column].to_f32();
            }
            if options.shared {
                let gate = 1.0 / (1.0 + (-self.shared_gate[token]).exp());
                let gate = if options.shared_gate { gate } else { 1.0 };
                sum = gate.mul_add(self.shared[index].to_f32(), sum);
            }
            D::from_f32(if options.average { 0.5 * sum } else { sum })
        };
        (0..self.shape.num_tokens * hidden).map(element).collect()
    }

    fn check(&self, gpu: &Gpu, offset: usize) {
        let options = self.options;
        let what =
            format!("{} H{} {} offset {offset} {options:?}", self.shape, self.hidden, D::DTYPE);
        let got = self.run(gpu, offset);
        // The bound sums the magnitudes of all weights, so those of inactive slots must not be NaN.
        let weights: Vec<f32> =
            self.weights.iter().map(|w| if w.is_nan() { 0.0 } else { *w }).collect();
        let experts = self.shape.num_experts as u32;
        let inputs = reference::CombineInputs {
            yp: &self.yp[..],
            routing_weights: options.weights_all().then_some(&weights[..]),
            identity: options.identity.then_some(reference::Identity {
                experts: experts..experts + 2,
                expert_ids: &self.ids,
                x: &self.x[..],
                routing_weights: options.weights_identities().then_some(&weights[..]),
            }),
            output_bias: options.output_bias.then_some(&self.output_bias[..]),
            shared: options.shared.then_some(reference::Shared {
                y: &self.shared[..],
                gate: options.shared_gate.then_some(&self.shared_gate[..]),
                average: options.average,
            }),
        };
        let (shape, plan) = (&self.shape, &self.plan);
        let want = reference::bound::combine(shape, plan, self.hidden, &inputs, D::DTYPE).unwrap();
        assert_within(&got, &want, &what);
        // A GPU's expf differs from the host's.
        if gpu.emulated || !options.shared_gate {
            assert_eq!(bits(&got), bits(&self.exact()), "{what}: the order of summation");
        }
    }
}

fn check<D: Dtype>(
    gpu: &Gpu,
    shape: RoutingShape,
    skew: Skew,
    hidden: usize,
    seed: u64,
    options: Options,
) {
    let rows_weighted = options.rows_weighted && D::DTYPE == DType::F16;
    let options = Options { rows_weighted, ..options };
    Case::<D>::with(shape, skew, hidden, seed, options).check(gpu, (seed % 3) as usize);
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn matches_reference(
        tokens in 0usize..12, experts in 1usize..50, k in 1usize..40, hidden in 1usize..600,
        skew in skew(), options in 0u64..128, seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let (gpu, options) = (gpu(), Options::new(options));
        gpu.reschedule(seed);
        check::<f32>(&gpu, shape, skew, hidden, seed, options);
        check::<f16>(&gpu, shape, skew, hidden, seed, options);
        check::<bf16>(&gpu, shape, skew, hidden, seed, options);
    }
}

/// Aligned and unaligned rows, rows of one and of several blocks, and K around the unrolling.
#[test]
fn edge_shapes_match_reference() {
    let (gpu, plain, all) = (gpu(), Options::default(), Options::new(0b11_1110));
    for hidden in [1, 7, 8, 248, 256, 1024, 1032, 2048, 2049, 4104] {
        for k in [1, 3, 4, 5, 8, 9] {
            let shape = RoutingShape::new(2, 9, k).unwrap();
            check::<f32>(&gpu, shape, Skew::Uniform, hidden, 3 * hidden as u64, plain);
            check::<bf16>(&gpu, shape, Skew::Inactive, hidden, 3 * hidden as u64, plain);
            check::<f16>(&gpu, shape, Skew::OneHot, hidden, 3 * hidden as u64 + 1, all);
        }
    }
    for rows_weighted in [0b100_0010, 0b100_1110] {
        let shape = RoutingShape::new(7, 9, 5).unwrap();
        let options = Options::new(rows_weighted);
        assert!(options.weights_identities());
        check::<f16>(&gpu, shape, Skew::Uniform, 256, 1, options);
        check::<f16>(&gpu, shape, Skew::Inactive, 33, 2, options);
    }
    // K around the 32 slots that a warp looks up at once.
    for k in [31, 32, 33, 64, 65] {
        let shape = RoutingShape::new(3, 65, k).unwrap();
        check::<bf16>(&gpu, shape, Skew::Inactive, 72, 6, all);
        check::<f32>(&gpu, shape, Skew::Uniform, 33, 7, plain);
    }
    check::<f16>(&gpu, RoutingShape::new(0, 4, 2).unwrap(), Skew::Uniform, 16, 0, all);
    check::<f16>(&gpu, RoutingShape::new(1, 1, 1).unwrap(), Skew::Uniform, 16, 0, plain);
}

/// Rows of whole vectors, where one buffer does not start at a 16-byte boundary.
#[test]
fn accepts_views_at_any_offset() {
    let gpu = gpu();
    let shape = RoutingShape::new(4, 5, 3).unwrap();
    let case = Case::<bf16>::with(shape, Skew::Uniform, 64, 4, Options::new(0b10_1110));
    for buffer in 0..5 {
        let mut offsets = [0; 5];
        offsets[buffer] = 1;
        assert_eq!(bits(&case.run_at(&gpu, offsets)), bits(&case.exact()), "buffer {buffer}");
    }
}

#[test]
fn token_without_experts_is_zero() {
    let gpu = gpu();
    let (shape, hidden) = (RoutingShape::new(3, 4, 2).unwrap(), 40);
    let mut case = Case::<bf16>::new(shape, Skew::Uniform, hidden, 1);
    case.ids = vec![4, u32::MAX, 0, 1, 9, 5];
    case.plan = reference::plan_fwd(&shape, &case.ids).unwrap();
    case.yp[2 * hidden..].fill(bf16::NAN);
    let y = case.run(&gpu, 0);
    assert_eq!(bits(&y[..hidden]), vec![0; hidden]);
    assert_eq!(bits(&y[2 * hidden..]), vec![0; hidden]);
    assert_eq!(bits(&y), bits(&case.exact()));
}

/// Ids next to the identity experts, and ids past `i32::MAX`, are inactive.
#[test]
fn identity_experts_are_a_range_of_ids() {
    let gpu = gpu();
    let (shape, hidden) = (RoutingShape::new(6, 4, 1).unwrap(), 8);
    let options = Options { identity: true, unweighted: true, ..Options::default() };
    let mut case = Case::<f32>::with(shape, Skew::Uniform, hidden, 1, options);
    case.ids = vec![4, 5, 6, u32::MAX, 1 << 31, i32::MAX as u32];
    case.plan = reference::plan_fwd(&shape, &case.ids).unwrap();
    case.yp.fill(f32::NAN);
    case.x = values::<f32>(6 * hidden, 1.0, 9);
    case.x[2 * hidden..].fill(f32::NAN);
    let y = case.run(&gpu, 0);
    assert_eq!(y[..2 * hidden], case.x[..2 * hidden]);
    assert_eq!(bits(&y[2 * hidden..]), vec![0; 4 * hidden]);
}

/// Gates whose exponential overflows, infinite gates, and NaN.
#[test]
fn shared_gate_handles_any_bits() {
    let gpu = gpu();
    let (shape, hidden) = (RoutingShape::new(8, 3, 2).unwrap(), 16);
    let options = Options { shared: true, shared_gate: true, ..Options::default() };
    let mut case = Case::<f32>::with(shape, Skew::Uniform, hidden, 2, options);
    case.shared_gate =
        vec![-200.0, -89.0, -87.0, 0.0, 40.0, f32::INFINITY, f32::NEG_INFINITY, -0.0];
    case.check(&gpu, 0);
    case.shared_gate = vec![f32::NAN; 8];
    assert!(case.run(&gpu, 0).iter().all(|y| y.is_nan()));
}

/// NaN in a row propagates to the result of its token, and to no other.
#[test]
fn nan_propagates_to_its_token_only() {
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
    let shape = RoutingShape::new(20, 9, 3).unwrap();
    let case = Case::<f16>::with(shape, Skew::Zipf, 72, 5, Options::new(0b11_1110));
    let runs: Vec<_> = (0..12)
        .map(|seed| {
            gpu.reschedule(seed);
            bits(&case.run(&gpu, seed as usize % 2))
        })
        .collect();
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn allocating_form_matches() {
    let gpu = gpu();
    let case = Case::<f16>::new(RoutingShape::new(6, 5, 2).unwrap(), Skew::Uniform, 48, 3);
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, case.shape, &gpu.upload(&case.ids).view())
        .unwrap();
    let (yp, weights) = (gpu.upload(&case.yp), gpu.upload(&case.weights));
    let (yp, weights) = (yp.view(), weights.view());
    let inputs = CombineInputs::new(&yp, &weights);
    let y = combine::combine_fwd(&gpu.device, &gpu.stream, &plan, 48, &inputs).unwrap();
    assert_eq!(bits(&gpu.download(&y.as_view())), bits(&case.run(&gpu, 0)));
}
