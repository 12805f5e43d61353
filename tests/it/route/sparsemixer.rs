//! Sparsemixer in training: the device against a direct model, and both against values from
//! transformers.

mod recorded;

use half::{bf16, f16};
use moe_kernels::{Dtype, NoiseDistribution, RouterConfig, RoutingShape, Scoring, reference};
use proptest::prelude::*;
use recorded::{JITTER, RECORDED};

use super::{check, run};
use crate::common::{Gpu, Rng, RouterCase, config, gpu};

/// A router of training without other options.
fn router(jitter: f32) -> RouterConfig {
    let scoring = Scoring::Sparsemixer { jitter, training: true };
    RouterConfig { scoring, ..RouterConfig::default() }
}

/// The index of the first largest number.
fn argmax(numbers: &[f32]) -> usize {
    (0..numbers.len()).rev().max_by(|&a, &b| numbers[a].total_cmp(&numbers[b])).unwrap()
}

/// One token as transformers computes it, mask by mask: ids from f32, weights in f64. `noise` is
/// `[K, E]`.
fn model(scores: &[f32], noise: &[f32], draws: &[f32], jitter: f32) -> (Vec<u32>, Vec<f64>) {
    // The scores, with -inf for chosen experts.
    let mut masked = scores.to_vec();
    let mut choose = |noise: &[f32], draw: f32| {
        let max_ind = argmax(&masked);
        let threshold = masked[max_ind];
        let far = |score: f32| (threshold - score) / score.abs().max(threshold) > 2.0 * jitter;
        let gate = |(&masked, &score): (&f32, &f32)| {
            if far(score) { f32::NEG_INFINITY } else { masked }
        };
        let gates: Vec<f32> = masked.iter().zip(scores).map(gate).collect();
        let noisy: Vec<f32> = gates.iter().zip(noise).map(|(gate, noise)| gate + noise).collect();
        let selected = argmax(&noisy);
        let exp = |gate: f32| (f64::from(gate) - f64::from(threshold)).exp();
        let softmax = exp(gates[selected]) / gates.iter().map(|&gate| exp(gate)).sum::<f64>();
        let one = selected == max_ind || draw > 0.75;
        masked[selected] = f32::NEG_INFINITY;
        (selected as u32, softmax * if one { 1.0 } else { f64::from(0.3333f32) })
    };
    noise.chunks_exact(scores.len()).zip(draws).map(|(noise, &draw)| choose(noise, draw)).unzip()
}

/// Checks the device against the reference, and against the model of every token.
fn check_model<D: Dtype>(gpu: &Gpu, case: &RouterCase<D>, jitter: f32, offset: usize) {
    check(gpu, case, offset);
    let RoutingShape { num_experts, top_k, .. } = case.shape;
    let (ids, weights) = run(gpu, case, offset);
    let (noise, draws) = (case.selection_noise.as_ref(), case.midpoint_draws.as_ref());
    let noise = noise.unwrap().chunks_exact(top_k * num_experts);
    let draws = draws.unwrap().chunks_exact(top_k);
    let tokens = case.logits.chunks_exact(num_experts).zip(noise).zip(draws);
    for (token, ((logits, noise), draws)) in tokens.enumerate() {
        let scores: Vec<f32> = logits.iter().map(|logit| logit.to_f32()).collect();
        let (want_ids, want) = model(&scores, noise, draws, jitter);
        let slots = token * top_k..(token + 1) * top_k;
        assert_eq!(ids[slots.clone()], want_ids, "token {token} of {scores:?}, jitter {jitter}");
        for (got, want) in weights[slots].iter().zip(want) {
            let error = (f64::from(*got) / want - 1.0).abs();
            assert!(error < 4e-6, "token {token}: {got} is not {want}");
        }
    }
}

/// Logits and noise in few steps, so that sums and distances are exact and often equal; draws at
/// and next to 0.75.
fn random_case<D: Dtype>(shape: RoutingShape, jitter: f32, seed: u64) -> RouterCase<D> {
    let mut rng = Rng::new(seed);
    let steps = [3, 24, 96][rng.below(3)];
    let mut number = |range: usize| (rng.below(2 * range + 1) as f32 - range as f32) / 16.0;
    let logits = (0..shape.logits()).map(|_| D::from_f32(number(steps))).collect();
    let noise = (0..shape.by_slot().logits()).map(|_| number(64)).collect();
    let draw = |_| [0.0, 0.5, 0.75, 0.75 + f32::EPSILON, 0.875, f32::NAN][rng.below(6)];
    RouterCase {
        selection_noise: Some(noise),
        midpoint_draws: Some((0..shape.slots()).map(draw).collect()),
        ..RouterCase::bare(shape, router(jitter), logits)
    }
}

fn check_dtypes(gpu: &Gpu, shape: RoutingShape, jitter: f32, seed: u64) {
    gpu.reschedule(seed);
    check_model(gpu, &random_case::<f32>(shape, jitter, seed), jitter, seed as usize % 3);
    check_model(gpu, &random_case::<f16>(shape, jitter, seed), jitter, 0);
    check_model(gpu, &random_case::<bf16>(shape, jitter, seed), jitter, 0);
}

proptest! {
    #![proptest_config(config(64))]

    /// Phi-MoE makes two choices; more choices follow in the same way.
    #[test]
    fn matches_the_model(
        tokens in 0usize..9, experts in 2usize..80, k in prop_oneof![3 => Just(2usize), 1 => 1usize..9],
        jitter in proptest::sample::select(vec![0.0f32, 0.01, 0.25, 0.5, 3.0]), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        check_dtypes(&gpu(), shape, jitter, seed);
    }
}

/// Every body of the kernel: a warp per token, narrow or wide, and a block.
#[test]
fn every_body_matches_the_model() {
    let gpu = gpu();
    for (experts, k) in [(16, 2), (256, 2), (257, 2), (1024, 3), (1025, 2), (40, 33), (70, 70)] {
        for seed in 0..3 {
            let shape = RoutingShape::new(5, experts, k).unwrap();
            check_dtypes(&gpu, shape, 0.5, seed);
        }
    }
}

/// Values from transformers: the same experts, and weights that differ by rounding alone.
#[test]
fn matches_transformers() {
    let gpu = gpu();
    let shape = RoutingShape::new(RECORDED.len(), 6, 2).unwrap();
    let case = RouterCase {
        selection_noise: Some(RECORDED.iter().flat_map(|token| token.noise.concat()).collect()),
        midpoint_draws: Some(RECORDED.iter().flat_map(|token| token.draws).collect()),
        ..RouterCase::bare(
            shape,
            router(JITTER),
            RECORDED.iter().flat_map(|token| token.scores).collect::<Vec<f32>>(),
        )
    };
    check_model(&gpu, &case, JITTER, 0);
    let (ids, weights) = run(&gpu, &case, 0);
    for (token, wanted) in RECORDED.iter().enumerate() {
        let slots = 2 * token..2 * token + 2;
        assert_eq!(ids[slots.clone()], wanted.ids, "token {token}");
        for (got, want) in weights[slots].iter().zip(wanted.weights) {
            assert!((got / want - 1.0).abs() < 1e-6, "token {token}: {got} is not {want}");
        }
    }
}

/// With noise of the generator, the frequencies of first choices follow the softmax.
#[test]
fn choices_follow_the_softmax() {
    const TOKENS: usize = 20_000;
    let shape = RoutingShape::new(TOKENS, 4, 1).unwrap();
    let logits = [1.0f32, 0.5, 0.0, -9.0].repeat(TOKENS);
    let draw = |kind, len| reference::noise_fwd(kind, 5, 0, len);
    let case = RouterCase {
        selection_noise: Some(draw(NoiseDistribution::Gumbel, 4 * TOKENS)),
        midpoint_draws: Some(draw(NoiseDistribution::Uniform, TOKENS)),
        ..RouterCase::bare(shape, router(0.5), logits)
    };
    let routing = reference::route_fwd::<f32, f32>(&shape, &case.router, &case.inputs()).unwrap();
    let shares = [1.0f64, 0.5, 0.0].map(f64::exp);
    let sum: f64 = shares.iter().sum();
    for (expert, share) in shares.iter().enumerate() {
        let count = routing.expert_ids.iter().filter(|&&id| id == expert as u32).count();
        let (got, want) = (count as f64 / TOKENS as f64, share / sum);
        // Five deviations of such a mean.
        let deviation = (want * (1.0 - want) / TOKENS as f64).sqrt();
        assert!((got - want).abs() < 5.0 * deviation, "expert {expert}: {got}, not {want}");
    }
    assert!(!routing.expert_ids.contains(&3));
}
