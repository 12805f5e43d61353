//! The number types of the router: f32, bit for bit as the kernel, and f64 as the exact value.

#![allow(clippy::excessive_precision, reason = "constants are written as in kernels/exact.cuh")]

use std::ops::{Add, Div, Mul, Sub};

/// The operations of the router's steps. Every function of f32 has the same bits on every device.
pub trait Number:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// The same number.
    fn of(value: f32) -> Self;
    /// `-inf` for NaN, `+0` for `-0`.
    fn cleaned(self) -> Self;
    /// 0 for NaN.
    fn or_zero(self) -> Self;
    /// The number itself if it is larger, else `other`; `other` for NaN.
    fn or_larger(self, other: Self) -> Self;
    /// Without the sign.
    fn magnitude(self) -> Self;
    /// True for numbers of at least 1.
    fn is_from_one_on(self) -> bool;
    /// `exp(self - max)`; 1 if both are equal, the same infinity included.
    fn share(self, max: Self) -> Self;
    /// The sum of results of [`share`](Self::share); it does not depend on their order.
    fn sum_of_shares(shares: &[Self]) -> Self;
    /// `1 / (1 + exp(-self))`
    fn sigmoid(self) -> Self;
    /// `ln(1 + exp(self))`
    fn softplus(self) -> Self;
    /// The square root.
    fn root_of_two(self) -> Self;
    /// The hyperbolic tangent.
    fn tangent(self) -> Self;
    /// The power of `p`, for numbers from 0 to 1.
    fn power(self, p: f32) -> Self;
    /// The `p`-th root, for numbers from 1 to the most experts.
    fn root(self, p: f32) -> Self;
}

/// Shares are added as integers of this unit: `2^-29`, so that four of them fit 32 bits.
pub(in crate::reference) const SHARE_UNIT: f32 = 1.0 / (1u32 << 29) as f32;

impl Number for f32 {
    fn of(value: f32) -> f32 {
        value
    }

    fn cleaned(self) -> f32 {
        // Adding +0 turns -0 into +0 and keeps every other number.
        if self.is_nan() { f32::NEG_INFINITY } else { self + 0.0 }
    }

    fn or_zero(self) -> f32 {
        if self.is_nan() { 0.0 } else { self }
    }

    fn or_larger(self, other: f32) -> f32 {
        if self > other { self } else { other }
    }

    fn magnitude(self) -> f32 {
        self.abs()
    }

    fn is_from_one_on(self) -> bool {
        self >= 1.0
    }

    fn share(self, max: f32) -> f32 {
        if self == max { 1.0 } else { exp(self - max) }
    }

    fn sum_of_shares(shares: &[f32]) -> f32 {
        let units = |share: &f32| (share / SHARE_UNIT).round_ties_even() as u64;
        shares.iter().map(units).sum::<u64>() as f32 * SHARE_UNIT
    }

    fn sigmoid(self) -> f32 {
        let t = exp(-self.abs());
        (if self < 0.0 { t } else { 1.0 }) / (1.0 + t)
    }

    fn softplus(self) -> f32 {
        (if self > 0.0 { self } else { 0.0 }) + log1p(exp(-self.abs()))
    }

    fn root_of_two(self) -> f32 {
        self.sqrt()
    }

    fn tangent(self) -> f32 {
        tanh(self)
    }

    fn power(self, p: f32) -> f32 {
        match p {
            1.0 => self,
            2.0 => self * self,
            _ if self >= f32::MIN_POSITIVE => exp(p * log(self)),
            _ => 0.0,
        }
    }

    fn root(self, p: f32) -> f32 {
        match p {
            1.0 => self,
            2.0 => self.sqrt(),
            _ => 1.0 / exp(-(log(self) / p)),
        }
    }
}

impl Number for f64 {
    fn of(value: f32) -> f64 {
        value.into()
    }

    fn cleaned(self) -> f64 {
        if self.is_nan() { f64::NEG_INFINITY } else { self + 0.0 }
    }

    fn or_zero(self) -> f64 {
        if self.is_nan() { 0.0 } else { self }
    }

    fn or_larger(self, other: f64) -> f64 {
        if self > other { self } else { other }
    }

    fn magnitude(self) -> f64 {
        self.abs()
    }

    fn is_from_one_on(self) -> bool {
        self >= 1.0
    }

    fn share(self, max: f64) -> f64 {
        if self == max { 1.0 } else { (self - max).exp() }
    }

    fn sum_of_shares(shares: &[f64]) -> f64 {
        shares.iter().sum()
    }

    fn sigmoid(self) -> f64 {
        let t = (-self.abs()).exp();
        (if self < 0.0 { t } else { 1.0 }) / (1.0 + t)
    }

    fn softplus(self) -> f64 {
        self.max(0.0) + (-self.abs()).exp().ln_1p()
    }

    fn root_of_two(self) -> f64 {
        self.sqrt()
    }

    fn tangent(self) -> f64 {
        self.tanh()
    }

    fn power(self, p: f32) -> f64 {
        self.powf(p.into())
    }

    fn root(self, p: f32) -> f64 {
        self.powf(1.0 / f64::from(p))
    }
}

// The functions of kernels/exact.cuh, which explains the constants and the errors. Rust never
// contracts a product and a sum: fused operations are written as such.

/// `exp(x)` for `x <= 0`.
fn exp(x: f32) -> f32 {
    if x < -104.0 {
        return 0.0;
    }
    const ROUND: f32 = 12582912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = (shifted.to_bits() as i32).wrapping_sub(0x4b40_0000);
    let whole = shifted - ROUND;
    let r = whole.mul_add(1.90465430e-9, whole.mul_add(-0.693147182, x));
    let mut q = 1.39263261e-3f32;
    for c in [8.36329255e-3, 4.16665524e-2, 1.66665763e-1, 0.5] {
        q = q.mul_add(r, c);
    }
    let value = 1.0 + (r * r).mul_add(q, r);
    let half = n / 2;
    value * power_of_two(half) * power_of_two(n - half)
}

fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// `2 atanh(s)` for `|s| <= 1/3`.
fn two_atanh(s: f32) -> f32 {
    let x = s * s;
    let mut q = 0.11612165f32;
    for c in [0.108532876, 0.142961785, 0.199998528, 0.333333343] {
        q = q.mul_add(x, c);
    }
    let twice = s + s;
    twice.mul_add(x * q, twice)
}

/// `ln(1 + t)` for `0 <= t <= 1`.
fn log1p(t: f32) -> f32 {
    two_atanh(t / (2.0 + t))
}

/// `n` and `f` of `x = 2^n * f` with `f` from `sqrt(1/2)` to `sqrt(2)`, for positive normal `x`.
fn log_parts(x: f32) -> (f32, f32) {
    let bits = x.to_bits() as i32;
    let n = bits.wrapping_sub(0x3f35_04f3) >> 23;
    (n as f32, f32::from_bits(bits.wrapping_sub(n << 23) as u32))
}

/// `ln(x)` for positive normal `x`.
fn log(x: f32) -> f32 {
    let (n, f) = log_parts(x);
    let r = two_atanh((f - 1.0) / (f + 1.0));
    n.mul_add(0.693147182, n.mul_add(-1.90465430e-9, r))
}

/// `ln(x)` for positive normal `x`, as noise is specified with it.
pub(in crate::reference) fn precise_log(x: f32) -> f32 {
    let (n, f) = log_parts(x);
    let f = f - 1.0;
    // ln(1 + f) = 2 atanh(s) with s = f / (2 + f).
    let s = f / (2.0 + f);
    let z = s * s;
    let mut q = 0.233304679f32;
    for c in [0.285508215, 0.400001228, 0.666666687] {
        q = q.mul_add(z, c);
    }
    let half_square = 0.5 * (f * f);
    let small = s * z.mul_add(q, half_square);
    // ln 2 as a sum of two floats.
    let tail = n.mul_add(1.42860677e-6, small);
    n.mul_add(0.693145752, f - (half_square - tail))
}

/// `tanh(x)` for any number.
fn tanh(x: f32) -> f32 {
    let size = x.abs();
    if size < 0.55 {
        let y = x * x;
        let mut q = -6.61022775e-3f32;
        for c in [2.13093888e-2, -5.39094284e-2, 0.133331135, -0.333333313] {
            q = q.mul_add(y, c);
        }
        return x.mul_add(y * q, x);
    }
    let t = exp(-2.0 * size);
    ((1.0 - t) / (1.0 + t)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest error over every `step`-th number between two of one sign, in units of 2^-24 of
    /// the value.
    fn worst(
        from: f32,
        to: f32,
        step: usize,
        got: impl Fn(f32) -> f32,
        want: impl Fn(f64) -> f64,
    ) -> f64 {
        let (low, high) = (from.to_bits().min(to.to_bits()), from.to_bits().max(to.to_bits()));
        let error = |bits| {
            let x = f32::from_bits(bits);
            let want = want(x.into());
            let near = want.abs() >= f32::MIN_POSITIVE.into();
            let error = (f64::from(got(x)) - want).abs();
            if near { error / want.abs() * f64::from(1 << 24) } else { error / 2f64.powi(-149) }
        };
        (low..=high).step_by(step).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn errors_are_within_their_bounds() {
        let tiny = f32::from_bits(1);
        let all = [
            ("exp", 1.6, worst(-tiny, -104.0, 997, exp, f64::exp)),
            ("two_atanh", 1.6, worst(tiny, 1.0 / 3.0, 997, two_atanh, |s| 2.0 * s.atanh())),
            ("log1p", 4.0, worst(tiny, 1.0, 997, log1p, f64::ln_1p)),
            ("log", 4.0, worst(f32::MIN_POSITIVE, f32::MAX, 997, log, f64::ln)),
            ("precise_log", 1.5, worst(f32::MIN_POSITIVE, f32::MAX, 997, precise_log, f64::ln)),
            ("tanh", 4.0, worst(tiny, f32::MAX, 997, tanh, f64::tanh)),
            ("tanh below", 4.0, worst(-0.5, -0.6, 7, tanh, f64::tanh)),
            ("softplus", 4.0, worst(-tiny, -80.0, 997, Number::softplus, Number::softplus)),
            ("softplus above", 4.0, worst(tiny, 1e6, 997, Number::softplus, Number::softplus)),
            ("sigmoid", 4.0, worst(-tiny, -87.0, 997, Number::sigmoid, Number::sigmoid)),
            ("sigmoid above", 4.0, worst(tiny, 1e6, 997, Number::sigmoid, Number::sigmoid)),
        ];
        for (name, bound, worst) in all {
            println!("{name}: {worst:.3}");
            assert!(worst <= bound, "{name} is off by {worst} units, wanted {bound}");
            // A loose bound would hide a wrong coefficient.
            assert!(worst >= 0.4 * bound, "{name} is off by {worst} units, and may be by {bound}");
        }
    }

    #[test]
    fn powers_and_roots_are_within_their_bounds() {
        for p in [1.0f32, 1.3, 2.0, 3.0, 7.5, 40.0] {
            let wide = f64::from(p);
            for i in 1..4000 {
                let x = i as f32 / 4000.0;
                let units = (2.0 + 5.0 * wide * f64::from(x).ln().abs()) * 2f64.powi(-24);
                let want = f64::from(x).powf(wide);
                assert!((f64::from(x.power(p)) - want).abs() <= units * want + 1e-44, "{x} {p}");
                let root = (1.0 + x * 4095.0).root(p);
                let want = (1.0 + f64::from(x * 4095.0)).powf(1.0 / wide);
                let units = 4.0 + 8.0 * want.ln();
                assert!((f64::from(root) / want - 1.0).abs() <= units * 2f64.powi(-24), "{x} {p}");
            }
        }
        assert_eq!((0.0f32.power(3.0), 1.0f32.power(1e30), 1e-40f32.power(1.5)), (0.0, 1.0, 0.0));
    }

    #[test]
    fn values_at_the_ends_of_the_ranges() {
        let infinity = f32::INFINITY;
        assert_eq!((exp(0.0), exp(-infinity), exp(-103.9)), (1.0, 0.0, f32::from_bits(1)));
        assert_eq!((log1p(0.0), log1p(1.0)), (0.0, std::f32::consts::LN_2));
        assert_eq!((tanh(infinity), tanh(-infinity), tanh(0.0)), (1.0, -1.0, 0.0));
        assert_eq!((infinity.sigmoid(), (-infinity).sigmoid(), 0.0f32.sigmoid()), (1.0, 0.0, 0.5));
        assert_eq!((infinity.softplus(), (-infinity).softplus()), (infinity, 0.0));
        assert_eq!((infinity.share(infinity), (-infinity).share(-infinity)), (1.0, 1.0));
        assert_eq!((1.0f32.share(infinity), (-infinity).share(1.0)), (0.0, 0.0));
        let share = 3.0f32 * SHARE_UNIT;
        assert_eq!(f32::sum_of_shares(&[1.0, share, SHARE_UNIT * 0.49]), 1.0 + share);
    }
}
