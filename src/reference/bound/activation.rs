//! The bound of the activation of inexact sums.
//!
//! With errors `dg` and `du` of gate and up, a function with a slope of at most `L` is off by at
//! most `L * dg`, plus the error of its evaluation in f32; limits have a slope of at most 1 and are
//! exact. So `h = f(g) * u'`, with `u' = u + offset`, is off by at most
//! `df * (|u'| + du) + |f(g)| * du`, and rounding the product to f32 adds one unit.
//!
//! Evaluation costs a few units of the result, and more if the argument of an exponential is
//! rounded: `exp(s)` loses `|s|` units for each unit of error of `s`. If an exponential or `erfc`
//! leaves the range of f32, the result is 0 or denormal, and the exact one is less than
//! `2^-120 * |g|`.

use super::super::activation::{function, gelu_tanh_argument};
use super::U;
use crate::config::{Activation, ActivationFunction, Limit};

/// A value in f64 and the bound of the error of its computation in f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inexact {
    pub(super) value: f64,
    pub(super) error: f64,
}

/// The error of `activate` for inexact `gate` and `up`.
pub(super) fn activation_error(activation: &Activation, gate: Option<Inexact>, up: Inexact) -> f64 {
    let Some(gate) = gate else { return gated(activation, up).error };
    let f = gated(activation, gate);
    let up = match activation.limit {
        Limit::None => up,
        Limit::Before { limit } | Limit::After { limit } => {
            up.negated().at_most(limit).negated().at_most(limit)
        }
        Limit::SoftCap { up: cap, .. } => {
            let value = soft_cap(up.value, cap);
            Inexact { value, error: up.error + 8.0 * U * value.abs() }
        }
    };
    let value = up.value + f64::from(activation.up_offset);
    let up_error = up.error + U * value.abs();
    let error = f.error * (value.abs() + up_error) + f.value.abs() * up_error;
    error + U * (f.value * value).abs()
}

/// The function of the gate with its limits.
fn gated(activation: &Activation, gate: Inexact) -> Inexact {
    let exact = |gate: Inexact| {
        let value = function(activation, gate.value);
        Inexact { value, error: function_error(activation, gate, value) }
    };
    match activation.limit {
        Limit::None => exact(gate),
        Limit::Before { limit } => exact(gate.at_most(limit)),
        Limit::After { limit } => exact(gate).at_most(limit),
        Limit::SoftCap { gate: cap, .. } => {
            let Inexact { value: g, error } = gate;
            let s = f64::from(activation.alpha) * g;
            let value = soft_cap(g, cap) / (1.0 + (-s).exp());
            // Two factors: a slope of at most 1 beside a sigmoid, and one of the sigmoid's beside
            // |g| at most, where |s| * sigmoid'(s) <= 0.224.
            let own = (20.0 + 2.0 * s.abs()) * U * value.abs() + flushed(g);
            Inexact { value, error: 1.23 * error + own }
        }
    }
}

fn soft_cap(x: f64, cap: f32) -> f64 {
    f64::from(cap) * (x / f64::from(cap)).tanh()
}

impl Inexact {
    /// A value that exceeds the limit by more than its error becomes exact.
    fn at_most(self, limit: f32) -> Self {
        let limit = f64::from(limit);
        match self {
            Self { value, error } if value - error >= limit => Self { value: limit, error: 0.0 },
            Self { value, error } if value > limit => Self { value: limit, error },
            below => below,
        }
    }

    fn negated(self) -> Self {
        Self { value: -self.value, ..self }
    }
}

/// The error of the function, whose value is `f`.
fn function_error(activation: &Activation, gate: Inexact, f: f64) -> f64 {
    let Inexact { value: g, error: dg } = gate;
    let own = |units: f64| units * U * f.abs() + flushed(g);
    match activation.function {
        ActivationFunction::Silu => {
            STEEPEST_SILU * dg + own(8.0 + 2.0 * (f64::from(activation.alpha) * g).abs())
        }
        // If it is small, erfc(z) loses 2 * z * z = g * g units for each unit of error of z.
        ActivationFunction::Gelu => {
            STEEPEST_GELU * dg + own(if g < 0.0 { 16.0 + 4.0 * g * g } else { 20.0 })
        }
        // The argument is off by some 6 units of itself.
        ActivationFunction::GeluTanh => {
            let s = gelu_tanh_argument(g).abs();
            STEEPEST_GELU * dg + own(if g < 0.0 { 8.0 + 8.0 * s } else { 16.0 })
        }
        ActivationFunction::Relu => dg,
        ActivationFunction::ReluSquared => {
            let r = if g < 0.0 { 0.0 } else { g };
            (2.0 * r + dg) * dg + U * f.abs() + super::DType::F32.min_positive() * U
        }
    }
}

/// Bounds of the slopes of `g * sigmoid(alpha * g)`, for any alpha, and of both kinds of GELU.
const STEEPEST_SILU: f64 = 1.1;
const STEEPEST_GELU: f64 = 1.13;

/// The error of a result that underflows in f32.
fn flushed(g: f64) -> f64 {
    2f64.powi(-120) * (1.0 + g.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(function: ActivationFunction, limit: Limit) -> Activation {
        Activation { function, limit, ..Activation::default() }
    }

    #[test]
    fn slopes_of_functions_are_bounded() {
        let steepest = |activation: &Activation| {
            let slope =
                |x: f64| (function(activation, x + 1e-6) - function(activation, x - 1e-6)) / 2e-6;
            (-40_000..40_000).map(|i| slope(f64::from(i) * 1e-3).abs()).fold(0.0, f64::max)
        };
        for alpha in [0.3, 1.0, 1.702, -1.0] {
            let silu = Activation { alpha, ..Activation::default() };
            let steepest = steepest(&silu);
            assert!((1.09..STEEPEST_SILU).contains(&steepest), "alpha {alpha}: {steepest}");
        }
        for f in [ActivationFunction::Gelu, ActivationFunction::GeluTanh] {
            let steepest = steepest(&with(f, Limit::None));
            assert!((1.12..STEEPEST_GELU).contains(&steepest), "{f:?}: {steepest}");
        }
    }

    #[test]
    fn slopes_of_soft_caps_are_bounded() {
        for (cap, alpha) in [(0.1f32, 1.0f32), (1.0, 1.0), (7.0, 1.0), (30.0, 1.702), (3.0, 0.2)] {
            let activation = Activation {
                alpha,
                limit: Limit::SoftCap { gate: cap, up: 1.0 },
                ..Activation::default()
            };
            let at = |x: f64| gated(&activation, Inexact { value: x, error: 0.0 }).value;
            for i in -4000..4000 {
                let x = f64::from(i) * 1e-2;
                let slope = (at(x + 1e-6) - at(x - 1e-6)) / 2e-6;
                assert!(slope.abs() < 1.23, "cap {cap} at {x}: {slope}");
            }
        }
    }

    /// The function in f32 for exact gates: the only error is that of evaluation.
    #[test]
    fn errors_of_evaluation_are_bounded() {
        use super::super::super::activation::activate;
        use ActivationFunction::{Gelu, GeluTanh, Relu, ReluSquared, Silu};
        let limits = [
            Limit::None,
            Limit::Before { limit: 3.0 },
            Limit::After { limit: 2.0 },
            Limit::SoftCap { gate: 4.0, up: 2.0 },
        ];
        for function in [Silu, Gelu, GeluTanh, Relu, ReluSquared] {
            for limit in limits {
                if matches!(limit, Limit::SoftCap { .. }) && function != Silu {
                    continue;
                }
                let activation = Activation { up_offset: 0.5, ..with(function, limit) };
                for i in -3000..3000 {
                    let g = i as f32 * 0.0137;
                    let u = (i % 17) as f32 * 0.3 - 2.0;
                    let exact = |value: f32| Inexact { value: value.into(), error: 0.0 };
                    for gate in [None, Some(g)] {
                        let up = if gate.is_some() { u } else { g };
                        let got = f64::from(activate(&activation, gate, up));
                        let want = activate(&activation, gate.map(f64::from), f64::from(up));
                        let bound = activation_error(&activation, gate.map(exact), exact(up));
                        assert!(
                            (got - want).abs() <= bound,
                            "{activation} of {gate:?}, {up}: {got} {want} {bound}"
                        );
                        assert!(
                            bound <= 1e-4 * want.abs().max(1e-3),
                            "{activation} of {gate:?}, {up}: {bound}"
                        );
                    }
                }
            }
        }
    }
}
