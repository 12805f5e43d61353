//! Random tensors.

use moe_kernels::Dtype;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Normal};

/// The values repeat after this prime number: drawing gigabytes of them would take minutes.
const PERIOD: usize = 1_048_573;

/// Returns normally distributed values. Tensors of zeros would be misleading, because a GPU draws
/// less power for them and multiplies them faster.
pub fn normal<D: Dtype>(len: usize, deviation: f64, seed: u64) -> Vec<D> {
    let period = period::<D>(len, deviation, seed);
    let mut values = Vec::with_capacity(len);
    while values.len() < len {
        values.extend_from_slice(&period[..period.len().min(len - values.len())]);
    }
    values
}

/// Returns one period of [`normal`], or the whole tensor if that is shorter.
pub(crate) fn period<D: Dtype>(len: usize, deviation: f64, seed: u64) -> Vec<D> {
    let mut random = SmallRng::seed_from_u64(seed);
    let normal = Normal::new(0.0, deviation).expect("a finite deviation");
    (0..len.min(PERIOD)).map(|_| D::from_f64(normal.sample(&mut random))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_deviation_and_depend_on_the_seed() {
        let values = normal::<f32>(100_000, 0.5, 1);
        let mean = values.iter().sum::<f32>() / 1e5;
        let square = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.01 && (square.sqrt() - 0.5).abs() < 0.01, "{mean} {square}");
        assert_ne!(values, normal::<f32>(100_000, 0.5, 2));
    }

    #[test]
    fn long_tensors_repeat_their_period() {
        let values = normal::<f32>(PERIOD + 5, 1.0, 3);
        assert_eq!(values.len(), PERIOD + 5);
        assert_eq!(values[PERIOD..], values[..5]);
    }
}
