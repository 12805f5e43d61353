//! Gate and up with any activation and any layout of the weights.

use half::{bf16, f16};
use moe_kernels::ops::grouped_gemm::{
    GateUpTensors, GateUpWeights, Rows, grouped_gemm_gate_up_fwd_into,
};
use moe_kernels::ops::plan;
use moe_kernels::reference::bound::Bounded;
use moe_kernels::reference::{self, bound};
use moe_kernels::{
    Activation, ActivationFunction, Dtype, ExpertConfig, GateUpLayout, Limit, RoutingShape,
    WeightOrder, WeightPosition,
};
use proptest::prelude::*;

use super::layouts::transposed;
use crate::common::{Gpu, Skew, assert_within, bits, config, gpu, routing_ids, skew, values};

/// Experts with random gate and up, `[E, I, in]` each, where `k` is in.
#[derive(Clone)]
struct Case<D> {
    shape: RoutingShape,
    experts: ExpertConfig,
    i: usize,
    k: usize,
    rows: Rows,
    ids: Vec<u32>,
    x: Vec<D>,
    gate: Vec<D>,
    up: Vec<D>,
    gate_bias: Vec<D>,
    up_bias: Vec<D>,
    weights: Vec<f32>,
}

/// The tensors of a checkpoint with the configuration's layout.
struct Stored<D> {
    /// The fused tensor, or gate.
    first: Vec<D>,
    up: Option<Vec<D>>,
    bias: Option<Vec<D>>,
}

/// Pieces of `piece` elements of `a` and `b`, alternating.
fn interleave<D: Copy>(a: &[D], b: &[D], piece: usize) -> Vec<D> {
    a.chunks(piece).zip(b.chunks(piece)).flat_map(|(a, b)| [a, b].concat()).collect()
}

impl<D: Dtype> Case<D> {
    fn new(
        shape: RoutingShape,
        experts: ExpertConfig,
        skew: Skew,
        [i, k]: [usize; 2],
        rows: Rows,
        seed: u64,
    ) -> Self {
        let x_rows = if rows == Rows::Gathered { shape.num_tokens } else { shape.slots() };
        let features = shape.num_experts * i;
        // Sums of a few units, so that limits cut some of them, and no square of one leaves f16.
        let scale = 4.0 / (k as f64).sqrt();
        Self {
            shape,
            experts,
            i,
            k,
            rows,
            ids: routing_ids(shape, skew, seed),
            x: values(x_rows * k, 2.0, seed ^ 1),
            gate: values(features * k, scale, seed ^ 2),
            up: values(features * k, scale, seed ^ 3),
            gate_bias: values(features, 2.0, seed ^ 4),
            up_bias: values(features, 2.0, seed ^ 5),
            weights: values(shape.slots(), 1.5, seed ^ 6),
        }
    }

    fn stored(&self) -> Stored<D> {
        let Self { experts, i, k, .. } = self;
        let ExpertConfig { gated, gate_up, gate_up_order, gate_up_bias, .. } = *experts;
        let of = |a: &[D], b: &[D], piece: usize| match gate_up {
            _ if !gated => b.to_vec(),
            GateUpLayout::Interleaved => interleave(a, b, piece / i),
            _ => interleave(a, b, piece),
        };
        let bias = gate_up_bias.then(|| of(&self.gate_bias, &self.up_bias, *i));
        let ordered = |w: &[D], features: usize| match gate_up_order {
            WeightOrder::OutIn => w.to_vec(),
            WeightOrder::InOut => transposed(w, features, *k),
        };
        if gate_up == GateUpLayout::Separate {
            let up = Some(ordered(&self.up, *i));
            return Stored { first: ordered(&self.gate, *i), up, bias };
        }
        let features = if gated { 2 * i } else { *i };
        let first = ordered(&of(&self.gate, &self.up, i * k), features);
        Stored { first, up: None, bias }
    }

    /// The device's result. The offsets from a 16-byte boundary, in elements, are those of `x`, of
    /// the weights, of up and biases, and of `act`.
    fn run(&self, gpu: &Gpu, [x_offset, w_offset, up_offset, act_offset]: [usize; 4]) -> Vec<D> {
        let Self { shape, experts, i, k, rows, .. } = self;
        let (device, stream) = (&gpu.device, &gpu.stream);
        let plan = plan::plan_fwd(device, stream, *shape, &gpu.upload(&self.ids).view()).unwrap();
        let shifted = |data: &[D], offset: usize| {
            gpu.upload(&[&vec![D::from_f32(f32::NAN); offset], data].concat())
        };
        let Stored { first, up, bias } = self.stored();
        let (x, first) = (shifted(&self.x, x_offset), shifted(&first, w_offset));
        let (up, bias) =
            (up.map(|up| shifted(&up, up_offset)), bias.map(|b| shifted(&b, up_offset)));
        let weights = gpu.upload(&self.weights);
        let mut act = gpu.poisoned::<D>(act_offset + shape.slots() * i);
        {
            let (x, first, weights) = (x.view(), first.view(), weights.view());
            let (x, first) = (x.slice(x_offset..), first.slice(w_offset..));
            let (up, bias) = (up.as_ref().map(|up| up.view()), bias.as_ref().map(|b| b.view()));
            let up = up.as_ref().map(|up| up.slice(up_offset..));
            let bias = bias.as_ref().map(|bias| bias.slice(up_offset..));
            let tensors = match &up {
                Some(up) => GateUpTensors::Separate { gate: &first, up },
                None => GateUpTensors::Fused(&first),
            };
            let gate_up = GateUpWeights { tensors, bias: bias.as_ref() };
            let weighted = experts.weight_position != WeightPosition::Output;
            let weights = weighted.then_some(&weights);
            let mut act = act.view_mut();
            let act = &mut act.slice_mut(act_offset..);
            grouped_gemm_gate_up_fwd_into(
                device, stream, &plan, experts, *i, *k, *rows, &x, gate_up, weights, act,
            )
            .unwrap();
        }
        let mut act = gpu.download(&act.view());
        assert!(
            act[..act_offset].iter().all(|value| value.to_f32().is_nan()),
            "elements before the view are not written"
        );
        act.split_off(act_offset)
    }

    /// Checks the device's result against the reference, and returns its bits.
    fn check(&self, gpu: &Gpu) -> Vec<u32> {
        let Self { shape, experts, i, k, rows, .. } = self;
        let got = self.run(gpu, [0; 4]);
        let plan = reference::plan_fwd(shape, &self.ids).unwrap();
        let Stored { first, up, bias } = self.stored();
        let tensors = match &up {
            Some(up) => reference::GateUpTensors::Separate { gate: &first[..], up: &up[..] },
            None => reference::GateUpTensors::Fused(&first[..]),
        };
        let gate_up = reference::GateUpWeights { tensors, bias: bias.as_deref() };
        let exact = Bounded {
            value: self.weights.iter().map(|&weight| weight.into()).collect(),
            bound: vec![0.0; self.weights.len()],
        };
        let weights = (experts.weight_position != WeightPosition::Output).then_some(&exact);
        let gather = *rows == Rows::Gathered;
        let want = bound::grouped_gemm_gate_up(
            &plan,
            experts,
            *i,
            *k,
            &self.x,
            gate_up,
            weights,
            gather,
            D::DTYPE,
        )
        .unwrap();
        let what = format!("{shape} I {i} in {k} {rows:?} {} {experts}", D::DTYPE);
        assert_within(&got, &want, &what);
        let got = bits(&got);
        assert!(
            got[plan.rows_in_use() * i..].iter().all(|&bits| bits == 0),
            "{what}: unused rows are +0"
        );
        got
    }

    /// Checks that every layout of the same weights gives the same bits, and returns them.
    fn check_layouts(&self, gpu: &Gpu) -> Vec<u32> {
        let want = self.check(gpu);
        for (gate_up, gate_up_order) in layouts(self.experts.gated) {
            let experts = ExpertConfig { gate_up, gate_up_order, ..self.experts };
            let other = Case { experts, ..self.clone() };
            let Case { shape, i, k, .. } = self;
            let what = format!("{shape} I {i} in {k} {} {experts}", D::DTYPE);
            assert_eq!(bits(&other.run(gpu, [0; 4])), want, "{what}");
        }
        want
    }
}

fn layouts(gated: bool) -> Vec<(GateUpLayout, WeightOrder)> {
    let each = |gate_up| [(gate_up, WeightOrder::OutIn), (gate_up, WeightOrder::InOut)];
    if !gated {
        return each(GateUpLayout::Concatenated).to_vec();
    }
    [GateUpLayout::Concatenated, GateUpLayout::Interleaved, GateUpLayout::Separate]
        .into_iter()
        .flat_map(each)
        .collect()
}

fn activation() -> impl Strategy<Value = Activation> {
    use ActivationFunction::{Gelu, GeluTanh, Relu, ReluSquared, Silu};
    let limit = |which: u8, limit: f32, other: f32| match which {
        0 => Limit::None,
        1 => Limit::Before { limit },
        2 => Limit::After { limit },
        _ => Limit::SoftCap { gate: limit, up: other },
    };
    let function = proptest::sample::select(vec![Silu, Gelu, GeluTanh, Relu, ReluSquared]);
    let alpha = prop_oneof![Just(1.0f32), -2.0f32..2.0];
    let offset = prop_oneof![Just(0.0f32), -2.0f32..2.0];
    (function, alpha, 0u8..4, 0.5f32..8.0, 0.5f32..8.0, offset).prop_map(
        move |(function, alpha, which, bound, other, up_offset)| {
            let silu = function == Silu;
            let which = if silu { which } else { which % 3 };
            let alpha = if silu { alpha } else { 1.0 };
            Activation { function, alpha, limit: limit(which, bound, other), up_offset }
        },
    )
}

fn experts() -> impl Strategy<Value = ExpertConfig> {
    let position = proptest::sample::select(vec![
        WeightPosition::Output,
        WeightPosition::Input,
        WeightPosition::Inside,
    ]);
    (activation(), any::<bool>(), any::<bool>(), 0usize..6, position).prop_map(
        |(activation, gated, gate_up_bias, layout, weight_position)| {
            let layouts = layouts(gated);
            let (gate_up, gate_up_order) = layouts[layout % layouts.len()];
            let up_offset = if gated { activation.up_offset } else { 0.0 };
            ExpertConfig {
                activation: Activation { up_offset, ..activation },
                gated,
                gate_up_bias,
                gate_up,
                gate_up_order,
                weight_position,
                ..ExpertConfig::default()
            }
        },
    )
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn any_experts_match_the_reference(
        experts in experts(), tokens in 0usize..60, num_experts in 1usize..6, top_k in 1usize..4,
        i in 1usize..150, k in 1usize..120, whole_chunks: bool, gather: bool, skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, num_experts, top_k.min(num_experts)).unwrap();
        let width = |width: usize| if whole_chunks { width.next_multiple_of(8) } else { width };
        let widths = [width(i), width(k)];
        let rows = if gather { Rows::Gathered } else { Rows::Grouped };
        let gpu = gpu();
        gpu.reschedule(seed);
        Case::<f32>::new(shape, experts, skew, widths, rows, seed).check(&gpu);
        Case::<f16>::new(shape, experts, skew, widths, rows, seed).check(&gpu);
        Case::<bf16>::new(shape, experts, skew, widths, rows, seed).check(&gpu);
    }
}

/// The activation of gpt-oss, with biases and routing weights on the input.
fn all_options() -> ExpertConfig {
    ExpertConfig {
        activation: Activation {
            alpha: 1.702,
            limit: Limit::Before { limit: 3.0 },
            up_offset: 1.0,
            ..Activation::default()
        },
        gate_up_bias: true,
        weight_position: WeightPosition::Input,
        ..ExpertConfig::default()
    }
}

fn without_gate() -> ExpertConfig {
    ExpertConfig {
        activation: Activation {
            function: ActivationFunction::ReluSquared,
            ..Activation::default()
        },
        gated: false,
        gate_up_bias: true,
        weight_position: WeightPosition::Inside,
        ..ExpertConfig::default()
    }
}

#[test]
fn layouts_do_not_change_bits() {
    fn check<D: Dtype>(gpu: &Gpu) {
        for experts in [all_options(), without_gate()] {
            for (tokens, widths) in [
                (20, [24, 40]),
                (150, [136, 72]), // tiles of two heights, two and three columns of them
                (70, [64, 128]),
                (9, [200, 264]),
                (33, [65, 40]), // only x starts at boundaries
                (33, [40, 65]),
                (5, [1, 1]),
            ] {
                let shape = RoutingShape::new(tokens, 3, 2).unwrap();
                Case::<D>::new(shape, experts, Skew::Zipf, widths, Rows::Gathered, 1)
                    .check_layouts(gpu);
            }
        }
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<f16>(&gpu);
    check::<bf16>(&gpu);
}

#[test]
fn extreme_routings() {
    let gpu = gpu();
    for (tokens, num_experts, top_k) in [(0, 4, 2), (1, 64, 1), (1, 8, 8), (3, 3, 3), (40, 12, 4)] {
        let shape = RoutingShape::new(tokens, num_experts, top_k).unwrap();
        for skew in [Skew::OneHot, Skew::Empty, Skew::Inactive] {
            for experts in [all_options(), without_gate()] {
                let case = |rows| Case::<bf16>::new(shape, experts, skew, [72, 24], rows, 2);
                case(Rows::Gathered).check(&gpu);
                case(Rows::Grouped).check(&gpu);
            }
        }
    }
}

#[test]
fn views_start_at_any_element() {
    fn check<D: Dtype>(gpu: &Gpu) {
        let shape = RoutingShape::new(40, 3, 2).unwrap();
        for (gate_up, gate_up_order) in layouts(true) {
            let experts = ExpertConfig { gate_up, gate_up_order, ..all_options() };
            let case = Case::<D>::new(shape, experts, Skew::Zipf, [72, 136], Rows::Gathered, 3);
            let want = case.check(gpu);
            for offsets in [[1; 4], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]] {
                assert_eq!(
                    bits(&case.run(gpu, offsets)),
                    want,
                    "{} {offsets:?} {experts}",
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
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let shape = RoutingShape::new(45, 3, 2).unwrap();
    let interleaved = ExpertConfig {
        gate_up: GateUpLayout::Interleaved,
        gate_up_order: WeightOrder::InOut,
        ..all_options()
    };
    for experts in [interleaved, without_gate()] {
        let run = |seed| {
            gpu.reschedule(seed);
            let widths = [136, 264];
            let wide = Case::<f32>::new(shape, experts, Skew::Zipf, widths, Rows::Grouped, 4);
            let narrow = Case::<f16>::new(shape, experts, Skew::Zipf, widths, Rows::Gathered, 4);
            (wide.check(&gpu), narrow.check(&gpu))
        };
        let first = run(0);
        assert!((1..8).all(|seed| run(seed) == first));
    }
}

#[test]
fn unused_experts_and_weights_are_not_read() {
    let gpu = gpu();
    let shape = RoutingShape::new(30, 4, 2).unwrap();
    for (gate_up, gate_up_order) in layouts(true) {
        let experts = ExpertConfig { gate_up, gate_up_order, ..all_options() };
        let mut case = Case::<bf16>::new(shape, experts, Skew::Empty, [40, 72], Rows::Gathered, 5);
        let want = case.check(&gpu);
        let (nan, matrix) = (bf16::NAN, case.i * case.k);
        for expert in [1, 3] {
            for w in [&mut case.gate, &mut case.up] {
                w[expert * matrix..][..matrix].fill(nan);
            }
            for bias in [&mut case.gate_bias, &mut case.up_bias] {
                bias[expert * case.i..][..case.i].fill(nan);
            }
        }
        assert_eq!(bits(&case.run(&gpu, [0; 4])), want, "{experts}");
        // The weight of a slot without a row is not read.
        case.ids[0] = u32::MAX;
        let want = bits(&case.run(&gpu, [0; 4]));
        case.weights[0] = f32::NAN;
        assert_eq!(bits(&case.run(&gpu, [0; 4])), want, "{experts}");
    }
}

/// The outputs for these values of gate and up, which are the weights of one token with one input
/// of 1.
fn activated<D: Dtype>(gpu: &Gpu, activation: Activation, pairs: &[(f32, f32)]) -> Vec<f32> {
    let shape = RoutingShape::new(1, 1, 1).unwrap();
    let experts = ExpertConfig { activation, ..ExpertConfig::default() };
    let mut case =
        Case::<D>::new(shape, experts, Skew::Uniform, [pairs.len(), 1], Rows::Gathered, 6);
    case.x = vec![D::from_f32(1.0)];
    case.gate = pairs.iter().map(|pair| D::from_f32(pair.0)).collect();
    case.up = pairs.iter().map(|pair| D::from_f32(pair.1)).collect();
    case.run(gpu, [0; 4]).iter().map(|value| value.to_f32()).collect()
}

#[test]
fn nan_propagates() {
    use ActivationFunction::{Gelu, GeluTanh, Relu, ReluSquared, Silu};
    let gpu = gpu();
    let limit = 2.0;
    let soft = Limit::SoftCap { gate: 2.0, up: 2.0 };
    for function in [Silu, Gelu, GeluTanh, Relu, ReluSquared] {
        for limit in [Limit::None, Limit::Before { limit }, Limit::After { limit }, soft] {
            if limit == soft && function != Silu {
                continue;
            }
            let activation = Activation { function, limit, ..Activation::default() };
            let (nan, inf) = (f32::NAN, f32::INFINITY);
            let pairs = [
                (nan, 1.0),
                (1.0, nan),
                (nan, nan),
                (inf, 1.0),
                (1.0, inf),
                (1.0, -inf),
                (-200.0, 1.0),
            ];
            let got = activated::<bf16>(&gpu, activation, &pairs);
            assert!(got[..3].iter().all(|value| value.is_nan()), "{activation}: {got:?}");
            if limit == Limit::None {
                assert_eq!((got[3], got[4], got[5]), (inf, inf, -inf), "{activation}");
            } else {
                assert!(got[3..6].iter().all(|value| value.abs() <= 4.0), "{activation}: {got:?}");
            }
            assert!(got[6] == 0.0, "{activation}: {got:?}");
        }
    }
}

/// Limits are exact if no value is rounded.
#[test]
fn limits_are_exact() {
    let gpu = gpu();
    let relu = |limit| Activation {
        function: ActivationFunction::Relu,
        limit,
        up_offset: 1.0,
        ..Activation::default()
    };
    let pairs = [(5.0, 5.0), (1.0, -5.0), (-5.0, 1.0), (2.0, 2.0), (2.5, 2.0)];
    let want = [6.0, -1.0, 0.0, 6.0, 6.0];
    for limit in [Limit::Before { limit: 2.0 }, Limit::After { limit: 2.0 }] {
        assert_eq!(activated::<f32>(&gpu, relu(limit), &pairs), want, "{limit:?}");
        assert_eq!(activated::<f16>(&gpu, relu(limit), &pairs), want, "{limit:?}");
    }
    let squared = |limit| Activation { function: ActivationFunction::ReluSquared, ..relu(limit) };
    let before = activated::<f32>(&gpu, squared(Limit::Before { limit: 2.0 }), &pairs);
    assert_eq!(before, [12.0, -1.0, 0.0, 12.0, 12.0]);
    let after = activated::<f32>(&gpu, squared(Limit::After { limit: 2.0 }), &pairs);
    assert_eq!(after, [6.0, -1.0, 0.0, 6.0, 6.0]);
}
