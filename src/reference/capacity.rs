//! Capacity: an expert takes a limited number of slots in each sequence; the others find no room, and are
//! dropped or ask elsewhere.

use std::cmp::Ordering;

use super::accum::Accum;
use crate::config::{CapacityConfig, Normalization, Priority, kept_divisor};
use crate::error::{Error, Result, check_len, product};
use crate::shape::RoutingShape;

/// What capacity makes of a routing; for `N` sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct Capacity {
    /// `[T, K]`: the expert that keeps the slot, `u32::MAX` where none does.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`: the weights, where a slot has asked another expert those of the last one that it asked.
    pub weights: Vec<f32>,
    /// `[N, E]`: slots that each expert keeps.
    pub kept: Vec<u32>,
    /// `[N, E]`: requests that each expert had no room for; without overflow, slots that are dropped.
    pub dropped: Vec<u32>,
}

/// The experts of each token in the order of its scores, for slots that find no room.
#[derive(Debug, Clone, Copy)]
pub struct Candidates<'a> {
    /// `C`, how many there are for each token.
    pub per_token: usize,
    /// `[T, C]`
    pub expert_ids: &'a [u32],
    /// `[T, C]`
    pub weights: &'a [f32],
}

/// Numbers in order, with -0 as 0 and NaN as minus infinity.
pub(super) fn order(a: f32, b: f32) -> Ordering {
    let number = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    number(a).partial_cmp(&number(b)).unwrap_or(Ordering::Equal)
}

/// Keeps of each expert's slots, in each sequence of `sequence_tokens` tokens (without: in the batch), as many as
/// `config` has room for, those that come first by its priority.
///
/// An id of `E` or more, any bits, asks nobody and never counts. With overflow, slots that found no room go on, round
/// after round: in the order of slots, each asks the next of its token's candidates that is an expert, was not
/// asked and is none of the token's own ids, with that candidate's weight; an expert that has room left takes what is
/// asked of it by the same priority. The top weight of [`Priority::ChoiceByTopWeight`] stays that of `weights`.
///
/// # Errors
/// A shape or limit out of range, a length that is not the shape's, or overflow without candidates.
pub fn capacity_fwd(
    shape: &RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    expert_ids: &[u32],
    weights: &[f32],
    candidates: Option<Candidates<'_>>,
) -> Result<Capacity> {
    const OP: &str = "capacity_fwd";
    shape.check(OP)?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(OP, "weights", weights.len(), shape.slots())?;
    if sequence_tokens == Some(0) {
        let (wanted, got) = ("1 or more".into(), "0".into());
        return Err(Error::Unsupported { op: OP, argument: "sequence_tokens", wanted, got });
    }
    if let Some(Candidates { per_token, expert_ids, weights }) = candidates {
        let len = product(OP, "num_tokens * candidates", shape.num_tokens, per_token)?;
        check_len(OP, "candidates.expert_ids", expert_ids.len(), len)?;
        check_len(OP, "candidates.weights", weights.len(), len)?;
    } else if config.overflow > 0 {
        let why = "overflow asks candidates, of which there are none".into();
        return Err(Error::Mismatch { op: OP, why });
    }
    let tokens = sequence_tokens.unwrap_or(shape.num_tokens).max(1);
    let capacity = config.rows(shape, sequence_tokens.unwrap_or(shape.num_tokens))?;
    let cells = product(OP, "N * E", shape.sequences(sequence_tokens), shape.num_experts)?;

    let mut all = Capacity {
        expert_ids: vec![u32::MAX; shape.slots()],
        weights: weights.to_vec(),
        kept: vec![0; cells],
        dropped: vec![0; cells],
    };
    let mut requests = expert_ids.to_vec();
    let mut next_candidate = vec![0; shape.num_tokens];
    for round in 0..=config.overflow {
        // The slots that ask each expert, of each sequence.
        let mut asking = vec![Vec::new(); cells];
        for (slot, &id) in requests.iter().enumerate() {
            if (id as usize) < shape.num_experts {
                let sequence = slot / shape.top_k / tokens;
                asking[sequence * shape.num_experts + id as usize].push(slot);
            }
        }
        for (cell, mut slots) in asking.into_iter().enumerate() {
            slots.sort_by(|&a, &b| {
                first_slot(config.priority, shape.top_k, weights, &all.weights, a, b)
            });
            let room = capacity.saturating_sub(all.kept[cell] as usize).min(slots.len());
            all.kept[cell] += room as u32;
            all.dropped[cell] += (slots.len() - room) as u32;
            for &slot in &slots[..room] {
                all.expert_ids[slot] = (cell % shape.num_experts) as u32;
            }
        }
        if let (Some(candidates), true) = (candidates, round < config.overflow) {
            let next = &mut next_candidate;
            requests = ask(shape, expert_ids, candidates, next, &mut all);
        }
    }
    Ok(all)
}

/// Which of two slots of an expert comes first.
fn first_slot(
    priority: Priority,
    top_k: usize,
    first_weights: &[f32],
    weights: &[f32],
    a: usize,
    b: usize,
) -> Ordering {
    let choice = (a % top_k).cmp(&(b % top_k));
    let top = |slot: usize| first_weights[slot / top_k * top_k];
    let before = match priority {
        Priority::Token => Ordering::Equal,
        Priority::Choice => choice,
        Priority::Weight => order(weights[b], weights[a]),
        Priority::ChoiceByTopWeight => choice.then(order(top(b), top(a))),
    };
    before.then(a.cmp(&b))
}

/// What the slots without room ask next.
fn ask(
    shape: &RoutingShape,
    expert_ids: &[u32],
    candidates: Candidates<'_>,
    next_candidate: &mut [usize],
    all: &mut Capacity,
) -> Vec<u32> {
    let is_expert = |id: u32| (id as usize) < shape.num_experts;
    let mut requests = vec![u32::MAX; shape.slots()];
    for slot in 0..shape.slots() {
        if !is_expert(expert_ids[slot]) || is_expert(all.expert_ids[slot]) {
            continue;
        }
        let token = slot / shape.top_k;
        let own = &expert_ids[token * shape.top_k..][..shape.top_k];
        let of_token = token * candidates.per_token;
        while next_candidate[token] < candidates.per_token {
            let place = of_token + next_candidate[token];
            next_candidate[token] += 1;
            let id = candidates.expert_ids[place];
            if is_expert(id) && !own.contains(&id) {
                requests[slot] = id;
                all.weights[slot] = candidates.weights[place];
                break;
            }
        }
    }
    requests
}

/// Weights of what is kept, `[T, K]`: divided by what `normalization` makes of the sum over a token's kept slots, in
/// the order of `k`, times `scale`; 0 for slots that `expert_ids` does not give to an expert. In f32 the kernel has the
/// same bits.
///
/// # Errors
/// A shape out of range, a length that is not the shape's, or a p-norm.
pub fn capacity_normalize_fwd<A: Accum>(
    shape: &RoutingShape,
    normalization: Normalization,
    scale: f32,
    expert_ids: &[u32],
    weights: &[A],
) -> Result<Vec<A>> {
    const OP: &str = "capacity_normalize_fwd";
    shape.check(OP)?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(OP, "weights", weights.len(), shape.slots())?;
    let (divide, epsilon, min) = kept_divisor(OP, "normalization", normalization)?;
    let (epsilon, min) = (A::from_dtype(epsilon), A::from_dtype(min));
    let is_kept = |slot: &usize| (expert_ids[*slot] as usize) < shape.num_experts;
    let mut normalized = vec![A::ZERO; shape.slots()];
    for token in 0..shape.num_tokens {
        let slots = token * shape.top_k..(token + 1) * shape.top_k;
        let sum = slots.clone().filter(is_kept).fold(A::ZERO, |sum, slot| sum + weights[slot]);
        let divisor = match divide {
            false => A::ONE,
            true if sum + epsilon < min => min,
            true => sum + epsilon,
        };
        for slot in slots.filter(is_kept) {
            normalized[slot] = weights[slot] / divisor * A::from_dtype(scale);
        }
    }
    Ok(normalized)
}

#[cfg(test)]
mod tests {
    use super::super::sample::Sampler;
    use super::*;
    use crate::config::CapacityLimit;

    const NONE: u32 = u32::MAX;

    fn config(rows: usize, priority: Priority, overflow: usize) -> CapacityConfig {
        CapacityConfig { overflow, ..CapacityConfig::new(CapacityLimit::Rows { rows }, priority) }
    }

    #[test]
    fn by_hand() {
        let shape = RoutingShape { num_tokens: 3, num_experts: 2, top_k: 2 };
        let ids = [0, 1, 1, 0, 0, 1];
        let weights = [0.6, 0.4, 0.7, 0.3, 0.9, 0.1];
        let kept = |priority, rows| {
            capacity_fwd(&shape, &config(rows, priority, 0), None, &ids, &weights, None).unwrap()
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
    fn overflow_by_hand() {
        let shape = RoutingShape { num_tokens: 3, num_experts: 3, top_k: 1 };
        let candidates = Candidates {
            per_token: 3,
            expert_ids: &[0, 1, 2, 0, 1, 2, 0, 1, 2],
            weights: &[0.6, 0.3, 0.1, 0.7, 0.2, 0.1, 0.8, 0.1, 0.05],
        };
        let run = |rows, overflow| {
            let config = config(rows, Priority::Token, overflow);
            let weights = [0.6, 0.7, 0.8];
            capacity_fwd(&shape, &config, None, &[0, 0, 0], &weights, Some(candidates)).unwrap()
        };
        assert_eq!(run(1, 0).expert_ids, [0, NONE, NONE]);
        let one = run(1, 1);
        assert_eq!(one.expert_ids, [0, 1, NONE]);
        assert_eq!((one.kept, one.dropped), (vec![1, 1, 0], vec![2, 1, 0]));
        let two = run(1, 2);
        assert_eq!((two.expert_ids, two.weights), (vec![0, 1, 2], vec![0.6, 0.2, 0.05]));
        assert_eq!(run(1, 9).expert_ids, [0, 1, 2]);
        assert!(
            capacity_fwd(&shape, &config(1, Priority::Token, 1), None, &[0; 3], &[0.0; 3], None)
                .is_err()
        );
    }

    /// The mask of a router of transformers' Switch: in each sequence, a token keeps its expert while the running
    /// count of that expert, the token included, is at most the capacity.
    fn switch_keeps(
        shape: &RoutingShape,
        tokens: usize,
        capacity: usize,
        ids: &[u32],
    ) -> Vec<bool> {
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

    /// The masks of transformers' NLLB top-2 router: the position of a first choice among the expert's first
    /// choices, tokens in order or by their largest probability; second choices behind all of them.
    fn nllb_keeps(
        shape: &RoutingShape,
        capacity: usize,
        by_probability: bool,
        ids: &[u32],
        weights: &[f32],
    ) -> Vec<bool> {
        let mut tokens: Vec<usize> = (0..shape.num_tokens).collect();
        if by_probability {
            tokens.sort_by(|&a, &b| weights[2 * b].partial_cmp(&weights[2 * a]).unwrap());
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
    fn families_keep_the_same_slots() {
        let mut sampler = Sampler::new(5);
        for _ in 0..200 {
            let num_experts = 2 + sampler.below(6);
            let (num_tokens, capacity) = (sampler.below(40), sampler.below(9));
            let kept = |shape, priority, tokens, ids: &[u32], weights: &[f32]| -> Vec<bool> {
                let config = config(capacity, priority, 0);
                let all = capacity_fwd(&shape, &config, tokens, ids, weights, None).unwrap();
                for (slot, &id) in all.expert_ids.iter().enumerate() {
                    assert!(id == NONE || id == ids[slot]);
                }
                all.expert_ids.iter().map(|&id| id != NONE).collect()
            };
            let shape = RoutingShape { num_tokens, num_experts, top_k: 1 };
            let ids: Vec<u32> =
                (0..num_tokens).map(|_| sampler.below(num_experts) as u32).collect();
            let tokens = 1 + sampler.below(12);
            let weights = vec![0.0; num_tokens];
            assert_eq!(
                kept(shape, Priority::Token, Some(tokens), &ids, &weights),
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
            let weights: Vec<f32> = ids.iter().map(|_| sampler.below(5) as f32 / 4.0).collect();
            for (priority, by_probability) in
                [(Priority::Choice, false), (Priority::ChoiceByTopWeight, true)]
            {
                assert_eq!(
                    kept(shape, priority, None, &ids, &weights),
                    nllb_keeps(&shape, capacity, by_probability, &ids, &weights)
                );
            }
        }
    }

    #[test]
    fn what_is_kept_is_normalised() {
        let shape = RoutingShape { num_tokens: 3, num_experts: 4, top_k: 2 };
        let ids = [0, 1, NONE, 2, NONE, NONE];
        let weights = [0.5, 0.25, f32::NAN, 0.125, 0.5, 0.5];
        let run = |normalization, scale| {
            capacity_normalize_fwd(&shape, normalization, scale, &ids, &weights)
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
    }

    #[test]
    fn wrong_arguments() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
        let config = config(1, Priority::Token, 0);
        let run = |tokens, ids: &[u32], weights: &[f32]| {
            capacity_fwd(&shape, &config, tokens, ids, weights, None)
        };
        assert!(run(None, &[0, 7], &[0.0; 2]).is_ok());
        assert!(run(Some(0), &[0, 1], &[0.0; 2]).is_err());
        assert!(run(None, &[0], &[0.0; 2]).is_err());
        assert!(run(None, &[0, 1], &[0.0]).is_err());
        let none = RoutingShape { num_tokens: 0, ..shape };
        let nothing = capacity_fwd(&none, &config, None, &[], &[], None).unwrap();
        assert!(nothing.kept.is_empty() && nothing.expert_ids.is_empty());
    }
}
