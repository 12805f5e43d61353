//! A layer with capacity: every option against a composition of the operations of the reference.

mod counts;
mod nllb;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::bf16;
use moe_kernels::reference::{self, Capacity, RouteInputs};
use moe_kernels::{
    CapacityConfig, CapacityLimit, DType, Device, Dtype, Error, MoeConfig, MoeInputs, MoeLayer,
    MoeWeights, Normalization, Priority, RouterConfig, RoutingOutputs, RoutingShape, Scoring,
    Selection, Typed, Workspace,
};
use proptest::prelude::*;

use super::{Case, Prepared};
use crate::common::{Gpu, Rng, bits, config, gpu, random_config, random_inputs, random_weights};

const NONE: u32 = u32::MAX;
const PRIORITIES: [Priority; 4] =
    [Priority::Token, Priority::Choice, Priority::Weight, Priority::ChoiceByTopWeight];

/// The routing of a layer with capacity.
#[derive(Debug, Clone, PartialEq)]
struct CapacityRouting {
    expert_ids: Vec<u32>,
    weights: Vec<f32>,
    kept: Vec<u32>,
    dropped: Vec<u32>,
}

impl CapacityRouting {
    fn check(&self, wanted: &Self, what: &str) {
        assert_eq!(self.expert_ids, wanted.expert_ids, "ids of {what}");
        assert_eq!(bits(&self.weights), bits(&wanted.weights), "weights of {what}");
        assert_eq!(self.kept, wanted.kept, "kept of {what}");
        assert_eq!(self.dropped, wanted.dropped, "dropped of {what}");
    }
}

/// The composition of the operations for given logits.
fn composed<D: Dtype>(case: &Case<D>) -> CapacityRouting {
    let (inputs, tensors) = (case.inputs.as_host(), case.weights.as_host());
    let (config, capacity) = (&case.config, case.config.capacity.unwrap());
    let shape = config.routing(case.num_tokens());
    let widen = |numbers: &Typed<_, D>| match numbers {
        Typed::Element(numbers) => Vec::<D>::clone(numbers).iter().map(|x| x.to_f32()).collect(),
        Typed::F32(numbers) => Vec::clone(numbers),
    };
    let logits: Vec<f32> = widen(case.inputs.logits.as_ref().unwrap());
    let noise_logits = case.inputs.noise_logits.as_ref().map(widen);
    let route = |router: RouterConfig, shape: RoutingShape| {
        let inputs = RouteInputs {
            logits: &logits,
            selection_bias: tensors.router.selection_bias,
            expert_scale: tensors.router.expert_scale.filter(|_| router.expert_scale),
            noise: inputs.noise,
            noise_logits: noise_logits.as_deref(),
            selection_noise: inputs.selection_noise,
            midpoint_draws: inputs.midpoint_draws,
            given_ids: inputs.given_ids.or(tensors.router.table),
            token_ids: inputs.token_ids,
            active: inputs.active,
        };
        reference::route_fwd::<f32, f32>(&shape, &router, &inputs).unwrap()
    };

    // The weights by which slots are kept are scaled, unless the kept weights are normalised first.
    let scaled_by_router = capacity.normalization == Normalization::None;
    let router = match scaled_by_router {
        true => config.router,
        false => RouterConfig { scale: 1.0, expert_scale: false, ..config.router },
    };
    let chosen = route(router, shape);
    // Batch-prioritised routing uses the scores before normalisation.
    let scores = RouterConfig {
        normalization: Normalization::None,
        scale: 1.0,
        expert_scale: false,
        ..config.router
    };
    let scores = route(scores, shape);
    assert_eq!(scores.expert_ids, chosen.expert_ids);
    let mut weights = chosen.routing_weights;
    let priorities = |weights: &[f32]| match capacity.priority {
        Priority::ChoiceByTopWeight => scores.routing_weights.clone(),
        _ => weights.to_vec(),
    };

    let (ids, tokens) = (&chosen.expert_ids, inputs.sequence_tokens);
    let plan = reference::plan_fwd(&shape.by_slot(), ids).unwrap();
    let by = priorities(&weights);
    let mut kept = reference::capacity_fwd(&plan, &shape, &capacity, tokens, &by).unwrap();
    if capacity.overflow > 0 {
        let num_candidates = shape.num_experts;
        let candidates = route(router, RoutingShape { top_k: num_candidates, ..shape });
        let mut next = vec![0; shape.num_tokens];
        for round in 0..capacity.overflow {
            let kept_ids = &kept.expert_ids;
            let requests = reference::capacity_reassign_fwd(
                &shape,
                num_candidates,
                round == 0,
                ids,
                kept_ids,
                &candidates.expert_ids,
                &candidates.routing_weights,
                &mut next,
                &mut weights,
            );
            let plan = reference::plan_fwd(&shape.by_slot(), &requests.unwrap()).unwrap();
            let by = priorities(&weights);
            let to = &mut kept;
            reference::capacity_later_fwd(&plan, &shape, &capacity, tokens, &by, to).unwrap();
        }
    }
    let Capacity { expert_ids, kept, dropped } = kept;
    if !scaled_by_router {
        let (by, scale) = (capacity.normalization, config.router.scale);
        let expert_scale = tensors.router.expert_scale;
        weights = reference::capacity_normalize_fwd(
            &shape,
            by,
            scale,
            expert_scale,
            &expert_ids,
            &weights,
        )
        .unwrap();
    }
    CapacityRouting { expert_ids, weights, kept, dropped }
}

/// The routing and the counts of the device.
fn on_device<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> CapacityRouting {
    let shape = case.config.routing(case.num_tokens());
    let cells = shape.sequences(case.inputs.sequence_tokens) * shape.num_experts;
    case.on(gpu, |mut prepared| {
        let (mut ids, mut routing_weights) =
            (gpu.poisoned(shape.slots()), gpu.poisoned::<f32>(shape.slots()));
        let (mut kept, mut dropped) = (gpu.poisoned(cells), gpu.poisoned(cells));
        let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
        let mut outputs = RoutingOutputs {
            kept: Some(kept.view_mut()),
            dropped: Some(dropped.view_mut()),
            ..RoutingOutputs::new(ids.view_mut(), routing_weights.view_mut())
        };
        layer.route_into(&gpu.stream, inputs, weights, workspace, &mut outputs).unwrap();
        CapacityRouting {
            expert_ids: gpu.download(&ids.view()),
            weights: gpu.download(&routing_weights.view()),
            kept: gpu.download(&kept.view()),
            dropped: gpu.download(&dropped.view()),
        }
    })
}

fn on_host<D: Dtype>(case: &Case<D>) -> CapacityRouting {
    let (inputs, weights) = (case.inputs.as_host(), case.weights.as_host());
    let routing = reference::moe_layer_route_fwd::<f32, D>(&case.config, &inputs, &weights);
    let reference::LayerRouting { expert_ids, weights, kept, dropped } = routing.unwrap();
    CapacityRouting { expert_ids, weights, kept, dropped }
}

fn check<D: Dtype>(gpu: &Gpu, case: &Case<D>, what: &str) {
    let wanted = composed(case);
    on_host(case).check(&wanted, &format!("the reference: {what}"));
    on_device(gpu, case).check(&wanted, &format!("the device: {what}"));
    // Without counts, ids and weights are the same.
    let (ids, weights) = case.route(gpu);
    assert_eq!((ids, bits(&weights)), (wanted.expert_ids, bits(&wanted.weights)), "{what}");
}

/// A layer of this router and capacity, with given logits `[T, E]`.
fn given(
    router: RouterConfig,
    capacity: CapacityConfig,
    top_k: usize,
    rows: &[&[f32]],
) -> Case<f32> {
    let num_experts = rows[0].len();
    let config =
        MoeConfig { router, capacity: Some(capacity), ..MoeConfig::new(1, 1, num_experts, top_k) };
    let weights = MoeWeights::plain(vec![1.0; config.gate_up_len()], vec![1.0; config.down_len()]);
    let inputs = MoeInputs::with_logits(vec![1.0; rows.len()], rows.concat());
    Case { config, weights, inputs }
}

fn one_row(priority: Priority) -> CapacityConfig {
    CapacityConfig::new(CapacityLimit::Rows { rows: 1 }, priority)
}

/// Logits whose softmax has these probabilities.
fn logits_of(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

fn near(got: f32, wanted: f64) -> bool {
    (f64::from(got) - wanted).abs() <= 1e-6 * wanted.abs()
}

proptest! {
    #![proptest_config(config(48))]

    /// Random routers and capacities.
    #[test]
    fn capacity_layer_matches_its_operations(
        tokens in 0usize..40, ties in any::<bool>(), sequence in proptest::option::of(1usize..50),
        limit in limit(), priority in proptest::sample::select(PRIORITIES.to_vec()),
        seed in any::<u64>(),
    ) {
        let mut rng = Rng::new(seed);
        let mut config = random_config(&mut rng, 3);
        while config.zero_experts.is_some() || config.capacity.is_none() {
            config = random_config(&mut rng, 3);
        }
        let capacity = config.capacity.as_mut().unwrap();
        (capacity.limit, capacity.priority) = (limit, priority);
        config.projection.noise_gate = false; // The composition does not contain its product.
        let gpu = gpu();
        gpu.reschedule(seed);
        let what = format!("T{tokens} sequences of {sequence:?} ties {ties} {config} seed {seed}");
        check(&gpu, &random_case::<f32>(config, tokens, sequence, ties, seed), &what);
        check(&gpu, &random_case::<bf16>(config, tokens, sequence, ties, seed), &what);
    }
}

fn limit() -> impl Strategy<Value = CapacityLimit> {
    prop_oneof![
        (0.1f64..2.0).prop_map(|factor| CapacityLimit::Factor { factor }),
        (0.02f64..0.9).prop_map(|fraction| CapacityLimit::TokenFraction { fraction }),
        (0usize..9).prop_map(|rows| CapacityLimit::Rows { rows }),
    ]
}

/// Random weights and inputs with given logits, which have few values if `ties`.
fn random_case<D: Dtype>(
    config: MoeConfig,
    tokens: usize,
    sequence: Option<usize>,
    ties: bool,
    seed: u64,
) -> Case<D> {
    let mut rng = Rng::new(seed ^ 0xca);
    let weights = random_weights(&config, &mut rng);
    let mut inputs = random_inputs(&config, tokens, &mut rng);
    let step = if ties { 1.0 } else { 1.0 / 64.0 };
    let range = (4.0 / step) as usize;
    let logits = (0..tokens * config.num_experts)
        .map(|_| D::from_f64((rng.below(2 * range) as f64 - range as f64) * step))
        .collect();
    inputs.logits = Some(Typed::Element(logits));
    if let Some(Typed::F32(noise_logits)) = &inputs.noise_logits {
        let of_type = noise_logits.iter().map(|x| D::from_f32(*x)).collect();
        inputs.noise_logits = Some(Typed::Element(of_type));
    }
    inputs.sequence_tokens = sequence;
    Case { config, weights, inputs }
}

/// Each priority with each normalisation, of the router and of the kept weights, with and without
/// overflow.
#[test]
fn every_capacity_option_matches_its_operations() {
    let gpu = gpu();
    let mut rng = Rng::new(3);
    let router_normalizations = [
        Normalization::None,
        Normalization::Sum { epsilon: 0.0 },
        Normalization::Sum { epsilon: 0.25 },
        Normalization::SumAtLeast { min: 0.75 },
        Normalization::PNorm { p: 2.0 },
    ];
    let kept_normalizations = [
        Normalization::None,
        Normalization::Sum { epsilon: 0.0 },
        Normalization::Sum { epsilon: 0.25 },
        Normalization::SumAtLeast { min: 0.75 },
    ];
    let mut seed = 0;
    for (priority, of_router, of_kept, overflow) in
        combinations(&PRIORITIES, &router_normalizations, &kept_normalizations, &[0, 1, 3])
    {
        if overflow > 0 && of_router != Normalization::None {
            continue;
        }
        seed += 1;
        let limit = match rng.below(3) {
            0 => CapacityLimit::Rows { rows: 5 },
            1 => CapacityLimit::Factor { factor: 0.6 },
            _ => CapacityLimit::TokenFraction { fraction: 0.3 },
        };
        let capacity = CapacityConfig {
            overflow,
            normalization: of_kept,
            ..CapacityConfig::new(limit, priority)
        };
        let scoring = [Scoring::Softmax, Scoring::Sigmoid, Scoring::SqrtSoftplus][rng.below(3)];
        let router = RouterConfig {
            scoring,
            normalization: of_router,
            scale: [0.8, 1.0, -1.5, 0.0][rng.below(4)],
            expert_scale: rng.below(2) == 0,
            ..RouterConfig::softmax_top_k(false)
        };
        let config = MoeConfig { router, capacity: Some(capacity), ..MoeConfig::new(2, 2, 5, 3) };
        let sequence = [None, Some(7)][rng.below(2)];
        let mut case = random_case::<f32>(config, 24, sequence, rng.below(2) == 0, seed);
        case.inputs.active =
            (rng.below(2) == 0).then(|| (0..24).map(|t| u8::from(t % 5 != 3)).collect());
        check(&gpu, &case, &format!("{config}, sequences of {sequence:?}, {seed}"));
    }
}

/// All combinations of the elements of four slices.
fn combinations<A: Copy, B: Copy, C: Copy, D: Copy>(
    a: &[A],
    b: &[B],
    c: &[C],
    d: &[D],
) -> Vec<(A, B, C, D)> {
    let mut all = Vec::new();
    for &a in a {
        for &b in b {
            for &c in c {
                all.extend(d.iter().map(|&d| (a, b, c, d)));
            }
        }
    }
    all
}

/// Token 0 has the larger probability of its first choice, but the smaller normalised weight.
#[test]
fn batch_priority_uses_scores_before_normalisation() {
    let gpu = gpu();
    let rows = [logits_of(&[0.5, 0.1, 0.4]), logits_of(&[0.45, 0.3, 0.25])];
    let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    for normalization in [
        Normalization::None,
        Normalization::Sum { epsilon: 0.0 },
        Normalization::SumAtLeast { min: f32::EPSILON },
        Normalization::PNorm { p: 2.0 },
    ] {
        for scale in [1.0, 0.8, -1.0, 0.0] {
            let router =
                RouterConfig { normalization, scale, ..RouterConfig::softmax_top_k(false) };
            let case = given(router, one_row(Priority::ChoiceByTopWeight), 2, &rows);
            for got in [on_host(&case), on_device(&gpu, &case)] {
                assert_eq!(got.expert_ids, [0, 2, NONE, 1], "{normalization:?} * {scale}");
                assert_eq!((got.kept, got.dropped), (vec![1, 1, 1], vec![1, 0, 0]));
            }
        }
    }
    // Nor by the scaled weight: token 0 keeps expert 2 although the scale of expert 0 is small.
    let rows = [logits_of(&[0.5, 0.1, 0.4]), logits_of(&[0.15, 0.45, 0.4])];
    let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let router = RouterConfig { expert_scale: true, ..RouterConfig::softmax_top_k(false) };
    let mut case = given(router, one_row(Priority::ChoiceByTopWeight), 2, &rows);
    case.weights.router.expert_scale = Some(vec![0.1, 1.0, 1.0]);
    for got in [on_host(&case), on_device(&gpu, &case)] {
        assert_eq!(got.expert_ids, [0, 2, 1, NONE]);
        assert!(near(got.weights[0], 0.05) && near(got.weights[1], 0.4));
    }
    // `Priority::Weight` uses the scaled weight of the router.
    let router = RouterConfig { scale: -1.0, ..RouterConfig::softmax_top_k(false) };
    let case = given(router, one_row(Priority::Weight), 1, &[&[0.0, 9.0], &[0.0, 8.0]]);
    for got in [on_host(&case), on_device(&gpu, &case)] {
        assert_eq!(got.expert_ids, [NONE, 1]);
    }
}

/// Scales apply after the normalisation of the kept weights, for any epsilon and for small sums.
#[test]
fn kept_weights_are_normalised_before_scaling() {
    let gpu = gpu();
    // Both tokens select expert 0 first. Token 1 keeps only expert 1, whose probability is 2^-24 or
    // 0.
    let small = -24.0 * std::f32::consts::LN_2;
    let kept_weights = |normalization, small: f32, scale, expert_scale: [f32; 3]| {
        let router =
            RouterConfig { scale, expert_scale: true, ..RouterConfig::softmax_top_k(false) };
        let capacity = CapacityConfig { normalization, ..one_row(Priority::Choice) };
        let rows: [&[f32]; 2] =
            [&[0.0, f32::NEG_INFINITY, small], &[0.0, small, f32::NEG_INFINITY]];
        let mut case = given(router, capacity, 2, &rows);
        case.weights.router.expert_scale = Some(expert_scale.to_vec());
        let got = on_device(&gpu, &case);
        got.check(&on_host(&case), &format!("{normalization:?} {small} {scale}"));
        assert_eq!(got.expert_ids, [0, 2, NONE, 1]);
        got.weights
    };
    let nllb = Normalization::SumAtLeast { min: f32::EPSILON };
    let sum = Normalization::Sum { epsilon: 0.0 };
    let ones = [1.0; 3];
    let weights = kept_weights(nllb, small, 0.8, ones);
    assert!(near(weights[0], 0.8) && weights[2] == 0.0, "{weights:?}");
    // 2^-24 / 2^-23, then the scale.
    assert!((weights[3] - 0.4).abs() < 1e-5, "{weights:?}");
    // A weight of 1, times both scales: the scaled weights are not normalised.
    let weights = kept_weights(sum, small, -2.0, [5.0, 0.5, 1.0]);
    assert!(near(weights[0], -10.0) && near(weights[3], -1.0), "{weights:?}");
    assert_eq!(kept_weights(sum, small, 0.0, ones), [0.0; 4]);
    // A sum of 0 gives weights of 0.
    let weights = kept_weights(sum, -200.0, 1.0, ones);
    assert_eq!(weights, [1.0, 0.0, 0.0, 0.0]);
    assert_eq!(kept_weights(nllb, -200.0, 1.0, ones)[3], 0.0);
}
