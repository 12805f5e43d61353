//! The router: from logits to expert ids and weights. [`route_fwd`] states its specification.

pub(super) mod exact;
mod scores;
mod select;
mod sparsemixer;
#[cfg(test)]
mod tests;
mod weigh;

use exact::Number;
pub use scores::route_scores_fwd;

use super::accum::Accum;
use crate::config::{RouteLengths, RouterConfig, Score, Selection};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::shape::RoutingShape;

/// What the router decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing<A> {
    /// `[T, K]`, the experts of each token, strongest first; `u32::MAX` for a slot without one.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`, their weights.
    pub routing_weights: Vec<A>,
}

/// What the router reads: the logits, and what its configuration or the caller adds to them.
///
/// [`RouteInputs::new`] has the logits alone; struct update syntax adds the rest.
#[derive(Debug, Clone, Copy)]
pub struct RouteInputs<'a, D> {
    /// `[T, E]`
    pub logits: &'a [D],
    /// `[E - num_sinks]`, where the router has a selection bias and chooses itself.
    pub selection_bias: Option<&'a [f32]>,
    /// `[E]`, where the router scales by expert.
    pub expert_scale: Option<&'a [f32]>,
    /// `[T, E]`, added to the logits.
    pub noise: Option<&'a [f32]>,
    /// `[T, E]`: noise is multiplied by `softplus` of these first.
    pub noise_logits: Option<&'a [D]>,
    /// `[T, K, E]`, where [`Scoring::Sparsemixer`](crate::Scoring::Sparsemixer) is that of training: added to `z` for
    /// the selection alone, a row for each choice; standard Gumbel.
    pub selection_noise: Option<&'a [f32]>,
    /// `[T, K]`, there with `selection_noise`: uniform in `[0, 1)`.
    pub midpoint_draws: Option<&'a [f32]>,
    /// `[V, K]`, where ids are given; a row for each token without `token_ids`.
    pub given_ids: Option<&'a [u32]>,
    /// `[T]`, the row of `given_ids` that a token has.
    pub token_ids: Option<&'a [u32]>,
    /// `[T]`: tokens with a 0 have no experts.
    pub active: Option<&'a [u8]>,
}

impl<'a, D> RouteInputs<'a, D> {
    /// The logits `[T, E]` alone.
    pub const fn new(logits: &'a [D]) -> Self {
        Self {
            logits,
            selection_bias: None,
            expert_scale: None,
            noise: None,
            noise_logits: None,
            selection_noise: None,
            midpoint_draws: None,
            given_ids: None,
            token_ids: None,
            active: None,
        }
    }

    fn lengths(&self) -> RouteLengths {
        RouteLengths {
            logits: self.logits.len(),
            selection_bias: self.selection_bias.map(<[f32]>::len),
            expert_scale: self.expert_scale.map(<[f32]>::len),
            noise: self.noise.map(<[f32]>::len),
            noise_logits: self.noise_logits.map(<[D]>::len),
            selection_noise: self.selection_noise.map(<[f32]>::len),
            midpoint_draws: self.midpoint_draws.map(<[f32]>::len),
            given_ids: self.given_ids.map(<[u32]>::len),
            token_ids: self.token_ids.map(<[u32]>::len),
            active: self.active.map(<[u8]>::len),
        }
    }
}

/// Chooses `K` experts for each token and weighs them.
///
/// For each token, with its `E` logits read as f32 (exact for every element type):
///
/// 1. **z.** A NaN counts as `-inf` and `-0` as `+0`, here and after each addition and at the end. Where there is
///    noise, `l + d * noise` with the deviation `d`, or `l + d * noise * softplus(noise_logit)`; then times the
///    multiplier; then `c * tanh(z / c)`.
/// 2. **Value.** What an expert is chosen by: `z` or its score, as [`RouterConfig`] says, plus its entry of the
///    selection bias. The last `num_sinks` experts have none, as they are not up for choice.
/// 3. **Groups.** A group is worth its largest value, or the sum of its two largest ones (of one expert, its value).
///    Outside the groups of largest worth, ties to the lower group, values become `-inf` or 0.
/// 4. **Choose.** The `K - num_sinks` experts that come first in the order (value descending, id ascending). So the
///    ids of a token are always distinct, and the first slot holds the strongest. The sinks follow, ascending.
///    Given ids take the place of 2 to 4; of those, an id from `E` on leaves its slot without an expert.
/// 5. **Score.** Of each chosen expert, without the bias. A softmax over some experts with the largest `z` of `m` has
///    `p = 1` where `z == m` and `exp(z - m)` elsewhere, so that infinite maxima share equally, and divides by the sum
///    of `p`. It is over all experts; over the chosen ones for [`SoftmaxSelected`](crate::Scoring::SoftmaxSelected),
///    and where scores are divided by their own sum or norm, out of which the difference cancels.
/// 6. **Normalise.** Scores are divided by their sum plus epsilon, their sum but no less than a minimum, or their norm,
///    which is that of their fractions of the largest one. Sums are over all slots, the sinks among them.
/// 7. **Scale.** Times `scale`, times the expert's own scale. What is no number then, of `0 / 0` or `inf / inf`, weighs
///    0; so does a slot without an expert. No weight is ever NaN.
///
/// Sparsemixer in training takes the place of 2 to 6. For each choice in turn, with `m` the largest `z` of the experts
/// that were not chosen before it, ties to the lower id:
///
/// 1. An expert of those is near if `z == m` or `(m - z) / max(|z|, m) <= 2 * jitter`.
/// 2. The choice is the near expert of largest `z + g`, ties to the lower id, with `g` the choice's row of
///    `selection_noise`; a NaN counts as `-inf`.
/// 3. It weighs its share of a softmax of `z` over the near experts; times 0.3333 if it is not the expert of `m`, unless
///    its number of `midpoint_draws` is above 0.75.
///
/// A token that is not active has slots without experts alone.
///
/// Steps 1 to 4 are computed in f32, so that every device and either accumulation type have the same ids; steps 5 to 7
/// in `A`, from the `z` in `A`. With `A` = f32 weights too are bit for bit those of every device: all operations round
/// correctly, `exp`, `log` and `tanh` are our own, what is fused is written, sums of a softmax are integers of units of
/// `2^-29`, and sums over slots have the order that `sum_of_slots` gives them. With `A` = f64 they are the truth, which
/// [`bound::route`](super::bound::route) says how far others may be from.
///
/// # Errors
/// A shape or a router out of range, a buffer that the router asks for and does not get or the reverse, or a length
/// that is not the shape's.
pub fn route_fwd<A: Accum, D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
) -> Result<Routing<A>> {
    route_in(shape, router, inputs)
}

/// [`route_fwd`] in any kind of number.
pub(super) fn route_in<N: Number, D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
) -> Result<Routing<N>> {
    inputs.lengths().check("route_fwd", shape, router)?;
    let mut routing = Routing {
        expert_ids: Vec::with_capacity(shape.slots()),
        routing_weights: Vec::with_capacity(shape.slots()),
    };
    for t in 0..shape.num_tokens {
        let (ids, routing_weights) = Token::new(shape, inputs, t).route(shape, router);
        routing.expert_ids.extend(ids);
        routing.routing_weights.extend::<Vec<N>>(routing_weights);
    }
    Ok(routing)
}

/// What the experts of each token are chosen by, in any kind of number: for tests of the choice.
#[cfg(test)]
pub(super) fn values_in<N: Number, D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
) -> Vec<Vec<N>> {
    let choices = shape.num_experts - router.num_sinks;
    let token = |t| Token::new(shape, inputs, t).values(router, choices);
    (0..shape.num_tokens).map(token).collect()
}

/// The id of a slot without an expert.
const NO_EXPERT: u32 = u32::MAX;

/// What the router reads of one token.
struct Token<'a> {
    /// `[E]`
    logits: Vec<f32>,
    selection_bias: Option<&'a [f32]>,
    expert_scale: Option<&'a [f32]>,
    /// `[E]`
    noise: Option<&'a [f32]>,
    /// `[E]`
    noise_logits: Option<Vec<f32>>,
    /// `[K, E]`
    selection_noise: Option<&'a [f32]>,
    /// `[K]`
    midpoint_draws: Option<&'a [f32]>,
    /// `[K]`; of a row that does not exist, `Some(None)`.
    given_ids: Option<Option<&'a [u32]>>,
    active: bool,
}

impl<'a> Token<'a> {
    fn new<D: Dtype>(shape: &RoutingShape, inputs: &RouteInputs<'a, D>, t: usize) -> Self {
        let (slots, experts) = (t * shape.top_k..(t + 1) * shape.top_k, shape.num_experts);
        let row = t * experts..(t + 1) * experts;
        let of_slots = slots.start * experts..slots.end * experts;
        let wide = |values: &[D]| values.iter().map(|value| value.to_f32()).collect();
        let given = inputs.given_ids.map(|given| {
            let row = inputs.token_ids.map_or(t, |ids| ids[t] as usize);
            given.chunks_exact(shape.top_k).nth(row)
        });
        Self {
            logits: wide(&inputs.logits[row.clone()]),
            selection_bias: inputs.selection_bias,
            expert_scale: inputs.expert_scale,
            noise: inputs.noise.map(|noise| &noise[row.clone()]),
            noise_logits: inputs.noise_logits.map(|logits| wide(&logits[row.clone()])),
            selection_noise: inputs.selection_noise.map(|noise| &noise[of_slots]),
            midpoint_draws: inputs.midpoint_draws.map(|draws| &draws[slots]),
            given_ids: given,
            active: inputs.active.is_none_or(|active| active[t] != 0),
        }
    }

    /// The `K` ids of this token and their weights.
    fn route<N: Number>(&self, shape: &RoutingShape, router: &RouterConfig) -> (Vec<u32>, Vec<N>) {
        if !self.active {
            return (vec![NO_EXPERT; shape.top_k], vec![N::of(0.0); shape.top_k]);
        }
        let ids = match (router.selection, router.score(), self.selection_noise) {
            (Selection::Given, ..) => self.given(shape),
            (_, Score::Sparsemixer { jitter }, Some(noise)) => {
                sparsemixer::sample(jitter, &weigh::logits(router, self), noise)
            }
            _ => self.choose(shape, router),
        };
        let routing_weights = self.weigh(router, &ids);
        (ids, routing_weights)
    }

    /// The given ids, where they are those of experts.
    fn given(&self, shape: &RoutingShape) -> Vec<u32> {
        let known = |&id: &u32| if (id as usize) < shape.num_experts { id } else { NO_EXPERT };
        match self.given_ids.flatten() {
            Some(ids) => ids.iter().map(known).collect(),
            None => vec![NO_EXPERT; shape.top_k],
        }
    }

    fn choose(&self, shape: &RoutingShape, router: &RouterConfig) -> Vec<u32> {
        let choices = shape.num_experts - router.num_sinks;
        let values = self.values::<f32>(router, choices);
        let chosen = select::choose(values, router.groups.as_ref(), shape.top_k - router.num_sinks);
        chosen.into_iter().chain(choices..shape.num_experts).map(|id| id as u32).collect()
    }

    /// What the first `choices` experts are chosen by.
    fn values<N: Number>(&self, router: &RouterConfig, choices: usize) -> Vec<N> {
        let z = weigh::logits::<N>(router, self);
        let mut values = weigh::scores(router.value(), &z, &z[..choices]);
        for (value, bias) in values.iter_mut().zip(self.selection_bias.into_iter().flatten()) {
            *value = (*value + N::of(*bias)).cleaned();
        }
        values
    }

    fn weigh<N: Number>(&self, router: &RouterConfig, ids: &[u32]) -> Vec<N> {
        let z = weigh::logits::<N>(router, self);
        let experts: Vec<u32> = ids.iter().copied().filter(|&id| id != NO_EXPERT).collect();
        let chosen: Vec<N> = experts.iter().map(|&id| z[id as usize]).collect();
        let mut of_experts = match router.score() {
            Score::Sparsemixer { jitter } => {
                let z32 = weigh::logits::<f32>(router, self);
                sparsemixer::scores(jitter, &z, &z32, &experts, self.midpoint_draws)
            }
            score => weigh::scores(score, &z, &chosen),
        }
        .into_iter();
        // Slots without an expert count as 0 in every sum.
        let has_expert = ids.iter().map(|&id| id != NO_EXPERT);
        let score = |has: bool| if has { of_experts.next() } else { None };
        let mut routing_weights: Vec<N> =
            has_expert.map(score).map(|score| score.unwrap_or(N::of(0.0))).collect();
        weigh::normalize(router.divisor(), &mut routing_weights);
        for (weight, &id) in routing_weights.iter_mut().zip(ids) {
            let scaled = *weight * N::of(router.scale);
            *weight = match (id, self.expert_scale) {
                (NO_EXPERT, _) => N::of(0.0),
                (id, Some(scale)) => (scaled * N::of(scale[id as usize])).or_zero(),
                (_, None) => scaled.or_zero(),
            };
        }
        routing_weights
    }
}
