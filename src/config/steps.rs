//! What a router's options come down to: the few steps that the kernel and the reference both run, and the
//! buffers that these read.

use super::router::{Normalization, RouterConfig, Scoring, Selection};
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
            Scoring::Sparsemixer { jitter } => Score::Sparsemixer { jitter },
        }
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

    /// Whether this is a softmax of logits and nothing else.
    pub(crate) fn is_plain(&self) -> bool {
        let Self { scoring, selection, normalization, .. } = *self;
        let plain = Self { scoring, selection, normalization, ..Self::softmax_top_k(false) };
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
    pub(crate) given_ids: Option<usize>,
    pub(crate) token_ids: Option<usize>,
    pub(crate) active: Option<usize>,
}

impl RouteLengths {
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
        held("noise", self.noise, shape.logits(), None)?;
        let scaled = if self.noise.is_none() { Some(false) } else { None };
        held("noise_logits", self.noise_logits, shape.logits(), scaled)?;
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
