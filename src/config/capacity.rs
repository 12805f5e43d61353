//! Capacity: how many rows an expert takes at most, and which it leaves out.

use super::field::Checked;
use super::router::Normalization;
use crate::error::{Error, Result};
use crate::shape::RoutingShape;

/// A limit on the rows of each expert. Slots beyond it are dropped, which means that they are inactive, or overflow.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct CapacityConfig {
    /// The limit.
    pub limit: CapacityLimit,
    /// Which slots of an expert come first.
    pub priority: Priority,
    /// How often a slot that found no room asks its token's next-best expert; 0 drops it at once. In a layer the router
    /// does not normalise then: [`normalization`](Self::normalization) does, once it is known which slots are kept.
    #[cfg_attr(feature = "serde", serde(default))]
    pub overflow: usize,
    /// The divisor of the weights of a token's kept slots, once the others are dropped (NLLB): none, or their sum. With
    /// a divisor a layer scales afterwards: the router gives weights without its
    /// [`scale`](crate::RouterConfig::scale) and expert scales, which multiply the quotients.
    #[cfg_attr(feature = "serde", serde(default = "undivided"))]
    pub normalization: Normalization,
}

#[cfg(feature = "serde")]
fn undivided() -> Normalization {
    Normalization::None
}

/// The limit on the rows of an expert, in one sequence or in the batch, as the operation is told.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum CapacityLimit {
    /// `ceil(tokens * K / E * factor)`, at least 1, of the tokens of a sequence: in f64, operation by operation from left
    /// to right, as Python computes it.
    Factor {
        /// A finite number above 0.
        factor: f64,
    },
    /// `ceil(fraction * tokens)` of the tokens of a sequence, in f64 (the evaluation capacity of NLLB).
    TokenFraction {
        /// A finite number above 0.
        fraction: f64,
    },
    /// So many rows.
    Rows {
        /// 0 or more.
        rows: usize,
    },
}

/// The order in which slots get the room of their expert; ties go to the lower slot. Weights order as numbers do, with
/// -0 as 0 and NaN as minus infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Priority {
    /// Token by token (Switch).
    Token,
    /// All first choices before all second ones, each token by token (GShard, NLLB).
    Choice,
    /// By weight, the largest first. In a layer these are the weights that the router gives.
    Weight,
    /// All first choices before all second ones, each by the score of the token's first choice, the largest first
    /// (batch-prioritised routing). In a layer that is the router's score before any normalisation and scale.
    ChoiceByTopWeight,
}

impl CapacityConfig {
    /// A limit that drops what finds no room, and leaves the other weights as they are.
    pub const fn new(limit: CapacityLimit, priority: Priority) -> Self {
        Self { limit, priority, overflow: 0, normalization: Normalization::None }
    }

    /// How many rows an expert takes in a sequence of `sequence_tokens` tokens, of which `shape` has the experts.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a factor or a fraction that is no finite number above 0, or
    /// a shape out of range.
    pub fn rows(&self, shape: &RoutingShape, sequence_tokens: usize) -> Result<usize> {
        const OP: &str = "capacity";
        self.check(OP)?;
        RoutingShape { num_tokens: sequence_tokens, ..*shape }.check(OP)?;
        // Conversions to f64 are exact below 2^53, and those from it saturate.
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

/// What the weights of a token's kept slots are divided by: whether by anything, what is added to their sum, and the
/// least divisor.
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
            wanted: "none, or a sum of what is kept".into(),
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
    fn rows_of_a_factor() {
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
            // What Python gives, where the nearest f32 would say one row more.
            (0.15, (20, 1, 1), 3),
            (0.1, (100, 1, 10), 1),
            (1.1, (100, 1, 10), 11),
            // 50 * 1.1 is 55.00000000000001 there.
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
    fn rows_of_a_fraction_of_tokens() {
        let rows = |fraction, tokens| {
            let limit = CapacityLimit::TokenFraction { fraction };
            let config = CapacityConfig::new(limit, Priority::Choice);
            config.rows(&RoutingShape { num_tokens: 7, num_experts: 16, top_k: 2 }, tokens)
        };
        for (fraction, tokens, wanted) in [
            (0.15, 20, 3),
            (0.25, 20, 5),
            (0.25, 21, 6),
            // 0.07 * 100 is 7.000000000000001 in Python.
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
