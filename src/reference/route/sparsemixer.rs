//! Sparsemixer: sequential choices, each among the remaining experts that are near the largest.

use super::exact::Number;

/// The candidates of a choice: remaining experts that are near the largest of them.
struct Near {
    /// The lowest expert with the largest `z`.
    top: usize,
    experts: Vec<usize>,
}

impl Near {
    /// Nearness is decided in f32, as ids are.
    fn new(jitter: f32, z: &[f32], left: &[usize]) -> Self {
        let larger = |top: usize, &e: &usize| if z[e] > z[top] { e } else { top };
        let top = left.iter().fold(left[0], larger);
        let max = z[top];
        let is_near =
            |e: usize| z[e] == max || (max - z[e]) / z[e].abs().or_larger(max) <= jitter + jitter;
        Self { top, experts: left.iter().copied().filter(|&e| is_near(e)).collect() }
    }
}

/// The choices in training: row `k` of `noise` `[K, E]` is added to `z` for choice `k`.
pub(super) fn sample(jitter: f32, z: &[f32], noise: &[f32]) -> Vec<u32> {
    let mut left: Vec<usize> = (0..z.len()).collect();
    let choose = |noise: &[f32]| {
        let Near { top, experts } = Near::new(jitter, z, &left);
        let value = |e: usize| (z[e] + noise[e]).cleaned();
        let larger = |best: usize, &e: &usize| if value(e) > value(best) { e } else { best };
        let choice = experts.iter().fold(*experts.first().unwrap_or(&top), larger);
        left.retain(|&e| e != choice);
        choice as u32
    };
    noise.chunks_exact(z.len()).map(choose).collect()
}

/// A choice other than the largest keeps its score if its draw is above this.
const MIDPOINT_ABOVE: f32 = 0.75;

/// Otherwise its score is multiplied by this: a third, the weight of a midpoint in Heun's
/// third-order method.
const MIDPOINT_FACTOR: f32 = 0.3333;

/// The scores of these experts, in the order in which they were chosen: the share in a softmax over
/// the remaining near experts, in training with the factor of its draw.
pub(super) fn scores<N: Number>(
    jitter: f32,
    z: &[N],
    z32: &[f32],
    ids: &[u32],
    midpoint_draws: Option<&[f32]>,
) -> Vec<N> {
    let mut left: Vec<usize> = (0..z.len()).collect();
    let score = |(k, &id): (usize, &u32)| {
        let choice = id as usize;
        let Near { top, experts } = Near::new(jitter, z32, &left);
        let shares: Vec<N> = experts.iter().map(|&e| z[e].share(z[top])).collect();
        left.retain(|&e| e != choice);
        let sum = N::sum_of_shares(&shares);
        if choice == top {
            return N::of(1.0) / sum;
        }
        let score = z[choice].share(z[top]) / sum;
        match midpoint_draws {
            Some(draws) if draws[k] > MIDPOINT_ABOVE => score,
            _ => score * N::of(MIDPOINT_FACTOR),
        }
    };
    ids.iter().enumerate().map(score).collect()
}
