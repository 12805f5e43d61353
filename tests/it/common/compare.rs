//! Comparisons: bit for bit, or each element within its bound.

use moe_kernels::Dtype;
use moe_kernels::reference::bound::Bounded;

/// The bits of values, which distinguish NaNs and the sign of zeros.
pub fn bits<D: Dtype>(values: &[D]) -> Vec<u32> {
    values.iter().map(|value| value.to_f32().to_bits()).collect()
}

/// Checks every element against the reference in f64; a failure names the element of largest
/// excess.
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
