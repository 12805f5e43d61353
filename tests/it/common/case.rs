//! Random routings and values from a seed.

use moe_kernels::{Dtype, RoutingShape};
use proptest::prelude::*;

/// A SplitMix64 generator, with the same numbers on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in `-1..1`.
    pub fn signed(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// The distribution of tokens over experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Skew {
    /// Every expert with the same probability.
    Uniform,
    /// Expert `e` with a probability proportional to `1 / (e + 1)`.
    Zipf,
    /// Expert 0 is the first choice of every token.
    OneHot,
    /// Experts with odd ids get no tokens, as far as `K` allows.
    Empty,
    /// Uniform, but every third slot has the id of no expert.
    Inactive,
}

/// A random skew.
pub fn skew() -> impl Strategy<Value = Skew> {
    proptest::sample::select(vec![
        Skew::Uniform,
        Skew::Zipf,
        Skew::OneHot,
        Skew::Empty,
        Skew::Inactive,
    ])
}

/// Expert ids `[T, K]`, distinct within a token except for inactive slots.
pub fn routing_ids(shape: RoutingShape, skew: Skew, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let mut ids = Vec::with_capacity(shape.slots());
    for _ in 0..shape.num_tokens {
        let mut remaining: Vec<usize> = (0..shape.num_experts).collect();
        for k in 0..shape.top_k {
            let at = match skew {
                Skew::Uniform | Skew::Inactive => rng.below(remaining.len()),
                Skew::Zipf => zipf(&remaining, &mut rng),
                Skew::OneHot if k == 0 => 0,
                Skew::OneHot => rng.below(remaining.len()),
                Skew::Empty => {
                    let even = remaining.iter().filter(|expert| *expert % 2 == 0).count();
                    if even == 0 {
                        rng.below(remaining.len())
                    } else {
                        let nth = rng.below(even);
                        let mut even =
                            remaining.iter().enumerate().filter(|(_, expert)| *expert % 2 == 0);
                        even.nth(nth).unwrap().0
                    }
                }
            };
            ids.push(remaining.remove(at) as u32);
        }
    }
    if skew == Skew::Inactive {
        let foreign = [shape.num_experts as u32, u32::MAX, i32::MAX as u32];
        for id in ids.iter_mut().step_by(3) {
            *id = foreign[rng.below(foreign.len())];
        }
    }
    ids
}

fn zipf(remaining: &[usize], rng: &mut Rng) -> usize {
    let total: f64 = remaining.iter().map(|expert| 1.0 / (expert + 1) as f64).sum();
    let mut at = (rng.signed() + 1.0) / 2.0 * total;
    for (index, expert) in remaining.iter().enumerate() {
        at -= 1.0 / (expert + 1) as f64;
        if at <= 0.0 {
            return index;
        }
    }
    remaining.len() - 1
}

/// Uniform values in `-scale..scale`, rounded to `D` so that device and reference read the same
/// numbers.
pub fn values<D: Dtype>(len: usize, scale: f64, seed: u64) -> Vec<D> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| D::from_f64(rng.signed() * scale)).collect()
}
