//! Capacity: how many rows an expert takes at most, and which it leaves out.

use super::field::{Checked, positive};
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
    /// does not normalise then: [`normalization`](Self::normalization) does, once it is known who is kept.
    #[cfg_attr(feature = "serde", serde(default))]
    pub overflow: usize,
    /// What the weights of a token's kept slots are divided by once the others are dropped (NLLB): nothing, or their
    /// sum, which takes a common factor out; [`RouterConfig::scale`](crate::RouterConfig::scale) then multiplies them.
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
    /// `ceil(tokens * K / E * factor)`, at least 1, of the tokens of a sequence. Exactly so: the factor is the f32
    /// that it is, and nothing is rounded before the end.
    Factor {
        /// A number above 0.
        factor: f32,
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
    /// By weight, the largest first.
    Weight,
    /// All first choices before all second ones, each by the weight of the token's first choice, the largest first
    /// (batch-prioritised routing).
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
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a factor that is no finite number above 0, or a shape out
    /// of range.
    pub fn rows(&self, shape: &RoutingShape, sequence_tokens: usize) -> Result<usize> {
        const OP: &str = "capacity";
        self.check(OP)?;
        RoutingShape { num_tokens: sequence_tokens, ..*shape }.check(OP)?;
        Ok(match self.limit {
            CapacityLimit::Rows { rows } => rows,
            CapacityLimit::Factor { factor } => {
                share(sequence_tokens * shape.top_k, shape.num_experts, factor)
            }
        })
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let at = Checked { op };
        match self.limit {
            CapacityLimit::Factor { factor } => {
                at.hold("capacity.limit.factor", factor, positive, "a finite number above 0")
            }
            CapacityLimit::Rows { .. } => Ok(()),
        }?;
        kept_divisor(op, "capacity.normalization", self.normalization).map(|_| ())
    }
}

/// `ceil(slots / experts * factor)` in integers, at least 1. A factor is a 24-bit integer times a power of two.
fn share(slots: usize, experts: usize, factor: f32) -> usize {
    let (exponent, fraction) = ((factor.to_bits() >> 23) as i32, factor.to_bits() & 0x7f_ffff);
    let (integer, power) = match exponent {
        0 => (fraction, -149),
        _ => (fraction | 0x80_0000, exponent - 150),
    };
    let (product, experts) = (slots as u128 * u128::from(integer), experts as u128);
    let rows = match power {
        // More than there are slots.
        32.. if product > 0 => u128::MAX,
        0.. => (product << power).div_ceil(experts),
        // Slots are less than 2^31: the quotient is less than 1.
        ..-80 => 1,
        _ => product.div_ceil(experts << -power),
    };
    usize::try_from(rows.max(1)).unwrap_or(usize::MAX)
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
            // The f32 next to 1.1 is larger than 1.1, and so is the quotient.
            (1.1, (100, 1, 10), 12),
            (0.1, (100, 1, 10), 2),
            (1.0f32.next_up(), (1 << 24, 1, 1), (1 << 24) + 2),
            (1.0f32.next_down(), ((1 << 24) + 1, 1, 1), 1 << 24),
            (f32::MIN_POSITIVE, (1 << 20, 8, 8), 1),
            (f32::from_bits(1), (1 << 20, 8, 8), 1),
            (2f32.powi(-40), (1 << 20, 8, 8), 1),
            (2f32.powi(60), (2, 1, 3), usize::MAX),
            (f32::MAX, (0, 1, 3), 1),
            (8388608.0, (3, 1, 2), 3 << 22),
        ] {
            assert_eq!(rows(factor, shape), Ok(wanted), "{factor:e} {shape:?}");
        }
        for factor in [0.0, -1.0, f32::NAN, f32::INFINITY] {
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
}
