//! Numbers that are infinite or NaN although their token is neither.

use std::fmt;

use moe_kernels::{DType, Dtype};

/// Their number and the first of them.
#[derive(Debug, PartialEq)]
pub struct NotFinite {
    /// The tensor that has them.
    name: &'static str,
    count: usize,
    total: usize,
    /// Token and column of the first.
    first: [usize; 2],
    value: f64,
    /// The layer's element type.
    dtype: DType,
}

impl NotFinite {
    /// None where every row of `values` `[T, width]` is finite whose token is.
    pub fn find<V: Dtype>(
        name: &'static str,
        finite_tokens: &[bool],
        values: &[V],
        width: usize,
        dtype: DType,
    ) -> Option<Self> {
        let mut found: Option<Self> = None;
        let rows = finite_tokens.iter().zip(values.chunks(width.max(1))).enumerate();
        for (token, (_, row)) in rows.filter(|(_, (finite, _))| **finite) {
            for (column, value) in row.iter().enumerate() {
                if value.to_f32().is_finite() {
                    continue;
                }
                let (first, value) = ([token, column], value.to_f64());
                let new = || Self { name, count: 0, total: values.len(), first, value, dtype };
                found.get_or_insert_with(new).count += 1;
            }
        }
        found
    }

    pub fn count(&self) -> usize {
        self.count
    }
}

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, count, total, first: [token, column], value, dtype } = self;
        let of = format!("{count} of {total} numbers of {name} are infinite or NaN");
        write!(f, "{of}, for tokens that are finite; the first, [{token}, {column}], is {value}")?;
        if *dtype == DType::F16 {
            f.write_str(
                "; f16 ends at 65504, which one of them, the input or a number between them exceeds: \
                 run with --dtype bf16 or f32",
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
        let find =
            |finite: &[bool], values: &[f32]| NotFinite::find("y", finite, values, 2, DType::F32);
        assert_eq!(find(&[true, true], &[1.0; 4]), None);
        assert_eq!(find(&[false, true], &[1.0, inf, 1.0, 1.0]), None);
        let found = find(&[false, true], &[1.0, inf, nan, -inf]).unwrap();
        assert_eq!((found.count(), found.first, found.total), (2, [1, 0], 4));
        assert!(found.to_string().ends_with("the first, [1, 0], is NaN"), "{found}");
        let found = NotFinite::find("y", &[true], &[f16::NAN], 1, DType::F16).unwrap();
        assert!(found.to_string().contains("65504"), "{found}");
        assert_eq!(find(&[], &[]), None);
    }
}
