//! Random routers and their inputs.

use moe_kernels::reference::RouteInputs;
use moe_kernels::{
    Dtype, GroupScore, Groups, Masked, Normalization, RouterConfig, RoutingShape, Scoring,
    Selection,
};

use super::Rng;

/// A value of random bits.
pub fn any_bits<D: Dtype>(rng: &mut Rng) -> D {
    let bits = rng.next().to_le_bytes();
    bytemuck::pod_read_unaligned(&bits[..size_of::<D>()])
}

/// A random router that `num_experts` and `top_k` allow.
pub fn router(rng: &mut Rng, num_experts: usize, top_k: usize) -> RouterConfig {
    let plain = RouterConfig {
        noise_deviation: [1.0, 1.0, 0.25][rng.below(3)],
        logit_multiplier: [1.0, 1.0, 0.125, 3.7][rng.below(4)],
        logit_softcap: [None, None, Some(5.0), Some(0.3)][rng.below(4)],
        scale: [1.0, 1.0, 2.5, -0.5][rng.below(4)],
        expert_scale: rng.below(2) == 0,
        ..RouterConfig::default()
    };
    let scorings = [
        Scoring::Softmax,
        Scoring::SoftmaxSelected,
        Scoring::Sigmoid,
        Scoring::SqrtSoftplus,
        Scoring::Logit,
        Scoring::Sparsemixer {
            jitter: [0.0, 0.01, 0.4][rng.below(3)],
            training: rng.below(2) == 0,
        },
    ];
    let scoring = scorings[rng.below(scorings.len())];
    if matches!(scoring, Scoring::Sparsemixer { .. }) {
        return RouterConfig { scoring, ..plain };
    }
    let normalizations = [
        Normalization::None,
        Normalization::Sum { epsilon: 0.0 },
        Normalization::Sum { epsilon: 1e-20 },
        Normalization::SumAtLeast { min: 0.25 },
        Normalization::PNorm { p: 1.0 },
        Normalization::PNorm { p: 2.0 },
        Normalization::PNorm { p: [1.5, 3.0, 40.0][rng.below(3)] },
    ];
    let num_sinks = if rng.below(3) == 0 { rng.below(top_k) } else { 0 };
    let mut router = RouterConfig {
        scoring,
        selection: [Selection::Score, Selection::Score, Selection::Logit, Selection::Given]
            [rng.below(4)],
        selection_bias: rng.below(2) == 0,
        normalization: normalizations[rng.below(normalizations.len())],
        num_sinks,
        ..plain
    };
    if rng.below(2) == 0 && router.selection != Selection::Given {
        router.groups = Some(groups(rng, num_experts - num_sinks));
    }
    // Scores over the selected experts depend on the selection.
    if scoring == Scoring::SoftmaxSelected && router.selection == Selection::Score {
        router.selection = Selection::Logit;
    }
    router
}

fn groups(rng: &mut Rng, experts: usize) -> Groups {
    let divisors: Vec<usize> = (1..=32).filter(|n| experts.is_multiple_of(*n)).collect();
    let num_groups = divisors[rng.below(divisors.len())];
    Groups {
        num_groups,
        top_groups: 1 + rng.below(num_groups),
        score: [GroupScore::Max, GroupScore::TopTwoSum][rng.below(2)],
        masked: [Masked::NegativeInfinity, Masked::Zero][rng.below(2)],
    }
}

/// A router with its required inputs, and randomly with optional ones.
#[derive(Debug, Clone)]
pub struct RouterCase<D> {
    pub shape: RoutingShape,
    pub router: RouterConfig,
    pub logits: Vec<D>,
    pub selection_bias: Option<Vec<f32>>,
    pub expert_scale: Option<Vec<f32>>,
    pub noise: Option<Vec<f32>>,
    pub noise_logits: Option<Vec<D>>,
    pub selection_noise: Option<Vec<f32>>,
    pub midpoint_draws: Option<Vec<f32>>,
    pub given_ids: Option<Vec<u32>>,
    pub token_ids: Option<Vec<u32>>,
    pub active: Option<Vec<u8>>,
}

impl<D: Dtype> RouterCase<D> {
    /// A case with logits only.
    pub fn bare(shape: RoutingShape, router: RouterConfig, logits: Vec<D>) -> Self {
        Self {
            shape,
            router,
            logits,
            selection_bias: None,
            expert_scale: None,
            noise: None,
            noise_logits: None,
            selection_noise: None,
            midpoint_draws: None,
            given_ids: None,
            token_ids: None,
            active: None,
        }
    }

    /// Random inputs: values in `-1..1`, or with probability 1/4 values of random bits.
    pub fn random(
        rng: &mut Rng,
        shape: RoutingShape,
        router: RouterConfig,
        logits: Vec<D>,
    ) -> Self {
        let RoutingShape { num_tokens, num_experts, top_k } = shape;
        let mut case = Self::bare(shape, router, logits);
        let wild = rng.below(4) == 0;
        let floats = |len: usize, rng: &mut Rng| -> Vec<f32> {
            (0..len).map(|_| if wild { any_bits(rng) } else { rng.signed() as f32 }).collect()
        };
        let given = router.selection == Selection::Given;
        if router.selection_bias && !given {
            case.selection_bias = Some(floats(num_experts - router.num_sinks, rng));
        }
        if router.expert_scale {
            case.expert_scale = Some(floats(num_experts, rng));
        }
        if rng.below(3) == 0 {
            case.noise = Some(floats(shape.logits(), rng));
            let logits = floats(shape.logits(), rng);
            let logits = logits.into_iter().map(|logit| D::from_f32(4.0 * logit)).collect();
            case.noise_logits = (rng.below(2) == 0).then_some(logits);
        }
        if matches!(router.scoring, Scoring::Sparsemixer { training: true, .. }) {
            case.selection_noise = Some(floats(shape.slots() * num_experts, rng));
            case.midpoint_draws = Some(floats(shape.slots(), rng));
        }
        if given {
            let by_token = rng.below(2) == 0;
            let rows = if by_token { rng.below(7) } else { num_tokens };
            // Some ids are those of no expert, and some tokens have no row.
            let far = if rng.below(3) == 0 { u32::MAX as usize } else { num_experts + 1 };
            case.given_ids = Some((0..rows * top_k).map(|_| rng.below(far) as u32).collect());
            case.token_ids =
                by_token.then(|| (0..num_tokens).map(|_| rng.below(rows + 1) as u32).collect());
        }
        if rng.below(4) == 0 {
            case.active = Some((0..num_tokens).map(|_| rng.below(3) as u8).collect());
        }
        case
    }

    /// The inputs of the reference.
    pub fn inputs(&self) -> RouteInputs<'_, D> {
        RouteInputs {
            logits: &self.logits,
            selection_bias: self.selection_bias.as_deref(),
            expert_scale: self.expert_scale.as_deref(),
            noise: self.noise.as_deref(),
            noise_logits: self.noise_logits.as_deref(),
            selection_noise: self.selection_noise.as_deref(),
            midpoint_draws: self.midpoint_draws.as_deref(),
            given_ids: self.given_ids.as_deref(),
            token_ids: self.token_ids.as_deref(),
            active: self.active.as_deref(),
        }
    }
}
