//! The steps of a router that the kernel and the reference share, derived from its options, and the
//! checks of the buffers that they read.

use super::router::{Normalization, RouterConfig, RouterStep, Scoring, Selection};
use crate::error::{Error, Result, check_len, check_presence};
use crate::shape::RoutingShape;

/// The function from logits to the values of a selection, or to weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Score {
    /// `z` itself.
    Logit,
    /// The softmax over all experts.
    Softmax,
    /// `1 / (1 + exp(-z))`
    Sigmoid,
    /// `sqrt(ln(1 + exp(z)))`
    SqrtSoftplus,
    /// The softmax over the selected experts.
    SoftmaxChosen,
    /// The softmax over the near experts of sparsemixer.
    Sparsemixer {
        /// As in [`Scoring::Sparsemixer`].
        jitter: f32,
    },
}

impl RouterConfig {
    /// The value by which experts are selected, before the bias.
    pub(crate) fn value(&self) -> Score {
        if self.selection == Selection::Given || self.selects_by_logit() {
            return Score::Logit;
        }
        match self.scoring {
            Scoring::Softmax | Scoring::SoftmaxSelected => Score::Softmax,
            Scoring::Sigmoid => Score::Sigmoid,
            Scoring::SqrtSoftplus => Score::SqrtSoftplus,
            Scoring::Logit | Scoring::Sparsemixer { .. } => Score::Logit,
        }
    }

    /// The score that weights are computed from. If scores are divided by their own sum or norm,
    /// the denominator of the softmax cancels; a softmax over the selected experts then gives the
    /// same weights, with larger values.
    pub(crate) fn score(&self) -> Score {
        let cancels = match self.normalization {
            Normalization::Sum { epsilon } => epsilon == 0.0,
            Normalization::PNorm { .. } => true,
            Normalization::None | Normalization::SumAtLeast { .. } => false,
        };
        match self.scoring {
            Scoring::Softmax if !cancels => Score::Softmax,
            Scoring::Softmax | Scoring::SoftmaxSelected => Score::SoftmaxChosen,
            Scoring::Sigmoid => Score::Sigmoid,
            Scoring::SqrtSoftplus => Score::SqrtSoftplus,
            Scoring::Logit => Score::Logit,
            Scoring::Sparsemixer { jitter, .. } => Score::Sparsemixer { jitter },
        }
    }

    /// The score that a step computes from `z`, and the router that computes `z`.
    pub(crate) fn score_of_step(
        &self,
        op: &'static str,
        step: RouterStep,
    ) -> Result<(Self, Score)> {
        let score = match (step, self.scoring) {
            (RouterStep::NoisyLogits, _) => {
                let plain = Self { logit_multiplier: 1.0, logit_softcap: None, ..*self };
                return Ok((plain, Score::Logit));
            }
            (RouterStep::Logits, _) | (RouterStep::Scores, Scoring::Logit) => Score::Logit,
            (RouterStep::Scores, Scoring::Softmax) => Score::Softmax,
            (RouterStep::Scores, Scoring::Sigmoid) => Score::Sigmoid,
            (RouterStep::Scores, Scoring::SqrtSoftplus) => Score::SqrtSoftplus,
            (RouterStep::Scores, Scoring::SoftmaxSelected | Scoring::Sparsemixer { .. }) => {
                return Err(Error::Unsupported {
                    op,
                    argument: "router.scoring",
                    wanted: "scores that do not depend on the selection; use the logits".into(),
                    got: format!("{:?}", self.scoring),
                });
            }
        };
        Ok((*self, score))
    }

    /// The divisor of the scores. The sum of a softmax over the selected experts is 1 already.
    pub(crate) fn divisor(&self) -> Normalization {
        match self.normalization {
            Normalization::Sum { epsilon: 0.0 } if self.score() == Score::SoftmaxChosen => {
                Normalization::None
            }
            other => other,
        }
    }

    /// Returns whether the selection bias is read; it is not with given ids.
    pub(crate) fn selects_with_bias(&self) -> bool {
        self.selection_bias && self.selection != Selection::Given
    }

    /// Returns whether the router is a softmax with top-k and has no other option; noise is
    /// allowed.
    pub(crate) fn is_plain(&self) -> bool {
        let Self { scoring, selection, normalization, noise_deviation, .. } = *self;
        let plain = Self::softmax_top_k(false);
        let plain = Self { scoring, selection, normalization, noise_deviation, ..plain };
        *self == plain
            && selection != Selection::Given
            && self.value() == Score::Logit
            && matches!(self.score(), Score::Softmax | Score::SoftmaxChosen)
            && self.divisor() == Normalization::None
    }
}

/// The lengths of a router's inputs; `None` for an input that is not given.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RouteLengths {
    pub(crate) logits: usize,
    pub(crate) selection_bias: Option<usize>,
    pub(crate) expert_scale: Option<usize>,
    pub(crate) noise: Option<usize>,
    pub(crate) noise_logits: Option<usize>,
    pub(crate) selection_noise: Option<usize>,
    pub(crate) midpoint_draws: Option<usize>,
    pub(crate) given_ids: Option<usize>,
    pub(crate) token_ids: Option<usize>,
    pub(crate) active: Option<usize>,
}

impl RouteLengths {
    /// Checks the inputs of a step, which reads logits, noise and flags only.
    pub(crate) fn check_step(
        &self,
        op: &'static str,
        shape: &RoutingShape,
        router: &RouterConfig,
    ) -> Result<()> {
        shape.check(op)?;
        router.check(op, shape.num_experts, shape.top_k)?;
        check_len(op, "logits", self.logits, shape.logits())?;
        self.check_noise(op, shape)?;
        self.active.map_or(Ok(()), |active| check_len(op, "active", active, shape.num_tokens))
    }

    /// Checks the optional noise; noise logits require noise.
    fn check_noise(&self, op: &'static str, shape: &RoutingShape) -> Result<()> {
        let len = |argument, got: Option<usize>| {
            got.map_or(Ok(()), |got| check_len(op, argument, got, shape.logits()))
        };
        len("noise", self.noise)?;
        if self.noise.is_none() && self.noise_logits.is_some() {
            let why = "`noise_logits` is given without `noise`".into();
            return Err(Error::Mismatch { op, why });
        }
        len("noise_logits", self.noise_logits)
    }

    /// Checks the shape and the router, and each input against both: an input is given exactly if
    /// the router reads it, and has the length that the shape requires.
    pub(crate) fn check(
        &self,
        op: &'static str,
        shape: &RoutingShape,
        router: &RouterConfig,
    ) -> Result<()> {
        shape.check(op)?;
        router.check(op, shape.num_experts, shape.top_k)?;
        let tokens = shape.num_tokens;
        let given = router.selection == Selection::Given;
        let optional = |argument, got: Option<usize>, wanted: usize| {
            got.map_or(Ok(()), |got| check_len(op, argument, got, wanted))
        };
        let required = |argument, got: Option<usize>, wanted: usize, enabled: bool| {
            check_presence(op, argument, got.is_some(), enabled)?;
            optional(argument, got, wanted)
        };
        check_len(op, "logits", self.logits, shape.logits())?;
        let choices = shape.num_experts - router.num_sinks;
        let bias = router.selects_with_bias();
        required("selection_bias", self.selection_bias, choices, bias)?;
        required("expert_scale", self.expert_scale, shape.num_experts, router.expert_scale)?;
        self.check_noise(op, shape)?;
        let samples = router.samples();
        required("selection_noise", self.selection_noise, shape.by_slot().logits(), samples)?;
        required("midpoint_draws", self.midpoint_draws, shape.slots(), samples)?;
        if !given {
            check_presence(op, "token_ids", self.token_ids.is_some(), false)?;
        }
        optional("token_ids", self.token_ids, tokens)?;
        // One row of ids per token, or any number of rows that token ids select.
        let rows = match (self.given_ids, self.token_ids) {
            (Some(len), Some(_)) => len / shape.top_k,
            _ => tokens,
        };
        required("given_ids", self.given_ids, rows * shape.top_k, given)?;
        optional("active", self.active, tokens)
    }
}
