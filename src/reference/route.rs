//! The router: from logits to expert ids and weights. [`route_fwd`] states its specification.

use std::cmp::Ordering;

use super::accum::Accum;
use crate::config::RouterConfig;
use crate::dtype::Dtype;
use crate::error::{Result, check_len};
use crate::shape::RoutingShape;

/// What the router decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing<A> {
    /// `[T, K]`, the experts of each token, strongest first.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`, their weights.
    pub weights: Vec<A>,
}

/// Chooses `K` experts for each token and weighs them: `logits` `[T, E]`.
///
/// For each token, with its `E` logits read as f32 (exact for every element type):
///
/// 1. **Clean.** `l_e` is the logit of expert `e`; a NaN counts as `-inf`, and `-0` equals `+0`.
/// 2. **Select.** The `K` experts that come first in the order (logit descending, id ascending):
///    the largest logits, ties to the lower id. This is also the order of the output, so the first
///    slot of a token holds its strongest expert. Only comparisons of f32 are involved, so every
///    device and either accumulation type selects the same ids, and the ids of a token are
///    distinct.
/// 3. **Weigh.** With `m` the largest of the `E` logits, `p_e = 1` where `l_e == m` and
///    `exp(l_e - m)` elsewhere. So a row that holds `+inf`, or nothing but `-inf` and NaN, is
///    defined too: the experts at the maximum share equally, the others get 0. No weight is ever
///    NaN.
///    - [`RouterConfig::softmax_top_k`] without renormalisation: `w_e = p_e / s`, where `s` is the sum
///      of `p` over all `E` experts in the order of their ids.
///    - with renormalisation: those `w_e`, each divided by the sum of the `K` of them in the order
///      of selection; in real numbers `p_e` over the sum of the selected `p`. Nothing guards this
///      division, for the expert at the maximum is always selected and its `p` is 1, so the sum is
///      at least `1/E`.
///    - [`RouterConfig::top_k_softmax`]: `p_e` over the sum of the `K` selected `p` in the order of
///      selection. In real numbers this is the renormalised softmax; it rounds once less.
///
/// Step 3 is computed in `A`. A kernel may sum in another order;
/// [`bound::route`](super::bound::route) says how far its weights may then be from the f64 ones.
///
/// # Errors
/// A shape out of range, or a length that is not the shape's.
pub fn route_fwd<A: Accum, D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    logits: &[D],
) -> Result<Routing<A>> {
    shape.check("route_fwd")?;
    check_len("route_fwd", "logits", logits.len(), shape.logits())?;
    let mut routing = Routing {
        expert_ids: Vec::with_capacity(shape.slots()),
        weights: Vec::with_capacity(shape.slots()),
    };
    for logits in logits.chunks_exact(shape.num_experts) {
        let logits: Vec<f32> = logits.iter().map(|logit| logit.to_f32()).collect();
        for (id, weight) in route_token(router, shape.top_k, &logits) {
            routing.expert_ids.push(id);
            routing.weights.push(weight);
        }
    }
    Ok(routing)
}

/// The experts of one token with their weights, strongest first: `logits` `[E]`. At most `E` of
/// them.
pub fn route_token<A: Accum>(router: &RouterConfig, top_k: usize, logits: &[f32]) -> Vec<(u32, A)> {
    let logits: Vec<f32> =
        logits.iter().map(|&l| if l.is_nan() { f32::NEG_INFINITY } else { l }).collect();
    let selected = select(&logits, top_k);
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let p = |e: usize| softmax_numerator::<A>(logits[e], max);
    let selected_sum: A = selected.iter().map(|&e| p(e)).sum();

    let sum_all = *router == RouterConfig::softmax_top_k(false);
    let sum = if sum_all { (0..logits.len()).map(p).sum() } else { selected_sum };
    let weights: Vec<A> = selected.iter().map(|&e| p(e) / sum).collect();
    selected.into_iter().map(|e| e as u32).zip(weights).collect()
}

/// The `top_k` largest of logits without NaN, in the order (logit descending, id ascending).
fn select(logits: &[f32], top_k: usize) -> Vec<usize> {
    let order = |&a: &usize, &b: &usize| {
        // `partial_cmp` has -0 equal +0, which `total_cmp` does not.
        logits[b].partial_cmp(&logits[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b))
    };
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    if (1..ids.len()).contains(&top_k) {
        // No two ids are equal in this order, so this splits them as a full sort would.
        ids.select_nth_unstable_by(top_k - 1, order);
    }
    ids.truncate(top_k);
    ids.sort_unstable_by(order);
    ids
}

/// `exp(logit - max)`, defined for infinities too.
fn softmax_numerator<A: Accum>(logit: f32, max: f32) -> A {
    if logit == max { A::ONE } else { (A::from_dtype(logit) - A::from_dtype(max)).exp() }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::sample::Sampler;
    use super::*;

    const INF: f32 = f32::INFINITY;
    const NAN: f32 = f32::NAN;
    const PLAIN: RouterConfig = RouterConfig::softmax_top_k(false);
    const RENORMALIZED: RouterConfig = RouterConfig::softmax_top_k(true);
    const AFTER: RouterConfig = RouterConfig::top_k_softmax();

    fn route(router: RouterConfig, top_k: usize, logits: &[f32]) -> (Vec<u32>, Vec<f64>) {
        route_token::<f64>(&router, top_k, logits).into_iter().unzip()
    }

    fn assert_close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() <= 1e-7 * want.abs(), "{got} instead of {want}");
        }
    }

    #[test]
    fn by_hand() {
        // p = 1/4, 1, 1/2, 1/8 of which the sum is 15/8.
        let ln2 = std::f32::consts::LN_2;
        let logits = [1.0 - 2.0 * ln2, 1.0, 1.0 - ln2, 1.0 - 3.0 * ln2];
        let (ids, weights) = route(PLAIN, 2, &logits);
        assert_eq!(ids, [1, 2]);
        assert_close(&weights, &[8.0 / 15.0, 4.0 / 15.0]);
        for router in [RENORMALIZED, AFTER] {
            let (ids, weights) = route(router, 2, &logits);
            assert_eq!(ids, [1, 2]);
            assert_close(&weights, &[2.0 / 3.0, 1.0 / 3.0]);
        }
    }

    #[test]
    fn ties_go_to_the_lower_id() {
        assert_eq!(route(PLAIN, 3, &[0.0, 2.0, 1.0, 2.0, 1.0]).0, [1, 3, 2]);
        assert_eq!(route(PLAIN, 4, &[-0.0, 0.0, -0.0, 0.0]).0, [0, 1, 2, 3]);
        let below = 1.0f32.next_down();
        assert_eq!(route(PLAIN, 2, &[below, 1.0, below, 1.0]).0, [1, 3]);
        let many: Vec<f32> = (0..4096).map(|e| (e % 2) as f32).collect();
        let odd: Vec<u32> = (0..100).map(|i| 2 * i + 1).collect();
        assert_eq!(route(AFTER, 100, &many).0, odd);
    }

    #[test]
    fn nan_is_the_least() {
        let (ids, weights) = route(PLAIN, 3, &[NAN, 0.0, -INF, 0.0]);
        assert_eq!(ids, [1, 3, 0]);
        assert_eq!(weights, [0.5, 0.5, 0.0]);
        let negative_nan = f32::from_bits(0xffc0_0001);
        assert_eq!(route(PLAIN, 2, &[negative_nan, NAN, -f32::MAX]).0, [2, 0]);
    }

    #[test]
    fn infinite_rows_are_defined() {
        for all in [[-INF; 4], [NAN; 4], [INF; 4]] {
            assert_eq!(route(PLAIN, 2, &all), (vec![0, 1], vec![0.25, 0.25]));
            assert_eq!(route(RENORMALIZED, 2, &all), (vec![0, 1], vec![0.5, 0.5]));
            assert_eq!(route(AFTER, 2, &all), (vec![0, 1], vec![0.5, 0.5]));
        }
        let (ids, weights) = route(RENORMALIZED, 3, &[3.0, INF, NAN, INF]);
        assert_eq!((ids, weights), (vec![1, 3, 0], vec![0.5, 0.5, 0.0]));
        // The difference of these is infinite in f32, and its exponential is 0.
        assert_eq!(route(AFTER, 2, &[f32::MAX, -f32::MAX]).1, [1.0, 0.0]);
    }

    #[test]
    fn all_experts_and_one_expert() {
        let (ids, weights) = route(PLAIN, 3, &[0.5, -1.0, 2.0]);
        assert_eq!(ids, [2, 0, 1]);
        assert_close(&[weights.iter().sum()], &[1.0]);
        for router in [PLAIN, RENORMALIZED, AFTER] {
            assert_eq!(route(router, 1, &[-7.0]), (vec![0], vec![1.0]));
        }
    }

    #[test]
    fn no_tokens_and_wrong_lengths() {
        let router = PLAIN;
        let shape = RoutingShape { num_tokens: 0, num_experts: 4, top_k: 2 };
        assert_eq!(route_fwd::<f32, f32>(&shape, &router, &[]).unwrap().expert_ids, []);
        let shape = RoutingShape { num_tokens: 2, ..shape };
        assert!(route_fwd::<f32, f32>(&shape, &router, &[0.0; 7]).is_err());
        let shape = RoutingShape { top_k: 5, ..shape };
        assert!(route_fwd::<f32, f32>(&shape, &router, &[0.0; 8]).is_err());
    }

    /// Any bits at all: ids are distinct, the same in f32 and f64, and weights are numbers.
    #[test]
    fn any_bits() {
        any_bits_of(f16::from_bits);
        any_bits_of(bf16::from_bits);
    }

    fn any_bits_of<D: Dtype>(from_bits: fn(u16) -> D) {
        let mut sampler = Sampler::new(7);
        for _ in 0..300 {
            let num_experts = 1 + sampler.below(40);
            let top_k = 1 + sampler.below(num_experts);
            let shape = RoutingShape { num_tokens: 3, num_experts, top_k };
            let logits: Vec<D> =
                (0..shape.logits()).map(|_| from_bits(sampler.below(1 << 16) as u16)).collect();
            for router in [PLAIN, RENORMALIZED, AFTER] {
                let single = route_fwd::<f32, D>(&shape, &router, &logits).unwrap();
                let double = route_fwd::<f64, D>(&shape, &router, &logits).unwrap();
                assert_eq!(single.expert_ids, double.expert_ids);
                assert!(double.weights.iter().all(|weight| (0.0..=1.0).contains(weight)));
                for ids in single.expert_ids.chunks(top_k) {
                    let mut distinct = ids.to_vec();
                    distinct.sort_unstable();
                    distinct.dedup();
                    assert_eq!(distinct.len(), top_k);
                }
            }
        }
    }
}
