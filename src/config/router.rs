//! The router: from the logits of a token to its experts and their weights.

use super::field::{Checked, finite, positive};
use crate::error::Result;

/// The router: selects the experts of each token and computes their weights.
///
/// For the logits `l` of one token, [`reference::route_fwd`](crate::reference::route_fwd) computes
/// these steps in f32:
///
/// 1. `z = (l + noise_deviation * noise) * logit_multiplier`; with a soft-cap `c`, then
///    `c * tanh(z / c)`.
/// 2. The scores `s` of all experts, by [`scoring`](Self::scoring).
/// 3. The selection value of each expert: its score or its `z`, by [`selection`](Self::selection),
///    plus its selection bias if enabled.
/// 4. With [`groups`](Self::groups), experts outside the best groups are masked.
/// 5. The `K` experts of the largest values are selected, ties to the lower id.
/// 6. Their weights: the scores without the bias, normalised, times `scale`, times the scale of the
///    expert if enabled.
///
/// If a model family multiplies the routed output by a factor instead of the weights, use
/// [`scale`](Self::scale) for it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RouterConfig {
    /// The factor of the noise before it is added to the logits, such as `1 / E`; a finite number
    /// above 0. It is the standard deviation of the scaled noise if that of the given noise is 1.
    pub noise_deviation: f32,
    /// The factor of every logit, after noise; a finite number above 0.
    pub logit_multiplier: f32,
    /// The soft-cap `c` of `c * tanh(z / c)`, which bounds logits to `-c..c`; a finite number above
    /// 0.
    pub logit_softcap: Option<f32>,
    /// The function from logits to scores.
    pub scoring: Scoring,
    /// The value by which experts are selected.
    pub selection: Selection,
    /// A vector `[E - num_sinks]` is added to the values for the selection only ("correction
    /// bias").
    pub selection_bias: bool,
    /// Restricts the selection to the experts of the best groups.
    pub groups: Option<Groups>,
    /// The divisor of the weights of the selected experts.
    pub normalization: Normalization,
    /// The factor of every weight, after normalisation; a finite number.
    pub scale: f32,
    /// A vector `[E]` multiplies the weights, by expert.
    pub expert_scale: bool,
    /// The number of sinks: the last `num_sinks` experts are selected for every token ("shared
    /// sinks"). They count in `E` and `K`, have logits like other experts, and their scores are
    /// part of the normalisation. Either 0 or less than `K`.
    pub num_sinks: usize,
}

/// The function from logits to scores.
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
    /// Phi-MoE's sparsemixer. In evaluation the weight of each choice is its softmax over the
    /// experts that were not chosen before and whose logits are near the largest, `m`: `(m - z) /
    /// max(|z|, m) <= 2 * jitter`.
    ///
    /// In training ([arXiv:2409.12136](https://arxiv.org/abs/2409.12136)) each choice is sampled
    /// from that softmax instead of taking the largest logit: the near expert of largest `z + g` is
    /// chosen, with separate Gumbel noise `g` for each choice. Its weight is its softmax value,
    /// times 0.3333 if it does not have the largest remaining logit, unless a uniform draw of the
    /// choice is above 0.75 (Heun's third-order method). Both draws are inputs, `selection_noise`
    /// `[T, K, E]` and `midpoint_draws` `[T, K]`; [`noise_fwd`](crate::reference::noise_fwd)
    /// generates such numbers.
    Sparsemixer {
        /// Half the relative distance to the largest logit up to which experts are near it; a
        /// finite number, at least 0.
        jitter: f32,
        /// Uses the training form, which requires both draws as inputs of every pass.
        #[cfg_attr(feature = "serde", serde(default))]
        training: bool,
    },
}

/// An intermediate result of the router, one value per expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RouterStep {
    /// The logits plus noise, before the multiplier and the soft-cap.
    NoisyLogits,
    /// `z`: the logits after noise, multiplier and soft-cap.
    Logits,
    /// The scores of `z` by [`RouterConfig::scoring`], for a scoring that does not depend on the
    /// selection. They are without bias, mask, normalisation and scale.
    Scores,
}

impl RouterStep {
    /// All steps, in order.
    pub const ALL: [Self; 3] = [Self::NoisyLogits, Self::Logits, Self::Scores];
}

/// The value by which experts are selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Selection {
    /// The score. If the scores order the experts as the logits do (softmax without bias, groups by
    /// their largest score), the logits are compared instead, which avoids ties by rounding.
    Score,
    /// The logit `z`.
    Logit,
    /// None: all `K` ids are given, including those of sinks, by a table of token ids or by an
    /// earlier pass. A selection bias is ignored.
    Given,
}

/// Groups of experts of equal size; the selection is restricted to the best groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Groups {
    /// The number of groups, 1 to 32 and a divisor of the number of experts (without sinks). Expert
    /// `e` is in group `e / (E / num_groups)`.
    pub num_groups: usize,
    /// The number of groups that remain: those of the largest group scores, ties to the lower
    /// group.
    pub top_groups: usize,
    /// The score of a group.
    pub score: GroupScore,
    /// The value of the experts of the other groups.
    pub masked: Masked,
}

/// The score of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum GroupScore {
    /// The largest value of its experts.
    Max,
    /// The sum of the two largest values of its experts.
    TopTwoSum,
}

/// The value of experts outside the best groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Masked {
    /// Minus infinity: they are selected only if no other experts are left.
    NegativeInfinity,
    /// 0: they precede experts of negative value, which a bias can cause.
    Zero,
}

/// The divisor of the weights of the selected experts. Sums are over the selected experts,
/// including sinks.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum Normalization {
    /// No division.
    None,
    /// Their sum plus `epsilon`.
    Sum {
        /// Added to the sum; a finite number, at least 0.
        epsilon: f32,
    },
    /// Their sum, but at least `min`.
    SumAtLeast {
        /// The smallest divisor; a finite number above 0.
        min: f32,
    },
    /// Their p-norm, `(sum of |w|^p)^(1/p)`.
    PNorm {
        /// A finite number, at least 1.
        p: f32,
    },
}

impl Default for RouterConfig {
    /// [`RouterConfig::softmax_top_k`] without renormalisation.
    fn default() -> Self {
        Self::softmax_top_k(false)
    }
}

impl RouterConfig {
    /// The softmax of all logits; its `K` largest values are the weights, divided by their sum if
    /// `renormalize` (Mixtral, Qwen3-MoE), or unchanged (OLMoE).
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

    /// The `K` largest logits are selected; the weights are their softmax (gpt-oss, Granite-MoE).
    pub const fn top_k_softmax() -> Self {
        Self {
            scoring: Scoring::SoftmaxSelected,
            selection: Selection::Logit,
            ..Self::softmax_top_k(false)
        }
    }

    /// The router of DeepSeek-V3, which Kimi-K2 and GLM-4.5 use as well. With the selection bias
    /// `b` and the selected experts `S`:
    ///
    /// ```text
    /// s[e] = sigmoid(l[e])
    /// groups: the top_groups of num_groups groups with the largest sum of their two largest s + b
    /// S:      the K experts of these groups with the largest s + b
    /// w[e] = scale * s[e] / (sum of s over S + 1e-20)    for e in S
    /// ```
    ///
    /// DeepSeek-V3 itself has 8 groups, of which 4 remain, and a scale of 2.5.
    pub const fn deepseek_v3(num_groups: usize, top_groups: usize, scale: f32) -> Self {
        Self {
            scoring: Scoring::Sigmoid,
            selection_bias: true,
            groups: Some(Groups {
                num_groups,
                top_groups,
                score: GroupScore::TopTwoSum,
                masked: Masked::NegativeInfinity,
            }),
            normalization: Normalization::Sum { epsilon: 1e-20 },
            scale,
            ..Self::softmax_top_k(false)
        }
    }

    /// Returns whether experts are selected by `z`: if the configuration says so, or if the scores
    /// are a monotonic function of `z`, whose rounding could only add ties.
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

    /// Returns whether choices are sampled, with draws that the caller provides.
    pub(crate) fn samples(&self) -> bool {
        matches!(self.scoring, Scoring::Sparsemixer { training: true, .. })
    }

    /// The router of the same selection whose weights are the scores, neither normalised nor
    /// scaled.
    pub(crate) fn of_scores(&self) -> Self {
        Self { normalization: Normalization::None, ..self.unscaled() }
    }

    /// The router of the same selection without scales.
    pub(crate) fn unscaled(&self) -> Self {
        Self { scale: 1.0, expert_scale: false, ..*self }
    }

    /// Checks every field, for `num_experts` experts and `top_k` experts per token.
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
                    "a finite number of at least 0",
                )?;
            }
            Normalization::SumAtLeast { min } => {
                at.require_number(
                    "router.normalization.min",
                    min,
                    positive,
                    "a finite number above 0",
                )?;
            }
            Normalization::PNorm { p } => {
                let good = |value: f32| finite(value) && value >= 1.0;
                at.require_number(
                    "router.normalization.p",
                    p,
                    good,
                    "a finite number of at least 1",
                )?;
            }
        }
        if let Scoring::Sparsemixer { jitter, .. } = self.scoring {
            let good = |value: f32| finite(value) && value >= 0.0;
            at.require_number(
                "router.scoring.jitter",
                jitter,
                good,
                "a finite number of at least 0",
            )?;
            let plain = self.selection != Selection::Given
                && !self.selection_bias
                && self.groups.is_none()
                && self.num_sinks == 0
                && self.normalization == Normalization::None;
            let wanted = "a router without bias, groups, sinks, given ids and normalisation";
            at.require("router.scoring", plain, wanted, "sparsemixer with one of them")?;
        }
        let wanted = "scores that do not depend on the selection, for a selection by biased scores";
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
            let wanted = "no groups with given ids";
            at.require("router.groups", self.selection != Selection::Given, wanted, "groups")?;
        }
        Ok(())
    }
}

/// The largest number of groups: each lane of a warp handles one.
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
        let scores_selected =
            self.scoring == Scoring::SoftmaxSelected || self.selection == Selection::Logit;
        if !scores_selected {
            write!(f, "{score}{bias}, ")?;
        } else if self.selection_bias {
            write!(f, "logits{bias}, ")?;
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
        if scores_selected {
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
