//! Comparisons: bit for bit, or each element within a bound of its own.

use moe_kernels::Dtype;
use moe_kernels::reference::bound::Bounded;

/// The bits of values, so that NaNs compare and zeros keep their sign.
pub fn bits<D: Dtype>(values: &[D]) -> Vec<u32> {
    values.iter().map(|value| value.to_f32().to_bits()).collect()
}

/// Holds every element against the reference in f64; a failure names the worst one.
pub fn assert_within<D: Dtype>(got: &[D], want: &Bounded, what: &str) {
    if let Some((index, excess)) = want.worst(got) {
        let show =
            |values: &[f64]| values.get(index).map_or("nothing".into(), |v| format!("{v:e}"));
        assert!(
            excess <= 1.0,
            "{what}: element {index} is {:?}, wanted {} within {} ({excess:.3} times the bound)",
            got.get(index),
            show(&want.value),
            show(&want.bound),
        );
    }
}
