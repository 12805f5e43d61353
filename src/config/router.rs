//! The router: from the logits of a token to its experts and their weights.

use super::field::{Checked, finite, positive};
use crate::error::Result;

/// How each token's experts are chosen and weighed.
///
/// With `l` the logits of one token, [`reference::route_fwd`](crate::reference::route_fwd) computes, step by step and in f32:
///
/// 1. `z = l * logit_multiplier`, with what noise there is in `l`, then `c * tanh(z / c)` where there is a soft-cap `c`;
/// 2. the scores `s` of all experts, as [`scoring`](Self::scoring) says;
/// 3. the value that an expert is selected by: its score or its `z`, as [`selection`](Self::selection) says, plus its
///    entry of the selection bias where there is one;
/// 4. experts outside the best groups are masked, where there are groups;
/// 5. the `K` experts of largest value, ties to the lower id;
/// 6. their weights: the scores without the bias, normalised, times `scale`, times the expert's own scale.
///
/// A factor that a family puts on the routed output instead of the weights is the same [`scale`](Self::scale).
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RouterConfig {
    /// Noise is multiplied by this before it is added to the logits; a finite number above 0. Noise of deviation 1 has
    /// this one then, such as `1 / E`.
    pub noise_deviation: f32,
    /// Every logit is multiplied by this first; a finite number above 0.
    pub logit_multiplier: f32,
    /// `c` of `c * tanh(z / c)`, which keeps logits between `-c` and `c`.
    pub logit_softcap: Option<f32>,
    /// From logits to scores.
    pub scoring: Scoring,
    /// What experts are chosen by.
    pub selection: Selection,
    /// There is a vector `[E]` that is added for the selection alone ("correction bias").
    pub selection_bias: bool,
    /// Only experts of the best groups may be chosen.
    pub groups: Option<Groups>,
    /// What the weights of the chosen experts are divided by.
    pub normalization: Normalization,
    /// Every weight is multiplied by this at the end; a finite number.
    pub scale: f32,
    /// There is a vector `[E]` that multiplies the weight of each expert.
    pub expert_scale: bool,
    /// The last so many experts are chosen for every token, beside the others ("shared sinks"). They count in `E` and
    /// `K`, have logits like the others, and their scores are part of what weights are normalised by.
    pub num_sinks: usize,
}

/// From logits to scores.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the selected experts.
    SoftmaxSelected,
    /// `1 / (1 + exp(-z))`
    Sigmoid,
    /// `sqrt(ln(1 + exp(z)))`
    SqrtSoftplus,
    /// `z` itself.
    Logit,
    /// Phi-MoE's sparsemixer in evaluation: the weight of each choice is its softmax over the experts that were not
    /// chosen before and whose logits are near: `(m - z) / max(|z|, m) <= 2 * jitter`, where `m` is the largest.
    ///
    /// In training ([arXiv:2409.12136](https://arxiv.org/abs/2409.12136)) a choice is a draw from that softmax instead
    /// of the largest logit: the near expert of largest `z + g`, with Gumbel noise `g` of its own for every choice. Its
    /// weight is its share; times 0.3333 where it is not the largest logit of those left, unless a uniform draw of the
    /// choice is above 0.75 (Heun's third-order method). Both draws are inputs, `selection_noise` `[T, K, E]` and
    /// `midpoint_draws` `[T, K]`, such as [`noise_fwd`](crate::reference::noise_fwd) makes.
    Sparsemixer {
        /// Half the relative distance to the largest logit within which experts take part.
        jitter: f32,
        /// The form of training, whose draws every pass is given.
        #[cfg_attr(feature = "serde", serde(default))]
        training: bool,
    },
}

/// A number of every expert that the router makes on its way from logits to a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RouterStep {
    /// The logits with their noise, before the multiplier and the soft-cap.
    NoisyLogits,
    /// `z`: the same after both.
    Logits,
    /// What [`RouterConfig::scoring`] makes of `z`, for scores that do not depend on which experts are chosen. There is
    /// no bias, mask, normalisation or scale in them.
    Scores,
}

impl RouterStep {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::NoisyLogits, Self::Logits, Self::Scores];
}

/// What experts are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Selection {
    /// By score. Where that orders experts as the logits do (softmax without bias, groups by their largest score), the
    /// logits decide, which no rounding can tie.
    Score,
    /// By `z`.
    Logit,
    /// All `K` ids are given, those of sinks among them: a table by token id, or the routing of an earlier pass. There
    /// is no selection then, and a selection bias is not read.
    Given,
}

/// Experts in groups of equal size, of which only the best may be chosen from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Groups {
    /// How many; expert `e` is in group `e / (E / num_groups)`. From 1 to 32.
    pub num_groups: usize,
    /// How many of them a token may choose from: those of the best group scores, ties to the lower group.
    pub top_groups: usize,
    /// What a group is worth.
    pub score: GroupScore,
    /// What becomes of the other groups' experts.
    pub masked: Masked,
}

/// What a group is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum GroupScore {
    /// Its largest value.
    Max,
    /// The sum of its two largest values.
    TopTwoSum,
}

/// The value of experts outside the best groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Masked {
    /// Minus infinity: they are chosen when nothing else is left.
    NegativeInfinity,
    /// 0: they win against negative values, which a bias can make.
    Zero,
}

/// What the weights of the chosen experts are divided by. Sums run over the chosen experts, the sinks included.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum Normalization {
    /// Nothing.
    None,
    /// Their sum plus `epsilon`.
    Sum {
        /// Added to the sum; may be 0.
        epsilon: f32,
    },
    /// Their sum, but no less than `min`.
    SumAtLeast {
        /// The least divisor.
        min: f32,
    },
    /// Their p-norm, `(sum of |w|^p)^(1/p)`.
    PNorm {
        /// 1 or more.
        p: f32,
    },
}

impl Default for RouterConfig {
    /// [`RouterConfig::softmax_top_k`] that does not renormalise.
    fn default() -> Self {
        Self::softmax_top_k(false)
    }
}

impl RouterConfig {
    /// Softmax over all experts, then the `K` largest, divided by their sum (Mixtral, Qwen3-MoE) or not (OLMoE).
    pub const fn softmax_top_k(renormalize: bool) -> Self {
        Self {
            noise_deviation: 1.0,
            logit_multiplier: 1.0,
            logit_softcap: None,
            scoring: Scoring::Softmax,
            selection: Selection::Score,
            selection_bias: false,
            groups: None,
            normalization: if renormalize {
                Normalization::Sum { epsilon: 0.0 }
            } else {
                Normalization::None
            },
            scale: 1.0,
            expert_scale: false,
            num_sinks: 0,
        }
    }

    /// The `K` largest logits, then softmax over those (gpt-oss, Granite-MoE).
    pub const fn top_k_softmax() -> Self {
        Self {
            scoring: Scoring::SoftmaxSelected,
            selection: Selection::Logit,
            ..Self::softmax_top_k(false)
        }
    }

    /// Whether `z` decides which experts are chosen: where it is asked for, and where scores are a growing function
    /// of it that only rounding could tie.
    pub fn selects_by_logit(&self) -> bool {
        let softmax = matches!(self.scoring, Scoring::Softmax | Scoring::SoftmaxSelected);
        let by_value = self.selection_bias
            || self.groups.is_some_and(|groups| {
                groups.score != GroupScore::Max || groups.masked != Masked::NegativeInfinity
            });
        match self.selection {
            Selection::Logit => true,
            Selection::Score => {
                softmax && !by_value
                    || matches!(self.scoring, Scoring::Logit | Scoring::Sparsemixer { .. })
            }
            Selection::Given => false,
        }
    }

    /// Whether choices are drawn: the caller gives the draws.
    pub(crate) fn samples(&self) -> bool {
        matches!(self.scoring, Scoring::Sparsemixer { training: true, .. })
    }

    /// The router that makes the same choice and weighs it by scores alone, neither normalised nor scaled.
    pub(crate) fn of_scores(&self) -> Self {
        Self { normalization: Normalization::None, ..self.unscaled() }
    }

    /// The router that makes the same choice and does not scale its weights.
    pub(crate) fn unscaled(&self) -> Self {
        Self { scale: 1.0, expert_scale: false, ..*self }
    }

    /// Holds every field against its limits, for `num_experts` experts of which a token has `top_k`.
    pub(crate) fn check(&self, op: &'static str, num_experts: usize, top_k: usize) -> Result<()> {
        let at = Checked { op };
        let wanted = "a finite number above 0";
        at.require_number("router.noise_deviation", self.noise_deviation, positive, wanted)?;
        at.require_number(
            "router.logit_multiplier",
            self.logit_multiplier,
            positive,
            "a finite number above 0",
        )?;
        if let Some(cap) = self.logit_softcap {
            at.require_number("router.logit_softcap", cap, positive, "a finite number above 0")?;
        }
        at.require_number("router.scale", self.scale, finite, "a finite number")?;
        match self.normalization {
            Normalization::None => {}
            Normalization::Sum { epsilon } => {
                let good = |value: f32| finite(value) && value >= 0.0;
                at.require_number(
                    "router.normalization.epsilon",
                    epsilon,
                    good,
                    "a finite number from 0 on",
                )?;
            }
            Normalization::SumAtLeast { min } => {
                at.require_number("router.normalization.min", min, positive, "a finite number above 0")?;
            }
            Normalization::PNorm { p } => {
                let good = |value: f32| finite(value) && value >= 1.0;
                at.require_number("router.normalization.p", p, good, "a finite number from 1 on")?;
            }
        }
        if let Scoring::Sparsemixer { jitter, .. } = self.scoring {
            let good = |value: f32| finite(value) && value >= 0.0;
            at.require_number("router.scoring.jitter", jitter, good, "a finite number from 0 on")?;
            let plain = self.selection != Selection::Given
                && !self.selection_bias
                && self.groups.is_none()
                && self.num_sinks == 0
                && self.normalization == Normalization::None;
            let wanted = "a router without bias, groups, sinks, given ids and normalisation";
            at.require("router.scoring", plain, wanted, "sparsemixer beside one of them")?;
        }
        let wanted = "scores that are known before the selection, where there is a bias";
        let known = self.scoring != Scoring::SoftmaxSelected
            || self.selection != Selection::Score
            || self.selects_by_logit();
        at.require("router.scoring", known, wanted, "softmax_selected, selected by score")?;
        let wanted = format!("less than top_k, which is {top_k}");
        at.require(
            "router.num_sinks",
            self.num_sinks == 0 || self.num_sinks < top_k,
            &wanted,
            self.num_sinks,
        )?;
        if let Some(groups) = self.groups {
            let experts = num_experts - self.num_sinks;
            let Groups { num_groups, top_groups, .. } = groups;
            let wanted = format!("1 to {MAX_GROUPS}, and a divisor of the {experts} experts");
            let divides =
                (1..=MAX_GROUPS).contains(&num_groups) && experts.is_multiple_of(num_groups);
            at.require("router.groups.num_groups", divides, &wanted, num_groups)?;
            let wanted = format!("1 to num_groups, which is {num_groups}");
            let good = (1..=num_groups).contains(&top_groups);
            at.require("router.groups.top_groups", good, &wanted, top_groups)?;
            let wanted = "no groups where the ids are given";
            at.require("router.groups", self.selection != Selection::Given, wanted, "groups")?;
        }
        Ok(())
    }
}

/// A lane of a warp answers for each group.
const MAX_GROUPS: usize = 32;

impl std::fmt::Display for RouterConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.noise_deviation != 1.0 {
            write!(f, "noise * {}, ", self.noise_deviation)?;
        }
        if self.logit_multiplier != 1.0 {
            write!(f, "logits * {}, ", self.logit_multiplier)?;
        }
        if let Some(cap) = self.logit_softcap {
            write!(f, "soft-capped at {cap}, ")?;
        }
        let score = match self.scoring {
            Scoring::Softmax => "softmax",
            Scoring::SoftmaxSelected => "softmax",
            Scoring::Sigmoid => "sigmoid",
            Scoring::SqrtSoftplus => "sqrt-softplus",
            Scoring::Logit => "logits",
            Scoring::Sparsemixer { training: false, .. } => "sparsemixer",
            Scoring::Sparsemixer { training: true, .. } => "sparsemixer of training",
        };
        let choice = match self.selection {
            Selection::Given => "given ids",
            _ => "top-k",
        };
        let bias = if self.selection_bias { " + bias" } else { "" };
        let after = self.scoring == Scoring::SoftmaxSelected || self.selection == Selection::Logit;
        let before = if after { format!("logits{bias}, ") } else { format!("{score}{bias}, ") };
        if !(after && bias.is_empty()) {
            f.write_str(&before)?;
        }
        if let Some(groups) = self.groups {
            let Groups { num_groups, top_groups, score, masked } = groups;
            let by = match score {
                GroupScore::Max => "max",
                GroupScore::TopTwoSum => "top-2 sum",
            };
            let zero = if masked == Masked::Zero { ", others at 0" } else { "" };
            write!(f, "{top_groups} of {num_groups} groups by {by}{zero}, ")?;
        }
        f.write_str(choice)?;
        if after {
            write!(f, ", {score}")?;
        }
        match self.normalization {
            Normalization::None => {}
            Normalization::Sum { epsilon: 0.0 } => f.write_str(", renormalised")?,
            Normalization::Sum { epsilon } => write!(f, ", renormalised + {epsilon:e}")?,
            Normalization::SumAtLeast { min } => write!(f, ", renormalised by {min:e} at least")?,
            Normalization::PNorm { p } => write!(f, ", {p}-norm")?,
        }
        if self.num_sinks > 0 {
            write!(f, ", {} sinks", self.num_sinks)?;
        }
        if self.expert_scale {
            f.write_str(", scaled by expert")?;
        }
        if self.scale != 1.0 {
            write!(f, ", * {}", self.scale)?;
        }
        Ok(())
    }
}
