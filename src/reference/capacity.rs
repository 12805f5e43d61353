//! Capacity: an expert keeps a limited number of slots in each sequence; the others are dropped, or
//! reassigned to their tokens' next candidates.

#[cfg(test)]
mod tests;

use std::cmp::Ordering;

use super::accum::Accum;
use super::plan::Plan;
use super::route::exact::Number;
use crate::config::{CapacityConfig, Normalization, Priority, kept_divisor};
use crate::error::{Error, Result, check_len, product};
use crate::shape::RoutingShape;

/// The slots that experts keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capacity {
    /// `[T, K]`: the expert of a kept slot, else `u32::MAX`.
    pub expert_ids: Vec<u32>,
    /// `[S, E]`: the number of slots of each sequence that each expert keeps.
    pub kept: Vec<u32>,
    /// `[S, E]`: the number of slots of each sequence that each expert drops.
    pub dropped: Vec<u32>,
}

/// Compares two numbers, with -0 as 0 and NaN as minus infinity.
pub(super) fn compare(a: f32, b: f32) -> Ordering {
    a.cleaned().partial_cmp(&b.cleaned()).unwrap_or(Ordering::Equal)
}

/// Keeps, in each sequence, the first slots of each expert in the order of `config`'s priority, up
/// to its limit.
///
/// `shape` is that of the routing, and `plan` the plan of its ids by slot
/// ([`RoutingShape::by_slot`]), which may be of some of the experts. A sequence has
/// `sequence_tokens` tokens, the last one possibly fewer; without a length the batch is one
/// sequence. Inactive slots stay inactive and never count. `routing_weights` `[T, K]` are read for
/// priorities by weight; for [`Priority::ChoiceByTopWeight`] they are those before any
/// normalisation, of which the first choices' are read. This is the first round; up to `overflow`
/// rounds of reassignment follow, each of [`capacity_reassign_fwd`] and [`capacity_later_fwd`].
///
/// # Errors
/// A shape or limit out of range, a length that is not the shape's, or a plan that is not of these
/// slots.
pub fn capacity_fwd(
    plan: &Plan,
    shape: &RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    routing_weights: &[f32],
) -> Result<Capacity> {
    shape.check(OP)?;
    let cells = cells(plan, shape, sequence_tokens)?;
    let mut capacity = Capacity {
        expert_ids: vec![u32::MAX; shape.slots()],
        kept: vec![0; cells],
        dropped: vec![0; cells],
    };
    capacity_later_fwd(plan, shape, config, sequence_tokens, routing_weights, &mut capacity)?;
    Ok(capacity)
}

/// A round of reassignment: experts keep their slots, `kept` of them, and accept requests up to
/// their limit.
///
/// `plan` is the plan by slot of the requests of [`capacity_reassign_fwd`]. `expert_ids` is written
/// for accepted requests alone. Accepted requests are added to `kept` and the others to `dropped`.
/// `routing_weights` are those of the requests, but the first round's for
/// [`Priority::ChoiceByTopWeight`]. The rest is as for [`capacity_fwd`].
///
/// # Errors
/// Those of [`capacity_fwd`].
pub fn capacity_later_fwd(
    plan: &Plan,
    shape: &RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    routing_weights: &[f32],
    capacity: &mut Capacity,
) -> Result<()> {
    shape.check(OP)?;
    if sequence_tokens == Some(0) {
        let (wanted, got) = ("1 or more".into(), "0".into());
        return Err(Error::Unsupported { op: OP, argument: "sequence_tokens", wanted, got });
    }
    check_by_slot(plan, shape)?;
    let cells = cells(plan, shape, sequence_tokens)?;
    check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
    check_len(OP, "expert_ids", capacity.expert_ids.len(), shape.slots())?;
    check_len(OP, "kept", capacity.kept.len(), cells)?;
    check_len(OP, "dropped", capacity.dropped.len(), cells)?;
    // The limit is that of a whole sequence, even if the batch is shorter.
    let tokens = sequence_tokens.unwrap_or(shape.num_tokens);
    let rows = config.rows(shape, tokens)?;

    for (expert, id) in plan.experts.clone().enumerate() {
        // The slots of this expert in each sequence.
        let slots = plan.token_of_row[plan.rows_of(expert)].iter().map(|&slot| slot as usize);
        let mut by_sequence = vec![Vec::new(); shape.sequences(sequence_tokens)];
        slots.for_each(|slot| by_sequence[slot / shape.top_k / tokens.max(1)].push(slot));
        for (sequence, mut slots) in by_sequence.into_iter().enumerate() {
            slots.sort_by(|&a, &b| {
                compare_slots(config.priority, shape.top_k, routing_weights, a, b)
            });
            let cell = sequence * plan.num_experts() + expert;
            let room = rows.saturating_sub(capacity.kept[cell] as usize).min(slots.len());
            capacity.kept[cell] += room as u32;
            capacity.dropped[cell] += (slots.len() - room) as u32;
            slots[..room].iter().for_each(|&slot| capacity.expert_ids[slot] = id as u32);
        }
    }
    Ok(())
}

const OP: &str = "capacity_fwd";

/// `N * E`, for the plan's experts.
fn cells(plan: &Plan, shape: &RoutingShape, sequence_tokens: Option<usize>) -> Result<usize> {
    product(OP, "sequences * num_experts", shape.sequences(sequence_tokens), plan.num_experts())
}

/// Checks that the rows of a plan are the slots of a shape.
fn check_by_slot(plan: &Plan, shape: &RoutingShape) -> Result<()> {
    plan.check(OP)?;
    let of_shape = plan.row_of_slot.len() == shape.slots()
        && plan.rows() == shape.slots()
        && plan.experts.end <= shape.num_experts;
    let by_slot = plan.row_of_slot.iter().enumerate().filter(|(_, row)| **row >= 0);
    let in_use = by_slot.clone().count() == plan.rows_in_use();
    let mut by_slot = by_slot.map(|(slot, &row)| (slot as i32, plan.token_of_row[row as usize]));
    if of_shape && in_use && by_slot.all(|(slot, token)| slot == token) {
        return Ok(());
    }
    let why = format!("the plan is not one of {}, made by slot for {shape}", shape.by_slot());
    Err(Error::Mismatch { op: OP, why })
}

/// Compares two slots of an expert by priority.
fn compare_slots(
    priority: Priority,
    top_k: usize,
    routing_weights: &[f32],
    a: usize,
    b: usize,
) -> Ordering {
    let choice = (a % top_k).cmp(&(b % top_k));
    let top = |slot: usize| routing_weights[slot / top_k * top_k];
    let before = match priority {
        Priority::Token => Ordering::Equal,
        Priority::Choice => choice,
        Priority::Weight => compare(routing_weights[b], routing_weights[a]),
        Priority::ChoiceByTopWeight => choice.then(compare(top(b), top(a))),
    };
    before.then(a.cmp(&b))
}

/// Requests the next candidate of its token for each dropped slot: `[T, K]`, `u32::MAX` without a
/// request.
///
/// `candidates` `[T, C]` are each token's experts in the order of scores, with their weights:
/// `route`'s result with a larger `top_k`. `expert_ids` `[T, K]` are the router's, `kept_ids` those
/// that the rounds so far have kept. A dropped slot requests the next candidate that is an expert
/// and is not in its token's own `expert_ids`; the slots of a token in order, and each candidate at
/// most once. `routing_weights` `[T, K]` receives the candidate's weight. `next_candidate` `[T]` is
/// each token's position in its candidates: written in the `first` round, read and written in later
/// ones.
///
/// # Errors
/// A shape out of range, or a length that is not the shape's.
#[allow(clippy::too_many_arguments, reason = "those of the device's")]
pub fn capacity_reassign_fwd(
    shape: &RoutingShape,
    num_candidates: usize,
    first: bool,
    expert_ids: &[u32],
    kept_ids: &[u32],
    candidates: &[u32],
    candidate_weights: &[f32],
    next_candidate: &mut [u32],
    routing_weights: &mut [f32],
) -> Result<Vec<u32>> {
    const OP: &str = "capacity_reassign_fwd";
    shape.check(OP)?;
    let listed = product(OP, "num_tokens * candidates", shape.num_tokens, num_candidates)?;
    for (name, len, wanted) in [
        ("expert_ids", expert_ids.len(), shape.slots()),
        ("kept_ids", kept_ids.len(), shape.slots()),
        ("candidates", candidates.len(), listed),
        ("candidate_weights", candidate_weights.len(), listed),
        ("next_candidate", next_candidate.len(), shape.num_tokens),
        ("routing_weights", routing_weights.len(), shape.slots()),
    ] {
        check_len(OP, name, len, wanted)?;
    }
    let is_expert = |id: u32| (id as usize) < shape.num_experts;
    let mut requests = vec![u32::MAX; shape.slots()];
    for (token, next) in next_candidate.iter_mut().enumerate() {
        let own = &expert_ids[token * shape.top_k..][..shape.top_k];
        if first {
            *next = 0;
        }
        for (k, &id) in own.iter().enumerate() {
            let slot = token * shape.top_k + k;
            if !is_expert(id) || is_expert(kept_ids[slot]) {
                continue;
            }
            while (*next as usize) < num_candidates {
                let place = token * num_candidates + *next as usize;
                *next += 1;
                let candidate = candidates[place];
                if is_expert(candidate) && !own.contains(&candidate) {
                    requests[slot] = candidate;
                    routing_weights[slot] = candidate_weights[place];
                    break;
                }
            }
        }
    }
    Ok(requests)
}

/// Normalises the weights of kept slots, `[T, K]`: divided by the divisor that `normalization`
/// computes from the sum over the token's kept slots, in the order of `k`, times `scale`, times the
/// expert's element of `expert_scale` `[E]`. NaN (of `0 / 0` or `inf / inf`) becomes 0, and slots
/// without an expert in `expert_ids` have 0. In f32 the kernel has the same bits.
///
/// # Errors
/// A shape out of range, a length that is not the shape's, or a p-norm.
pub fn capacity_normalize_fwd<A: Accum>(
    shape: &RoutingShape,
    normalization: Normalization,
    scale: f32,
    expert_scale: Option<&[f32]>,
    expert_ids: &[u32],
    routing_weights: &[A],
) -> Result<Vec<A>> {
    const OP: &str = "capacity_normalize_fwd";
    shape.check(OP)?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
    if let Some(expert_scale) = expert_scale {
        check_len(OP, "expert_scale", expert_scale.len(), shape.num_experts)?;
    }
    let (divide, epsilon, min) = kept_divisor(OP, "normalization", normalization)?;
    let (epsilon, min) = (A::from_dtype(epsilon), A::from_dtype(min));
    let is_kept = |slot: &usize| (expert_ids[*slot] as usize) < shape.num_experts;
    let mut normalized = vec![A::ZERO; shape.slots()];
    for token in 0..shape.num_tokens {
        let slots = token * shape.top_k..(token + 1) * shape.top_k;
        let sum =
            slots.clone().filter(is_kept).fold(A::ZERO, |sum, slot| sum + routing_weights[slot]);
        let divisor = match divide {
            false => A::ONE,
            true if sum + epsilon < min => min,
            true => sum + epsilon,
        };
        for slot in slots.filter(is_kept) {
            let scaled = routing_weights[slot] / divisor * A::from_dtype(scale);
            let own = expert_scale.map(|scale| A::from_dtype(scale[expert_ids[slot] as usize]));
            normalized[slot] = Number::or_zero(own.map_or(scaled, |own| scaled * own));
        }
    }
    Ok(normalized)
}
