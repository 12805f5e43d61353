//! The weights of the chosen experts.

use super::Token;
use super::exact::Number;
use crate::config::{Normalization, RouterConfig, Score};

/// `z` of all experts of a token.
pub(super) fn logits<N: Number>(router: &RouterConfig, token: &Token<'_>) -> Vec<N> {
    let logit = |e: usize| {
        let mut z = N::of(token.logits[e]).cleaned();
        if let Some(noise) = token.noise {
            let mut noise = N::of(noise[e]) * N::of(router.noise_deviation);
            if let Some(logits) = &token.noise_logits {
                noise = noise * N::of(logits[e]).cleaned().softplus();
            }
            z = (z + noise).cleaned();
        }
        z = z * N::of(router.logit_multiplier);
        if let Some(cap) = router.logit_softcap {
            z = N::of(cap) * (z / N::of(cap)).tangent();
        }
        z.cleaned()
    };
    (0..token.logits.len()).map(logit).collect()
}

/// The scores of experts with these `z`; `all` are those of every expert.
pub(super) fn scores<N: Number>(score: Score, all: &[N], z: &[N]) -> Vec<N> {
    match score {
        Score::Logit => z.to_vec(),
        Score::Softmax => softmax(all, z),
        Score::SoftmaxChosen => softmax(z, z),
        Score::Sigmoid => z.iter().map(|z| z.sigmoid()).collect(),
        Score::SqrtSoftplus => z.iter().map(|z| z.softplus().root_of_two()).collect(),
        // Scores depend on the order of choices: `sparsemixer::scores` computes them.
        Score::Sparsemixer { .. } => Vec::new(),
    }
}

/// The shares of some experts in a softmax over `all`.
fn softmax<N: Number>(all: &[N], z: &[N]) -> Vec<N> {
    let max = all.iter().fold(N::of(f32::NEG_INFINITY), |max, z| z.or_larger(max));
    let shares: Vec<N> = all.iter().map(|z| z.share(max)).collect();
    let sum = N::sum_of_shares(&shares);
    z.iter().map(|z| z.share(max) / sum).collect()
}

/// Divides scores by their sum or norm, as `by` states. NaN propagates.
pub(super) fn normalize<N: Number>(by: Normalization, scores: &mut [N]) {
    let divisor = match by {
        Normalization::None => return,
        Normalization::Sum { epsilon } => sum_of_slots(scores) + N::of(epsilon),
        Normalization::SumAtLeast { min } => sum_of_slots(scores).or_larger(N::of(min)),
        Normalization::PNorm { p } => {
            // Fractions of the largest score, of which no power overflows.
            let most = scores.iter().fold(N::of(0.0), |most, s| s.magnitude().or_larger(most));
            scores.iter_mut().for_each(|score| *score = *score / most);
            let powers: Vec<N> = scores.iter().map(|score| score.magnitude().power(p)).collect();
            let sum = sum_of_slots(&powers);
            // At least 1 unless the largest score is 0 or infinite.
            if sum.is_from_one_on() { sum.root(p) } else { sum }
        }
    };
    scores.iter_mut().for_each(|score| *score = *score / divisor);
}

/// A sum over the slots of a token: chunks of 32 slots are summed by halves, with 0 for missing
/// slots, and then added in order.
fn sum_of_slots<N: Number>(numbers: &[N]) -> N {
    let by_halves = |numbers: &[N]| {
        let mut sums = [N::of(0.0); 32];
        sums[..numbers.len()].copy_from_slice(numbers);
        for half in [16, 8, 4, 2, 1] {
            for i in 0..half {
                sums[i] = sums[i] + sums[i + half];
            }
        }
        sums[0]
    };
    numbers.chunks(32).map(by_halves).fold(N::of(0.0), |sum, chunk| sum + chunk)
}
