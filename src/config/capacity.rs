//! Capacity: how many rows an expert takes at most, and which it leaves out.

use super::field::{Checked, positive};
use crate::error::Result;

/// A limit on the rows of each expert. Slots beyond it are dropped, which means that they are inactive, or overflow.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct CapacityConfig {
    /// The limit.
    pub limit: CapacityLimit,
    /// Which slots of an expert come first.
    pub priority: Priority,
    /// How often a slot that found no room asks its token's next-best expert; 0 drops it at once.
    pub overflow: usize,
}

/// The limit on the rows of an expert, in one sequence or in the batch, as the operation is told.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum CapacityLimit {
    /// `ceil(tokens * K / E * factor)`, at least 1.
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

/// The order in which slots get the room of their expert; ties go to the lower slot.
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
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let at = Checked { op };
        match self.limit {
            CapacityLimit::Factor { factor } => {
                at.hold("capacity.limit.factor", factor, positive, "a finite number above 0")
            }
            CapacityLimit::Rows { .. } => Ok(()),
        }
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
        Ok(())
    }
}
