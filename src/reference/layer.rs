//! The layer: the operations one after the other, without rounding in between.

use std::marker::PhantomData;

use super::accum::Accum;
use super::capacity::{
    Capacity, capacity_ask_fwd, capacity_fwd, capacity_later_fwd, capacity_normalize_fwd,
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

pub(super) use router::RouterReads;
pub use router::{noise_logits, router_logits, router_scores};

const OP: &str = "moe_layer_fwd";

/// A whole layer: tokens `x` `[T, H]` to `y` `[T, H]`. `T` follows from the length of `x`.
///
/// Logits are rounded to the type that the configuration gives them, as the router reads them; nothing else is
/// rounded on the way: this is the layer as mathematics, in the precision of `A`.
///
/// # Errors
/// A configuration out of range, or a tensor that is not as the configuration says.
pub fn moe_layer_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Vec<A>> {
    let routing = moe_layer_route_fwd::<A, D>(config, inputs, weights)?;
    moe_layer_experts_fwd(config, inputs.x, &routing.expert_ids, &routing.weights, weights)
}

/// What a layer's router decides, capacity included; for `N` sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRouting<A> {
    /// `[T, K]`: the experts of each token, strongest first; `u32::MAX` for a slot that was dropped, or whose token is
    /// not active.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`, their weights.
    pub weights: Vec<A>,
    /// `[N, E]`: slots of each sequence that each expert keeps; empty without capacity.
    pub kept: Vec<u32>,
    /// `[N, E]`: requests that each expert had no room for; without overflow, slots that are dropped.
    pub dropped: Vec<u32>,
}

/// The layer up to the choice of experts, capacity included. Where slots may ask again, weights are those of f32, which
/// decide who is kept.
///
/// # Errors
/// Those of [`moe_layer_fwd`].
pub fn moe_layer_route_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<LayerRouting<A>> {
    let reads = RouterReads::new::<A, D>(config, inputs, weights)?;
    let shape = config.routing(inputs.x.len() / config.hidden);
    let router = config.router_before_capacity();
    let routing = route_fwd::<A, f32>(&shape, &router, &reads.of(&router, inputs, weights))?;
    let Some(capacity) = &config.capacity else {
        let (kept, dropped) = (Vec::new(), Vec::new());
        let (expert_ids, weights) = (routing.expert_ids, routing.routing_weights);
        return Ok(LayerRouting { expert_ids, weights, kept, dropped });
    };
    // Priorities are those of f32, on every device.
    let in_f32 = |router: &RouterConfig, shape: &RoutingShape| {
        route_fwd::<f32, f32>(shape, router, &reads.of(router, inputs, weights))
    };
    let mut asked = in_f32(&router, &shape)?.routing_weights;
    let top = match capacity.priority {
        Priority::ChoiceByTopWeight => Some(in_f32(&config.router.of_scores(), &shape)?.routing_weights),
        _ => None,
    };
    let tokens = inputs.sequence_tokens;
    let select = |ids: &[u32], asked: &[f32], so_far: Option<Capacity>| -> Result<Capacity> {
        let plan = plan_fwd(&shape.by_slot(), ids)?;
        let by = top.as_deref().unwrap_or(asked);
        let Some(mut so_far) = so_far else {
            return capacity_fwd(&plan, &shape, capacity, tokens, by);
        };
        capacity_later_fwd(&plan, &shape, capacity, tokens, by, &mut so_far)?;
        Ok(so_far)
    };
    let chosen = &routing.expert_ids;
    let mut so_far = select(chosen, &asked, None)?;
    let listed = config.candidates();
    let all: Vec<A> = if listed == 0 {
        routing.routing_weights
    } else {
        let candidates = in_f32(&router, &RoutingShape { top_k: listed, ..shape })?;
        let (of, by) = (&candidates.expert_ids, &candidates.routing_weights);
        let mut next = vec![0; shape.num_tokens];
        // Every candidate is asked once.
        for round in 0..capacity.overflow.min(listed) {
            let (kept, first) = (&so_far.expert_ids, round == 0);
            let requests = capacity_ask_fwd(
                &shape, listed, first, chosen, kept, of, by, &mut next, &mut asked,
            )?;
            so_far = select(&requests, &asked, Some(so_far))?;
        }
        // A slot that has asked again has the weight that it was kept by, in f32.
        asked.iter().map(|weight| A::from_dtype(*weight)).collect()
    };
    let Capacity { expert_ids, kept, dropped } = so_far;
    let weights = match capacity.normalization {
        Normalization::None => all,
        by => {
            let (scale, of_experts) = (config.router.scale, weights.router.expert_scale);
            capacity_normalize_fwd(&shape, by, scale, of_experts, &expert_ids, &all)?
        }
    };
    Ok(LayerRouting { expert_ids, weights, kept, dropped })
}

/// The layer from the choice of experts on: `expert_ids` and `routing_weights` `[T, K]`, in which slots of
/// other ids than the experts' own take no part.
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

/// The operations that a layer puts together, on values of some kind: numbers, or numbers with their bounds.
pub(super) trait Operations<D: Dtype> {
    /// A tensor that an operation makes.
    type Values;

    /// A tensor as the caller has it.
    fn exact(&self, x: &[D]) -> Self::Values;

    /// `x` `[R, K]` to `[R, N]`.
    fn linear(
        &self,
        plan: &Plan,
        n: usize,
        k: usize,
        x: &Self::Values,
        weights: LinearWeights<'_, D>,
    ) -> Result<Self::Values>;

    /// The same, each row times its weight of `[T, K]`.
    fn weighted_linear(
        &self,
        plan: &Plan,
        widths: [usize; 2],
        x: &Self::Values,
        weights: LinearWeights<'_, D>,
        routing_weights: &Self::Values,
    ) -> Result<Self::Values>;

    /// Tokens `[T, H]` to `[R, I]`; the widths are `I` and `H`.
    fn gate_up(
        &self,
        plan: &Plan,
        experts: &ExpertConfig,
        widths: [usize; 2],
        x: &Self::Values,
        gate_up: GateUpWeights<'_, D>,
        weights: Option<&Self::Values>,
    ) -> Result<Self::Values>;

    /// Each row of `x` `[R, H]`.
    fn norm(
        &self,
        norm: &RmsNorm,
        hidden: usize,
        x: &Self::Values,
        weight: Option<&[D]>,
        plan: Option<&Plan>,
    ) -> Result<Self::Values>;

    /// A shared expert's gate: tokens `[T, H]` times one vector `[H]`.
    fn gate(&self, hidden: usize, x: &Self::Values, gate: &[D]) -> Result<Self::Values>;

    /// What each token gets.
    fn combine(
        &self,
        shape: &RoutingShape,
        plan: &Plan,
        hidden: usize,
        parts: &Parts<'_, Self::Values, D>,
    ) -> Result<Self::Values>;
}

/// What `combine` adds up.
pub(super) struct Parts<'a, V, D> {
    pub(super) yp: &'a V,
    pub(super) weights: Option<&'a V>,
    pub(super) identity: Option<Identity<'a, D>>,
    /// Of identity experts alone, where rows have been multiplied by theirs.
    pub(super) identity_weights: Option<&'a V>,
    pub(super) output_bias: Option<&'a [D]>,
    pub(super) shared: Option<&'a SharedPart<V>>,
}

/// What the shared expert makes of every token.
pub(super) struct SharedPart<V> {
    pub(super) y: V,
    pub(super) gate: Option<V>,
    pub(super) average: bool,
}

/// The layer from the choice of experts on.
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
    // Tiles are for kernels; the products of this module cut rows on their own.
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
        (Some(latent), Some(around)) => {
            let (hidden, inner) = (config.hidden, latent.hidden);
            let before = LinearWeights::new(around.proj_in);
            let mut rows = by.linear(&dense, inner, hidden, &tokens, before)?;
            if let Some(norm) = &latent.norm {
                rows = by.norm(norm, inner, &rows, around.norm, None)?;
            }
            let yp = routed_experts(by, config, &plan, &rows, routing_weights, &weights.experts)?;
            let parts = Parts { yp: &yp, output_bias: None, shared: None, ..routed };
            let latent_y = by.combine(&shape, &plan, inner, &parts)?;
            let bias = weights.experts.output_bias;
            let after = LinearWeights { bias, ..LinearWeights::new(around.proj_out) };
            let yp = by.linear(&dense, hidden, inner, &latent_y, after)?;
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

/// The routed experts' outputs `yp` `[R, H]`, normed where the configuration says so.
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
    let on_rows = (experts.weight_position != WeightPosition::Output).then_some(routing_weights);
    let act = by.gate_up(plan, experts, [*intermediate, hidden], x, gate_up, on_rows)?;
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

/// The operations on numbers, none of which is rounded.
struct Numbers<A>(PhantomData<A>);

impl<A: Accum, D: Dtype> Operations<D> for Numbers<A> {
    type Values = Vec<A>;

    fn exact(&self, x: &[D]) -> Vec<A> {
        x.iter().map(|x| A::from_dtype(*x)).collect()
    }

    fn linear(
        &self,
        plan: &Plan,
        n: usize,
        k: usize,
        x: &Vec<A>,
        weights: LinearWeights<'_, D>,
    ) -> Result<Vec<A>> {
        grouped_gemm_fwd(plan, n, k, x, weights, false)
    }

    fn weighted_linear(
        &self,
        plan: &Plan,
        [n, k]: [usize; 2],
        x: &Vec<A>,
        weights: LinearWeights<'_, D>,
        routing_weights: &Vec<A>,
    ) -> Result<Vec<A>> {
        grouped_gemm_weighted_fwd(plan, n, k, x, weights, routing_weights, false)
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
        router_gemm_fwd(1, hidden, &RouterGemmInputs { x, gate, bias: None })
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

/// Each number as the nearest element, ties to even.
pub fn round<A: Accum, D: Dtype>(values: &[A]) -> Vec<D> {
    values.iter().map(|value| value.round()).collect()
}

#[cfg(test)]
mod tests;
