//! What a router's options come down to: the few steps that the kernel and the reference both run, and the
//! buffers that these read.

use super::router::{Normalization, RouterConfig, RouterStep, Scoring, Selection};
use crate::error::{Error, Result, check_len};
use crate::shape::RoutingShape;

/// A number of an expert, which it is chosen by or weighed by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Score {
    /// `z` itself.
    Logit,
    /// Its share of a softmax over all experts.
    Softmax,
    /// `1 / (1 + exp(-z))`
    Sigmoid,
    /// `sqrt(ln(1 + exp(z)))`
    SqrtSoftplus,
    /// Its share of a softmax over the chosen experts.
    SoftmaxChosen,
    /// Its share of a softmax over what sparsemixer leaves.
    Sparsemixer {
        /// As in [`Scoring::Sparsemixer`].
        jitter: f32,
    },
}

impl RouterConfig {
    /// What experts are chosen by, before the bias.
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

    /// What weights are made of. The denominator of a softmax over all experts cancels where scores are divided by
    /// their own sum or norm; so does that of a softmax over the chosen, which is never as small.
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

    /// What makes that step's number of `z`, and the router that `z` is of.
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
                    wanted:
                        "scores that do not depend on the choice; the logits are there in any case"
                            .into(),
                    got: format!("{:?}", self.scoring),
                });
            }
        };
        Ok((*self, score))
    }

    /// What these scores are divided by. Those of a softmax over the chosen have the sum 1 already.
    pub(crate) fn divisor(&self) -> Normalization {
        match self.normalization {
            Normalization::Sum { epsilon: 0.0 } if self.score() == Score::SoftmaxChosen => {
                Normalization::None
            }
            other => other,
        }
    }

    /// Whether a bias is read: there is none where nothing is selected.
    pub(crate) fn selects_with_bias(&self) -> bool {
        self.selection_bias && self.selection != Selection::Given
    }

    /// Whether this is a softmax of logits and nothing else; noise is an input.
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

/// The lengths of what a router reads; `None` where there is no buffer.
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
    /// The same for a step's number of every expert: logits, noise and flags are read, and nothing else.
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

    /// Noise is there or not; its own logits are where it is.
    fn check_noise(&self, op: &'static str, shape: &RoutingShape) -> Result<()> {
        let len = |argument, got: Option<usize>| {
            got.map_or(Ok(()), |got| check_len(op, argument, got, shape.logits()))
        };
        len("noise", self.noise)?;
        if self.noise.is_none() && self.noise_logits.is_some() {
            return presence(op, "noise_logits", false);
        }
        len("noise_logits", self.noise_logits)
    }

    /// Holds the shape and the router against their limits, and each buffer against both: it is there if the router
    /// asks for it, and has the length that the shape gives it.
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
        // What is asked for: always, never, or as the caller likes.
        let held = |argument, got: Option<usize>, wanted: usize, asked: Option<bool>| match got {
            None if asked == Some(true) => presence(op, argument, true),
            Some(_) if asked == Some(false) => presence(op, argument, false),
            None => Ok(()),
            Some(got) => check_len(op, argument, got, wanted),
        };
        check_len(op, "logits", self.logits, shape.logits())?;
        let choices = shape.num_experts - router.num_sinks;
        let bias = router.selects_with_bias();
        held("selection_bias", self.selection_bias, choices, Some(bias))?;
        held("expert_scale", self.expert_scale, shape.num_experts, Some(router.expert_scale))?;
        self.check_noise(op, shape)?;
        let samples = Some(router.samples());
        held("selection_noise", self.selection_noise, shape.by_slot().logits(), samples)?;
        held("midpoint_draws", self.midpoint_draws, shape.slots(), samples)?;
        held("token_ids", self.token_ids, tokens, if given { None } else { Some(false) })?;
        // A row for each token, or for each of the ids that tokens have.
        let rows = match (self.given_ids, self.token_ids) {
            (Some(len), Some(_)) => len / shape.top_k,
            _ => tokens,
        };
        held("given_ids", self.given_ids, rows * shape.top_k, Some(given))?;
        held("active", self.active, tokens, None)
    }
}

fn presence(op: &'static str, argument: &'static str, wanted: bool) -> Result<()> {
    let (wanted, got) = if wanted {
        ("a buffer, as this router asks for it", "none")
    } else {
        ("none, as this router does not ask for it", "a buffer")
    };
    Err(Error::Unsupported { op, argument, wanted: wanted.into(), got: got.into() })
}
