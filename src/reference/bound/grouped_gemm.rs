//! The bounds of the experts' products.

use super::super::accum::Element;
use super::super::activation::activate;
use super::super::expert_weights::{
    GateUpWeights, LinearWeights, Part, Values, row_weights, weights_of_rows,
};
use super::super::grouped_gemm::{grouped_gemm_fwd, sums};
use super::super::plan::Plan;
use super::activation::{Inexact, activation_error};
use super::{Bounded, U, stored, sum_error};
use crate::config::{ExpertConfig, WeightPosition};
use crate::dtype::{DType, Dtype};
use crate::error::Result;

/// [`grouped_gemm_fwd`] with its result stored as `out`.
///
/// # Errors
/// Those of [`grouped_gemm_fwd`].
pub fn grouped_gemm<D: Dtype>(
    plan: &Plan,
    out_features: usize,
    in_features: usize,
    x: &[impl Element<f64>],
    weights: LinearWeights<'_, D>,
    gather: bool,
    out: DType,
) -> Result<Bounded> {
    let value = grouped_gemm_fwd::<f64, D>(plan, out_features, in_features, x, weights, gather)?;
    let magnitude = grouped_gemm_magnitude(plan, out_features, in_features, x, weights, gather)?;
    let adding = if weights.bias.is_some() { U } else { 0.0 };
    let error = |(s, value): (&f64, &f64)| sum_error(in_features, *s) + adding * value.abs();
    let errors = magnitude.iter().zip(&value).map(error).collect();
    Ok(Bounded { bound: stored(&value, errors, out), value })
}

/// [`grouped_gemm_weighted_fwd`](crate::reference::grouped_gemm_weighted_fwd) with its result
/// stored as `out`. The bounds of `routing_weights` are those of the operation's routing weights.
///
/// # Errors
/// Those of [`grouped_gemm_weighted_fwd`](crate::reference::grouped_gemm_weighted_fwd).
#[allow(clippy::too_many_arguments, reason = "those of the operation")]
pub fn grouped_gemm_weighted<D: Dtype>(
    plan: &Plan,
    out_features: usize,
    in_features: usize,
    x: &[impl Element<f64>],
    weights: LinearWeights<'_, D>,
    routing_weights: &Bounded,
    gather: bool,
    out: DType,
) -> Result<Bounded> {
    weighted_of(plan, [out_features, in_features], (x, None), weights, routing_weights, gather, out)
}

/// [`grouped_gemm_weighted`] of an inexact `x`, whose errors are the second slice.
pub(super) fn weighted_of<D: Dtype, X: Element<f64>>(
    plan: &Plan,
    [out_features, in_features]: [usize; 2],
    (x, x_errors): (&[X], Option<&[f64]>),
    weights: LinearWeights<'_, D>,
    routing_weights: &Bounded,
    gather: bool,
    out: DType,
) -> Result<Bounded> {
    const OP: &str = "grouped_gemm_weighted";
    let values = grouped_gemm_fwd::<f64, D>(plan, out_features, in_features, x, weights, gather)?;
    let magnitudes = grouped_gemm_magnitude(plan, out_features, in_features, x, weights, gather)?;
    let from_x = match x_errors {
        Some(errors) => {
            grouped_gemm_magnitude(plan, out_features, in_features, errors, weights, gather)?
        }
        None => vec![0.0; values.len()],
    };
    let weight: Vec<f64> = row_weights(OP, "routing_weights", plan, &routing_weights.value)?;
    let weight_error: Vec<f64> = row_weights(OP, "routing_weights", plan, &routing_weights.bound)?;
    let adding = if weights.bias.is_some() { U } else { 0.0 };
    let (mut value, mut errors) = (Vec::new(), Vec::new());
    for (at, (sum, (magnitude, from_x))) in
        values.iter().zip(magnitudes.iter().zip(&from_x)).enumerate()
    {
        let error = sum_error(in_features, magnitude + from_x) + from_x + adding * sum.abs();
        let row = at / out_features;
        let weight = Inexact { value: weight[row], error: weight_error[row] };
        let weighted = times(weight, Inexact { value: *sum, error });
        value.push(weighted.value);
        errors.push(weighted.error);
    }
    let in_use = plan.rows_in_use() * out_features;
    errors[in_use..].fill(0.0);
    Ok(Bounded { bound: stored(&value, errors, out), value })
}

/// [`grouped_gemm_gate_up_fwd`](crate::reference::grouped_gemm_gate_up_fwd) with its result stored
/// as `out`. The bounds of `routing_weights` are those of the operation's routing weights.
///
/// # Errors
/// Those of [`grouped_gemm_gate_up_fwd`](crate::reference::grouped_gemm_gate_up_fwd).
#[allow(clippy::too_many_arguments, reason = "those of the operation")]
pub fn grouped_gemm_gate_up<D: Dtype>(
    plan: &Plan,
    experts: &ExpertConfig,
    intermediate: usize,
    in_features: usize,
    x: &[impl Element<f64>],
    gate_up: GateUpWeights<'_, D>,
    routing_weights: Option<&Bounded>,
    gather: bool,
    out: DType,
) -> Result<Bounded> {
    gate_up_of(
        plan,
        experts,
        [intermediate, in_features],
        (x, None),
        gate_up,
        routing_weights,
        gather,
        out,
    )
}

/// [`grouped_gemm_gate_up`] of an inexact `x`, whose errors are the second slice.
#[allow(clippy::too_many_arguments, reason = "those of the operation")]
pub(super) fn gate_up_of<D: Dtype, X: Element<f64>>(
    plan: &Plan,
    experts: &ExpertConfig,
    [intermediate, in_features]: [usize; 2],
    (x, x_errors): (&[X], Option<&[f64]>),
    gate_up: GateUpWeights<'_, D>,
    routing_weights: Option<&Bounded>,
    gather: bool,
    out: DType,
) -> Result<Bounded> {
    const OP: &str = "grouped_gemm_gate_up";
    let (gate, up) = Part::of_gate_up(OP, plan, experts, intermediate, in_features, gate_up)?;
    let of_rows = |of: fn(&Bounded) -> &Vec<f64>| {
        weights_of_rows::<f64>(
            OP,
            plan,
            experts,
            routing_weights.map(|weights| of(weights).as_slice()),
        )
    };
    let (weight, weight_error) = (of_rows(|w| &w.value)?, of_rows(|w| &w.bound)?);
    let weight_of = |row: usize| match (&weight, &weight_error) {
        (Some(weight), Some(error)) => Inexact { value: weight[row], error: error[row] },
        _ => Inexact { value: 1.0, error: 0.0 },
    };
    let inside = experts.weight_position == WeightPosition::Inside;

    let inexact_sums = |part: Part<'_, D>| -> Result<Vec<Inexact>> {
        let signed = sums(plan, intermediate, in_features, x, part, gather, Values::Signed)?;
        let absolute = sums(plan, intermediate, in_features, x, part, gather, Values::Absolute)?;
        let from_x = match x_errors {
            Some(errors) => {
                sums(plan, intermediate, in_features, errors, part, gather, Values::Absolute)?
            }
            None => vec![0.0; signed.len()],
        };
        let biases = part.biases(plan, intermediate);
        let of_output = |(index, ((sum, magnitude), bias)): (usize, ((&f64, &f64), &f64))| {
            let error = sum_error(in_features, *magnitude + from_x[index]) + from_x[index];
            let mut sum = Inexact { value: *sum, error };
            if weight.is_some() && !inside {
                sum = times(weight_of(index / intermediate), sum);
            }
            let value = sum.value + bias;
            let adding = if gate_up.bias.is_some() { U * value.abs() } else { 0.0 };
            Inexact { value, error: sum.error + adding }
        };
        Ok(signed.iter().zip(&absolute).zip(&biases).enumerate().map(of_output).collect())
    };
    let gate = gate.map(inexact_sums).transpose()?;
    let up = inexact_sums(up)?;
    let (mut value, mut errors) = (Vec::new(), Vec::new());
    for (index, up) in up.into_iter().enumerate() {
        let gate = gate.as_ref().map(|gate| gate[index]);
        let mut act = Inexact {
            value: activate(&experts.activation, gate.map(|gate| gate.value), up.value),
            error: activation_error(&experts.activation, gate, up),
        };
        if inside {
            act = times(weight_of(index / intermediate), act);
        }
        value.push(act.value);
        errors.push(act.error);
    }
    // Unused rows are 0, even if the activation of 0 is not.
    let in_use = plan.rows_in_use() * intermediate;
    value[in_use..].fill(0.0);
    errors[in_use..].fill(0.0);
    Ok(Bounded { bound: stored(&value, errors, out), value })
}

/// The magnitude `sum over i of |x_i * w_i|` of each element that [`grouped_gemm_fwd`] computes.
pub(super) fn grouped_gemm_magnitude<D: Dtype>(
    plan: &Plan,
    out_features: usize,
    in_features: usize,
    x: &[impl Element<f64>],
    weights: LinearWeights<'_, D>,
    gather: bool,
) -> Result<Vec<f64>> {
    let part = Part::of_linear("grouped_gemm_magnitude", plan, out_features, in_features, weights)?;
    sums(plan, out_features, in_features, x, part, gather, Values::Absolute)
}

/// The product of two numbers, rounded to f32.
fn times(a: Inexact, b: Inexact) -> Inexact {
    let value = a.value * b.value;
    let error = a.error * (b.value.abs() + b.error) + a.value.abs() * b.error;
    Inexact { value, error: error + U * value.abs() + U * DType::F32.min_positive() }
}
