//! The activation between an expert's projections.

use super::accum::Accum;
use crate::config::{Activation, ActivationFunction, Limit};

/// `f(gate) * (up + up_offset)` with `activation`'s limits; without a gate, `f(up)`.
///
/// NaN propagates: limits are comparisons.
pub fn activate<A: Accum>(activation: &Activation, gate: Option<A>, up: A) -> A {
    let (g, u) = match gate {
        Some(gate) => (gate, Some(up)),
        None => (up, None),
    };
    let (h, u) = match activation.limit {
        Limit::None => (function(activation, g), u),
        Limit::Before { limit } => {
            let limit = number(limit);
            (function(activation, at_most(g, limit)), u.map(|u| clamp(u, limit)))
        }
        Limit::After { limit } => {
            let limit = number(limit);
            (at_most(function(activation, g), limit), u.map(|u| clamp(u, limit)))
        }
        Limit::SoftCap { gate, up } => {
            let s = number::<A>(activation.alpha) * g;
            (times_sigmoid(soft_cap(g, number(gate)), s), u.map(|u| soft_cap(u, number(up))))
        }
    };
    u.map_or(h, |u| h * (u + number(activation.up_offset)))
}

/// The function of the gate without limits.
pub(super) fn function<A: Accum>(activation: &Activation, g: A) -> A {
    let half = number::<A>(0.5);
    let inverse_root = A::nearest(std::f64::consts::FRAC_1_SQRT_2);
    match activation.function {
        ActivationFunction::Silu => times_sigmoid(g, number::<A>(activation.alpha) * g),
        // 1 + erf(z) is erfc(-z), which does not cancel.
        ActivationFunction::Gelu => half * g * (-inverse_root * g).erfc(),
        ActivationFunction::GeluTanh => times_sigmoid(g, gelu_tanh_argument(g)),
        ActivationFunction::Relu => relu(g),
        ActivationFunction::ReluSquared => relu(g) * relu(g),
    }
}

/// Twice the argument of `tanh`: `(1 + tanh(z)) / 2` is the sigmoid of `2 * z`, which does not
/// cancel.
pub(super) fn gelu_tanh_argument<A: Accum>(g: A) -> A {
    A::nearest(1.595_769_121_605_730_8) * (g + A::nearest(0.044715) * (g * g * g))
}

/// `x * sigmoid(s)`
fn times_sigmoid<A: Accum>(x: A, s: A) -> A {
    x / (A::ONE + (-s).exp())
}

fn relu<A: Accum>(g: A) -> A {
    if g < A::ZERO { A::ZERO } else { g }
}

/// `cap * tanh(x / cap)`
fn soft_cap<A: Accum>(x: A, cap: A) -> A {
    cap * (x / cap).tanh()
}

fn at_most<A: Accum>(x: A, limit: A) -> A {
    if x > limit { limit } else { x }
}

fn clamp<A: Accum>(x: A, limit: A) -> A {
    if x < -limit { -limit } else { at_most(x, limit) }
}

fn number<A: Accum>(value: f32) -> A {
    A::from_dtype(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(function: ActivationFunction, limit: Limit) -> Activation {
        Activation { function, limit, ..Activation::default() }
    }

    /// Values of PyTorch's functions, in f64.
    #[test]
    fn functions_agree_with_pytorch() {
        use ActivationFunction::{Gelu, GeluTanh, Relu, ReluSquared, Silu};
        let at = |f, g: f64| function(&with(f, Limit::None), g);
        let close =
            |got: f64, want: f64| assert!((got - want).abs() < 1e-14 * want.abs(), "{got} {want}");
        close(at(Silu, 1.0), 0.731_058_578_630_004_9);
        close(at(Gelu, 1.0), 0.841_344_746_068_542_9);
        close(at(Gelu, -3.0), -0.004_049_694_094_890_28);
        // The formulas with tanh and erf, for arguments at which they do not cancel.
        for g in [-2.0f64, -0.3, 0.0, 0.7, 4.0] {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            assert!((at(GeluTanh, g) - g * (1.0 + z.tanh()) / 2.0).abs() < 1e-15);
            let erf = libm::erf(g / 2f64.sqrt());
            assert!((at(Gelu, g) - g * (1.0 + erf) / 2.0).abs() < 1e-15);
        }
        assert_eq!((at(Relu, -2.0), at(Relu, 3.0)), (0.0, 3.0));
        assert_eq!((at(ReluSquared, -2.0), at(ReluSquared, 3.0)), (0.0, 9.0));
        assert!(
            [Silu, Gelu, GeluTanh, Relu, ReluSquared].iter().all(|&f| at(f, f64::NAN).is_nan())
        );
    }

    /// gpt-oss: `(u + 1) * g * sigmoid(1.702 * g)` with `g` at most 7 and `u` within 7.
    #[test]
    fn limits_apply_before_or_after_the_function() {
        let oss = Activation {
            alpha: 1.702,
            limit: Limit::Before { limit: 7.0 },
            up_offset: 1.0,
            ..Activation::default()
        };
        let alpha = f64::from(1.702f32);
        let sigmoid = |s: f64| 1.0 / (1.0 + (-s).exp());
        let want = |g: f64, u: f64| (u + 1.0) * g * sigmoid(alpha * g);
        for (g, u, at) in
            [(2.0, -3.0, (2.0, -3.0)), (9.0, 8.0, (7.0, 7.0)), (-9.0, -8.0, (-9.0, -7.0))]
        {
            assert!((activate(&oss, Some(g), u) - want(at.0, at.1)).abs() < 1e-13);
        }
        let after = with(ActivationFunction::Silu, Limit::After { limit: 2.0 });
        assert_eq!(activate(&after, Some(50.0), 3.0), 4.0);
        assert_eq!(activate(&after, None, 50.0), 2.0);
        let relu = with(ActivationFunction::Relu, Limit::Before { limit: 2.0 });
        assert_eq!((activate(&relu, None, 50.0), activate(&relu, Some(-1.0), 5.0)), (2.0, 0.0));
        let cap = with(ActivationFunction::Silu, Limit::SoftCap { gate: 5.0, up: 3.0 });
        let want = 5.0 * 0.4f64.tanh() * sigmoid(2.0) * 3.0 * 2f64.tanh();
        assert!((activate(&cap, Some(2.0), 6.0) - want).abs() < 1e-14);
        assert!(
            activate(&oss, Some(f32::NAN), 1.0).is_nan()
                && activate(&oss, Some(1.0), f32::NAN).is_nan()
        );
    }
}
