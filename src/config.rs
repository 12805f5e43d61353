//! What a layer computes, as plain enums and numbers.

use crate::error::{Error, Result};
use crate::shape::RoutingShape;

/// How weights come from the logits of a token. Experts are always chosen by logit: the `K` largest,
/// ties to the lower expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Scoring {
    /// Softmax over all experts, then the `K` largest.
    SoftmaxThenTopK {
        /// Divide the chosen weights by their sum (Mixtral, Qwen3-MoE), or leave them (OLMoE).
        renormalize: bool,
    },
    /// The `K` largest logits, then softmax over those (gpt-oss, Granite-MoE).
    TopKThenSoftmax,
}

/// The router: from logits to expert ids and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RouterConfig {
    /// How weights come from logits.
    pub scoring: Scoring,
}

/// A whole layer: the router and `E` SwiGLU experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct MoeConfig {
    /// `H`, the width of a token.
    pub hidden: usize,
    /// `I`, the width of an expert.
    pub intermediate: usize,
    /// `E`
    pub num_experts: usize,
    /// `K`, experts per token.
    pub top_k: usize,
    /// The router.
    pub router: RouterConfig,
}

impl MoeConfig {
    /// Holds every field against its limits.
    ///
    /// # Errors
    /// [`Error::Unsupported`], which names the field.
    pub fn check(&self) -> Result<()> {
        for (argument, value) in [("hidden", self.hidden), ("intermediate", self.intermediate)] {
            if !(1..=MAX_WIDTH).contains(&value) {
                return Err(Error::Unsupported {
                    op: "MoeConfig",
                    argument,
                    wanted: format!("1 to {MAX_WIDTH}"),
                    got: value.to_string(),
                });
            }
        }
        self.routing(0).check("MoeConfig")
    }

    /// The shape of a routing of `num_tokens` tokens.
    pub fn routing(&self, num_tokens: usize) -> RoutingShape {
        RoutingShape { num_tokens, num_experts: self.num_experts, top_k: self.top_k }
    }

    /// Elements of `gate_up` `[E, 2I, H]`.
    pub fn gate_up_len(&self) -> usize {
        2usize.saturating_mul(self.down_len())
    }

    /// Elements of `down` `[E, H, I]`.
    pub fn down_len(&self) -> usize {
        self.num_experts.saturating_mul(self.hidden).saturating_mul(self.intermediate)
    }
}

/// Twice a width, and a tile past it, still fits an `i32`.
const MAX_WIDTH: usize = 1 << 24;

impl std::fmt::Display for MoeConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let router = match self.router.scoring {
            Scoring::SoftmaxThenTopK { renormalize: true } => "softmax, top-k, renormalised",
            Scoring::SoftmaxThenTopK { renormalize: false } => "softmax, top-k",
            Scoring::TopKThenSoftmax => "top-k, softmax",
        };
        write!(
            f,
            "H{} I{} E{} K{}, {router}",
            self.hidden, self.intermediate, self.num_experts, self.top_k
        )
    }
}
