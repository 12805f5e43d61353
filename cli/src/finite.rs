//! Outputs that are infinite or NaN although their token is neither.

use std::fmt;

use moe_kernels::{DType, Dtype};

/// Their number and the first of them.
#[derive(Debug, PartialEq)]
pub struct NotFinite {
    count: usize,
    total: usize,
    /// Token and column of the first.
    first: [usize; 2],
    value: f64,
    dtype: DType,
}

impl NotFinite {
    /// None where every row of `y` `[T, H]` is finite whose row of `x` is.
    pub fn find<D: Dtype>(x: &[D], y: &[D], hidden: usize) -> Option<Self> {
        let is_finite = |value: &D| value.to_f32().is_finite();
        let mut found: Option<Self> = None;
        let rows = x.chunks(hidden.max(1)).zip(y.chunks(hidden.max(1))).enumerate();
        for (token, (_, y)) in rows.filter(|(_, (x, _))| x.iter().all(is_finite)) {
            for (column, value) in y.iter().enumerate().filter(|(_, value)| !is_finite(value)) {
                let new = || Self {
                    count: 0,
                    total: y.len(),
                    first: [token, column],
                    value: value.to_f64(),
                    dtype: D::DTYPE,
                };
                found.get_or_insert_with(new).count += 1;
            }
        }
        found.map(|found| Self { total: found.total * (x.len() / hidden.max(1)), ..found })
    }

    pub fn count(&self) -> usize {
        self.count
    }
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, total, first: [token, column], value, dtype } = self;
        let of = format!("{count} of {total} numbers of y are infinite or NaN");
        write!(f, "{of}, for tokens that are finite; the first is y[{token}, {column}] = {value}")?;
        if *dtype == DType::F16 {
            f.write_str(
                "; f16 ends at 65504, which y or a number on the way to it exceeds: run with --dtype bf16 or f32",
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn rows_of_finite_tokens_alone() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert_eq!(NotFinite::find(&[1.0f32; 4], &[1.0; 4], 2), None);
        assert_eq!(NotFinite::find(&[nan, 1.0, 1.0, 1.0], &[1.0, inf, 1.0, 1.0], 2), None);
        let found = NotFinite::find(&[inf, 1.0, 1.0, 1.0], &[1.0, inf, 1.0, -inf], 2).unwrap();
        assert_eq!((found.count(), found.first, found.total), (1, [1, 1], 4));
        assert!(found.to_string().ends_with("y[1, 1] = -inf"), "{found}");
        let found = NotFinite::find(&[f16::ONE], &[f16::NAN], 1).unwrap();
        assert!(found.to_string().contains("65504"), "{found}");
        assert_eq!(NotFinite::find::<f32>(&[], &[], 0), None);
    }
}
