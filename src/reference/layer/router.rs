//! The router of a layer: its products, and the inputs of the operation `route`.

use super::{OP, round};
use crate::config::{MoeConfig, RouterConfig, RouterStep};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::reference::accum::{Accum, Element};
use crate::reference::rms_norm::{RmsNormInputs, rms_norm_fwd};
use crate::reference::route::{RouteInputs, route_scores_fwd};
use crate::reference::router_gemm::{RouterGemmInputs, router_gemm_fwd};
use crate::tensors::{
    Host, Memory, MoeInputs, MoeWeights, Owned, Typed, no_noise_gate, no_router_gate,
};

/// Computes the logits of the router `[T, E']`, rounded to their type in the configuration. They
/// are those of the product, before noise, multiplier and soft-cap; [`router_scores`] has the later
/// steps.
///
/// # Errors
/// Those of [`moe_layer_fwd`](super::moe_layer_fwd), and weights without a router gate.
pub fn router_logits<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Typed<Owned, D>> {
    let logits: Vec<A> = projected(config, inputs, weights, Product::Logits)?;
    Ok(typed(config.projection.f32_logits, &logits))
}

/// Computes the noise logits `[T, E']` of a layer with a
/// [`noise_gate`](crate::RouterProjection::noise_gate), rounded to the type of the logits of the
/// pass. The router multiplies the noise by their `softplus`.
///
/// # Errors
/// Those of [`moe_layer_fwd`](super::moe_layer_fwd), and weights without a noise gate.
pub fn noise_logits<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Typed<Owned, D>> {
    let logits: Vec<A> = projected(config, inputs, weights, Product::NoiseLogits)?;
    let f32_logits = inputs.logits.as_ref().map(Typed::is_f32);
    Ok(typed(f32_logits.unwrap_or(config.projection.f32_logits), &logits))
}

/// Computes a step of the router for the logits of a layer, `[T, E']`: the logits with noise, the
/// logits after multiplier and soft-cap, or the scores; see [`route_scores_fwd`].
///
/// # Errors
/// Those of [`moe_layer_fwd`](super::moe_layer_fwd) and of [`route_scores_fwd`].
pub fn router_scores<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
    step: RouterStep,
) -> Result<Vec<A>> {
    let router_logits = RouterLogits::new::<A, D>(config, inputs, weights)?;
    let shape = config.routing(inputs.x.len() / config.hidden);
    let router = &config.router;
    route_scores_fwd(&shape, router, step, &router_logits.inputs(router, inputs, weights))
}

/// A product of the router.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Product {
    Logits,
    NoiseLogits,
}

fn typed<A: Accum, D: Dtype>(f32_logits: bool, logits: &[A]) -> Typed<Owned, D> {
    match f32_logits {
        true => Typed::F32(round(logits)),
        false => Typed::Element(round(logits)),
    }
}

/// Computes the router's norm and one of its products.
fn projected<A: Accum, D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
    product: Product,
) -> Result<Vec<A>> {
    weights.check(OP, config)?;
    inputs.check(OP, config)?;
    let x = inputs.router_x.unwrap_or(inputs.x);
    match &config.projection.norm {
        Some(norm) => {
            let inputs = RmsNormInputs { x, weight: weights.router.norm, plan: None };
            let x: Vec<A> = rms_norm_fwd(norm, config.hidden, &inputs)?;
            router_gemm(config, &x, weights, product)
        }
        None => router_gemm(config, x, weights, product),
    }
}

fn router_gemm<A: Accum, D: Dtype>(
    config: &MoeConfig,
    x: &[impl Element<A>],
    weights: &MoeWeights<Host<'_>, D>,
    product: Product,
) -> Result<Vec<A>> {
    let (experts, hidden, router) = (config.router_experts(), config.hidden, &weights.router);
    let (matrix, bias) = match product {
        Product::Logits => {
            (router.router_gate.as_ref().ok_or_else(|| no_router_gate(OP))?, &router.bias)
        }
        Product::NoiseLogits => {
            (router.noise_gate.as_ref().ok_or_else(|| no_noise_gate(OP))?, &None)
        }
    };
    // Matrix and bias have the same type, which was checked.
    match matrix {
        Typed::Element(gate) => {
            let bias = bias.as_ref().and_then(Typed::element).copied();
            router_gemm_fwd(experts, hidden, &RouterGemmInputs { x, router_gate: gate, bias })
        }
        Typed::F32(gate) => {
            let bias = bias.as_ref().and_then(Typed::f32).copied();
            router_gemm_fwd(experts, hidden, &RouterGemmInputs { x, router_gate: gate, bias })
        }
    }
}

/// The logits that the router reads, as f32, which represents every element type exactly.
pub(in crate::reference) struct RouterLogits {
    logits: Vec<f32>,
    noise_logits: Option<Vec<f32>>,
}

impl RouterLogits {
    /// Checks every tensor, and returns the given logits of the pass, or else those of the router
    /// gate.
    pub(in crate::reference) fn new<A: Accum, D: Dtype>(
        config: &MoeConfig,
        inputs: &MoeInputs<Host<'_>, D>,
        weights: &MoeWeights<Host<'_>, D>,
    ) -> Result<Self> {
        weights.check(OP, config)?;
        inputs.check(OP, config)?;
        inputs.check_route(OP, config, weights)?;
        fn widen<M: Memory, D: Dtype>(numbers: &Typed<M, D>) -> Vec<f32>
        where
            M::Of<D>: AsRef<[D]>,
            M::Of<f32>: AsRef<[f32]>,
        {
            match numbers {
                Typed::Element(numbers) => numbers.as_ref().iter().map(|x| x.to_f32()).collect(),
                Typed::F32(numbers) => numbers.as_ref().to_vec(),
            }
        }
        let logits = match &inputs.logits {
            Some(logits) => widen(logits),
            None => widen(&router_logits::<A, D>(config, inputs, weights)?),
        };
        let noise_logits = match &inputs.noise_logits {
            Some(logits) => Some(widen(logits)),
            None if inputs.noise.is_some() && config.projection.noise_gate => {
                Some(widen(&noise_logits::<A, D>(config, inputs, weights)?))
            }
            None => None,
        };
        Ok(Self { logits, noise_logits })
    }

    /// The inputs of `route` for a router that makes the layer's selection.
    pub(in crate::reference) fn inputs<'a, 'i: 'a, 'w: 'a, D: Dtype>(
        &'a self,
        router: &RouterConfig,
        inputs: &MoeInputs<Host<'i>, D>,
        weights: &MoeWeights<Host<'w>, D>,
    ) -> RouteInputs<'a, f32> {
        RouteInputs {
            logits: &self.logits,
            selection_bias: weights.router.selection_bias,
            expert_scale: weights.router.expert_scale.filter(|_| router.expert_scale),
            noise: inputs.noise,
            noise_logits: self.noise_logits.as_deref(),
            selection_noise: inputs.selection_noise,
            midpoint_draws: inputs.midpoint_draws,
            given_ids: inputs.given_ids.or(weights.router.table),
            token_ids: inputs.token_ids,
            active: inputs.active,
        }
    }
}
