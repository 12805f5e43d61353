//! The dimensions of a routing.

use crate::abi;
use crate::error::{Error, Result, product};

/// The largest number of experts of a layer.
pub const MAX_EXPERTS: usize = abi::MAX_EXPERTS as usize;

/// The dimensions of a routing: each of `T` tokens is sent to `K` of `E` experts.
///
/// A *slot* is a pair (token, k), numbered `token * top_k + k`. Grouping the active slots by expert
/// gives the *rows*: one row per active slot, so at most [`slots`](Self::slots).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RoutingShape {
    /// `T`; may be 0.
    pub num_tokens: usize,
    /// `E`, from 1 to [`MAX_EXPERTS`].
    pub num_experts: usize,
    /// `K`, experts per token, from 1 to `E`.
    pub top_k: usize,
}

impl RoutingShape {
    /// Creates a shape after checking it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless `1 <= top_k <= num_experts <= MAX_EXPERTS` and the number of
    /// slots fits an `i32`.
    pub fn new(num_tokens: usize, num_experts: usize, top_k: usize) -> Result<Self> {
        let shape = Self { num_tokens, num_experts, top_k };
        shape.check("RoutingShape")?;
        Ok(shape)
    }

    /// `T * K`: the number of slots, and an upper bound of the number of rows.
    pub fn slots(&self) -> usize {
        self.num_tokens.saturating_mul(self.top_k)
    }

    /// `T * E`: the number of logits.
    pub fn logits(&self) -> usize {
        self.num_tokens.saturating_mul(self.num_experts)
    }

    /// The shape in which each slot counts as one token with one expert, `[T * K, E]`. A plan of
    /// this shape lists slots in place of tokens.
    pub fn by_slot(&self) -> Self {
        Self { num_tokens: self.slots(), num_experts: self.num_experts, top_k: 1 }
    }

    /// The number of sequences of `sequence_tokens` tokens, of which the last may be shorter.
    /// `None` makes the batch one sequence.
    pub fn sequences(&self, sequence_tokens: Option<usize>) -> usize {
        self.num_tokens.div_ceil(sequence_tokens.unwrap_or(self.num_tokens).max(1))
    }

    /// The checks of [`RoutingShape::new`]. Operations repeat them, since the fields are public.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        self.check_rows(op)?;
        if self.top_k > self.num_experts {
            let wanted = format!("1 to num_experts, which is {}", self.num_experts);
            return Err(unsupported(op, "top_k", wanted, self.top_k));
        }
        Ok(())
    }

    /// The checks of operations on the rows of a plan, whose experts may be fewer than `top_k`.
    pub(crate) fn check_rows(&self, op: &'static str) -> Result<()> {
        if !(1..=MAX_EXPERTS).contains(&self.num_experts) {
            let wanted = format!("1 to {MAX_EXPERTS}");
            return Err(unsupported(op, "num_experts", wanted, self.num_experts));
        }
        if !(1..=MAX_EXPERTS).contains(&self.top_k) {
            return Err(unsupported(op, "top_k", format!("1 to {MAX_EXPERTS}"), self.top_k));
        }
        let slots = product(op, "num_tokens * top_k", self.num_tokens, self.top_k)?;
        if slots > MAX_SLOTS {
            let wanted = format!("at most {MAX_SLOTS}");
            return Err(unsupported(op, "num_tokens * top_k", wanted, slots));
        }
        product(op, "num_tokens * num_experts", self.num_tokens, self.num_experts)?;
        Ok(())
    }

    /// The shape of a plan for the experts `first..end` of this routing.
    pub(crate) fn of_experts(&self, op: &'static str, first: usize, end: usize) -> Result<Self> {
        self.check(op)?;
        if first >= end || end > self.num_experts {
            return Err(Error::Unsupported {
                op,
                argument: "experts",
                wanted: format!("a non-empty range within 0..{}", self.num_experts),
                got: format!("{first}..{end}"),
            });
        }
        Ok(Self { num_experts: end - first, ..*self })
    }
}

fn unsupported(op: &'static str, argument: &'static str, wanted: String, got: usize) -> Error {
    Error::Unsupported { op, argument, wanted, got: got.to_string() }
}

/// Kernels count rows and slots in `int`, and a tile may extend past the last row.
const MAX_SLOTS: usize = i32::MAX as usize - 4096;

impl std::fmt::Display for RoutingShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "T{} E{} K{}", self.num_tokens, self.num_experts, self.top_k)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_checked() {
        assert!(RoutingShape::new(0, 1, 1).is_ok());
        assert!(RoutingShape::new(5, 4096, 4096).is_ok());
        for (t, e, k) in
            [(1, 0, 1), (1, 4097, 1), (1, 8, 0), (1, 8, 9), (usize::MAX, 8, 2), (1 << 30, 8, 2)]
        {
            assert!(RoutingShape::new(t, e, k).is_err(), "T{t} E{e} K{k}");
        }
    }

    #[test]
    fn range_of_experts_is_checked() {
        let whole = RoutingShape::new(5, 8, 2).unwrap();
        let part = whole.of_experts("test", 3, 4).unwrap();
        assert_eq!((part.num_tokens, part.num_experts, part.top_k), (5, 1, 2));
        assert!(part.check("test").is_err() && part.check_rows("test").is_ok());
        assert_eq!(whole.of_experts("test", 0, 8), Ok(whole));
        for (first, end) in [(0, 0), (8, 8), (7, 9), (5, 3), (0, usize::MAX)] {
            assert!(whole.of_experts("test", first, end).is_err(), "{first}..{end}");
        }
        assert!(RoutingShape { top_k: 0, ..part }.check_rows("test").is_err());
    }
}
