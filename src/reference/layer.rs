//! The layer: its operations in order, without rounding between them.

use std::marker::PhantomData;

use super::accum::Accum;
use super::capacity::{
    Capacity, capacity_fwd, capacity_later_fwd, capacity_normalize_fwd, capacity_reassign_fwd,
};
use super::combine::{CombineInputs, Identity, Shared, combine_fwd};
use super::expert_weights::{GateUpWeights, LinearWeights};
use super::grouped_gemm::{grouped_gemm_fwd, grouped_gemm_gate_up_fwd, grouped_gemm_weighted_fwd};
use super::plan::{Plan, plan_fwd, plan_range_fwd};
use super::rms_norm::{RmsNormInputs, rms_norm_fwd};
use super::route::route_fwd;
use super::router_gemm::{RouterGemmInputs, router_gemm_fwd};
use crate::config::{
    ExpertConfig, MoeConfig, Normalization, Priority, RmsNorm, RouterConfig, WeightPosition,
    ZeroOutput,
};
use crate::dtype::Dtype;
use crate::error::{Result, check_len};
use crate::shape::RoutingShape;
use crate::tensors::{ExpertWeights, Host, MoeInputs, MoeWeights, shape_of};

mod router;

pub(super) use router::RouterLogits;
pub use router::{noise_logits, router_logits, router_scores};

const OP: &str = "moe_layer_fwd";

/// Computes a whole layer: tokens `x` `[T, H]` to `y` `[T, H]`. `T` follows from the length of `x`.
///
/// Logits are rounded to their type in the configuration, since the router reads them so. No other
/// intermediate value is rounded; all are computed in `A`.
///
/// # Errors
/// A configuration out of range, or a tensor that contradicts the configuration.
pub fn moe_layer_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Vec<A>> {
    let routing = moe_layer_route_fwd::<A, D>(config, inputs, weights)?;
    moe_layer_experts_fwd(config, inputs.x, &routing.expert_ids, &routing.weights, weights)
}

/// The routing of a layer after capacity, for `S` sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRouting<A> {
    /// `[T, K]`, the experts of each token, largest value first; `u32::MAX` for a dropped slot and
    /// for slots of inactive tokens.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`, the routing weights of the slots.
    pub weights: Vec<A>,
    /// `[S, E]`, the number of slots of each sequence that each expert keeps; empty without
    /// capacity.
    pub kept: Vec<u32>,
    /// `[S, E]`, the number of requests beyond the limit of each expert; without overflow these are
    /// the dropped slots. Empty without capacity.
    pub dropped: Vec<u32>,
}

/// Computes the routing of a layer, including capacity. With overflow, weights are computed in f32,
/// since they determine the kept slots.
///
/// # Errors
/// Those of [`moe_layer_fwd`].
pub fn moe_layer_route_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<LayerRouting<A>> {
    let router_logits = RouterLogits::new::<A, D>(config, inputs, weights)?;
    let shape = config.routing(inputs.x.len() / config.hidden);
    let router = config.router_before_capacity();
    let routing =
        route_fwd::<A, f32>(&shape, &router, &router_logits.inputs(&router, inputs, weights))?;
    let Some(capacity) = &config.capacity else {
        let (kept, dropped) = (Vec::new(), Vec::new());
        let (expert_ids, weights) = (routing.expert_ids, routing.routing_weights);
        return Ok(LayerRouting { expert_ids, weights, kept, dropped });
    };
    // Priorities are computed in f32, as on every device.
    let in_f32 = |router: &RouterConfig, shape: &RoutingShape| {
        route_fwd::<f32, f32>(shape, router, &router_logits.inputs(router, inputs, weights))
    };
    let mut f32_weights = in_f32(&router, &shape)?.routing_weights;
    let top_scores = match capacity.priority {
        Priority::ChoiceByTopWeight => {
            Some(in_f32(&config.router.of_scores(), &shape)?.routing_weights)
        }
        _ => None,
    };
    let tokens = inputs.sequence_tokens;
    let select = |ids: &[u32], weights: &[f32], earlier: Option<Capacity>| -> Result<Capacity> {
        let plan = plan_fwd(&shape.by_slot(), ids)?;
        let priorities = top_scores.as_deref().unwrap_or(weights);
        let Some(mut selected) = earlier else {
            return capacity_fwd(&plan, &shape, capacity, tokens, priorities);
        };
        capacity_later_fwd(&plan, &shape, capacity, tokens, priorities, &mut selected)?;
        Ok(selected)
    };
    let chosen = &routing.expert_ids;
    let mut selected = select(chosen, &f32_weights, None)?;
    let num_candidates = config.candidates();
    let slot_weights: Vec<A> = if num_candidates == 0 {
        routing.routing_weights
    } else {
        let candidates = in_f32(&router, &RoutingShape { top_k: num_candidates, ..shape })?;
        let mut next_candidate = vec![0; shape.num_tokens];
        // Each candidate is requested at most once.
        for round in 0..capacity.overflow.min(num_candidates) {
            let requests = capacity_reassign_fwd(
                &shape,
                num_candidates,
                round == 0,
                chosen,
                &selected.expert_ids,
                &candidates.expert_ids,
                &candidates.routing_weights,
                &mut next_candidate,
                &mut f32_weights,
            )?;
            selected = select(&requests, &f32_weights, Some(selected))?;
        }
        // The weight of a reassigned slot is the f32 weight by which it was kept.
        f32_weights.iter().map(|weight| A::from_dtype(*weight)).collect()
    };
    let Capacity { expert_ids, kept, dropped } = selected;
    let weights = match capacity.normalization {
        Normalization::None => slot_weights,
        normalization => {
            let (scale, expert_scale) = (config.router.scale, weights.router.expert_scale);
            capacity_normalize_fwd(
                &shape,
                normalization,
                scale,
                expert_scale,
                &expert_ids,
                &slot_weights,
            )?
        }
    };
    Ok(LayerRouting { expert_ids, weights, kept, dropped })
}

/// Computes the layer for a given routing: `expert_ids` and `routing_weights` `[T, K]`. Slots whose
/// id is not that of an expert are ignored.
///
/// # Errors
/// Those of [`moe_layer_fwd`].
pub fn moe_layer_experts_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    x: &[D],
    expert_ids: &[u32],
    routing_weights: &[A],
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Vec<A>> {
    experts_of_layer(
        &Numbers(PhantomData),
        config,
        x,
        expert_ids,
        &routing_weights.to_vec(),
        weights,
    )
}

/// The operations of a layer on tensors of numbers, or of numbers with error bounds.
pub(super) trait Operations<D: Dtype> {
    /// The result of an operation.
    type Values;

    /// Converts a tensor of the caller, without error.
    fn exact(&self, x: &[D]) -> Self::Values;

    /// A grouped product, `x` `[R, in]` to `[R, out]`.
    fn linear(
        &self,
        plan: &Plan,
        out_features: usize,
        in_features: usize,
        x: &Self::Values,
        weights: LinearWeights<'_, D>,
    ) -> Result<Self::Values>;

    /// A grouped product of which each row is multiplied by its routing weight `[T, K]`; the widths
    /// are `out` and `in`.
    fn weighted_linear(
        &self,
        plan: &Plan,
        widths: [usize; 2],
        x: &Self::Values,
        weights: LinearWeights<'_, D>,
        routing_weights: &Self::Values,
    ) -> Result<Self::Values>;

    /// The gate and up products with the activation, tokens `[T, H]` to `[R, I]`; the widths are
    /// `I` and `H`.
    fn gate_up(
        &self,
        plan: &Plan,
        experts: &ExpertConfig,
        widths: [usize; 2],
        x: &Self::Values,
        gate_up: GateUpWeights<'_, D>,
        weights: Option<&Self::Values>,
    ) -> Result<Self::Values>;

    /// The RMS norm of each row of `x` `[R, H]`.
    fn norm(
        &self,
        norm: &RmsNorm,
        hidden: usize,
        x: &Self::Values,
        weight: Option<&[D]>,
        plan: Option<&Plan>,
    ) -> Result<Self::Values>;

    /// The logits `[T]` of the shared expert's sigmoid gate: tokens `[T, H]` times a vector `[H]`.
    fn gate(&self, hidden: usize, x: &Self::Values, gate: &[D]) -> Result<Self::Values>;

    /// The sum of the weighted rows of each token, `[T, H]`.
    fn combine(
        &self,
        shape: &RoutingShape,
        plan: &Plan,
        hidden: usize,
        parts: &Parts<'_, Self::Values, D>,
    ) -> Result<Self::Values>;
}

/// The terms that `combine` adds.
pub(super) struct Parts<'a, V, D> {
    pub(super) yp: &'a V,
    pub(super) weights: Option<&'a V>,
    pub(super) identity: Option<Identity<'a, D>>,
    /// The weights of identity experts, if those of the rows have been applied before.
    pub(super) identity_weights: Option<&'a V>,
    pub(super) output_bias: Option<&'a [D]>,
    pub(super) shared: Option<&'a SharedPart<V>>,
}

/// The output of the shared expert.
pub(super) struct SharedPart<V> {
    pub(super) y: V,
    pub(super) gate: Option<V>,
    pub(super) average: bool,
}

/// Computes the layer for a given routing.
pub(super) fn experts_of_layer<D: Dtype, O: Operations<D>>(
    by: &O,
    config: &MoeConfig,
    x: &[D],
    expert_ids: &[u32],
    routing_weights: &O::Values,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<O::Values> {
    weights.check(OP, config)?;
    let shape = shape_of(OP, config, x.len())?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    // The products of this module do not use the tiles of a plan.
    let plan = plan_range_fwd(&shape, 0..config.num_experts, expert_ids)?;
    let dense = Plan::dense(shape.num_tokens);
    let tokens = by.exact(x);
    let shared = shared(by, config, &dense, &tokens, weights)?;
    let identity = config.zero_experts.filter(|zero| zero.output == ZeroOutput::Identity);
    let identity = identity.map(|zero| Identity {
        experts: config.num_experts as u32..(config.num_experts + zero.count) as u32,
        expert_ids,
        x,
        routing_weights: None,
    });
    let output = config.experts.weight_position == WeightPosition::Output;
    let rows_weighted = config.experts.weighs_rows(D::DTYPE);
    let mut routed = Parts {
        yp: &tokens,
        weights: (output && !rows_weighted).then_some(routing_weights),
        identity_weights: (rows_weighted && identity.is_some()).then_some(routing_weights),
        identity,
        output_bias: weights.experts.output_bias,
        shared: shared.as_ref(),
    };
    let y = match (&config.latent, &weights.latent) {
        (Some(latent), Some(projections)) => {
            let (hidden, inner) = (config.hidden, latent.hidden);
            let proj_in = LinearWeights::new(projections.proj_in);
            let mut latent_x = by.linear(&dense, inner, hidden, &tokens, proj_in)?;
            if let Some(norm) = &latent.norm {
                latent_x = by.norm(norm, inner, &latent_x, projections.norm, None)?;
            }
            let experts = &weights.experts;
            let yp = routed_experts(by, config, &plan, &latent_x, routing_weights, experts)?;
            let parts = Parts { yp: &yp, output_bias: None, shared: None, ..routed };
            let latent_y = by.combine(&shape, &plan, inner, &parts)?;
            let bias = weights.experts.output_bias;
            let proj_out = LinearWeights { bias, ..LinearWeights::new(projections.proj_out) };
            let yp = by.linear(&dense, hidden, inner, &latent_y, proj_out)?;
            let parts = Parts {
                yp: &yp,
                weights: None,
                identity: None,
                identity_weights: None,
                output_bias: None,
                shared: shared.as_ref(),
            };
            by.combine(&RoutingShape { num_experts: 1, top_k: 1, ..shape }, &dense, hidden, &parts)?
        }
        _ => {
            let yp = routed_experts(by, config, &plan, &tokens, routing_weights, &weights.experts)?;
            routed.yp = &yp;
            by.combine(&shape, &plan, config.hidden, &routed)?
        }
    };
    match &config.output_norm {
        Some(norm) => by.norm(norm, config.hidden, &y, weights.output_norm, None),
        None => Ok(y),
    }
}

/// The outputs of the routed experts `yp` `[R, H]`, after their norm if there is one.
fn routed_experts<D: Dtype, O: Operations<D>>(
    by: &O,
    config: &MoeConfig,
    plan: &Plan,
    x: &O::Values,
    routing_weights: &O::Values,
    weights: &ExpertWeights<Host<'_>, D>,
) -> Result<O::Values> {
    let MoeConfig { intermediate, experts, .. } = config;
    let hidden = config.expert_hidden();
    let gate_up = GateUpWeights { tensors: weights.gate_up, bias: weights.gate_up_bias };
    let row_weights =
        (experts.weight_position != WeightPosition::Output).then_some(routing_weights);
    let act = by.gate_up(plan, experts, [*intermediate, hidden], x, gate_up, row_weights)?;
    let down =
        LinearWeights { w: weights.down, bias: weights.down_bias, order: experts.down_order };
    if experts.weighs_rows(D::DTYPE) {
        return by.weighted_linear(plan, [hidden, *intermediate], &act, down, routing_weights);
    }
    let yp = by.linear(plan, hidden, *intermediate, &act, down)?;
    match &experts.post_norm {
        Some(norm) => by.norm(norm, hidden, &yp, weights.post_norm, Some(plan)),
        None => Ok(yp),
    }
}

fn shared<D: Dtype, O: Operations<D>>(
    by: &O,
    config: &MoeConfig,
    dense: &Plan,
    x: &O::Values,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Option<SharedPart<O::Values>>> {
    let (Some(shared), Some(weights)) = (&config.shared, &weights.shared) else { return Ok(None) };
    let (hidden, intermediate) = (config.hidden, shared.intermediate);
    let bias = weights.gate_up_bias;
    let gate_up = GateUpWeights { bias, ..GateUpWeights::fused(weights.gate_up) };
    let act = by.gate_up(dense, &shared.experts(), [intermediate, hidden], x, gate_up, None)?;
    let down = LinearWeights { bias: weights.down_bias, ..LinearWeights::new(weights.down) };
    let y = by.linear(dense, hidden, intermediate, &act, down)?;
    let gate = weights.sigmoid_gate.map(|gate| by.gate(hidden, x, gate)).transpose()?;
    Ok(Some(SharedPart { y, gate, average: shared.average }))
}

/// The operations on numbers, without rounding.
struct Numbers<A>(PhantomData<A>);

impl<A: Accum, D: Dtype> Operations<D> for Numbers<A> {
    type Values = Vec<A>;

    fn exact(&self, x: &[D]) -> Vec<A> {
        x.iter().map(|x| A::from_dtype(*x)).collect()
    }

    fn linear(
        &self,
        plan: &Plan,
        out_features: usize,
        in_features: usize,
        x: &Vec<A>,
        weights: LinearWeights<'_, D>,
    ) -> Result<Vec<A>> {
        grouped_gemm_fwd(plan, out_features, in_features, x, weights, false)
    }

    fn weighted_linear(
        &self,
        plan: &Plan,
        [out_features, in_features]: [usize; 2],
        x: &Vec<A>,
        weights: LinearWeights<'_, D>,
        routing_weights: &Vec<A>,
    ) -> Result<Vec<A>> {
        grouped_gemm_weighted_fwd(
            plan,
            out_features,
            in_features,
            x,
            weights,
            routing_weights,
            false,
        )
    }

    fn gate_up(
        &self,
        plan: &Plan,
        experts: &ExpertConfig,
        [intermediate, hidden]: [usize; 2],
        x: &Vec<A>,
        gate_up: GateUpWeights<'_, D>,
        weights: Option<&Vec<A>>,
    ) -> Result<Vec<A>> {
        let weights = weights.map(Vec::as_slice);
        grouped_gemm_gate_up_fwd(plan, experts, intermediate, hidden, x, gate_up, weights, true)
    }

    fn norm(
        &self,
        norm: &RmsNorm,
        hidden: usize,
        x: &Vec<A>,
        weight: Option<&[D]>,
        plan: Option<&Plan>,
    ) -> Result<Vec<A>> {
        rms_norm_fwd(norm, hidden, &RmsNormInputs { x, weight, plan })
    }

    fn gate(&self, hidden: usize, x: &Vec<A>, gate: &[D]) -> Result<Vec<A>> {
        router_gemm_fwd(1, hidden, &RouterGemmInputs { x, router_gate: gate, bias: None })
    }

    fn combine(
        &self,
        shape: &RoutingShape,
        plan: &Plan,
        hidden: usize,
        parts: &Parts<'_, Vec<A>, D>,
    ) -> Result<Vec<A>> {
        let shared = parts.shared.map(|shared| Shared {
            y: &shared.y[..],
            gate: shared.gate.as_deref(),
            average: shared.average,
        });
        let inputs = CombineInputs {
            yp: &parts.yp[..],
            routing_weights: parts.weights.map(Vec::as_slice),
            identity: parts
                .identity
                .as_ref()
                .map(|identity| identity.with_weights(parts.identity_weights.map(Vec::as_slice))),
            output_bias: parts.output_bias,
            shared,
        };
        combine_fwd(shape, plan, hidden, &inputs)
    }
}

/// Rounds each number to an element, to nearest, ties to even.
pub fn round<A: Accum, D: Dtype>(values: &[A]) -> Vec<D> {
    values.iter().map(|value| value.round()).collect()
}

#[cfg(test)]
mod tests;
