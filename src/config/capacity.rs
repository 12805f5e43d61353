//! Capacity: the limit on the rows of each expert, and the order in which slots are kept.

use super::field::Checked;
use super::router::Normalization;
use crate::error::{Error, Result};
use crate::shape::RoutingShape;

/// A limit on the rows of each expert. Slots beyond the limit are reassigned to the next-best
/// experts of their token (overflow), or else dropped, which makes them inactive.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct CapacityConfig {
    /// The limit.
    pub limit: CapacityLimit,
    /// The order in which the slots of an expert are kept.
    pub priority: Priority,
    /// The number of rounds in which slots beyond the limit are reassigned to the next-best expert
    /// of their token; 0 drops them at once. In a layer with overflow the router must not normalise
    /// weights; [`normalization`](Self::normalization) normalises those of the kept slots.
    #[cfg_attr(feature = "serde", serde(default))]
    pub overflow: usize,
    /// The normalisation of the weights of a token's kept slots, after the others are dropped
    /// (NLLB): none, or a division by their sum. With a division, a layer applies the router's
    /// [`scale`](crate::RouterConfig::scale) and expert scales to the quotients instead of the
    /// router's weights.
    #[cfg_attr(feature = "serde", serde(default = "undivided"))]
    pub normalization: Normalization,
}

#[cfg(feature = "serde")]
fn undivided() -> Normalization {
    Normalization::None
}

/// The limit on the rows of an expert, per sequence. A batch without sequences is one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum CapacityLimit {
    /// `ceil(tokens * K / E * factor)` rows, at least 1, for the tokens of a sequence. Computed in
    /// f64 from left to right, as in Python.
    Factor {
        /// A finite number above 0.
        factor: f64,
    },
    /// `ceil(fraction * tokens)` rows for the tokens of a sequence, computed in f64 (the evaluation
    /// capacity of NLLB).
    TokenFraction {
        /// A finite number above 0.
        fraction: f64,
    },
    /// A fixed number of rows.
    Rows {
        /// 0 or more.
        rows: usize,
    },
}

/// The order in which the slots of an expert are kept; ties go to the lower slot. Weights are
/// compared as numbers, where -0 equals 0 and NaN counts as minus infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Priority {
    /// Token by token (Switch).
    Token,
    /// All first choices before all second ones, each token by token (GShard, NLLB).
    Choice,
    /// By weight, the largest first. A layer uses the weights of the router.
    Weight,
    /// All first choices before all second ones, each by the score of the token's first choice, the
    /// largest first (batch-prioritised routing). A layer uses the router's score before
    /// normalisation and scale.
    ChoiceByTopWeight,
}

impl CapacityConfig {
    /// A limit without overflow or normalisation: slots beyond it are dropped, and the weights of
    /// the others are unchanged.
    pub const fn new(limit: CapacityLimit, priority: Priority) -> Self {
        Self { limit, priority, overflow: 0, normalization: Normalization::None }
    }

    /// The limit in rows of an expert for a sequence of `sequence_tokens` tokens; `shape` has the
    /// numbers of experts and of experts per token.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a factor or a fraction that is not a
    /// finite number above 0, or a shape out of range.
    pub fn rows(&self, shape: &RoutingShape, sequence_tokens: usize) -> Result<usize> {
        const OP: &str = "capacity";
        self.check(OP)?;
        RoutingShape { num_tokens: sequence_tokens, ..*shape }.check(OP)?;
        // Conversions to f64 are exact below 2^53; conversions from f64 saturate.
        Ok(match self.limit {
            CapacityLimit::Rows { rows } => rows,
            CapacityLimit::Factor { factor } => {
                let slots = (sequence_tokens * shape.top_k) as f64;
                (slots / shape.num_experts as f64 * factor).ceil().max(1.0) as usize
            }
            CapacityLimit::TokenFraction { fraction } => {
                (fraction * sequence_tokens as f64).ceil() as usize
            }
        })
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let at = Checked { op };
        let positive = |argument, value: f64| {
            let good = value.is_finite() && value > 0.0;
            at.require(argument, good, "a finite number above 0", value)
        };
        match self.limit {
            CapacityLimit::Factor { factor } => positive("capacity.limit.factor", factor),
            CapacityLimit::TokenFraction { fraction } => {
                positive("capacity.limit.fraction", fraction)
            }
            CapacityLimit::Rows { .. } => Ok(()),
        }?;
        kept_divisor(op, "capacity.normalization", self.normalization).map(|_| ())
    }
}

/// The divisor of the weights of a token's kept slots: whether there is one, the epsilon added to
/// the sum, and the smallest divisor.
pub(crate) fn kept_divisor(
    op: &'static str,
    argument: &'static str,
    normalization: Normalization,
) -> Result<(bool, f32, f32)> {
    match normalization {
        Normalization::None => Ok((false, 0.0, f32::NEG_INFINITY)),
        Normalization::Sum { epsilon } => Ok((true, epsilon, f32::NEG_INFINITY)),
        Normalization::SumAtLeast { min } => Ok((true, 0.0, min)),
        Normalization::PNorm { p } => Err(Error::Unsupported {
            op,
            argument,
            wanted: "none, or a sum of the kept weights".into(),
            got: format!("a {p}-norm"),
        }),
    }
}

impl std::fmt::Display for CapacityConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.limit {
            CapacityLimit::Factor { factor } => write!(f, "capacity factor {factor}")?,
            CapacityLimit::TokenFraction { fraction } => {
                write!(f, "capacity {fraction} of the tokens")?;
            }
            CapacityLimit::Rows { rows } => write!(f, "capacity {rows}")?,
        }
        f.write_str(match self.priority {
            Priority::Token => " in token order",
            Priority::Choice => " by choice",
            Priority::Weight => " by weight",
            Priority::ChoiceByTopWeight => " by choice and top weight",
        })?;
        if self.overflow > 0 {
            write!(f, ", {} overflow rounds", self.overflow)?;
        }
        if self.normalization != Normalization::None {
            f.write_str(", renormalised")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_factor_match_python() {
        let rows = |factor, (t, k, e): (usize, usize, usize)| {
            let limit = CapacityLimit::Factor { factor };
            let config = CapacityConfig::new(limit, Priority::Token);
            config.rows(&RoutingShape { num_tokens: 7, num_experts: e, top_k: k }, t)
        };
        for (factor, shape, wanted) in [
            (1.0, (64, 2, 8), 16),
            (1.25, (64, 2, 8), 20),
            (1.25, (65, 2, 8), 21),
            (1.0, (1, 1, 128), 1),
            (1.0, (0, 2, 8), 1),
            // As in Python; rounded to f32 the result would be one row more.
            (0.15, (20, 1, 1), 3),
            (0.1, (100, 1, 10), 1),
            (1.1, (100, 1, 10), 11),
            // 50 * 1.1 is 55.00000000000001 in f64.
            (1.1, (500, 1, 10), 56),
            (f64::MIN_POSITIVE, (1 << 20, 8, 8), 1),
            (f64::from_bits(1), (1 << 20, 8, 8), 1),
            (2f64.powi(80), (2, 1, 3), usize::MAX),
            (f64::MAX, (3, 3, 3), usize::MAX),
            (f64::MAX, (0, 1, 3), 1),
            (8388608.0, (3, 1, 2), 3 << 22),
        ] {
            assert_eq!(rows(factor, shape), Ok(wanted), "{factor:e} {shape:?}");
        }
        for factor in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(rows(factor, (8, 2, 8)).is_err(), "{factor}");
        }
        assert!(rows(1.0, (1 << 31, 2, 8)).is_err());
        let limit = CapacityLimit::Rows { rows: 0 };
        let config = CapacityConfig::new(limit, Priority::Token);
        assert_eq!(
            config.rows(&RoutingShape { num_tokens: 1, num_experts: 1, top_k: 1 }, 1),
            Ok(0)
        );
    }

    #[test]
    fn rows_by_token_fraction_match_python() {
        let rows = |fraction, tokens| {
            let limit = CapacityLimit::TokenFraction { fraction };
            let config = CapacityConfig::new(limit, Priority::Choice);
            config.rows(&RoutingShape { num_tokens: 7, num_experts: 16, top_k: 2 }, tokens)
        };
        for (fraction, tokens, wanted) in [
            (0.15, 20, 3),
            (0.25, 20, 5),
            (0.25, 21, 6),
            // 0.07 * 100 is 7.000000000000001 in f64.
            (0.07, 100, 8),
            (0.5, 0, 0),
            (1e-9, 5, 1),
            (f64::from_bits(1), 1, 1),
            (1.5, 4, 6),
            (f64::MAX, 4, usize::MAX),
        ] {
            assert_eq!(rows(fraction, tokens), Ok(wanted), "{fraction} of {tokens}");
        }
        for fraction in [0.0, -0.5, f64::NAN, f64::INFINITY] {
            let error = rows(fraction, 8).unwrap_err().to_string();
            assert!(error.contains("`capacity.limit.fraction`"), "{error}");
        }
    }
}
