//! capacity: a selection, so device and reference agree bit for bit.

use std::ops::Range;

use moe_kernels::ops::capacity::{self, CapacityBuffers};
use moe_kernels::ops::plan;
use moe_kernels::reference::{self, Capacity};
use moe_kernels::{CapacityConfig, CapacityLimit, Error, Normalization, Priority, RoutingShape};
use proptest::prelude::*;

use crate::common::{Gpu, Rng, Skew, bits, config, gpu, routing_ids, skew};

const PRIORITIES: [Priority; 4] =
    [Priority::Token, Priority::Choice, Priority::Weight, Priority::ChoiceByTopWeight];

/// A routing, and for each token every expert in an order that begins with its own.
struct Case {
    shape: RoutingShape,
    ids: Vec<u32>,
    weights: Vec<f32>,
    per_token: usize,
    candidates: Vec<u32>,
    candidate_weights: Vec<f32>,
}

/// Weights of few values, so that some are equal, and of every kind.
fn some_weights(len: usize, rng: &mut Rng) -> Vec<f32> {
    let kinds = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, -1.5, 1e-45];
    (0..len)
        .map(|_| match rng.below(24) {
            kind if kind < kinds.len() => kinds[kind],
            _ => rng.below(12) as f32 / 8.0,
        })
        .collect()
}

impl Case {
    fn new(shape: RoutingShape, skew: Skew, per_token: usize, seed: u64) -> Self {
        let rng = &mut Rng::new(seed ^ 0xc0);
        let ids = routing_ids(shape, skew, seed);
        let mut candidates = Vec::new();
        for token in 0..shape.num_tokens {
            let own = &ids[token * shape.top_k..][..shape.top_k];
            let mut row: Vec<u32> = own.to_vec();
            let mut others: Vec<u32> =
                (0..shape.num_experts as u32).filter(|id| !own.contains(id)).collect();
            while !others.is_empty() {
                row.push(others.swap_remove(rng.below(others.len())));
            }
            row.resize(per_token.max(row.len()), u32::MAX);
            row.truncate(per_token);
            // Any bits.
            if per_token > 0 && rng.below(5) == 0 {
                row[rng.below(per_token)] = rng.next() as u32;
            }
            candidates.extend(row);
        }
        Self {
            shape,
            weights: some_weights(shape.slots(), rng),
            candidate_weights: some_weights(candidates.len(), rng),
            ids,
            per_token,
            candidates,
        }
    }

    /// All rounds, and the weights with which slots were kept.
    fn reference(&self, config: &CapacityConfig, tokens: Option<usize>) -> (Capacity, Vec<f32>) {
        let (shape, mut weights) = (&self.shape, self.weights.clone());
        let plan = reference::plan_fwd(&shape.by_slot(), &self.ids).unwrap();
        let mut capacity =
            reference::capacity_fwd(&plan, shape, config, tokens, &self.weights).unwrap();
        let mut next = vec![u32::MAX; shape.num_tokens];
        for round in 0..config.overflow {
            let requests = reference::capacity_reassign_fwd(
                shape,
                self.per_token,
                round == 0,
                &self.ids,
                &capacity.expert_ids,
                &self.candidates,
                &self.candidate_weights,
                &mut next,
                &mut weights,
            );
            let plan = reference::plan_fwd(&shape.by_slot(), &requests.unwrap()).unwrap();
            let by_top = config.priority == Priority::ChoiceByTopWeight;
            let by = if by_top { &self.weights } else { &weights };
            reference::capacity_later_fwd(&plan, shape, config, tokens, by, &mut capacity).unwrap();
        }
        (capacity, weights)
    }

    /// All rounds on the device, as a caller composes them.
    fn run(
        &self,
        gpu: &Gpu,
        config: &CapacityConfig,
        tokens: Option<usize>,
    ) -> (Capacity, Vec<f32>) {
        let (device, stream, shape) = (&gpu.device, &gpu.stream, self.shape);
        let cells = shape.sequences(tokens) * shape.num_experts;
        let (ids, first_weights) = (gpu.upload(&self.ids), gpu.upload(&self.weights));
        let mut weights = gpu.upload(&self.weights);
        let mut kept_ids = gpu.poisoned::<u32>(shape.slots());
        let (mut kept, mut dropped) = (gpu.poisoned::<u32>(cells), gpu.poisoned::<u32>(cells));
        let plan = plan::plan_fwd(device, stream, shape.by_slot(), &ids.view()).unwrap();
        capacity::capacity_fwd_into(
            device,
            stream,
            &plan,
            shape,
            config,
            tokens,
            &weights.view(),
            &mut kept_ids.view_mut(),
            &mut kept.view_mut(),
            &mut dropped.view_mut(),
        )
        .unwrap();

        let candidates = gpu.upload(&self.candidates);
        let candidate_weights = gpu.upload(&self.candidate_weights);
        let mut next = gpu.poisoned::<u32>(shape.num_tokens);
        for round in 0..config.overflow {
            let mut requests = gpu.poisoned::<u32>(shape.slots());
            capacity::capacity_reassign_fwd_into(
                device,
                stream,
                shape,
                self.per_token,
                round == 0,
                &ids.view(),
                &kept_ids.view(),
                &candidates.view(),
                &candidate_weights.view(),
                &mut next.view_mut(),
                &mut requests.view_mut(),
                &mut weights.view_mut(),
            )
            .unwrap();
            let plan = plan::plan_fwd(device, stream, shape.by_slot(), &requests.view()).unwrap();
            let by_top = config.priority == Priority::ChoiceByTopWeight;
            capacity::capacity_later_fwd_into(
                device,
                stream,
                &plan,
                shape,
                config,
                tokens,
                &if by_top { first_weights.view() } else { weights.view() },
                &mut kept_ids.view_mut(),
                &mut kept.view_mut(),
                &mut dropped.view_mut(),
            )
            .unwrap();
        }
        let capacity = Capacity {
            expert_ids: gpu.download(&kept_ids.view()),
            kept: gpu.download(&kept.view()),
            dropped: gpu.download(&dropped.view()),
        };
        (capacity, gpu.download(&weights.view()))
    }

    fn check(&self, gpu: &Gpu, config: &CapacityConfig, tokens: Option<usize>, what: &str) {
        let (got, want) = (self.run(gpu, config, tokens), self.reference(config, tokens));
        let what = format!("{} {config}, sequences of {tokens:?}, {what}", self.shape);
        assert_eq!(got.0, want.0, "{what}");
        assert_eq!(bits(&got.1), bits(&want.1), "{what}");
    }
}

fn rows(rows: usize, priority: Priority) -> CapacityConfig {
    CapacityConfig::new(CapacityLimit::Rows { rows }, priority)
}

fn limit() -> impl Strategy<Value = CapacityLimit> {
    prop_oneof![
        (0.05f64..2.5).prop_map(|factor| CapacityLimit::Factor { factor }),
        (0.01f64..1.2).prop_map(|fraction| CapacityLimit::TokenFraction { fraction }),
        (0usize..12).prop_map(|rows| CapacityLimit::Rows { rows }),
    ]
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn matches_reference(
        tokens in 0usize..160, experts in 1usize..12, k in 1usize..6, limit in limit(),
        priority in proptest::sample::select(PRIORITIES.to_vec()), overflow in 0usize..4,
        sequence in proptest::option::of(1usize..70), more in 0usize..6,
        skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let case = Case::new(shape, skew, shape.top_k + more, seed);
        let gpu = gpu();
        gpu.reschedule(seed);
        let config = CapacityConfig { overflow, ..CapacityConfig::new(limit, priority) };
        case.check(&gpu, &config, sequence, &format!("{skew:?} seed {seed}"));
    }

    #[test]
    fn normalize_matches_reference(
        tokens in 0usize..400, experts in 1usize..12, k in 1usize..9, seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let gpu = gpu();
        gpu.reschedule(seed);
        let ids = routing_ids(shape, Skew::Inactive, seed);
        let weights = some_weights(shape.slots(), &mut Rng::new(seed));
        let scale = [1.0, 0.8, -2.5][seed as usize % 3];
        let expert_scale = some_weights(shape.num_experts, &mut Rng::new(seed ^ 1));
        let expert_scale = (seed % 2 == 0).then_some(&expert_scale[..]);
        for normalization in [
            Normalization::None,
            Normalization::Sum { epsilon: 1e-20 },
            Normalization::SumAtLeast { min: f32::EPSILON },
        ] {
            let want = reference::capacity_normalize_fwd(
                &shape, normalization, scale, expert_scale, &ids, &weights,
            ).unwrap();
            let (ids, weights) = (gpu.upload(&ids), gpu.upload(&weights));
            let expert_scale = expert_scale.map(|scales| gpu.upload(scales));
            let mut normalized = gpu.poisoned::<f32>(shape.slots());
            capacity::capacity_normalize_fwd_into(
                &gpu.device, &gpu.stream, shape, normalization, scale,
                expert_scale.as_ref().map(|scales| scales.view()).as_ref(), &ids.view(),
                &weights.view(), &mut normalized.view_mut(),
            ).unwrap();
            let got = gpu.download(&normalized.view());
            prop_assert_eq!(bits(&got), bits(&want), "{} {:?}", shape, normalization);
            prop_assert!(got.iter().all(|weight| !weight.is_nan()));
        }
    }
}

/// Experts with more slots than a block has threads, and weights that differ in any digit of their
/// keys.
#[test]
fn matches_reference_at_limits() {
    let gpu = gpu();
    for (t, e, k) in
        [(0, 3, 2), (1, 1, 1), (700, 1, 1), (1500, 2, 2), (257, 4, 3), (40, 4096, 8), (20, 40, 40)]
    {
        let shape = RoutingShape::new(t, e, k).unwrap();
        let mut case = Case::new(shape, Skew::Uniform, k, 3);
        for priority in PRIORITIES {
            let limits = [0, 1, 2, 255, 256, 257, 699, 700, usize::MAX];
            // Counts of many experts stay small.
            let limits = if e > 64 { &limits[1..3] } else { &limits[..] };
            for &limit in limits {
                case.check(&gpu, &rows(limit, priority), None, "few weights");
            }
            if e <= 64 {
                case.check(&gpu, &rows(1, priority), Some(1), "sequences of one");
            }
            case.check(&gpu, &rows(5, priority), Some(100), "sequences");
            case.check(&gpu, &rows(5, priority), Some(1 << 20), "a long sequence");
        }
        let mut rng = Rng::new(8);
        case.weights.iter_mut().for_each(|weight| *weight = f32::from_bits(rng.next() as u32));
        case.check(&gpu, &rows(100, Priority::Weight), None, "any bits");
        case.check(&gpu, &rows(100, Priority::ChoiceByTopWeight), None, "any bits");
        case.weights.fill(0.5);
        case.check(&gpu, &rows(100, Priority::Weight), None, "equal weights");
        case.ids.fill(u32::MAX);
        case.check(&gpu, &rows(3, Priority::Token), None, "all inactive");
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let shape = RoutingShape::new(300, 5, 2).unwrap();
    let case = Case::new(shape, Skew::Zipf, 4, 5);
    for seed in 0..8 {
        gpu.reschedule(seed);
        for priority in PRIORITIES {
            let config = CapacityConfig { overflow: 2, ..rows(40, priority) };
            case.check(&gpu, &config, Some(150), &format!("schedule {seed}"));
        }
    }
}

/// A plan of some of the experts keeps the same slots of these as the whole plan.
#[test]
fn plan_of_some_experts_keeps_the_same_slots() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(90, 7, 3).unwrap();
    let case = Case::new(shape, Skew::Inactive, 3, 6);
    let limit = CapacityLimit::Factor { factor: 0.75 };
    let config = CapacityConfig::new(limit, Priority::Weight);
    let (whole, _) = case.reference(&config, Some(30));
    let by_reference = |experts: Range<usize>| {
        let plan = reference::plan_range_fwd(&shape.by_slot(), experts, &case.ids).unwrap();
        reference::capacity_fwd(&plan, &shape, &config, Some(30), &case.weights).unwrap()
    };
    let (ids, weights) = (gpu.upload(&case.ids), gpu.upload(&case.weights));
    let part = |experts: Range<usize>| {
        let plan = plan::plan_range_fwd(device, stream, shape.by_slot(), experts, &ids.view());
        let (plan, weights) = (plan.unwrap(), weights.view());
        capacity::capacity_fwd(device, stream, &plan, shape, &config, Some(30), &weights).unwrap()
    };
    for experts in [0..2, 2..7, 6..7] {
        let got = part(experts.clone());
        let clear_others = |&id: &u32| if experts.contains(&(id as usize)) { id } else { u32::MAX };
        let want: Vec<u32> = whole.expert_ids.iter().map(clear_others).collect();
        assert_eq!(gpu.download(&got.expert_ids.as_view()), want);
        let columns = |all: &[u32]| -> Vec<u32> {
            all.chunks(7).flat_map(|row| row[experts.clone()].to_vec()).collect()
        };
        assert_eq!(gpu.download(&got.kept.as_view()), columns(&whole.kept));
        assert_eq!(gpu.download(&got.dropped.as_view()), columns(&whole.dropped));
        let (kept, dropped) = (columns(&whole.kept), columns(&whole.dropped));
        let wanted = Capacity { expert_ids: want, kept, dropped };
        assert_eq!(by_reference(experts), wanted);
    }
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(4, 3, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let weights = gpu.upload(&[0f32; 8]);
    let by_slot = plan::plan_fwd(device, stream, shape.by_slot(), &ids.view()).unwrap();
    let by_token = plan::plan_fwd(device, stream, shape, &ids.view()).unwrap();
    let good = rows(1, Priority::Weight);
    let call = |plan, shape, config: CapacityConfig, tokens, len: usize| {
        let weights = weights.view().slice(..len);
        capacity::capacity_fwd(device, stream, plan, shape, &config, tokens, &weights).map(|_| ())
    };
    assert_eq!(call(&by_slot, shape, good, None, 8), Ok(()));
    assert!(matches!(call(&by_token, shape, good, None, 8), Err(Error::Mismatch { .. })));
    let fewer = RoutingShape { num_experts: 2, ..shape };
    assert!(matches!(call(&by_slot, fewer, good, None, 8), Err(Error::Mismatch { .. })));
    let weights_short =
        Err(Error::Length { op: "capacity_fwd", argument: "routing_weights", wanted: 8, got: 7 });
    assert_eq!(call(&by_slot, shape, good, None, 7), weights_short);
    assert!(matches!(
        call(&by_slot, shape, good, Some(0), 8),
        Err(Error::Unsupported { argument: "sequence_tokens", .. })
    ));
    for factor in [0.0, -1.0, f64::NAN] {
        let config = CapacityConfig { limit: CapacityLimit::Factor { factor }, ..good };
        assert!(matches!(
            call(&by_slot, shape, config, None, 8),
            Err(Error::Unsupported { argument: "capacity.limit.factor", .. })
        ));
    }
    let mut normalized = gpu.poisoned::<f32>(8);
    let p_norm = capacity::capacity_normalize_fwd_into(
        device,
        stream,
        shape,
        Normalization::PNorm { p: 2.0 },
        1.0,
        None,
        &ids.view(),
        &weights.view(),
        &mut normalized.view_mut(),
    );
    assert!(matches!(p_norm, Err(Error::Unsupported { argument: "normalization", .. })));

    let scales = weights.view().slice(..2);
    let scales = capacity::capacity_normalize_fwd_into(
        device,
        stream,
        shape,
        Normalization::None,
        1.0,
        Some(&scales),
        &ids.view(),
        &weights.view(),
        &mut normalized.view_mut(),
    );
    assert!(matches!(
        scales,
        Err(Error::Length { argument: "expert_scale", wanted: 3, got: 2, .. })
    ));

    let buffers = CapacityBuffers {
        expert_ids: 256,
        kept: 256,
        dropped: 254,
        routing_weights: 256,
        expert_offsets: 256,
        row_of_slot: 256,
        slot_of_row: 256,
    };
    // SAFETY: the call fails before it launches anything.
    let result = unsafe {
        let stream = stream.cu_stream();
        capacity::capacity_fwd_raw(device, stream, shape, 0..3, &good, None, false, buffers)
    };
    assert!(matches!(result, Err(Error::Alignment { argument: "dropped", .. })), "{result:?}");
}
