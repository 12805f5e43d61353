//! The dimensions of a routing.

use crate::abi;
use crate::error::{Error, Result, product};

/// The most experts that a layer may have.
pub const MAX_EXPERTS: usize = abi::MAX_EXPERTS as usize;

/// How many tokens go to how many of how many experts.
///
/// A *slot* is a pair (token, k), numbered `token * top_k + k`. Grouping slots by expert gives
/// *rows*; there are as many rows as active slots, so at most [`slots`](Self::slots).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RoutingShape {
    /// `T`; may be 0.
    pub num_tokens: usize,
    /// `E`, from 1 to [`MAX_EXPERTS`].
    pub num_experts: usize,
    /// `K`, experts per token, from 1 to `E`.
    pub top_k: usize,
}

impl RoutingShape {
    /// A shape that has been checked.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless `1 <= top_k <= num_experts <= MAX_EXPERTS` and the number of
    /// slots fits an `i32`.
    pub fn new(num_tokens: usize, num_experts: usize, top_k: usize) -> Result<Self> {
        let shape = Self { num_tokens, num_experts, top_k };
        shape.check("RoutingShape")?;
        Ok(shape)
    }

    /// `T * K`: the number of slots, and the bound on the number of rows.
    pub fn slots(&self) -> usize {
        self.num_tokens.saturating_mul(self.top_k)
    }

    /// `T * E`: elements of the logits.
    pub fn logits(&self) -> usize {
        self.num_tokens.saturating_mul(self.num_experts)
    }

    /// What [`RoutingShape::new`] checks; operations repeat it, since the fields are public.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let unsupported = |argument, wanted: String, got: usize| {
            Err(Error::Unsupported { op, argument, wanted, got: got.to_string() })
        };
        if !(1..=MAX_EXPERTS).contains(&self.num_experts) {
            return unsupported("num_experts", format!("1 to {MAX_EXPERTS}"), self.num_experts);
        }
        if self.top_k < 1 || self.top_k > self.num_experts {
            let wanted = format!("1 to num_experts, which is {}", self.num_experts);
            return unsupported("top_k", wanted, self.top_k);
        }
        let slots = product(op, "num_tokens * top_k", self.num_tokens, self.top_k)?;
        if slots > MAX_SLOTS {
            return unsupported("num_tokens * top_k", format!("at most {MAX_SLOTS}"), slots);
        }
        product(op, "num_tokens * num_experts", self.num_tokens, self.num_experts)?;
        Ok(())
    }
}

/// Rows and slots are counted in `int` by the kernels; a tile may reach past the last row.
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
    fn limits() {
        assert!(RoutingShape::new(0, 1, 1).is_ok());
        assert!(RoutingShape::new(5, 4096, 4096).is_ok());
        for (t, e, k) in
            [(1, 0, 1), (1, 4097, 1), (1, 8, 0), (1, 8, 9), (usize::MAX, 8, 2), (1 << 30, 8, 2)]
        {
            assert!(RoutingShape::new(t, e, k).is_err(), "T{t} E{e} K{k}");
        }
    }
}
