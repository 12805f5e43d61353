//! The bounds of a whole layer: each operation stores its result, and hands on how far that may be off.

use super::super::combine::{CombineInputs, Identity, Shared, combine_fwd, sigmoid};
use super::super::expert_weights::{GateUpWeights, LinearWeights};
use super::super::layer::{Operations, Parts, RouterReads, experts_of_layer};
use super::super::moe_layer_route_fwd;
use super::super::plan::Plan;
use super::super::rms_norm::RmsNormInputs;
use super::super::router_gemm::{RouterGemmInputs, router_gemm_fwd};
use super::grouped_gemm::{gate_up_of, grouped_gemm_magnitude, weighted_of};
use super::{Bounded, U, combine, grouped_gemm, magnitudes, rms_norm, route, router_gemm};
use crate::config::{ExpertConfig, MoeConfig, Normalization, RmsNorm, kept_divisor};
use crate::dtype::{DType, Dtype};
use crate::error::Result;
use crate::shape::RoutingShape;
use crate::tensors::{Host, MoeInputs, MoeWeights, Typed, no_gate, no_noise_gate};

/// Errors are multiplied by each other as well, and rounded; 1 % is ample for those second orders.
const SECOND_ORDER: f64 = 1.01;

/// [`moe_layer_fwd`](super::super::moe_layer_fwd) with what lies between its operations stored as `D`, and so
/// its result. Logits that are not given are those of the reference: a device's own may choose other experts
/// where two are near to each other.
///
/// # Errors
/// Those of [`moe_layer_fwd`](super::super::moe_layer_fwd).
pub fn moe_layer<D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Bounded> {
    if config.candidates() > 0 {
        // Who is kept by which weight is a matter of f32, the same on every device.
        let routing = moe_layer_route_fwd::<f32, D>(config, inputs, weights)?;
        let value: Vec<f64> = routing.weights.into_iter().map(f64::from).collect();
        let routing_weights = Bounded { bound: vec![0.0; value.len()], value };
        return moe_layer_experts(config, inputs.x, &routing.expert_ids, &routing_weights, weights);
    }
    let routing = moe_layer_route_fwd::<f64, D>(config, inputs, weights)?;
    let read = RouterReads::new::<f64, D>(config, inputs, weights)?;
    let shape = config.routing(inputs.x.len() / config.hidden);
    let router = config.router_before_capacity();
    let (before, mut errors) = route(&shape, &router, &read.of(&router, inputs, weights))?;
    if let Some(by) = config.capacity.map(|capacity| capacity.normalization)
        && by != Normalization::None
    {
        errors = normalized(
            &shape,
            by,
            config.router.scale,
            weights.router.expert_scale,
            &routing.expert_ids,
            &before.routing_weights,
            &errors,
        )?;
    }
    let routing_weights = Bounded { value: routing.weights, bound: errors };
    moe_layer_experts(config, inputs.x, &routing.expert_ids, &routing_weights, weights)
}

/// The router's logits, before the rounding that [`router_logits`](super::super::router_logits) makes, with what a norm
/// before them is stored as `D`.
///
/// # Errors
/// Those of [`router_logits`](super::super::router_logits).
pub fn router_logits<D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Bounded> {
    const OP: &str = "router_logits";
    let x = router_x(OP, config, inputs, weights)?;
    let (gate, bias) = (weights.router.gate.as_ref(), weights.router.bias.as_ref());
    let gate = gate.ok_or_else(|| no_gate(OP))?;
    router_product(config, &x, gate, bias, config.projection.f32_logits)
}

/// The noise's own logits, before the rounding that [`noise_logits`](super::super::noise_logits) makes, with what a norm
/// before them is stored as `D`.
///
/// # Errors
/// Those of [`noise_logits`](super::super::noise_logits).
pub fn noise_logits<D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Bounded> {
    const OP: &str = "noise_logits";
    let x = router_x(OP, config, inputs, weights)?;
    let gate = weights.router.noise_gate.as_ref().ok_or_else(|| no_noise_gate(OP))?;
    let f32_logits = inputs.logits.as_ref().map(Typed::is_f32);
    let f32_logits = f32_logits.unwrap_or(config.projection.f32_logits);
    router_product(config, &x, gate, None, f32_logits)
}

/// The tokens that the router reads, after its norm where it has one.
fn router_x<D: Dtype>(
    op: &'static str,
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Bounded> {
    weights.check(op, config)?;
    inputs.check(op, config)?;
    let x = WithBounds.exact(inputs.router_x.unwrap_or(inputs.x));
    match &config.projection.norm {
        Some(norm) => WithBounds.norm(norm, config.hidden, &x, weights.router.norm, None),
        None => Ok(x),
    }
}

fn router_product<D: Dtype>(
    config: &MoeConfig,
    x: &Bounded,
    gate: &Typed<Host<'_>, D>,
    bias: Option<&Typed<Host<'_>, D>>,
    f32_logits: bool,
) -> Result<Bounded> {
    let out = if f32_logits { DType::F32 } else { D::DTYPE };
    let widths = (config.router_experts(), config.hidden);
    match gate {
        Typed::Element(gate) => {
            projected(widths, x, gate, bias.and_then(Typed::element).copied(), out)
        }
        Typed::F32(gate) => projected(widths, x, gate, bias.and_then(Typed::f32).copied(), out),
    }
}

fn projected<G: Dtype>(
    (experts, hidden): (usize, usize),
    x: &Bounded,
    gate: &[G],
    bias: Option<&[G]>,
    out: DType,
) -> Result<Bounded> {
    let own = router_gemm(
        experts,
        hidden,
        &RouterGemmInputs { x: &x.value[..], router_gate: gate, bias },
        out,
    )?;
    let sizes = magnitudes(gate);
    let errors = RouterGemmInputs { x: &x.bound[..], router_gate: &sizes[..], bias: None };
    Ok(own.with(&router_gemm_fwd::<f64>(experts, hidden, &errors)?))
}

/// [`moe_layer_experts_fwd`](super::super::moe_layer_experts_fwd) with what lies between its operations stored as
/// `D`, and so its result.
///
/// # Errors
/// Those of [`moe_layer_experts_fwd`](super::super::moe_layer_experts_fwd).
pub fn moe_layer_experts<D: Dtype>(
    config: &MoeConfig,
    x: &[D],
    expert_ids: &[u32],
    routing_weights: &Bounded,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Bounded> {
    experts_of_layer(&WithBounds, config, x, expert_ids, routing_weights, weights)
}

/// The errors of weights that are divided by their sum: those of their own, and that of the sum.
fn normalized(
    shape: &RoutingShape,
    by: Normalization,
    scale: f32,
    expert_scale: Option<&[f32]>,
    expert_ids: &[u32],
    weights: &[f64],
    errors: &[f64],
) -> Result<Vec<f64>> {
    let (_, epsilon, min) = kept_divisor("moe_layer", "capacity.normalization", by)?;
    let kept = |slot: usize| (expert_ids[slot] as usize) < shape.num_experts;
    let error_of = |slot: usize| {
        let first = slot / shape.top_k * shape.top_k;
        let sum = |of: &[f64]| -> f64 {
            (first..first + shape.top_k).filter(|slot| kept(*slot)).map(|slot| of[slot]).sum()
        };
        let (divisor, off) = ((sum(weights) + f64::from(epsilon)).max(f64::from(min)), sum(errors));
        let value = weights[slot] / divisor;
        let error = (errors[slot] + value.abs() * off) / (divisor.abs() - off).max(0.0);
        let own = expert_scale.map_or(1.0, |scale| scale[expert_ids[slot] as usize].abs());
        let error = f64::from(scale.abs()) * f64::from(own) * (error + 8.0 * U * value.abs());
        // Of a sum that may be 0, the quotient may be anything.
        if error.is_nan() { f64::INFINITY } else { error }
    };
    Ok((0..shape.slots()).map(|slot| if kept(slot) { error_of(slot) } else { 0.0 }).collect())
}

/// The operations on numbers with bounds.
struct WithBounds;

impl<D: Dtype> Operations<D> for WithBounds {
    type Values = Bounded;

    fn exact(&self, x: &[D]) -> Bounded {
        let value: Vec<f64> = x.iter().map(|x| x.to_f64()).collect();
        Bounded { bound: vec![0.0; value.len()], value }
    }

    fn linear(
        &self,
        plan: &Plan,
        n: usize,
        k: usize,
        x: &Bounded,
        weights: LinearWeights<'_, D>,
    ) -> Result<Bounded> {
        let own = grouped_gemm(plan, n, k, &x.value, weights, false, D::DTYPE)?;
        let from_x = grouped_gemm_magnitude(plan, n, k, &x.bound, weights, false)?;
        Ok(own.with(&from_x))
    }

    fn weighted_linear(
        &self,
        plan: &Plan,
        widths: [usize; 2],
        x: &Bounded,
        weights: LinearWeights<'_, D>,
        routing_weights: &Bounded,
    ) -> Result<Bounded> {
        let x = (&x.value[..], Some(&x.bound[..]));
        weighted_of(plan, widths, x, weights, routing_weights, false, D::DTYPE)
    }

    fn gate_up(
        &self,
        plan: &Plan,
        experts: &ExpertConfig,
        widths: [usize; 2],
        x: &Bounded,
        gate_up: GateUpWeights<'_, D>,
        weights: Option<&Bounded>,
    ) -> Result<Bounded> {
        let errors = x.bound.iter().any(|error| *error > 0.0).then_some(&x.bound[..]);
        gate_up_of(plan, experts, widths, (&x.value, errors), gate_up, weights, true, D::DTYPE)
    }

    fn norm(
        &self,
        norm: &RmsNorm,
        hidden: usize,
        x: &Bounded,
        weight: Option<&[D]>,
        plan: Option<&Plan>,
    ) -> Result<Bounded> {
        let inputs = RmsNormInputs { x: &x.value[..], weight, plan };
        let own = rms_norm(norm, hidden, &inputs, D::DTYPE)?;
        // What of a row is normed, and how far that is off.
        let factor = |h: usize| match weight {
            Some(weight) => (f64::from(norm.offset) + weight[h].to_f64()).abs(),
            None => 1.0,
        };
        let before = |h| if norm.scale_first { factor(h) } else { 1.0 };
        let after = |h| if norm.scale_first { 1.0 } else { factor(h) };
        let mut from_x = Vec::with_capacity(x.value.len());
        for (x, errors) in x.value.chunks(hidden).zip(x.bound.chunks(hidden)) {
            let scaled = |of: &[f64]| -> Vec<f64> {
                of.iter().enumerate().map(|(h, v)| v.abs() * before(h)).collect()
            };
            let (x, errors) = (scaled(x), scaled(errors));
            let mean = |of: &[f64]| of.iter().map(|v| v * v).sum::<f64>() / hidden as f64;
            let root = (mean(&x) + f64::from(norm.epsilon)).sqrt();
            // A root of a sum of squares is a length: it is off by the length of the error at most.
            let root_error = mean(&errors).sqrt();
            let least = (root - root_error).max(f64::from(norm.epsilon).sqrt());
            for (h, (x, error)) in x.iter().zip(&errors).enumerate() {
                from_x.push(match root_error == 0.0 {
                    true => 0.0,
                    false => after(h) * (error + x / root * root_error) / least,
                });
            }
        }
        // Rows that nobody owns are 0, and exact.
        let used = plan.map_or(x.value.len(), |plan| plan.rows_in_use() * hidden);
        from_x[used..].fill(0.0);
        Ok(own.with(&from_x))
    }

    fn gate(&self, hidden: usize, x: &Bounded, gate: &[D]) -> Result<Bounded> {
        projected((1, hidden), x, gate, None, DType::F32)
    }

    fn combine(
        &self,
        shape: &RoutingShape,
        plan: &Plan,
        hidden: usize,
        parts: &Parts<'_, Bounded, D>,
    ) -> Result<Bounded> {
        let Parts { yp, weights, identity, identity_weights, output_bias, shared } = parts;
        let gate = shared.and_then(|shared| shared.gate.as_ref());
        let values = CombineInputs {
            yp: &yp.value[..],
            routing_weights: weights.map(|weights| &weights.value[..]),
            identity: identity.as_ref().map(|identity| {
                identity.with_weights(identity_weights.map(|weights| &weights.value[..]))
            }),
            output_bias: *output_bias,
            shared: shared.map(|shared| Shared {
                y: &shared.y.value[..],
                gate: gate.map(|gate| &gate.value[..]),
                average: shared.average,
            }),
        };
        let own = combine(shape, plan, hidden, &values, D::DTYPE)?;
        // What errors of rows make, with the weights as large as they may be.
        let most = |b: &Bounded| -> Vec<f64> {
            b.value.iter().zip(&b.bound).map(|(value, error)| value.abs() + error).collect()
        };
        let average = shared.is_some_and(|shared| shared.average);
        let sizes = weights.map(most);
        let from_rows = CombineInputs::<f64, f64, D> {
            yp: &yp.bound,
            routing_weights: sizes.as_deref(),
            identity: None,
            output_bias: None,
            shared: shared.map(|shared| Shared {
                y: &shared.y.bound[..],
                gate: gate.map(|gate| &gate.value[..]),
                average,
            }),
        };
        let mut errors = combine_fwd::<f64>(shape, plan, hidden, &from_rows)?;
        // What errors of weights make of rows, unless those have them already, and of tokens.
        if let Some(weights) = weights.or(*identity_weights) {
            let rows = match identity_weights {
                Some(_) => vec![0.0; yp.value.len()],
                None => magnitudes(&yp.value),
            };
            let x = identity.as_ref().map(|identity| magnitudes(identity.x));
            let from_weights = CombineInputs::<f64, f64, f64> {
                yp: &rows,
                routing_weights: Some(&weights.bound),
                identity: identity.as_ref().zip(x.as_deref()).map(|(identity, x)| Identity {
                    experts: identity.experts.clone(),
                    expert_ids: identity.expert_ids,
                    x,
                    routing_weights: None,
                }),
                output_bias: None,
                shared: None,
            };
            let half = if average { 0.5 } else { 1.0 };
            let from_weights = combine_fwd::<f64>(shape, plan, hidden, &from_weights)?;
            errors.iter_mut().zip(from_weights).for_each(|(error, more)| *error += half * more);
        }
        // A sigmoid's slope is the product of itself and what it lacks of 1, and no more than a quarter.
        if let (Some(shared), Some(gate)) = (shared, gate) {
            let rows = errors.chunks_mut(hidden).zip(shared.y.value.chunks(hidden));
            let rows =
                rows.zip(shared.y.bound.chunks(hidden)).zip(gate.value.iter().zip(&gate.bound));
            for (((errors, y), y_error), (gate, gate_error)) in rows {
                let near = sigmoid(gate + gate_error).min(1.0) - sigmoid(gate - gate_error);
                for ((error, y), y_error) in errors.iter_mut().zip(y).zip(y_error) {
                    *error += near * (y.abs() + y_error);
                }
            }
        }
        Ok(own.with(&errors))
    }
}

impl Bounded {
    /// The same value, with what errors of its operands make of it. The result is stored again.
    fn with(mut self, errors: &[f64]) -> Self {
        self.bound.iter_mut().zip(errors).for_each(|(bound, error)| *bound += SECOND_ORDER * error);
        self
    }
}
