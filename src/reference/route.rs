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

/// The result of a router.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing<A> {
    /// `[T, K]`: the experts of each token, strongest first; `u32::MAX` for a slot without an
    /// expert.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`: the weights of those experts.
    pub routing_weights: Vec<A>,
}

/// The inputs of a router: the logits, and the optional buffers that its configuration needs or the
/// caller gives.
///
/// [`RouteInputs::new`] sets the logits alone; struct update syntax adds the rest.
#[derive(Debug, Clone, Copy)]
pub struct RouteInputs<'a, D> {
    /// `[T, E]`
    pub logits: &'a [D],
    /// `[E - num_sinks]`, if the router has a selection bias and selects the experts itself.
    pub selection_bias: Option<&'a [f32]>,
    /// `[E]`, if the router scales by expert.
    pub expert_scale: Option<&'a [f32]>,
    /// `[T, E]`, added to the logits.
    pub noise: Option<&'a [f32]>,
    /// `[T, E]`: noise is multiplied by `softplus` of these first.
    pub noise_logits: Option<&'a [D]>,
    /// `[T, K, E]`, for [`Scoring::Sparsemixer`](crate::Scoring::Sparsemixer) in training: standard
    /// Gumbel noise, a row for each choice, added to `z` for the selection alone.
    pub selection_noise: Option<&'a [f32]>,
    /// `[T, K]`, given together with `selection_noise`: uniform in `[0, 1)`.
    pub midpoint_draws: Option<&'a [f32]>,
    /// `[V, K]`, if ids are given; without `token_ids` a row for each token.
    pub given_ids: Option<&'a [u32]>,
    /// `[T]`, each token's row of `given_ids`.
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

/// Selects `K` experts for each token and computes their weights.
///
/// For each token, with its `E` logits read as f32 (exact for every element type):
///
/// 1. **z.** A NaN counts as `-inf` and `-0` as `+0`, here, after each addition and at the end.
///    With noise, `l + d * noise` with the deviation `d`, or
///    `l + d * noise * softplus(noise_logit)`; then times the multiplier; then `c * tanh(z / c)`.
/// 2. **Value.** `z` or its score, as [`RouterConfig`] defines it, plus the expert's element of the
///    selection bias. The last `num_sinks` experts have no value, as they are not selected.
/// 3. **Groups.** A group's score is its largest value, or the sum of its two largest values (for
///    one expert, its value). Outside the groups with the largest scores, ties to the lower group,
///    values become `-inf` or 0.
/// 4. **Select.** The first `K - num_sinks` experts in the order (value descending, id ascending).
///    The ids of a token are therefore distinct, and its first slot has the strongest expert. The
///    sinks follow, ascending. Given ids replace steps 2 to 4; a slot with a given id of `E` or
///    more has no expert.
/// 5. **Score.** The score of each selected expert, without the bias. A softmax over a set of
///    experts with the largest `z` of `m` has `p = 1` if `z == m`, else `p = exp(z - m)`, so that
///    equal infinite maxima share equally, and divides by the sum of `p`. The set is all experts;
///    it is the selected ones for [`SoftmaxSelected`](crate::Scoring::SoftmaxSelected), and for
///    scores that are divided by their own sum or norm, in which the difference cancels.
/// 6. **Normalise.** Scores are divided by their sum plus epsilon, by the larger of their sum and a
///    minimum, or by their norm, which is computed from their fractions of the largest. Sums are
///    over all slots, sinks included.
/// 7. **Scale.** Times `scale`, times the expert's own scale. NaN (of `0 / 0` or `inf / inf`)
///    becomes 0, and a slot without an expert has the weight 0. No weight is NaN.
///
/// Sparsemixer in training replaces steps 2 to 6. For each choice in turn, with `m` the largest `z`
/// of the experts that were not chosen before, ties to the lower id:
///
/// 1. Such an expert is near if `z == m` or `(m - z) / max(|z|, m) <= 2 * jitter`.
/// 2. The choice is the near expert with the largest `z + g`, ties to the lower id, with `g` the
///    choice's row of `selection_noise`; a NaN counts as `-inf`.
/// 3. Its score is its share of a softmax of `z` over the near experts, times 0.3333 if it is not
///    the expert of `m` and its element of `midpoint_draws` is not above 0.75.
///
/// The slots of an inactive token have no experts.
///
/// Steps 1 to 4 are computed in f32, so that ids are the same on every device and for either
/// accumulation type; steps 5 to 7 in `A`, from the `z` in `A`. With `A` = f32 the weights have the
/// same bits on every device too: all operations are correctly rounded, `exp`, `log` and `tanh` are
/// this crate's own, fused operations are explicit, sums of a softmax are integers in units of
/// `2^-29`, and sums over slots are in the order of `sum_of_slots`. With `A` = f64 they are the
/// exact values, to which [`bound::route`](super::bound::route) bounds the distance of others.
///
/// # Errors
/// A shape or a router out of range, a buffer that the router needs and that is not given or the
/// reverse, or a length that is not the shape's.
pub fn route_fwd<A: Accum, D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
) -> Result<Routing<A>> {
    route_in(shape, router, inputs)
}

/// [`route_fwd`] in any number type.
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

/// The values that select each token's experts, in any number type: for tests of the selection.
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

/// The inputs of one token.
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
    /// `[K]`; `Some(None)` for a row that does not exist.
    given_ids: Option<Option<&'a [u32]>>,
    active: bool,
}

impl<'a> Token<'a> {
    fn new<D: Dtype>(shape: &RoutingShape, inputs: &RouteInputs<'a, D>, t: usize) -> Self {
        let (slots, experts) = (t * shape.top_k..(t + 1) * shape.top_k, shape.num_experts);
        let row = t * experts..(t + 1) * experts;
        let slot_rows = slots.start * experts..slots.end * experts;
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
            selection_noise: inputs.selection_noise.map(|noise| &noise[slot_rows]),
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

    /// The given ids; those out of range become [`NO_EXPERT`].
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

    /// The values that select the first `choices` experts.
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
        let mut scores = match router.score() {
            Score::Sparsemixer { jitter } => {
                let z32 = weigh::logits::<f32>(router, self);
                sparsemixer::scores(jitter, &z, &z32, &experts, self.midpoint_draws)
            }
            score => weigh::scores(score, &z, &chosen),
        }
        .into_iter();
        // Slots without an expert count as 0 in every sum.
        let has_expert = ids.iter().map(|&id| id != NO_EXPERT);
        let score = |has: bool| if has { scores.next() } else { None };
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
