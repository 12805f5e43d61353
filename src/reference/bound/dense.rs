//! Error bounds of combine, rms_norm and router_gemm.

use super::{Bounded, U, magnitudes, stored, sum_error};
use crate::config::RmsNorm;
use crate::dtype::DType;
use crate::error::Result;
use crate::reference::accum::Element;
use crate::reference::combine::{CombineInputs, Identity, Shared, combine_fwd, sigmoid};
use crate::reference::plan::Plan;
use crate::reference::rms_norm::{RmsNormInputs, rms_norm_fwd};
use crate::reference::router_gemm::{RouterGemmInputs, router_gemm_fwd};
use crate::shape::RoutingShape;

/// [`combine_fwd`] with its result stored as `out`.
///
/// # Errors
/// Those of [`combine_fwd`].
pub fn combine(
    shape: &RoutingShape,
    plan: &Plan,
    hidden: usize,
    inputs: &CombineInputs<'_, impl Element<f64>, impl Element<f64>, impl Element<f64>>,
    out: DType,
) -> Result<Bounded> {
    let value = combine_fwd::<f64>(shape, plan, hidden, inputs)?;
    let yp = magnitudes(inputs.yp);
    let weights = inputs.routing_weights.map(magnitudes);
    let x = inputs.identity.as_ref().map(|identity| magnitudes(identity.x));
    let of_identities = inputs.identity.as_ref().and_then(|i| i.routing_weights).map(magnitudes);
    let output_bias = inputs.output_bias.map(magnitudes);
    let shared = inputs.shared.as_ref().map(|shared| magnitudes(shared.y));
    // Gates are not replaced by their magnitudes, because a sigmoid is positive.
    let gate: Option<Vec<f64>> = inputs.shared.as_ref().and_then(|shared| shared.gate).map(widen);
    let magnitude = CombineInputs {
        yp: &yp,
        routing_weights: weights.as_deref(),
        identity: inputs.identity.as_ref().zip(x.as_deref()).map(|(identity, x)| Identity {
            experts: identity.experts.clone(),
            expert_ids: identity.expert_ids,
            x,
            routing_weights: of_identities.as_deref(),
        }),
        output_bias: output_bias.as_deref(),
        shared: inputs.shared.as_ref().zip(shared.as_deref()).map(|(inputs, y)| Shared {
            y,
            gate: gate.as_deref(),
            average: inputs.average,
        }),
    };
    let magnitudes = combine_fwd::<f64>(shape, plan, hidden, &magnitude)?;
    // The bias and the shared row are two more terms.
    let terms = shape.top_k + usize::from(output_bias.is_some()) + usize::from(shared.is_some());
    let mut errors: Vec<f64> = magnitudes.iter().map(|s| sum_error(terms, *s)).collect();
    if let (Some(gate), Some(shared)) = (gate, shared) {
        let rows = errors.chunks_exact_mut(hidden).zip(shared.chunks_exact(hidden));
        for ((errors, shared), gate) in rows.zip(gate) {
            let gate_error = sigmoid_error(gate);
            errors.iter_mut().zip(shared).for_each(|(error, y)| *error += gate_error * y);
        }
    }
    Ok(Bounded { bound: stored(&value, errors, out), value })
}

/// The error of a sigmoid in f32: three operations of a few units each; if `exp(-z)` overflows, the
/// result is 0.
fn sigmoid_error(z: f64) -> f64 {
    8.0 * U * sigmoid(z) + 2f64.powi(-125)
}

/// [`rms_norm_fwd`] with its result stored as `out`.
///
/// The mean square is a sum of `H` squares, and the root halves its relative error. The factor, its
/// product, the root, its inverse and the product with it round a few times more. Subnormal squares
/// and squares past f32's range are not covered.
///
/// # Errors
/// Those of [`rms_norm_fwd`].
pub fn rms_norm(
    norm: &RmsNorm,
    hidden: usize,
    inputs: &RmsNormInputs<'_, impl Element<f64>, impl Element<f64>>,
    out: DType,
) -> Result<Bounded> {
    let value = rms_norm_fwd::<f64>(norm, hidden, inputs)?;
    // `offset + weight` may cancel, but it is one rounded operation: its error is relative to the
    // sum.
    let units = super::SUM * (hidden as f64).sqrt() / 2.0 + 10.0;
    let errors = value.iter().map(|y| units * U * y.abs() + DType::F32.min_positive()).collect();
    Ok(Bounded { bound: stored(&value, errors, out), value })
}

/// [`router_gemm_fwd`] with its result stored as `out`.
///
/// # Errors
/// Those of [`router_gemm_fwd`].
pub fn router_gemm(
    num_experts: usize,
    hidden: usize,
    inputs: &RouterGemmInputs<'_, impl Element<f64>, impl Element<f64>>,
    out: DType,
) -> Result<Bounded> {
    let value = router_gemm_fwd::<f64>(num_experts, hidden, inputs)?;
    let (x, gate) = (magnitudes(inputs.x), magnitudes(inputs.router_gate));
    let bias = inputs.bias.map(magnitudes);
    let magnitude = RouterGemmInputs { x: &x, router_gate: &gate, bias: bias.as_deref() };
    let magnitude = router_gemm_fwd::<f64>(num_experts, hidden, &magnitude)?;
    let errors = magnitude.iter().map(|s| sum_error(hidden + 1, *s)).collect();
    Ok(Bounded { bound: stored(&value, errors, out), value })
}

fn widen<X: Element<f64>>(values: &[X]) -> Vec<f64> {
    values.iter().map(|value| value.widen()).collect()
}
