//! The bounds of a layer: each operation stores its result, and its error is propagated to the next
//! one.

use super::super::combine::{CombineInputs, Identity, Shared, combine_fwd, sigmoid};
use super::super::expert_weights::{GateUpWeights, LinearWeights};
use super::super::layer::{Operations, Parts, RouterLogits, experts_of_layer};
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
use crate::tensors::{Host, MoeInputs, MoeWeights, Typed, no_noise_gate, no_router_gate};

/// A factor for products of errors and for the rounding of errors; 1 % exceeds these second-order
/// terms.
const SECOND_ORDER: f64 = 1.01;

/// The bounds of [`moe_layer_fwd`](super::super::moe_layer_fwd) with intermediate tensors and
/// result stored as `D`. Logits that are not given are those of the reference; logits of a device
/// differ, and may select other experts if two values are near each other.
///
/// # Errors
/// Those of [`moe_layer_fwd`](super::super::moe_layer_fwd).
pub fn moe_layer<D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Host<'_>, D>,
    weights: &MoeWeights<Host<'_>, D>,
) -> Result<Bounded> {
    if config.candidates() > 0 {
        // The kept slots and their weights are computed in f32, bit for bit the same on every
        // device.
        let routing = moe_layer_route_fwd::<f32, D>(config, inputs, weights)?;
        let value: Vec<f64> = routing.weights.into_iter().map(f64::from).collect();
        let routing_weights = Bounded { bound: vec![0.0; value.len()], value };
        return moe_layer_experts(config, inputs.x, &routing.expert_ids, &routing_weights, weights);
    }
    let routing = moe_layer_route_fwd::<f64, D>(config, inputs, weights)?;
    let router_logits = RouterLogits::new::<f64, D>(config, inputs, weights)?;
    let shape = config.routing(inputs.x.len() / config.hidden);
    let router = config.router_before_capacity();
    let inputs_of_route = router_logits.inputs(&router, inputs, weights);
    let (unnormalized, mut errors) = route(&shape, &router, &inputs_of_route)?;
    if let Some(normalization) = config.capacity.map(|capacity| capacity.normalization)
        && normalization != Normalization::None
    {
        errors = normalized(
            &shape,
            normalization,
            config.router.scale,
            weights.router.expert_scale,
            &routing.expert_ids,
            &unnormalized.routing_weights,
            &errors,
        )?;
    }
    let routing_weights = Bounded { value: routing.weights, bound: errors };
    moe_layer_experts(config, inputs.x, &routing.expert_ids, &routing_weights, weights)
}

/// The bounds of [`router_logits`](super::super::router_logits), whose values here are not rounded.
/// The result of a norm is stored as `D`.
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
    let router_gate = weights.router.router_gate.as_ref().ok_or_else(|| no_router_gate(OP))?;
    let bias = weights.router.bias.as_ref();
    router_product(config, &x, router_gate, bias, config.projection.f32_logits)
}

/// The bounds of [`noise_logits`](super::super::noise_logits), whose values here are not rounded.
/// The result of a norm is stored as `D`.
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
    let noise_gate = weights.router.noise_gate.as_ref().ok_or_else(|| no_noise_gate(OP))?;
    let f32_logits = inputs.logits.as_ref().map(Typed::is_f32);
    let f32_logits = f32_logits.unwrap_or(config.projection.f32_logits);
    router_product(config, &x, noise_gate, None, f32_logits)
}

/// The input of the router, after its norm if there is one.
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
    let rounded =
        router_gemm(experts, hidden, &RouterGemmInputs { x: &x.value[..], router_gate: gate, bias }, out)?;
    let sizes = magnitudes(gate);
    let errors = RouterGemmInputs { x: &x.bound[..], router_gate: &sizes[..], bias: None };
    Ok(rounded.with_input_errors(&router_gemm_fwd::<f64>(experts, hidden, &errors)?))
}

/// The bounds of [`moe_layer_experts_fwd`](super::super::moe_layer_experts_fwd) with intermediate
/// tensors and result stored as `D`.
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

/// The errors of weights that are divided by their sum: their own errors and that of the sum.
fn normalized(
    shape: &RoutingShape,
    normalization: Normalization,
    scale: f32,
    expert_scale: Option<&[f32]>,
    expert_ids: &[u32],
    weights: &[f64],
    errors: &[f64],
) -> Result<Vec<f64>> {
    let (_, epsilon, min) = kept_divisor("moe_layer", "capacity.normalization", normalization)?;
    let kept = |slot: usize| (expert_ids[slot] as usize) < shape.num_experts;
    let error_of = |slot: usize| {
        let first = slot / shape.top_k * shape.top_k;
        let sum = |of: &[f64]| -> f64 {
            (first..first + shape.top_k).filter(|slot| kept(*slot)).map(|slot| of[slot]).sum()
        };
        let divisor = (sum(weights) + f64::from(epsilon)).max(f64::from(min));
        let sum_error = sum(errors);
        let value = weights[slot] / divisor;
        let error = (errors[slot] + value.abs() * sum_error) / (divisor.abs() - sum_error).max(0.0);
        let expert_scale = expert_scale.map_or(1.0, |scale| scale[expert_ids[slot] as usize].abs());
        let error =
            f64::from(scale.abs()) * f64::from(expert_scale) * (error + 8.0 * U * value.abs());
        // If the sum may be 0, the quotient is unbounded.
        if error.is_nan() { f64::INFINITY } else { error }
    };
    Ok((0..shape.slots()).map(|slot| if kept(slot) { error_of(slot) } else { 0.0 }).collect())
}

/// The operations on numbers with error bounds.
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
        out_features: usize,
        in_features: usize,
        x: &Bounded,
        weights: LinearWeights<'_, D>,
    ) -> Result<Bounded> {
        let rounded =
            grouped_gemm(plan, out_features, in_features, &x.value, weights, false, D::DTYPE)?;
        let from_x =
            grouped_gemm_magnitude(plan, out_features, in_features, &x.bound, weights, false)?;
        Ok(rounded.with_input_errors(&from_x))
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
        let rounded = rms_norm(norm, hidden, &inputs, D::DTYPE)?;
        // The weights multiply either the input of the norm or its result.
        let factor = |h: usize| match weight {
            Some(weight) => (f64::from(norm.offset) + weight[h].to_f64()).abs(),
            None => 1.0,
        };
        let input_factor = |h| if norm.scale_first { factor(h) } else { 1.0 };
        let output_factor = |h| if norm.scale_first { 1.0 } else { factor(h) };
        let mut from_x = Vec::with_capacity(x.value.len());
        for (x, errors) in x.value.chunks(hidden).zip(x.bound.chunks(hidden)) {
            let scaled = |of: &[f64]| -> Vec<f64> {
                of.iter().enumerate().map(|(h, v)| v.abs() * input_factor(h)).collect()
            };
            let (x, errors) = (scaled(x), scaled(errors));
            let mean = |of: &[f64]| of.iter().map(|v| v * v).sum::<f64>() / hidden as f64;
            let root = (mean(&x) + f64::from(norm.epsilon)).sqrt();
            // The root of a sum of squares is a Euclidean length, whose error is at most the length
            // of the error vector.
            let root_error = mean(&errors).sqrt();
            let least = (root - root_error).max(f64::from(norm.epsilon).sqrt());
            for (h, (x, error)) in x.iter().zip(&errors).enumerate() {
                from_x.push(match root_error == 0.0 {
                    true => 0.0,
                    false => output_factor(h) * (error + x / root * root_error) / least,
                });
            }
        }
        // Unused rows are 0, without error.
        let used = plan.map_or(x.value.len(), |plan| plan.rows_in_use() * hidden);
        from_x[used..].fill(0.0);
        Ok(rounded.with_input_errors(&from_x))
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
        let rounded = combine(shape, plan, hidden, &values, D::DTYPE)?;
        // The errors of the rows, times the largest weights within their bounds.
        let largest = |b: &Bounded| -> Vec<f64> {
            b.value.iter().zip(&b.bound).map(|(value, error)| value.abs() + error).collect()
        };
        let average = shared.is_some_and(|shared| shared.average);
        let sizes = weights.map(largest);
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
        // The errors of the weights, times rows (unless these include them already) and tokens.
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
        // The error of the sigmoid: the difference of its values at the ends of the bound.
        if let (Some(shared), Some(gate)) = (shared, gate) {
            let rows = errors.chunks_mut(hidden).zip(shared.y.value.chunks(hidden));
            let rows =
                rows.zip(shared.y.bound.chunks(hidden)).zip(gate.value.iter().zip(&gate.bound));
            for (((errors, y), y_error), (gate, gate_error)) in rows {
                let difference = sigmoid(gate + gate_error).min(1.0) - sigmoid(gate - gate_error);
                for ((error, y), y_error) in errors.iter_mut().zip(y).zip(y_error) {
                    *error += difference * (y.abs() + y_error);
                }
            }
        }
        Ok(rounded.with_input_errors(&errors))
    }
}

impl Bounded {
    /// Adds the errors that the errors of an operation's inputs cause in its result.
    fn with_input_errors(mut self, errors: &[f64]) -> Self {
        self.bound.iter_mut().zip(errors).for_each(|(bound, error)| *bound += SECOND_ORDER * error);
        self
    }
}
