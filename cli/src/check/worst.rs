//! Comparison of an output with the reference: keeps the element with the largest error.

use std::fmt;

use moe_kernels::Dtype;
use moe_kernels::reference::bound::Bounded;

/// The element with the largest error relative to its bound.
#[derive(Debug, Clone)]
pub struct Worst {
    /// `error / bound`; at most 1 for a correct output.
    pub ratio: f64,
    /// `|got - wanted|`
    pub error: f64,
    /// The largest error that is allowed.
    pub bound: f64,
    /// True if the output has to equal the reference bit for bit.
    pub exact: bool,
    description: String,
}

impl Worst {
    /// The result before the first comparison.
    pub fn none() -> Self {
        Self { ratio: 0.0, error: 0.0, bound: 0.0, exact: true, description: String::new() }
    }

    /// True if the error is within the bound.
    pub fn is_good(&self) -> bool {
        self.ratio <= 1.0
    }

    /// Keeps the larger error of the two.
    pub fn merge(&mut self, other: Worst) {
        // A comparison with a bound replaces a correct exact one, so that the table shows the
        // bound.
        if other.ratio > self.ratio || (self.exact && !other.exact && self.is_good()) {
            *self = other;
        }
    }

    /// Compares integers, which have to be equal.
    pub fn of_integers<T: PartialEq + fmt::Debug>(name: &str, got: &[T], wanted: &[T]) -> Self {
        let differs = (0..got.len().max(wanted.len())).find(|&i| got.get(i) != wanted.get(i));
        let description = differs.map_or_else(String::new, |i| {
            let show =
                |value: Option<&T>| value.map_or("missing".into(), |value| format!("{value:?}"));
            format!("{name}[{i}] is {}, wanted {}", show(got.get(i)), show(wanted.get(i)))
        });
        let error = if differs.is_some() { f64::INFINITY } else { 0.0 };
        Self { ratio: error, error, bound: 0.0, exact: true, description }
    }

    /// Compares copies byte by byte; the index in the description is that of a byte.
    pub fn of_bytes<D: Dtype>(name: &str, got: &[D], wanted: &[D]) -> Self {
        let bytes = bytemuck::cast_slice::<D, u8>;
        Self::of_integers(name, bytes(got), bytes(wanted))
    }

    /// Compares each element with its own bound.
    pub fn of_bounded<D: Dtype>(name: &str, got: &[D], wanted: &Bounded) -> Self {
        let Some((index, ratio)) = wanted.worst(got) else {
            return Self { exact: false, ..Self::none() };
        };
        let at = |values: &[f64]| values.get(index).copied().unwrap_or(f64::NAN);
        let (value, bound) = (at(&wanted.value), at(&wanted.bound));
        let got = got.get(index).map_or(f64::NAN, |got| got.to_f64());
        let description =
            format!("{name}[{index}] is {got:e}, wanted {value:e} within {bound:.1e}");
        Self { ratio, error: (got - value).abs(), bound, exact: false, description }
    }
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.description)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merge_keeps_largest_error() {
        let mut worst = Worst::none();
        worst.merge(Worst::of_integers("ids", &[1, 2], &[1, 2]));
        assert!(worst.is_good() && worst.exact);
        let wanted = Bounded { value: vec![1.0, 2.0], bound: vec![0.5, 0.25] };
        worst.merge(Worst::of_bounded("y", &[1.25f32, 2.0], &wanted));
        assert!(worst.is_good() && !worst.exact);
        assert_eq!((worst.ratio, worst.error, worst.bound), (0.5, 0.25, 0.5));
        worst.merge(Worst::of_bounded("y", &[1.0f32, f32::NAN], &wanted));
        assert!(!worst.is_good());
        assert_eq!(worst.to_string(), "y[1] is NaN, wanted 2e0 within 2.5e-1");
    }

    #[test]
    fn other_bits_are_errors() {
        let worst = Worst::of_integers("ids", &[1, 2], &[1, 3]);
        assert!(!worst.is_good());
        assert_eq!(worst.to_string(), "ids[1] is 2, wanted 3");
        let short = Worst::of_integers("ids", &[1], &[1, 3]);
        assert_eq!(short.to_string(), "ids[1] is missing, wanted 3");
        let zeros = Worst::of_bytes("x", &[0.0f32], &[-0.0]);
        assert_eq!(zeros.to_string(), "x[3] is 0, wanted 128");
    }
}
