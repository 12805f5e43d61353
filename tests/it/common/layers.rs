//! Whole layers at random: configurations with every option, their weights and inputs.

use moe_kernels::{
    Activation, ActivationFunction, CapacityConfig, CapacityLimit, Dtype, ExpertConfig, ExpertWeights, GateUp,
    GateUpWeights, GroupScore, Groups, Inputs, LatentConfig, LatentWeights, Limit, Masked, MoeConfig, Normalization,
    Owned, Priority, ProjectionConfig, RmsNorm, RouterConfig, RouterWeights, Scoring, Selection, SharedConfig,
    SharedWeights, Typed, WeightOrder, WeightPosition, Weights, ZeroExperts, ZeroOutput,
};

use super::case::{Rng, values};

impl Rng {
    /// True once in `n` times.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// A number between the two.
    fn between(&mut self, low: f64, high: f64) -> f32 {
        (low + (high - low) * (self.signed() + 1.0) / 2.0) as f32
    }
}

/// Any router for `num_experts` experts of which a token has `top_k`.
pub fn random_router(rng: &mut Rng, num_experts: usize, top_k: usize) -> RouterConfig {
    let jitter = rng.between(0.0, 0.5);
    let scoring = rng.one_of(&[
        Scoring::Softmax,
        Scoring::SoftmaxSelected,
        Scoring::Sigmoid,
        Scoring::SqrtSoftplus,
        Scoring::Logit,
        Scoring::Sparsemixer { jitter },
    ]);
    let scale = if rng.once_in(2) { 1.0 } else { rng.between(0.5, 3.0) };
    let logit_multiplier = if rng.once_in(2) { 1.0 } else { rng.between(0.2, 2.0) };
    let logit_softcap = rng.once_in(4).then(|| rng.between(1.0, 8.0));
    let expert_scale = rng.once_in(4);
    let plain = RouterConfig {
        logit_multiplier,
        logit_softcap,
        scoring,
        scale,
        expert_scale,
        ..RouterConfig::default()
    };
    if matches!(scoring, Scoring::Sparsemixer { .. }) {
        return plain;
    }
    let num_sinks = if top_k > 1 && rng.once_in(6) { 1 + rng.below(top_k - 1) } else { 0 };
    let selection = match scoring {
        Scoring::SoftmaxSelected => Selection::Logit,
        _ => rng.one_of(&[Selection::Score, Selection::Score, Selection::Logit, Selection::Given]),
    };
    let chosen = num_experts - num_sinks;
    let divisors: Vec<usize> = (1..=chosen.min(32)).filter(|d| chosen.is_multiple_of(*d)).collect();
    let groups = (selection != Selection::Given && rng.once_in(3)).then(|| {
        let num_groups = rng.one_of(&divisors);
        Groups {
            num_groups,
            top_groups: 1 + rng.below(num_groups),
            score: rng.one_of(&[GroupScore::Max, GroupScore::TopTwoSum]),
            masked: rng.one_of(&[Masked::NegativeInfinity, Masked::Zero]),
        }
    });
    let p = rng.between(1.0, 4.0);
    let normalization = rng.one_of(&[
        Normalization::None,
        Normalization::Sum { epsilon: 0.0 },
        Normalization::Sum { epsilon: 1e-6 },
        Normalization::SumAtLeast { min: 1e-3 },
        Normalization::PNorm { p: 2.0 },
        Normalization::PNorm { p },
    ]);
    let selection_bias = selection != Selection::Given && rng.once_in(2);
    RouterConfig { selection, selection_bias, groups, normalization, num_sinks, ..plain }
}

/// Any activation; up has an offset only beside a gate.
pub fn random_activation(rng: &mut Rng, gated: bool) -> Activation {
    let function = rng.one_of(&[
        ActivationFunction::Silu,
        ActivationFunction::Gelu,
        ActivationFunction::GeluTanh,
        ActivationFunction::Relu,
        ActivationFunction::ReluSquared,
    ]);
    let silu = function == ActivationFunction::Silu;
    let (limit, other) = (rng.between(0.2, 3.0), rng.between(0.2, 3.0));
    let limit = match rng.below(if silu { 6 } else { 5 }) {
        0 => Limit::Before { limit },
        1 => Limit::After { limit },
        5 => Limit::SoftCap { gate: limit, up: other },
        _ => Limit::None,
    };
    Activation {
        function,
        alpha: if silu && rng.once_in(3) { 1.702 } else { 1.0 },
        limit,
        up_offset: if gated && rng.once_in(3) { 1.0 } else { 0.0 },
    }
}

/// Any experts.
pub fn random_experts(rng: &mut Rng) -> ExpertConfig {
    let gated = !rng.once_in(4);
    let layouts = [GateUp::Concatenated, GateUp::Interleaved, GateUp::Separate];
    let orders = [WeightOrder::OutIn, WeightOrder::InOut];
    ExpertConfig {
        activation: random_activation(rng, gated),
        gated,
        gate_up_bias: rng.once_in(3),
        down_bias: rng.once_in(3),
        output_bias: rng.once_in(5),
        gate_up: if gated { rng.one_of(&layouts) } else { GateUp::Concatenated },
        gate_up_order: rng.one_of(&orders),
        down_order: rng.one_of(&orders),
        weight_position: rng.one_of(&[
            WeightPosition::Output,
            WeightPosition::Output,
            WeightPosition::Input,
            WeightPosition::Inside,
        ]),
        post_norm: rng.once_in(5).then(|| random_norm(rng)),
    }
}

fn random_norm(rng: &mut Rng) -> RmsNorm {
    RmsNorm {
        epsilon: rng.one_of(&[1e-6, 1e-5]),
        offset: rng.one_of(&[0.0, 1.0]),
        scale_first: rng.once_in(2),
    }
}

/// Any layer that there can be, of at most `most` experts and widths.
pub fn random_config(rng: &mut Rng, most: usize) -> MoeConfig {
    let (hidden, intermediate) = (1 + rng.below(most), 1 + rng.below(most));
    let num_experts = 1 + rng.below(12);
    let zero = rng.once_in(5).then(|| ZeroExperts {
        count: 1 + rng.below(3),
        output: rng.one_of(&[ZeroOutput::Identity, ZeroOutput::Zero]),
    });
    let router_experts = num_experts + zero.map_or(0, |zero| zero.count);
    let top_k = 1 + rng.below(router_experts.min(5));
    let mut router = random_router(rng, router_experts, top_k);
    if zero.is_some() && router.num_sinks > 0 {
        router = RouterConfig { num_sinks: 0, groups: None, ..router };
    }
    let identity = zero.is_some_and(|zero| zero.output == ZeroOutput::Identity);
    let latent = (!identity && rng.once_in(6)).then(|| LatentConfig {
        hidden: 1 + rng.below(most),
        norm: rng.once_in(2).then(|| random_norm(rng)),
    });
    let shared = rng.once_in(3).then(|| {
        let gated = !rng.once_in(4);
        SharedConfig {
            intermediate: 1 + rng.below(most),
            activation: random_activation(rng, gated),
            gated,
            sigmoid_gate: rng.once_in(2),
            average: rng.once_in(3),
        }
    });
    let capacity = rng.once_in(6).then(|| CapacityConfig {
        limit: rng.one_of(&[
            CapacityLimit::Factor { factor: 0.7 },
            CapacityLimit::Factor { factor: 1.25 },
            CapacityLimit::Rows { rows: 3 },
        ]),
        priority: rng.one_of(&[
            Priority::Token,
            Priority::Choice,
            Priority::Weight,
            Priority::ChoiceByTopWeight,
        ]),
        overflow: 0,
    });
    let config = MoeConfig {
        projection: ProjectionConfig {
            f32_logits: rng.once_in(2),
            bias: rng.once_in(3),
            norm: rng.once_in(5).then(|| random_norm(rng)),
        },
        router,
        zero_experts: zero,
        capacity,
        experts: random_experts(rng),
        latent,
        shared,
        ..MoeConfig::new(hidden, intermediate, num_experts, top_k)
    };
    config.check().unwrap_or_else(|error| panic!("{config}: {error}"));
    config
}

/// Rows of the table of ids, where there is one.
const TABLE: usize = 17;

/// Weights of such a layer, small enough that 16 bits hold what lies between.
pub fn random_weights<D: Dtype>(config: &MoeConfig, rng: &mut Rng) -> Weights<Owned, D> {
    let (hidden, inner) = (config.hidden, config.expert_hidden());
    let router_experts = config.router_experts();
    let (experts, router) = (config.experts, config.router);
    let mut draw = |len: usize, scale: f64| values::<D>(len, scale, rng.next());
    let half = config.down_len();
    let parts = if experts.gated { 2 } else { 1 };
    let gate_scale = 3.0 / (hidden as f64).sqrt();
    let gate = draw(router_experts * hidden, gate_scale);
    let expert_weights = ExpertWeights {
        gate_up: match experts.gate_up {
            GateUp::Separate => GateUpWeights::Separate { gate: draw(half, 0.2), up: draw(half, 0.2) },
            _ => GateUpWeights::Fused(draw(parts * half, 0.2)),
        },
        gate_up_bias: experts
            .gate_up_bias
            .then(|| draw(parts * config.num_experts * config.intermediate, 0.5)),
        down: draw(half, 0.2),
        down_bias: experts.down_bias.then(|| draw(config.num_experts * inner, 0.5)),
        output_bias: experts.output_bias.then(|| draw(inner, 0.5)),
        post_norm: experts.post_norm.map(|_| draw(inner, 0.5)),
    };
    let latent = config.latent.map(|latent| LatentWeights {
        before: draw(inner * hidden, 0.3),
        norm: latent.norm.map(|_| draw(inner, 0.5)),
        after: draw(hidden * inner, 0.3),
    });
    let shared = config.shared.map(|shared| SharedWeights {
        gate_up: draw(if shared.gated { 2 } else { 1 } * shared.intermediate * hidden, 0.2),
        down: draw(hidden * shared.intermediate, 0.2),
        sigmoid_gate: shared.sigmoid_gate.then(|| draw(hidden, 0.3)),
    });
    let norm = config.projection.norm.map(|_| draw(hidden, 0.5));
    let mut floats = |len: usize, scale: f64| values::<f32>(len, scale, rng.next());
    let gate = match config.projection.f32_logits && rng_bit(&mut floats) {
        true => Typed::F32(floats(router_experts * hidden, gate_scale)),
        false => Typed::Element(gate),
    };
    let router_weights = RouterWeights {
        gate: Some(gate),
        bias: config.projection.bias.then(|| floats(router_experts, 0.5)),
        norm,
        selection_bias: router
            .selection_bias
            .then(|| floats(router_experts - router.num_sinks, 0.5)),
        expert_scale: router.expert_scale.then(|| floats(router_experts, 1.5)),
        table: (router.selection == Selection::Given).then(|| {
            let mut rng = Rng::new(hidden as u64 ^ 0x7ab1e);
            (0..TABLE * config.top_k).map(|_| rng.below(router_experts) as u32).collect()
        }),
    };
    Weights { router: router_weights, experts: expert_weights, latent, shared }
}

fn rng_bit(floats: &mut impl FnMut(usize, f64) -> Vec<f32>) -> bool {
    floats(1, 1.0)[0] > 0.0
}

/// Inputs of such a layer.
pub fn random_inputs<D: Dtype>(
    config: &MoeConfig,
    num_tokens: usize,
    rng: &mut Rng,
) -> Inputs<Owned, D> {
    let tokens = num_tokens * config.hidden;
    let router_experts = config.router_experts();
    let x = values(tokens, 1.0, rng.next());
    let router_x = rng.once_in(5).then(|| values(tokens, 1.0, rng.next()));
    let logits = rng.once_in(3).then(|| {
        if config.projection.f32_logits {
            Typed::F32(values(num_tokens * router_experts, 3.0, rng.next()))
        } else {
            Typed::Element(values(num_tokens * router_experts, 3.0, rng.next()))
        }
    });
    let given = config.router.selection == Selection::Given;
    let token_ids = given.then(|| (0..num_tokens).map(|_| rng.below(TABLE) as u32).collect());
    let noise = rng.once_in(5).then(|| values(num_tokens * router_experts, 1.0, rng.next()));
    let active =
        rng.once_in(5).then(|| (0..num_tokens).map(|_| u8::from(!rng.once_in(4))).collect());
    let divides = num_tokens > 0 && num_tokens.is_multiple_of(2);
    let sequence_len = (divides && rng.once_in(2)).then_some(num_tokens / 2);
    Inputs { x, router_x, logits, token_ids, noise, active, sequence_len }
}
