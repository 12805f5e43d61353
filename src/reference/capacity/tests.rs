//! Capacity by hand, and against the masks of transformers.

use super::super::plan::{plan_fwd, plan_range_fwd};
use super::super::sample::Sampler;
use super::*;
use crate::config::CapacityLimit;

const NONE: u32 = u32::MAX;

fn config(rows: usize, priority: Priority, overflow: usize) -> CapacityConfig {
    CapacityConfig { overflow, ..CapacityConfig::new(CapacityLimit::Rows { rows }, priority) }
}

/// All rounds, as a caller composes them, and the weights with which slots were kept. A token's
/// candidates and their weights are `[T, C]`.
fn rounds(
    shape: &RoutingShape,
    config: &CapacityConfig,
    ids: &[u32],
    routing_weights: &[f32],
    candidates: (&[u32], &[f32]),
) -> (Capacity, Vec<f32>) {
    let mut capacity = kept(shape, config, None, ids, routing_weights).unwrap();
    let mut requested = routing_weights.to_vec();
    let mut next = vec![u32::MAX; shape.num_tokens];
    let listed = candidates.0.len() / shape.num_tokens;
    for round in 0..config.overflow {
        let (kept_ids, first) = (&capacity.expert_ids, round == 0);
        let (experts, weights) = candidates;
        let requests = capacity_reassign_fwd(
            shape,
            listed,
            first,
            ids,
            kept_ids,
            experts,
            weights,
            &mut next,
            &mut requested,
        );
        let plan = plan_fwd(&shape.by_slot(), &requests.unwrap()).unwrap();
        capacity_later_fwd(&plan, shape, config, None, &requested, &mut capacity).unwrap();
    }
    (capacity, requested)
}

fn kept(
    shape: &RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    ids: &[u32],
    routing_weights: &[f32],
) -> Result<Capacity> {
    let plan = plan_fwd(&shape.by_slot(), ids)?;
    capacity_fwd(&plan, shape, config, sequence_tokens, routing_weights)
}

#[test]
fn hand_computed_rows() {
    let shape = RoutingShape { num_tokens: 3, num_experts: 2, top_k: 2 };
    let ids = [0, 1, 1, 0, 0, 1];
    let routing_weights = [0.6, 0.4, 0.7, 0.3, 0.9, 0.1];
    let kept = |priority, rows| {
        kept(&shape, &config(rows, priority, 0), None, &ids, &routing_weights).unwrap()
    };
    let token = kept(Priority::Token, 2);
    assert_eq!(token.expert_ids, [0, 1, 1, 0, NONE, NONE]);
    assert_eq!((token.kept, token.dropped), (vec![2, 2], vec![1, 1]));
    assert_eq!(kept(Priority::Choice, 2).expert_ids, [0, 1, 1, NONE, 0, NONE]);
    assert_eq!(kept(Priority::Weight, 1).expert_ids, [NONE, NONE, 1, NONE, 0, NONE]);
    let top = kept(Priority::ChoiceByTopWeight, 2).expert_ids;
    assert_eq!(top, [0, NONE, 1, NONE, 0, 1]);
    assert_eq!(kept(Priority::Token, 0).kept, [0, 0]);
    assert_eq!(kept(Priority::Token, usize::MAX).dropped, [0, 0]);
}

#[test]
fn hand_computed_overflow() {
    let shape = RoutingShape { num_tokens: 3, num_experts: 3, top_k: 1 };
    let candidates =
        (&[0, 1, 2, 0, 1, 2, 0, 1, 2][..], &[0.6, 0.3, 0.1, 0.7, 0.2, 0.1, 0.8, 0.1, 0.05][..]);
    let run = |rows, overflow| {
        let config = config(rows, Priority::Token, overflow);
        rounds(&shape, &config, &[0, 0, 0], &[0.6, 0.7, 0.8], candidates)
    };
    assert_eq!(run(1, 0).0.expert_ids, [0, NONE, NONE]);
    let (one, _) = run(1, 1);
    assert_eq!(one.expert_ids, [0, 1, NONE]);
    assert_eq!((one.kept, one.dropped), (vec![1, 1, 0], vec![2, 1, 0]));
    let (two, routing_weights) = run(1, 2);
    assert_eq!((two.expert_ids, routing_weights), (vec![0, 1, 2], vec![0.6, 0.2, 0.05]));
    assert_eq!(run(1, 9).0.expert_ids, [0, 1, 2]);
}

/// A plan of some of the experts has columns for these alone, and the router's ids.
#[test]
fn plan_of_some_experts() {
    let shape = RoutingShape { num_tokens: 3, num_experts: 3, top_k: 2 };
    let (ids, routing_weights) = ([0, 1, 1, 2, 2, 1], [0.0; 6]);
    let plan = plan_range_fwd(&shape.by_slot(), 1..3, &ids).unwrap();
    let one = config(1, Priority::Token, 0);
    let got = capacity_fwd(&plan, &shape, &one, None, &routing_weights).unwrap();
    assert_eq!(got.expert_ids, [NONE, 1, NONE, 2, NONE, NONE]);
    assert_eq!((got.kept, got.dropped), (vec![1, 1], vec![2, 1]));
}

/// The mask of a router of transformers' Switch: in each sequence, a token keeps its expert
/// while the running count of that expert, the token included, is at most the capacity.
fn switch_keeps(shape: &RoutingShape, tokens: usize, capacity: usize, ids: &[u32]) -> Vec<bool> {
    let mut keeps = Vec::new();
    for sequence in ids.chunks(tokens) {
        let mut count = vec![0; shape.num_experts];
        for &id in sequence {
            count[id as usize] += 1;
            keeps.push(count[id as usize] <= capacity);
        }
    }
    keeps
}

/// The masks of transformers' NLLB top-2 router: the position of a first choice among the
/// expert's first choices, tokens in order or by their largest probability; second choices
/// behind all of them.
fn nllb_keeps(
    shape: &RoutingShape,
    capacity: usize,
    by_probability: bool,
    ids: &[u32],
    routing_weights: &[f32],
) -> Vec<bool> {
    let mut tokens: Vec<usize> = (0..shape.num_tokens).collect();
    if by_probability {
        tokens
            .sort_by(|&a, &b| routing_weights[2 * b].partial_cmp(&routing_weights[2 * a]).unwrap());
    }
    let mut position = vec![0; shape.num_experts];
    let mut keeps = vec![false; ids.len()];
    for choice in 0..2 {
        for &token in &tokens {
            let expert = ids[2 * token + choice] as usize;
            keeps[2 * token + choice] = position[expert] < capacity;
            position[expert] += 1;
        }
    }
    keeps
}

#[test]
fn keeps_the_same_slots_as_transformers() {
    let mut sampler = Sampler::new(5);
    for _ in 0..200 {
        let num_experts = 2 + sampler.below(6);
        let (num_tokens, capacity) = (sampler.below(40), sampler.below(9));
        let kept = |shape, priority, tokens, ids: &[u32], routing_weights: &[f32]| -> Vec<bool> {
            let config = config(capacity, priority, 0);
            let all = super::tests::kept(&shape, &config, tokens, ids, routing_weights).unwrap();
            for (slot, &id) in all.expert_ids.iter().enumerate() {
                assert!(id == NONE || id == ids[slot]);
            }
            all.expert_ids.iter().map(|&id| id != NONE).collect()
        };
        let shape = RoutingShape { num_tokens, num_experts, top_k: 1 };
        let ids: Vec<u32> = (0..num_tokens).map(|_| sampler.below(num_experts) as u32).collect();
        let tokens = 1 + sampler.below(12);
        let routing_weights = vec![0.0; num_tokens];
        assert_eq!(
            kept(shape, Priority::Token, Some(tokens), &ids, &routing_weights),
            switch_keeps(&shape, tokens, capacity, &ids)
        );

        let shape = RoutingShape { top_k: 2, ..shape };
        let ids: Vec<u32> = (0..num_tokens)
            .flat_map(|_| {
                let first = sampler.below(num_experts);
                let second = (first + 1 + sampler.below(num_experts - 1)) % num_experts;
                [first as u32, second as u32]
            })
            .collect();
        // Few values, so that some are equal.
        let routing_weights: Vec<f32> = ids.iter().map(|_| sampler.below(5) as f32 / 4.0).collect();
        for (priority, by_probability) in
            [(Priority::Choice, false), (Priority::ChoiceByTopWeight, true)]
        {
            assert_eq!(
                kept(shape, priority, None, &ids, &routing_weights),
                nllb_keeps(&shape, capacity, by_probability, &ids, &routing_weights)
            );
        }
    }
}

#[test]
fn kept_weights_are_normalised() {
    let shape = RoutingShape { num_tokens: 3, num_experts: 4, top_k: 2 };
    let ids = [0, 1, NONE, 2, NONE, NONE];
    let routing_weights = [0.5, 0.25, f32::NAN, 0.125, 0.5, 0.5];
    let run = |normalization, scale| {
        capacity_normalize_fwd(&shape, normalization, scale, None, &ids, &routing_weights)
    };
    let third = 0.5f32 / 0.75;
    let sum = run(Normalization::Sum { epsilon: 0.0 }, 1.0).unwrap();
    assert_eq!(sum, [third, 0.25 / 0.75, 0.0, 1.0, 0.0, 0.0]);
    let epsilon = run(Normalization::Sum { epsilon: 0.25 }, 1.0).unwrap();
    assert_eq!(epsilon, [0.5, 0.25, 0.0, 0.125 / 0.375, 0.0, 0.0]);
    let at_least = run(Normalization::SumAtLeast { min: 0.5 }, 1.0).unwrap();
    assert_eq!(at_least, [third, 0.25 / 0.75, 0.0, 0.25, 0.0, 0.0]);
    assert_eq!(run(Normalization::None, 1.0).unwrap(), [0.5, 0.25, 0.0, 0.125, 0.0, 0.0]);
    let halved = run(Normalization::None, -0.5).unwrap();
    assert_eq!(halved, [-0.25, -0.125, 0.0, -0.0625, 0.0, 0.0]);
    assert!(run(Normalization::PNorm { p: 2.0 }, 1.0).is_err());
    let by = Normalization::Sum { epsilon: 0.0 };
    let expert_scale = |scale: &[f32]| {
        capacity_normalize_fwd(&shape, by, 2.0, Some(scale), &ids, &routing_weights)
    };
    let own = expert_scale(&[3.0, -1.0, 0.5, 9.0]).unwrap();
    assert_eq!(own, [third * 2.0 * 3.0, 0.25 / 0.75 * -2.0, 0.0, 1.0, 0.0, 0.0]);
    assert!(expert_scale(&[1.0; 3]).is_err());
    // 0 / 0 gives 0.
    let zeros = capacity_normalize_fwd(&shape, by, 1.0, None, &ids, &[0.0f32; 6]).unwrap();
    assert!(zeros.iter().all(|weight| weight.to_bits() == 0));
}

#[test]
fn rejects_wrong_arguments() {
    let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
    let config = config(1, Priority::Token, 0);
    let run = |tokens, ids: &[u32], routing_weights: &[f32]| {
        kept(&shape, &config, tokens, ids, routing_weights)
    };
    assert!(run(None, &[0, 7], &[0.0; 2]).is_ok());
    assert!(run(Some(0), &[0, 1], &[0.0; 2]).is_err());
    assert!(run(None, &[0, 1], &[0.0]).is_err());
    let none = RoutingShape { num_tokens: 0, ..shape };
    let empty = kept(&none, &config, None, &[], &[]).unwrap();
    assert!(empty.kept.is_empty() && empty.expert_ids.is_empty());

    // Plans of tokens, of other slots, and of other experts.
    let two = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 2 };
    let with = |plan: Plan| capacity_fwd(&plan, &two, &config, None, &[0.0; 4]);
    let ids = [0, 1, 0, 1];
    assert!(with(plan_fwd(&two.by_slot(), &ids).unwrap()).is_ok());
    assert!(with(plan_fwd(&two, &ids).unwrap()).is_err());
    assert!(with(plan_fwd(&shape, &[0, 1]).unwrap()).is_err());
    let more = RoutingShape { num_experts: 3, ..two.by_slot() };
    assert!(with(plan_fwd(&more, &ids).unwrap()).is_err());

    let plan = plan_fwd(&shape.by_slot(), &[0, 1]).unwrap();
    let first = capacity_fwd(&plan, &shape, &config, None, &[0.0; 2]).unwrap();
    let later = |damage: fn(&mut Capacity)| {
        let mut capacity = first.clone();
        damage(&mut capacity);
        capacity_later_fwd(&plan, &shape, &config, None, &[0.0; 2], &mut capacity)
    };
    assert!(later(|_| ()).is_ok());
    assert!(later(|capacity| capacity.kept.truncate(1)).is_err());
    assert!(later(|capacity| capacity.dropped.push(0)).is_err());
    assert!(later(|capacity| capacity.expert_ids.truncate(1)).is_err());
    let reassign = |next: &mut [u32], candidates: &[u32]| {
        let mut routing_weights = [0.0; 2];
        capacity_reassign_fwd(
            &shape,
            1,
            false,
            &[0, 1],
            &[0, NONE],
            candidates,
            &[0.0; 2],
            next,
            &mut routing_weights,
        )
    };
    assert_eq!(reassign(&mut [0, 0], &[1, 0]).unwrap(), [NONE, 0]);
    // A position beyond the candidates, of any bits, makes no request.
    assert_eq!(reassign(&mut [0, 1 << 31], &[1, 0]).unwrap(), [NONE, NONE]);
    assert!(reassign(&mut [0], &[1, 0]).is_err());
    assert!(reassign(&mut [0, 0], &[1]).is_err());
}
