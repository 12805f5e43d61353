//! Random layers: configurations with every option, their weights and inputs.

use moe_kernels::{
    Activation, ActivationFunction, CapacityConfig, CapacityLimit, Dtype, ExpertConfig,
    ExpertWeights, GateUpLayout, GateUpTensors, LatentConfig, LatentWeights, Limit, MoeConfig,
    MoeInputs, MoeWeights, Normalization, Owned, Priority, RmsNorm, RouterConfig, RouterProjection,
    RouterWeights, Scoring, Selection, SharedConfig, SharedWeights, Typed, WeightOrder,
    WeightPosition, ZeroExperts, ZeroOutput,
};

use super::case::{Rng, values};
use super::router::router;

impl Rng {
    /// True with probability `1 / n`.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// A uniform number in `low..high`.
    fn between(&mut self, low: f64, high: f64) -> f32 {
        (low + (high - low) * (self.signed() + 1.0) / 2.0) as f32
    }
}

/// A random activation; up has an offset only for gated experts.
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

/// Random experts.
pub fn random_experts(rng: &mut Rng) -> ExpertConfig {
    let gated = !rng.once_in(4);
    let layouts = [GateUpLayout::Concatenated, GateUpLayout::Interleaved, GateUpLayout::Separate];
    let orders = [WeightOrder::OutIn, WeightOrder::InOut];
    ExpertConfig {
        activation: random_activation(rng, gated),
        gated,
        gate_up_bias: rng.once_in(3),
        down_bias: rng.once_in(3),
        output_bias: rng.once_in(5),
        gate_up: if gated { rng.one_of(&layouts) } else { GateUpLayout::Concatenated },
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

/// A random layer of any options, with widths of at most `max_width`.
pub fn random_config(rng: &mut Rng, max_width: usize) -> MoeConfig {
    let (hidden, intermediate) = (1 + rng.below(max_width), 1 + rng.below(max_width));
    let num_experts = 1 + rng.below(12);
    let zero = rng.once_in(5).then(|| ZeroExperts {
        count: 1 + rng.below(3),
        output: rng.one_of(&[ZeroOutput::Identity, ZeroOutput::Zero]),
    });
    let router_experts = num_experts + zero.map_or(0, |zero| zero.count);
    let top_k = 1 + rng.below(router_experts.min(5));
    let mut router = router(rng, router_experts, top_k);
    if zero.is_some() && router.num_sinks > 0 {
        router = RouterConfig { num_sinks: 0, groups: None, ..router };
    }
    let identity = zero.is_some_and(|zero| zero.output == ZeroOutput::Identity);
    let latent = (!identity && rng.once_in(6)).then(|| LatentConfig {
        hidden: 1 + rng.below(max_width),
        norm: rng.once_in(2).then(|| random_norm(rng)),
    });
    let shared = rng.once_in(3).then(|| {
        let gated = !rng.once_in(4);
        SharedConfig {
            intermediate: 1 + rng.below(max_width),
            activation: random_activation(rng, gated),
            gated,
            gate_up_bias: rng.once_in(3),
            down_bias: rng.once_in(3),
            sigmoid_gate: rng.once_in(2),
            average: rng.once_in(3),
        }
    });
    let capacity = (zero.is_none() && rng.once_in(4)).then(|| CapacityConfig {
        limit: rng.one_of(&[
            CapacityLimit::Factor { factor: 0.7 },
            CapacityLimit::Factor { factor: 1.25 },
            CapacityLimit::TokenFraction { fraction: 0.2 },
            CapacityLimit::Rows { rows: 3 },
        ]),
        priority: rng.one_of(&[
            Priority::Token,
            Priority::Choice,
            Priority::Weight,
            Priority::ChoiceByTopWeight,
        ]),
        overflow: rng.below(3),
        normalization: rng.one_of(&[
            Normalization::None,
            Normalization::Sum { epsilon: 0.0 },
            Normalization::SumAtLeast { min: 0.1 },
        ]),
    });
    if capacity.is_some_and(|capacity| capacity.overflow > 0) {
        let alone =
            matches!(router.scoring, Scoring::SoftmaxSelected | Scoring::Sparsemixer { .. });
        router = RouterConfig {
            scoring: if alone { Scoring::Softmax } else { router.scoring },
            selection: rng.one_of(&[Selection::Score, Selection::Logit]),
            normalization: Normalization::None,
            groups: router.groups.filter(|_| router.num_sinks == 0),
            num_sinks: 0,
            ..router
        };
    }
    let config = MoeConfig {
        projection: RouterProjection {
            f32_logits: rng.once_in(2),
            bias: rng.once_in(3),
            norm: rng.once_in(5).then(|| random_norm(rng)),
            noise_gate: rng.once_in(4),
        },
        router,
        zero_experts: zero,
        capacity,
        experts: random_experts(rng),
        latent,
        shared,
        output_norm: rng.once_in(8).then(|| random_norm(rng)),
        ..MoeConfig::new(hidden, intermediate, num_experts, top_k)
    };
    config.check().unwrap_or_else(|error| panic!("{config}: {error}"));
    config
}

/// The number of rows of the table of ids.
const TABLE: usize = 17;

/// Random values of a random seed.
fn draw<D: Dtype>(rng: &mut Rng, len: usize, scale: f64) -> Vec<D> {
    values(len, scale, rng.next())
}

/// Random values in the layer's element type or in f32.
fn typed<D: Dtype>(rng: &mut Rng, f32: bool, len: usize, scale: f64) -> Typed<Owned, D> {
    if f32 { Typed::F32(draw(rng, len, scale)) } else { Typed::Element(draw(rng, len, scale)) }
}

/// Random weights of a layer, small enough that intermediate values stay within the range of f16.
pub fn random_weights<D: Dtype>(config: &MoeConfig, rng: &mut Rng) -> MoeWeights<Owned, D> {
    let MoeConfig { hidden, num_experts, intermediate, experts, .. } = *config;
    let (inner, half) = (config.expert_hidden(), config.down_len());
    let parts = if experts.gated { 2 } else { 1 };
    let gate_up = match experts.gate_up {
        GateUpLayout::Separate => {
            GateUpTensors::Separate { gate: draw(rng, half, 0.2), up: draw(rng, half, 0.2) }
        }
        _ => GateUpTensors::Fused(draw(rng, parts * half, 0.2)),
    };
    let features = parts * num_experts * intermediate;
    MoeWeights {
        router: random_router_weights(config, rng),
        experts: ExpertWeights {
            gate_up,
            gate_up_bias: experts.gate_up_bias.then(|| draw(rng, features, 0.5)),
            down: draw(rng, half, 0.2),
            down_bias: experts.down_bias.then(|| draw(rng, num_experts * inner, 0.5)),
            output_bias: experts.output_bias.then(|| draw(rng, hidden, 0.5)),
            post_norm: experts.post_norm.map(|_| draw(rng, inner, 0.5)),
        },
        latent: config.latent.map(|latent| LatentWeights {
            proj_in: draw(rng, inner * hidden, 0.3),
            norm: latent.norm.map(|_| draw(rng, inner, 0.5)),
            proj_out: draw(rng, hidden * inner, 0.3),
        }),
        shared: config.shared.map(|shared| {
            let parts = if shared.gated { 2 } else { 1 };
            SharedWeights {
                gate_up: draw(rng, parts * shared.intermediate * hidden, 0.2),
                gate_up_bias: shared
                    .gate_up_bias
                    .then(|| draw(rng, parts * shared.intermediate, 0.5)),
                down: draw(rng, hidden * shared.intermediate, 0.2),
                down_bias: shared.down_bias.then(|| draw(rng, hidden, 0.5)),
                sigmoid_gate: shared.sigmoid_gate.then(|| draw(rng, hidden, 0.3)),
            }
        }),
        output_norm: config.output_norm.map(|_| draw(rng, hidden, 0.5)),
    }
}

fn random_router_weights<D: Dtype>(config: &MoeConfig, rng: &mut Rng) -> RouterWeights<Owned, D> {
    let MoeConfig { hidden, top_k, projection, router, .. } = *config;
    let experts = config.router_experts();
    let f32_gate = rng.once_in(3);
    let given = router.selection == Selection::Given;
    let bias = router.selection_bias && !given;
    RouterWeights {
        router_gate: Some(typed(rng, f32_gate, experts * hidden, 3.0 / (hidden as f64).sqrt())),
        bias: projection.bias.then(|| typed(rng, f32_gate, experts, 0.5)),
        norm: projection.norm.map(|_| draw(rng, hidden, 0.5)),
        noise_gate: projection
            .noise_gate
            .then(|| typed(rng, f32_gate, experts * hidden, 2.0 / (hidden as f64).sqrt())),
        selection_bias: bias.then(|| draw(rng, experts - router.num_sinks, 0.5)),
        expert_scale: router.expert_scale.then(|| draw(rng, experts, 1.5)),
        // Some ids are those of no expert.
        table: given.then(|| (0..TABLE * top_k).map(|_| rng.below(experts + 1) as u32).collect()),
    }
}

/// Random inputs of a layer.
pub fn random_inputs<D: Dtype>(
    config: &MoeConfig,
    num_tokens: usize,
    rng: &mut Rng,
) -> MoeInputs<Owned, D> {
    let (tokens, shape) = (num_tokens * config.hidden, config.routing(num_tokens));
    let given = config.router.selection == Selection::Given;
    let by_token = given && rng.once_in(2);
    let (has_logits, has_noise) = (rng.once_in(3), rng.once_in(4));
    // Given logits may have either type, independent of the configuration.
    let f32_logits = if has_logits { rng.once_in(2) } else { config.projection.f32_logits };
    let given_ids = || -> Vec<u32> {
        (0..shape.slots()).map(|slot| (slot % shape.num_experts) as u32).collect()
    };
    let scaled = has_noise && rng.once_in(2);
    let sampled = matches!(config.router.scoring, Scoring::Sparsemixer { training: true, .. });
    MoeInputs {
        x: draw(rng, tokens, 1.0),
        router_x: rng.once_in(5).then(|| draw(rng, tokens, 1.0)),
        logits: has_logits.then(|| typed(rng, f32_logits, shape.logits(), 3.0)),
        given_ids: (given && !by_token).then(given_ids),
        token_ids: by_token.then(|| (0..num_tokens).map(|_| rng.below(TABLE) as u32).collect()),
        noise: has_noise.then(|| draw(rng, shape.logits(), 1.0)),
        noise_logits: scaled.then(|| typed(rng, f32_logits, shape.logits(), 2.0)),
        selection_noise: sampled.then(|| draw(rng, shape.by_slot().logits(), 3.0)),
        midpoint_draws: sampled.then(|| draw(rng, shape.slots(), 1.0)),
        active: rng
            .once_in(5)
            .then(|| (0..num_tokens).map(|_| u8::from(!rng.once_in(4))).collect()),
        sequence_tokens: rng.once_in(2).then(|| 1 + rng.below(num_tokens.max(1))),
    }
}
