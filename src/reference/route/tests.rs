//! The specification by hand: each option on small rows with known answers.

use half::{bf16, f16};

use super::super::sample::Sampler;
use super::*;
use crate::config::{GroupScore, Groups, Masked, Normalization, Scoring};

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;
const PLAIN: RouterConfig = RouterConfig::softmax_top_k(false);
const RENORMALIZED: RouterConfig = RouterConfig::softmax_top_k(true);
const AFTER: RouterConfig = RouterConfig::top_k_softmax();

/// One token, in f64.
fn route(router: RouterConfig, top_k: usize, logits: &[f32]) -> (Vec<u32>, Vec<f64>) {
    route_with(router, top_k, &RouteInputs::new(logits))
}

fn route_with(
    router: RouterConfig,
    top_k: usize,
    inputs: &RouteInputs<'_, f32>,
) -> (Vec<u32>, Vec<f64>) {
    let shape = RoutingShape { num_tokens: 1, num_experts: inputs.logits.len(), top_k };
    let single = route_fwd::<f32, f32>(&shape, &router, inputs).unwrap();
    let double = route_fwd::<f64, f32>(&shape, &router, inputs).unwrap();
    assert_eq!(single.expert_ids, double.expert_ids);
    for (single, double) in single.routing_weights.iter().zip(&double.routing_weights) {
        let close = (f64::from(*single) - double).abs() <= 1e-5 * double.abs() + 1e-44;
        assert!(close || f64::from(*single) == *double, "{single} in f32, {double} in f64");
    }
    (double.expert_ids, double.routing_weights)
}

fn assert_close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-7 * want.abs(), "{got} instead of {want}");
    }
}

#[test]
fn hand_computed_weights() {
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
fn nan_is_selected_last() {
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
fn selects_all_experts_or_one() {
    let (ids, weights) = route(PLAIN, 3, &[0.5, -1.0, 2.0]);
    assert_eq!(ids, [2, 0, 1]);
    assert_close(&[weights.iter().sum()], &[1.0]);
    for router in [PLAIN, RENORMALIZED, AFTER] {
        assert_eq!(route(router, 1, &[-7.0]), (vec![0], vec![1.0]));
    }
}

#[test]
fn accepts_no_tokens_and_rejects_wrong_lengths() {
    let router = PLAIN;
    let shape = RoutingShape { num_tokens: 0, num_experts: 4, top_k: 2 };
    let none = route_fwd::<f32, f32>(&shape, &router, &RouteInputs::new(&[])).unwrap();
    assert!(none.expert_ids.is_empty());
    let shape = RoutingShape { num_tokens: 2, ..shape };
    assert!(route_fwd::<f32, f32>(&shape, &router, &RouteInputs::new(&[0.0; 7])).is_err());
    let shape = RoutingShape { top_k: 5, ..shape };
    assert!(route_fwd::<f32, f32>(&shape, &router, &RouteInputs::new(&[0.0; 8])).is_err());
}

/// For logits of any bits, ids are distinct and the same in f32 and f64, and no weight is NaN.
#[test]
fn any_bits_give_distinct_ids_and_no_nan() {
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
            let inputs = RouteInputs::new(&logits);
            let single = route_fwd::<f32, D>(&shape, &router, &inputs).unwrap();
            let double = route_fwd::<f64, D>(&shape, &router, &inputs).unwrap();
            assert_eq!(single.expert_ids, double.expert_ids);
            assert!(double.routing_weights.iter().all(|weight| (0.0..=1.0).contains(weight)));
            for ids in single.expert_ids.chunks(top_k) {
                let mut distinct = ids.to_vec();
                distinct.sort_unstable();
                distinct.dedup();
                assert_eq!(distinct.len(), top_k);
            }
        }
    }
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

#[test]
fn hand_computed_scores() {
    let logits = [0.5f32, -1.0, 2.0, -3.0];
    let with = |scoring| RouterConfig { scoring, ..PLAIN };
    let (ids, weights) = route(with(Scoring::Sigmoid), 2, &logits);
    assert_eq!(ids, [2, 0]);
    assert_close(&weights, &[sigmoid(2.0), sigmoid(0.5)]);
    let (ids, weights) = route(with(Scoring::SqrtSoftplus), 4, &logits);
    assert_eq!(ids, [2, 0, 1, 3]);
    let softplus = |z: f64| z.exp().ln_1p().sqrt();
    assert_close(&weights, &[2.0, 0.5, -1.0, -3.0].map(softplus));
    let (ids, weights) = route(with(Scoring::Logit), 3, &logits);
    assert_eq!((ids, weights), (vec![2, 0, 1], vec![2.0, 0.5, -1.0]));
}

/// Saturated scores tie where logits do not.
#[test]
fn selects_by_logit_or_by_score() {
    let logits = [100.0f32, 101.0, 50.0];
    let sigmoid = RouterConfig { scoring: Scoring::Sigmoid, ..PLAIN };
    assert_eq!(route(sigmoid, 2, &logits).0, [0, 1]);
    let by_logit = RouterConfig { selection: Selection::Logit, ..sigmoid };
    assert_eq!(route(by_logit, 2, &logits), (vec![1, 0], vec![1.0, 1.0]));
}

#[test]
fn applies_multiplier_and_softcap() {
    let router = RouterConfig {
        logit_multiplier: 0.5,
        logit_softcap: Some(3.0),
        scoring: Scoring::Logit,
        ..PLAIN
    };
    let (ids, weights) = route(router, 3, &[1.0, -INF, 40.0, INF]);
    assert_eq!(ids, [3, 2, 0]);
    let cap = |z: f64| 3.0 * (z / 3.0).tanh();
    assert_close(&weights, &[3.0, cap(20.0), cap(0.5)]);
    assert_eq!(route(router, 4, &[1.0, -INF, 40.0, NAN]).1[3], -3.0);
}

/// A bias changes the selection and not the weights.
#[test]
fn bias_changes_the_selection_alone() {
    let logits = [0.0f32, 1.0, 2.0, 3.0];
    for (scoring, selection) in
        [(Scoring::Sigmoid, Selection::Score), (Scoring::Sigmoid, Selection::Logit)]
    {
        let router = RouterConfig { scoring, selection, selection_bias: true, ..PLAIN };
        let bias = [9.0, -9.0, NAN, 0.5];
        let inputs = RouteInputs { selection_bias: Some(&bias), ..RouteInputs::new(&logits) };
        let (ids, weights) = route_with(router, 4, &inputs);
        assert_eq!(ids, [0, 3, 1, 2]);
        assert_close(&weights, &[0.0, 3.0, 1.0, 2.0].map(sigmoid));
    }
    // Softmax: the denominator is that of all experts.
    let router = RouterConfig { selection_bias: true, ..PLAIN };
    let inputs =
        RouteInputs { selection_bias: Some(&[1.0, 0.0, 0.0, 0.0]), ..RouteInputs::new(&logits) };
    let (ids, weights) = route_with(router, 1, &inputs);
    let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
    assert_eq!(ids, [0]);
    assert_close(&weights, &[1.0 / sum]);
}

#[test]
fn groups_limit_the_choice() {
    let logits = [5.0f32, -4.0, 4.0, 3.0, 4.5, -9.0];
    let groups = Groups {
        num_groups: 3,
        top_groups: 1,
        score: GroupScore::Max,
        masked: Masked::NegativeInfinity,
    };
    let route = |groups| {
        let router = RouterConfig { groups: Some(groups), scoring: Scoring::Logit, ..PLAIN };
        route(router, 3, &logits).0
    };
    // The first group alone is unmasked; masked experts are in the order of ids.
    assert_eq!(route(groups), [0, 1, 2]);
    assert_eq!(route(Groups { score: GroupScore::TopTwoSum, ..groups }), [2, 3, 0]);
    assert_eq!(route(Groups { top_groups: 2, ..groups }), [0, 4, 1]);
    // A masked 0 wins against a negative value.
    assert_eq!(route(Groups { masked: Masked::Zero, ..groups }), [0, 2, 3]);
    // The score of a single expert is its value; all groups are no limit.
    let single = Groups { num_groups: 6, top_groups: 3, score: GroupScore::TopTwoSum, ..groups };
    assert_eq!(route(single), [0, 4, 2]);
    assert_eq!(route(Groups { top_groups: 3, ..groups }), [0, 4, 2]);
}

#[test]
fn hand_computed_normalizations() {
    let logits = [3.0f32, 1.0, -2.0];
    let route = |normalization| {
        route(
            RouterConfig { scoring: Scoring::Logit, normalization, scale: 2.0, ..PLAIN },
            3,
            &logits,
        )
        .1
    };
    assert_close(&route(Normalization::None), &[6.0, 2.0, -4.0]);
    assert_close(&route(Normalization::Sum { epsilon: 2.0 }), &[1.5, 0.5, -1.0]);
    assert_close(&route(Normalization::SumAtLeast { min: 1.0 }), &[3.0, 1.0, -2.0]);
    assert_close(&route(Normalization::SumAtLeast { min: 8.0 }), &[0.75, 0.25, -0.5]);
    assert_close(&route(Normalization::PNorm { p: 1.0 }), &[1.0, 1.0 / 3.0, -2.0 / 3.0]);
    let norm = 14f64.sqrt() / 2.0;
    assert_close(&route(Normalization::PNorm { p: 2.0 }), &[3.0 / norm, 1.0 / norm, -2.0 / norm]);
    let norm = 36f64.powf(1.0 / 3.0) / 2.0;
    assert_close(&route(Normalization::PNorm { p: 3.0 }), &[3.0 / norm, 1.0 / norm, -2.0 / norm]);
}

/// 0 / 0 and inf / inf give the weight 0.
#[test]
fn nan_weights_become_zero() {
    let normalizations = [
        Normalization::Sum { epsilon: 0.0 },
        Normalization::PNorm { p: 1.0 },
        Normalization::PNorm { p: 2.0 },
        Normalization::PNorm { p: 2.5 },
    ];
    for normalization in normalizations {
        let zero = RouterConfig { scoring: Scoring::Sigmoid, normalization, ..PLAIN };
        assert_eq!(route(zero, 2, &[-INF, -1000.0, NAN]).1, [0.0, 0.0]);
        let infinite = RouterConfig { scoring: Scoring::Logit, normalization, ..PLAIN };
        assert_eq!(route(infinite, 2, &[INF, 1.0, 0.0]).1, [0.0, 0.0]);
        assert_eq!(route(infinite, 2, &[INF, -INF]).1, [0.0, 0.0]);
    }
    let least = Normalization::SumAtLeast { min: 0.5 };
    let zero = RouterConfig { scoring: Scoring::Sigmoid, normalization: least, ..PLAIN };
    assert_eq!(route(zero, 2, &[-INF, -1000.0, NAN]).1, [0.0, 0.0]);
    let router = RouterConfig { expert_scale: true, ..PLAIN };
    let inputs = RouteInputs { expert_scale: Some(&[NAN, INF]), ..RouteInputs::new(&[0.0, -INF]) };
    assert_eq!(route_with(router, 2, &inputs).1, [0.0, 0.0]);
}

/// A softmax divided by its own sum is one over the chosen experts, however small their share.
#[test]
fn common_factors_cancel() {
    let logits = [200.0f32, 0.0, 1.0];
    let inputs =
        RouteInputs { selection_bias: Some(&[-9.0, 0.0, 0.0]), ..RouteInputs::new(&logits) };
    let router = RouterConfig { selection_bias: true, ..RENORMALIZED };
    let (ids, weights) = route_with(router, 2, &inputs);
    assert_eq!(ids, [1, 2]);
    assert_close(&weights, &[1.0 - sigmoid(1.0), sigmoid(1.0)]);
    let router = RouterConfig { normalization: Normalization::PNorm { p: 1.0 }, ..router };
    assert_close(&route_with(router, 2, &inputs).1, &weights);
    // An epsilon does not cancel: exp(-200) vanishes next to it.
    let router = RouterConfig { normalization: Normalization::Sum { epsilon: 1e-20 }, ..router };
    assert!(route_with(router, 2, &inputs).1.iter().all(|&weight| weight < 1e-60));
}

#[test]
fn applies_scales() {
    let router = RouterConfig { scale: 0.5, expert_scale: true, ..AFTER };
    let inputs =
        RouteInputs { expert_scale: Some(&[3.0, 8.0, -1.0]), ..RouteInputs::new(&[0.0; 3]) };
    assert_eq!(route_with(router, 2, &inputs), (vec![0, 1], vec![0.75, 2.0]));
}

/// Inkling: weights are shares of the sigmoids of the chosen and the shared experts, which it
/// computes as `exp(log_sigmoid - logsumexp)`.
#[test]
fn sinks_share_the_sum() {
    let logits = [1.0f32, -1.0, 2.0, 0.5, -0.5];
    let router = RouterConfig {
        scoring: Scoring::Sigmoid,
        normalization: Normalization::Sum { epsilon: 0.0 },
        num_sinks: 2,
        selection_bias: true,
        scale: 3.0,
        ..PLAIN
    };
    let inputs =
        RouteInputs { selection_bias: Some(&[0.0, 1.0, 0.0]), ..RouteInputs::new(&logits) };
    let (ids, weights) = route_with(router, 4, &inputs);
    assert_eq!(ids, [1, 2, 3, 4]);
    let logs = [-1.0, 2.0, 0.5, -0.5].map(|z: f64| -(-z).exp().ln_1p());
    let sum: f64 = logs.iter().map(|log| log.exp()).sum();
    assert_close(&weights, &logs.map(|log| 3.0 * (log - sum.ln()).exp()));
}

/// In training each choice is drawn among the remaining near experts. Its weight is a third of its
/// share if it is not the largest of them, unless the midpoint's draw is above 0.75.
#[test]
fn sparsemixer_in_training() {
    let scoring = Scoring::Sparsemixer { jitter: 0.1, training: true };
    let router = RouterConfig { scoring, ..PLAIN };
    let shape = RoutingShape { num_tokens: 1, num_experts: 4, top_k: 2 };
    let logits = [2.0f32, 1.5, 1.75, 0.1];
    let run = |noise: [f32; 8], draws: [f32; 2]| {
        let inputs = RouteInputs {
            selection_noise: Some(&noise),
            midpoint_draws: Some(&draws),
            ..RouteInputs::new(&logits)
        };
        let routing = route_fwd::<f64, f32>(&shape, &router, &inputs).unwrap();
        (routing.expert_ids, routing.routing_weights)
    };
    let share = |d: f64| 1.0 / (1.0 + d.exp());
    let third = f64::from(0.3333f32);
    // Expert 2 is drawn, and then 1, which is not near 2; noise of experts that are not near is
    // ignored.
    let (ids, weights) = run([0.0, 9.0, 0.5, 9.0, 0.0, 9.0, 9.0, 9.0], [0.75, 0.0]);
    assert_eq!(ids, [2, 0]);
    assert_close(&weights, &[third * share(0.25), 1.0]);
    let (_, weights) = run([0.0, 9.0, 0.5, 9.0, 0.0, 9.0, 9.0, 9.0], [0.76, 0.0]);
    assert_close(&weights, &[share(0.25), 1.0]);
    // Of equal sums the lower id; a draw changes no weight of the largest one; the second choice
    // has its own row.
    let (ids, weights) = run([0.0, 0.0, 0.25, 0.0, NAN, 0.5, 0.0, 0.0], [0.0, 0.1]);
    assert_eq!(ids, [0, 1]);
    assert_close(&weights, &[share(-0.25), third * share(0.25)]);
    // A NaN counts as -inf; a NaN draw is not above 0.75.
    let (ids, weights) = run([NAN, INF, -1e9, INF, -INF, NAN, NAN, 0.0], [NAN, NAN]);
    assert_eq!(ids, [2, 0]);
    assert_close(&weights, &[third * share(0.25), 1.0]);
}

/// Phi-MoE: the score of each choice is its share among the remaining near experts. The distance is
/// relative to the larger of the other logit's magnitude and the largest remaining logit.
#[test]
fn sparsemixer() {
    let router =
        RouterConfig { scoring: Scoring::Sparsemixer { jitter: 0.1, training: false }, ..PLAIN };
    let weights = |top_k, logits: &[f32]| route(router, top_k, logits).1;
    // (2 - 1.7) / 2 is near, (2 - 1.5) / 2 is not; (1.7 - 1.5) / 1.7 is.
    let near = |d: f64| 1.0 / (1.0 + (-d).exp());
    let (z, y) = (f64::from(1.7f32), 1.5);
    assert_close(&weights(2, &[2.0, 1.5, 1.7, 0.1]), &[near(2.0 - z), near(z - y)]);
    // Of negative logits the farther one is the measure: (-1 + 1.2) / 1.2 is near, (-1 + 1.3) / 1.3
    // is not.
    assert_close(
        &weights(1, &[-1.0, f32::from_bits(0xbf99_999a)]),
        &[near(f64::from(1.2f32) - 1.0)],
    );
    assert_eq!(weights(1, &[-1.0, -1.3]), [1.0]);
    // Zero is near to zero alone; infinite logits to infinite ones.
    assert_eq!(weights(3, &[0.0, 0.0, -1e-30]), [0.5, 1.0, 1.0]);
    assert_eq!(weights(4, &[INF, 3.0, INF, -INF]), [0.5, 1.0, 1.0, 1.0]);
    assert_eq!(weights(3, &[NAN, -INF, NAN]), [1.0 / 3.0, 0.5, 1.0]);
}

#[test]
fn noise_changes_the_selection() {
    let logits = [1.0f32, 2.0, 3.0, INF];
    let noise = [2.5f32, 0.0, -5.0, -INF];
    let router = RouterConfig { scoring: Scoring::Logit, ..PLAIN };
    let inputs = RouteInputs { noise: Some(&noise), ..RouteInputs::new(&logits) };
    // inf - inf is NaN, which counts as -inf.
    assert_eq!(
        route_with(router, 4, &inputs),
        (vec![0, 1, 2, 3], vec![3.5, 2.0, -2.0, -INF as f64])
    );
    let scales = [0.0f32, 1.0, -INF, 0.0];
    let inputs = RouteInputs { noise_logits: Some(&scales), ..inputs };
    let (ids, weights) = route_with(router, 3, &inputs);
    assert_eq!(ids, [2, 0, 1]);
    assert_close(&weights, &[3.0, 1.0 + 2.5 * std::f64::consts::LN_2, 2.0]);
}

#[test]
fn given_ids_have_weights() {
    let logits = [0.0f32, 1.0, 2.0, 0.0, 1.0, 2.0];
    let shape = RoutingShape { num_tokens: 2, num_experts: 3, top_k: 2 };
    let router = RouterConfig { selection: Selection::Given, ..AFTER };
    let inputs = RouteInputs { given_ids: Some(&[2, 0, 7, 1]), ..RouteInputs::new(&logits) };
    let run = |inputs| route_fwd::<f64, f32>(&shape, &router, &inputs).unwrap();
    let routing = run(inputs);
    assert_eq!(routing.expert_ids, [2, 0, u32::MAX, 1]);
    assert_close(&routing.routing_weights, &[sigmoid(2.0), sigmoid(-2.0), 0.0, 1.0]);
    // Both tokens have the second row, then a row out of range.
    let routing = run(RouteInputs { token_ids: Some(&[1, 9]), ..inputs });
    assert_eq!(routing.expert_ids, [u32::MAX, 1, u32::MAX, u32::MAX]);
    assert_eq!(routing.routing_weights, [0.0, 1.0, 0.0, 0.0]);
    let routing = run(RouteInputs { active: Some(&[0, 2]), ..inputs });
    assert_eq!(routing.expert_ids, [u32::MAX, u32::MAX, u32::MAX, 1]);
    assert_eq!(routing.routing_weights, [0.0, 0.0, 0.0, 1.0]);
}

/// A buffer is given exactly if the router needs it, with the length of the shape.
#[test]
fn checks_presence_and_length_of_buffers() {
    let shape = RoutingShape { num_tokens: 2, num_experts: 3, top_k: 2 };
    let (logits, ids, flags) = ([0.0f32; 7], [0u32; 7], [1u8; 3]);
    let bare = RouteInputs::new(&logits[..6]);
    let given = RouterConfig { selection: Selection::Given, ..AFTER };
    let biased = RouterConfig { selection_bias: true, ..PLAIN };
    let scaled = RouterConfig { expert_scale: true, ..PLAIN };
    let scoring = Scoring::Sparsemixer { jitter: 0.1, training: true };
    let sampled = RouterConfig { scoring, ..PLAIN };
    let (some, draws) = (Some(&logits[..3]), Some(&[0.0; 12][..]));
    let cases = [
        (PLAIN, RouteInputs { logits: &logits[..5], ..bare }, "`logits`"),
        (biased, bare, "`selection_bias` is missing"),
        (PLAIN, RouteInputs { selection_bias: some, ..bare }, "`selection_bias` is given"),
        (biased, RouteInputs { selection_bias: Some(&logits), ..bare }, "`selection_bias` has 7"),
        (scaled, bare, "`expert_scale` is missing"),
        (PLAIN, RouteInputs { expert_scale: some, ..bare }, "`expert_scale` is given"),
        (PLAIN, RouteInputs { noise: some, ..bare }, "`noise` has 3"),
        (PLAIN, RouteInputs { noise_logits: Some(&logits[..6]), ..bare }, "`noise_logits` is given without"),
        (sampled, bare, "`selection_noise` is missing"),
        (sampled, RouteInputs { selection_noise: draws, ..bare }, "`midpoint_draws` is missing"),
        (sampled, RouteInputs { selection_noise: some, ..bare }, "`selection_noise` has 3"),
        (
            sampled,
            RouteInputs { selection_noise: draws, midpoint_draws: some, ..bare },
            "`midpoint_draws` has 3",
        ),
        (PLAIN, RouteInputs { selection_noise: draws, ..bare }, "`selection_noise` is given"),
        (PLAIN, RouteInputs { midpoint_draws: draws, ..bare }, "`midpoint_draws` is given"),
        (given, bare, "`given_ids` is missing"),
        (PLAIN, RouteInputs { given_ids: Some(&ids[..4]), ..bare }, "`given_ids` is given"),
        (given, RouteInputs { given_ids: Some(&ids[..6]), ..bare }, "`given_ids` has 6"),
        (
            given,
            RouteInputs { given_ids: Some(&ids), token_ids: Some(&ids[..2]), ..bare },
            "`given_ids` has 7",
        ),
        (PLAIN, RouteInputs { token_ids: Some(&ids[..2]), ..bare }, "`token_ids` is given"),
        (PLAIN, RouteInputs { active: Some(&flags), ..bare }, "`active` has 3"),
        (RouterConfig { num_sinks: 2, ..PLAIN }, bare, "`router.num_sinks`"),
    ];
    for (router, inputs, wanted) in cases {
        let message = route_fwd::<f32, f32>(&shape, &router, &inputs).unwrap_err().to_string();
        assert!(message.contains(wanted), "{message} lacks {wanted}");
    }
}
