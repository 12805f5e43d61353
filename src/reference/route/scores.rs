//! The values of one step of the router for every expert.

use super::{RouteInputs, Token, weigh};
use crate::config::{RouterConfig, RouterStep, Score};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::reference::accum::Accum;
use crate::shape::RoutingShape;

/// The values of a step of the router, `[T, E]`: the scores for
/// [`expert_choice_fwd`](crate::reference::expert_choice_fwd), or the logits for losses.
/// [`route_fwd`](super::route_fwd) states the steps; in f32 the bits are the same on every device.
/// Of the inputs, `logits`, `noise`, `noise_logits` and `active` are read. The row of an inactive
/// token is 0, or `-inf` for logits.
///
/// # Errors
/// A shape or a router out of range, a length that is not the shape's, noise logits without noise,
/// and scores that depend on which experts are chosen
/// ([`SoftmaxSelected`](crate::Scoring::SoftmaxSelected) and sparsemixer).
pub fn route_scores_fwd<A: Accum, D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    step: RouterStep,
    inputs: &RouteInputs<'_, D>,
) -> Result<Vec<A>> {
    const OP: &str = "route_scores_fwd";
    inputs.lengths().check_step(OP, shape, router)?;
    let (router, score) = router.score_of_step(OP, step)?;
    let inactive_score = if score == Score::Logit { f32::NEG_INFINITY } else { 0.0 };
    let mut scores = Vec::with_capacity(shape.logits());
    for t in 0..shape.num_tokens {
        let read = RouteInputs { given_ids: None, token_ids: None, ..*inputs };
        let token = Token::new(shape, &read, t);
        if token.active {
            let z = weigh::logits::<A>(&router, &token);
            scores.extend(weigh::scores(score, &z, &z));
        } else {
            scores.extend((0..shape.num_experts).map(|_| A::from_dtype(inactive_score)));
        }
    }
    Ok(scores)
}
