//! Bounds on the error of a correct result against the f64 reference, per element.
//!
//! A result is computed from the same inputs in f32, perhaps rounded to 16 bits on the way, and
//! stored as an element of unit roundoff `u_out`. An element is a sum of `n` products `a_i * b_i`.
//! With its magnitude `S = sum of |a_i * b_i|` and `u = 2^-24`:
//!
//! ```text
//! |got - ref64| <= u_out * |ref64| + (u_mid + c * sqrt(n) * u) * S + tiny
//! ```
//!
//! - **Storing** costs half a unit in the last place: `u_out * |ref64|`. Below the smallest normal
//!   number that half is absolute, which is the *tiny* term: `u_out * min_positive`.
//! - **Summing** `n` products in f32 makes `n` rounding errors of at most `u` times a partial sum,
//!   which `S` bounds. In the worst case they add up to `n * u * S`. In practice they do not, and
//!   [`SUM`]` * sqrt(n) * u * S` with `SUM = 4` holds for every order of summation, for sums in
//!   blocks, and for tensor cores that truncate instead of rounding. Up to `n = 16` it is the worst
//!   case itself. The bound is still tight: one product of typical size, `S / n`, exceeds it up to
//!   `n = 26000`.
//! - **A bias**, and a routing weight that multiplies a sum, cost one unit of their result each.
//! - **Activations** amplify errors by their slope and add those of their evaluation; see
//!   `bound/activation.rs`.
//! - **Weights** of the router are computed in intervals that contain the possible results of each
//!   operation in f32.
//! - **Combine** is a sum of `K` products as above and of up to two more terms. **Router products**
//!   are sums as above. An **RMS norm** has one such sum under a root, which halves its relative
//!   error.
//! - **The layer** rounds between its operations if its element type is narrow: `u_mid` is that of
//!   `act`, of `yp` (in f16 times its weight, unless a norm comes between), and of other
//!   intermediate tensors. The errors of an operation are propagated through the next: those of
//!   `act` add the sum over `I` of `|d act| * |down|` to `yp`.
//!
//! The bounds ignore overflow of intermediate values: a 16-bit `act` that becomes infinite exceeds
//! its bound.

mod activation;
mod dense;
mod grouped_gemm;
mod interval;
mod layer;

pub use dense::{combine, rms_norm, router_gemm};
pub use grouped_gemm::{grouped_gemm, grouped_gemm_gate_up, grouped_gemm_weighted};
use interval::{Interval, U};
pub use layer::{moe_layer, moe_layer_experts, noise_logits, router_logits};

use super::accum::Element;
use super::route::{RouteInputs, Routing, route_in};
use crate::config::RouterConfig;
use crate::dtype::{DType, Dtype};
use crate::error::Result;
use crate::shape::RoutingShape;

/// The factor `c` of the bound on a sum; the module docs have the reason.
pub const SUM: f64 = 4.0;

/// The reference in f64, and the largest error of a correct result for each element.
#[derive(Debug, Clone, PartialEq)]
pub struct Bounded {
    /// The reference.
    pub value: Vec<f64>,
    /// The largest distance of a correct result from the reference.
    pub bound: Vec<f64>,
}

impl Bounded {
    /// The largest [`excess`] of a result and its index; `None` for an empty result.
    ///
    /// For a result of another length the excess is infinite, at the first index that only one of
    /// them has.
    pub fn worst<D: Dtype>(&self, got: &[D]) -> Option<(usize, f64)> {
        if got.len() != self.value.len() {
            return Some((got.len().min(self.value.len()), f64::INFINITY));
        }
        let elements = got.iter().zip(&self.value).zip(&self.bound);
        let excesses = elements.map(|((&got, &value), &bound)| excess(got, value, bound));
        excesses.enumerate().max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// The error of an element divided by its bound: at most 1 if the element is correct, never NaN.
///
/// For a NaN reference only NaN is correct. An infinity is correct if numbers within the bound
/// round to it.
pub fn excess<D: Dtype>(got: D, value: f64, bound: f64) -> f64 {
    let wide = got.to_f64();
    let right = if value.is_nan() {
        wide.is_nan()
    } else if wide.is_infinite() {
        let furthest = if value.is_infinite() { value } else { value + bound.copysign(wide) };
        D::from_f64(furthest).to_f64() == wide
    } else {
        wide == value
    };
    let error = (wide - value).abs();
    match () {
        () if right => 0.0,
        () if error.is_finite() && !bound.is_nan() => error / bound,
        () => f64::INFINITY,
    }
}

/// The relative error `|x - y| / |y|` of `x` in the Euclidean norm; 0 for two empty or zero
/// tensors.
pub fn relative_error(x: &[f64], y: &[f64]) -> f64 {
    let error: f64 = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum();
    let norm: f64 = y.iter().map(|y| y * y).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// The routing and the bounds of its weights, `[T, K]`. Ids are exact. A bound is infinite if f32
/// overflows or scores cancel.
///
/// # Errors
/// Those of [`route_fwd`](super::route_fwd).
pub fn route<D: Dtype>(
    shape: &RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
) -> Result<(Routing<f64>, Vec<f64>)> {
    let Routing { expert_ids, routing_weights: weights } =
        route_in::<Interval, D>(shape, router, inputs)?;
    let bound = weights.iter().map(Interval::bound).collect();
    let weights = weights.iter().map(|weight| weight.mid).collect();
    Ok((Routing { expert_ids, routing_weights: weights }, bound))
}

/// The error of a sum of `terms` products with magnitude `s`. The error of a product below the
/// normal numbers of f32 is half the smallest subnormal number.
fn sum_error(terms: usize, s: f64) -> f64 {
    let n = terms as f64;
    SUM * n.sqrt() * U * s + n * U * DType::F32.min_positive()
}

/// Adds the error of storing: half a unit in the last place of the stored number.
fn stored(value: &[f64], errors: Vec<f64>, out: DType) -> Vec<f64> {
    let u = out.unit_roundoff();
    let stored =
        |(value, error): (&f64, f64)| error + u * (value.abs() + error + out.min_positive());
    value.iter().zip(errors).map(stored).collect()
}

fn magnitudes<X: Element<f64>>(values: &[X]) -> Vec<f64> {
    values.iter().map(|value| value.widen().abs()).collect()
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::combine::{CombineInputs, combine_fwd};
    use super::super::expert_weights::{GateUpWeights, LinearWeights};
    use super::super::grouped_gemm::{grouped_gemm_fwd, grouped_gemm_gate_up_fwd};
    use super::super::layer::{moe_layer_fwd, round};
    use super::super::plan::{Plan, plan_fwd};
    use super::super::sample::Sampler;
    use super::*;
    use crate::config::{ExpertConfig, MoeConfig};
    use crate::tensors::{Host, MoeInputs, MoeWeights};

    fn worst<D: Dtype>(bounded: &Bounded, got: &[D]) -> f64 {
        bounded.worst(got).map_or(0.0, |(_, excess)| excess)
    }

    /// A plan of one expert and one row, with `x` `[1, in]` and `w` `[out, in]` of either sign.
    fn one_row<D: Dtype>(out_features: usize, in_features: usize) -> (Plan, Vec<D>, Vec<D>) {
        let plan =
            plan_fwd(&RoutingShape { num_tokens: 1, num_experts: 1, top_k: 1 }, &[0]).unwrap();
        let mut sampler = Sampler::new(in_features as u64);
        let x = sampler.elements(in_features);
        (plan, x, sampler.elements(out_features * in_features))
    }

    /// A sum in f32 from left to right, the order of largest error.
    fn sum_in_order<D: Dtype>(x: &[D], w: &[D]) -> f32 {
        x.iter().zip(w).fold(0.0, |sum, (x, w)| sum + x.to_f32() * w.to_f32())
    }

    fn check_sum<D: Dtype>(k: usize) {
        let (plan, x, w) = one_row::<D>(20, k);
        let bounded =
            grouped_gemm(&plan, 20, k, &x, LinearWeights::new(&w), true, D::DTYPE).unwrap();
        let mut got: Vec<D> = w.chunks(k).map(|w| D::from_f32(sum_in_order(&x, w))).collect();
        assert!(worst(&bounded, &got) <= 1.0);
        // One sum lacks one product of typical size.
        let typical =
            (0..k).find(|&i| (0.2..0.5).contains(&(x[i].to_f64() * w[7 * k + i].to_f64())));
        let mut w = w[7 * k..][..k].to_vec();
        w[typical.unwrap()] = D::from_f32(0.0);
        got[7] = D::from_f32(sum_in_order(&x, &w));
        assert_eq!(bounded.worst(&got).map(|(i, excess)| (i, excess > 1.0)), Some((7, true)));
    }

    #[test]
    fn bound_of_sums_rejects_a_missing_product() {
        for k in [16, 100, 4096] {
            check_sum::<f32>(k);
            check_sum::<f16>(k);
            check_sum::<bf16>(k);
        }
    }

    /// Products of one sign have the largest error: partial sums grow to the magnitude.
    #[test]
    fn bound_of_sums_holds_for_one_sign() {
        for k in [1, 2, 7, 1000, 20_000] {
            let (plan, x, w) = one_row::<f32>(50, k);
            let positive = |values: Vec<f32>| values.into_iter().map(f32::abs).collect::<Vec<_>>();
            let (x, w) = (positive(x), positive(w));
            let bounded =
                grouped_gemm(&plan, 50, k, &x, LinearWeights::new(&w), true, DType::F32).unwrap();
            let got: Vec<f32> = w.chunks(k).map(|w| sum_in_order(&x, w)).collect();
            assert!(worst(&bounded, &got) <= 1.0, "K {k}");
        }
    }

    fn check_swiglu<D: Dtype>(scale: f64) {
        let (n, k) = (60, 90);
        let (plan, x, w) = one_row::<D>(2 * n, k);
        let x: Vec<D> = x.iter().map(|x| D::from_f64(scale * x.to_f64())).collect();
        let (experts, gate_up) = (ExpertConfig::default(), GateUpWeights::fused(&w[..]));
        let bounded =
            grouped_gemm_gate_up(&plan, &experts, n, k, &x, gate_up, None, true, D::DTYPE).unwrap();
        let sums: Vec<f32> = w.chunks(k).map(|w| sum_in_order(&x, w)).collect();
        let swiglu = |gate: f32, up: f32| D::from_f32(gate / (1.0 + (-gate).exp()) * up);
        let got: Vec<D> = (0..n).map(|i| swiglu(sums[i], sums[n + i])).collect();
        assert!(worst(&bounded, &got) <= 1.0, "scale {scale}: {}", worst(&bounded, &got));
        let none = None::<&[f32]>;
        let fast =
            grouped_gemm_gate_up_fwd::<f32, D>(&plan, &experts, n, k, &x, gate_up, none, true)
                .unwrap();
        assert!(worst(&bounded, &round::<f32, D>(&fast)) <= 1.0);
        // Without the silu.
        let got: Vec<D> = (0..n).map(|i| D::from_f32(sums[i] * sums[n + i])).collect();
        assert!(worst(&bounded, &got) > 10.0);
    }

    #[test]
    fn bound_of_swiglu_rejects_a_missing_silu() {
        for scale in [1e-3, 1.0, 5.0, 40.0] {
            check_swiglu::<f32>(scale);
            check_swiglu::<bf16>(scale);
            check_swiglu::<f16>(scale.min(5.0));
        }
    }

    #[test]
    fn bound_of_weights_is_tight() {
        let shape = RoutingShape { num_tokens: 50, num_experts: 200, top_k: 8 };
        for scale in [0.01, 1.0, 30.0, 200.0] {
            let mut logits: Vec<f32> = Sampler::new(3).elements(shape.logits());
            logits.iter_mut().for_each(|logit| *logit *= scale);
            for router in [
                RouterConfig::softmax_top_k(false),
                RouterConfig::softmax_top_k(true),
                RouterConfig::top_k_softmax(),
            ] {
                let (right, bound) = route(&shape, &router, &RouteInputs::new(&logits)).unwrap();
                let got =
                    route_in::<f32, f32>(&shape, &router, &RouteInputs::new(&logits)).unwrap();
                let bounded = Bounded { value: right.routing_weights, bound };
                assert!(worst(&bounded, &got.routing_weights) <= 1.0);
                let wrong: Vec<f32> =
                    got.routing_weights.iter().map(|weight| weight * 1.0001).collect();
                assert!(worst(&bounded, &wrong) > 1.0);
            }
        }
    }

    #[test]
    fn bound_of_combine_rejects_a_missing_row() {
        let shape = RoutingShape { num_tokens: 30, num_experts: 10, top_k: 6 };
        let mut sampler = Sampler::new(9);
        let (plan, hidden) = (sampler.plan(&shape), 8);
        let yp: Vec<bf16> = sampler.elements(shape.slots() * hidden);
        let mut weights: Vec<f32> = sampler.elements(shape.slots());
        let inputs = CombineInputs::new(&yp, &weights);
        let bounded = combine(&shape, &plan, hidden, &inputs, DType::BF16).unwrap();
        let combined = |weights: &[f32]| -> Vec<bf16> {
            let inputs = CombineInputs::new(&yp, weights);
            round(&combine_fwd::<f32>(&shape, &plan, hidden, &inputs).unwrap())
        };
        assert!(worst(&bounded, &combined(&weights)) <= 1.0);
        let active = plan.row_of_slot.iter().position(|&row| row >= 0).unwrap();
        weights[active] = 0.0;
        assert!(worst(&bounded, &combined(&weights)) > 1.0);
    }

    /// The layer as on a device: in f32, with `act` and `yp` stored as `D`.
    fn layer_in_steps<D: Dtype>(
        config: &MoeConfig,
        inputs: &[Vec<D>; 4],
        drop_slot: bool,
    ) -> Vec<D> {
        let [x, logits, gate_up, down] = inputs;
        let (h, i, shape) = (config.hidden, config.intermediate, config.routing(20));
        let mut routing =
            route_in::<f32, D>(&shape, &config.router, &RouteInputs::new(logits)).unwrap();
        let plan = plan_fwd(&shape, &routing.expert_ids).unwrap();
        let (gate_up, down) = (GateUpWeights::fused(&gate_up[..]), LinearWeights::new(&down[..]));
        let (experts, none) = (&config.experts, None::<&[f32]>);
        let act: Vec<D> = round(
            &grouped_gemm_gate_up_fwd::<f32, D>(&plan, experts, i, h, x, gate_up, none, true)
                .unwrap(),
        );
        let yp: Vec<D> =
            round(&grouped_gemm_fwd::<f32, D>(&plan, h, i, &act, down, false).unwrap());
        if drop_slot {
            routing.routing_weights[0] = 0.0;
        }
        let inputs = CombineInputs::new(&yp, &routing.routing_weights);
        round(&combine_fwd::<f32>(&shape, &plan, h, &inputs).unwrap())
    }

    fn check_layer<D: Dtype>(router: RouterConfig) {
        let config = MoeConfig { router, ..MoeConfig::new(48, 72, 6, 2) };
        let mut sampler = Sampler::new(11);
        let num_tokens = 20;
        let case = [
            sampler.elements::<D>(num_tokens * config.hidden),
            sampler.elements::<D>(num_tokens * config.num_experts),
            sampler.elements::<D>(config.gate_up_len()),
            sampler.elements::<D>(config.down_len()),
        ];
        let [x, logits, gate_up, down] = &case;
        let inputs = MoeInputs::<Host<'_>, D>::with_logits(x, logits);
        let weights = MoeWeights::<Host<'_>, D>::plain(gate_up, down);
        let bounded = moe_layer(&config, &inputs, &weights).unwrap();
        let exact = moe_layer_fwd::<f64, D>(&config, &inputs, &weights).unwrap();
        assert_eq!(bounded.value, exact);
        assert!(worst(&bounded, &layer_in_steps(&config, &case, false)) <= 1.0);
        let cpu = moe_layer_fwd::<f32, D>(&config, &inputs, &weights).unwrap();
        assert!(worst(&bounded, &round::<f32, D>(&cpu)) <= 1.0);
        assert!(worst(&bounded, &layer_in_steps(&config, &case, true)) > 1.0);
    }

    #[test]
    fn bound_of_layers_rejects_a_missing_slot() {
        for router in [RouterConfig::softmax_top_k(true), RouterConfig::top_k_softmax()] {
            check_layer::<f32>(router);
            check_layer::<f16>(router);
            check_layer::<bf16>(router);
        }
    }

    #[test]
    fn excess_handles_nan_and_infinity() {
        assert_eq!(excess(f32::NAN, f64::NAN, 0.0), 0.0);
        assert_eq!(excess(f32::NAN, 1.0, 9.0), f64::INFINITY);
        assert_eq!(excess(1.0f32, f64::NAN, f64::NAN), f64::INFINITY);
        assert_eq!(excess(f32::INFINITY, f64::INFINITY, f64::NAN), 0.0);
        assert_eq!(excess(f32::INFINITY, f64::NEG_INFINITY, f64::NAN), f64::INFINITY);
        assert_eq!(excess(f16::INFINITY, 65519.0, 40.0), 0.0);
        assert_eq!(excess(f16::INFINITY, 65400.0, 40.0), f64::INFINITY);
        assert_eq!(excess(f16::NEG_INFINITY, 65519.0, 40.0), f64::INFINITY);
        assert_eq!(excess(1.5f32, 1.0, 0.25), 2.0);
        assert_eq!(excess(0.0f32, -0.0, 0.0), 0.0);
        assert_eq!(excess(1.0f32, 0.0, 0.0), f64::INFINITY);
        let bounded = Bounded { value: vec![1.0; 2], bound: vec![1.0; 2] };
        assert_eq!(bounded.worst(&[1.0f32]), Some((1, f64::INFINITY)));
    }

    #[test]
    fn relative_error_is_euclidean() {
        assert_eq!(relative_error(&[], &[]), 0.0);
        assert_eq!(relative_error(&[3.0, 4.0], &[0.0, 4.0]), 0.75);
        assert_eq!(relative_error(&[1.0], &[0.0]), f64::INFINITY);
    }
}
