//! Intervals that contain every possible result in f32. A router computed in them yields its error
//! bounds.

use std::ops::{Add, Div, Mul, Sub};

use crate::dtype::DType;
use crate::reference::route::exact::{Number, SHARE_UNIT};

/// The unit roundoff of f32, the type of every sum.
pub(super) const U: f64 = DType::F32.unit_roundoff();

/// The result of operations in f64, with the smallest and the largest result of the same operations
/// in f32.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interval {
    pub(super) low: f64,
    pub(super) mid: f64,
    pub(super) high: f64,
}

/// The distance of subnormal numbers of f32.
const TINY: f64 = f64::from_bits((1023 - 149) << 52);

impl Interval {
    /// The largest distance of a result in f32 from the one in f64.
    pub(super) fn bound(&self) -> f64 {
        if self.low == self.high {
            return 0.0;
        }
        (self.high - self.mid).max(self.mid - self.low)
    }

    /// Widens two ends by `units` times their unit roundoff, or times the smallest subnormal
    /// number. Ends that exceed the range of f32 become infinite.
    fn around(mid: f64, [low, high]: [f64; 2], units: f64) -> Self {
        let low = low - units * (U * low.abs() + TINY);
        let high = high + units * (U * high.abs() + TINY);
        // A NaN end makes the interval unbounded.
        let low = if low >= -f64::from(f32::MAX) { low } else { f64::NEG_INFINITY };
        let high = if high <= f64::from(f32::MAX) { high } else { f64::INFINITY };
        Self { low, mid, high }
    }

    /// A monotonically increasing function with an error of `units` in f32.
    fn grown(self, function: impl Fn(f64) -> f64, units: f64) -> Self {
        let ends = [function(self.low), function(self.high)];
        Self::around(function(self.mid), ends, units)
    }

    /// The extremes of an operation that has them at the ends of its operands.
    fn corners(self, other: Self, operation: impl Fn(f64, f64) -> f64) -> [f64; 2] {
        let pairs = [
            (self.low, other.low),
            (self.low, other.high),
            (self.high, other.low),
            (self.high, other.high),
        ];
        let results = pairs.map(|(a, b)| operation(a, b));
        if results.iter().any(|result| result.is_nan()) {
            return UNBOUNDED;
        }
        [results.into_iter().fold(f64::NAN, f64::min), results.into_iter().fold(f64::NAN, f64::max)]
    }
}

const UNBOUNDED: [f64; 2] = [f64::NEG_INFINITY, f64::INFINITY];

impl Add for Interval {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        // The sum of opposite infinities, which only noise and biases cause, counts as -inf later.
        let ends = [self.low + other.low, self.high + other.high].map(f64::cleaned);
        Self::around(self.mid + other.mid, ends, 1.0)
    }
}

impl Sub for Interval {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        let ends = [self.low - other.high, self.high - other.low].map(f64::cleaned);
        Self::around(self.mid - other.mid, ends, 1.0)
    }
}

impl Mul for Interval {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        if other.low == 1.0 && other.high == 1.0 {
            return self;
        }
        let ends = self.corners(other, |a, b| a * b);
        Self::around(self.mid * other.mid, ends, 1.0)
    }
}

impl Div for Interval {
    type Output = Self;

    fn div(self, other: Self) -> Self {
        let safe = other.low > 0.0 || other.high < 0.0;
        let ends = if safe { self.corners(other, |a, b| a / b) } else { UNBOUNDED };
        Self::around(self.mid / other.mid, ends, 1.0)
    }
}

impl Number for Interval {
    fn of(value: f32) -> Self {
        let value = value.into();
        Self { low: value, mid: value, high: value }
    }

    fn cleaned(self) -> Self {
        Self { low: self.low.cleaned(), mid: self.mid.cleaned(), high: self.high.cleaned() }
    }

    fn or_zero(self) -> Self {
        Self { mid: self.mid.or_zero(), ..self }
    }

    fn or_larger(self, other: Self) -> Self {
        Self {
            low: self.low.max(other.low),
            mid: self.mid.or_larger(other.mid),
            high: self.high.max(other.high),
        }
    }

    fn magnitude(self) -> Self {
        let (low, mid, high) = (self.low, self.mid.abs(), self.high);
        match () {
            () if low >= 0.0 => Self { low, mid, high },
            () if high <= 0.0 => Self { low: -high, mid, high: -low },
            () => Self { low: 0.0, mid, high: high.max(-low) },
        }
    }

    fn is_from_one_on(self) -> bool {
        self.mid.is_from_one_on()
    }

    fn share(self, max: Self) -> Self {
        // The NaN difference of equal infinities counts as 0.
        let exp = |difference: f64| if difference < 0.0 { difference.exp() } else { 1.0 };
        let ends = [self.low - max.high, self.high - max.low];
        let ends = [ends[0] - U * ends[0].abs(), ends[1] + U * ends[1].abs()].map(exp);
        Self::around(self.mid.share(max.mid), ends, 2.0)
    }

    fn sum_of_shares(shares: &[Self]) -> Self {
        let rounded = 0.5 * f64::from(SHARE_UNIT) * shares.len() as f64;
        let sum = |end: fn(&Self) -> f64| shares.iter().map(end).sum::<f64>();
        let ends = [sum(|share| share.low) - rounded, sum(|share| share.high) + rounded];
        Self::around(sum(|share| share.mid), ends, 1.0)
    }

    fn sigmoid(self) -> Self {
        self.grown(f64::sigmoid, 4.0)
    }

    fn softplus(self) -> Self {
        self.grown(f64::softplus, 4.0)
    }

    fn root_of_two(self) -> Self {
        self.grown(|x| if x > 0.0 { x.sqrt() } else { 0.0 }, 1.0)
    }

    fn tangent(self) -> Self {
        self.grown(f64::tanh, 4.0)
    }

    fn power(self, p: f32) -> Self {
        // kernels/exact.cuh states the error, and that small numbers count as 0.
        let wide = f64::from(p);
        let end = |x: f64, sign: f64| {
            if x.is_nan() || x <= 0.0 {
                return 0.0;
            }
            let units = 2.0 + 5.0 * wide * x.ln().abs();
            (x.powf(wide) * (1.0 + sign * units * U)).max(0.0) + sign * f64::from(f32::MIN_POSITIVE)
        };
        Self::around(self.mid.power(p), [end(self.low, -1.0), end(self.high, 1.0)], 1.0)
    }

    fn root(self, p: f32) -> Self {
        let root = |x: f64| x.max(1.0).root(p);
        let units = 4.0 + 8.0 * root(self.high).ln();
        Self::around(self.mid.root(p), [root(self.low), root(self.high)], units)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RouterConfig, Scoring};
    use crate::reference::route::{RouteInputs, route_in, values_in};
    use crate::reference::sample::Sampler;
    use crate::shape::RoutingShape;

    /// Where the values in f64 select another expert, the intervals of the two experts overlap;
    /// this is rare.
    #[test]
    fn ids_differ_from_those_of_f64_only_within_the_bound() {
        let shape = RoutingShape { num_tokens: 400, num_experts: 64, top_k: 6 };
        for scoring in [Scoring::Sigmoid, Scoring::SqrtSoftplus, Scoring::Softmax] {
            let plain = RouterConfig { scoring, selection_bias: true, ..RouterConfig::default() };
            let mut differing = 0;
            for router in [
                plain,
                RouterConfig { logit_softcap: Some(2.0), ..plain },
                RouterConfig { logit_multiplier: 6.0, ..plain },
            ] {
                let mut sampler = Sampler::new(23);
                let logits: Vec<f32> =
                    sampler.elements::<f32>(shape.logits()).iter().map(|l| 14.0 * l).collect();
                let bias = sampler.elements::<f32>(shape.num_experts).into_iter();
                let bias: Vec<f32> = bias.map(|bias| 1e-4 * bias).collect();
                let inputs =
                    RouteInputs { selection_bias: Some(&bias), ..RouteInputs::new(&logits) };
                let routing = route_in::<f32, f32>(&shape, &router, &inputs).unwrap();
                let values = values_in::<Interval, f32>(&shape, &router, &inputs);
                for (ids, values) in routing.expert_ids.chunks(shape.top_k).zip(values) {
                    for (k, &id) in ids.iter().enumerate() {
                        let chosen = values[id as usize];
                        let remaining =
                            (0..shape.num_experts).filter(|&e| !ids[..k].contains(&(e as u32)));
                        for other in remaining.map(|e| values[e]) {
                            assert!(
                                chosen.high >= other.low,
                                "{chosen:?} was chosen before {other:?}"
                            );
                            differing += usize::from(chosen.mid < other.mid);
                        }
                    }
                }
            }
            println!("{scoring:?}: {differing} of {} choices", 3 * shape.slots());
            assert!(
                differing <= 3 * shape.slots() / 100,
                "{scoring:?}: {differing} choices differ"
            );
        }
    }

    /// The bounds of typical routers are a few units.
    #[test]
    fn bounds_are_tight() {
        let shape = RoutingShape { num_tokens: 100, num_experts: 64, top_k: 6 };
        let logits: Vec<f32> = Sampler::new(5).elements(shape.logits());
        for (scoring, most) in
            [(Scoring::Softmax, 20.0), (Scoring::Sigmoid, 17.0), (Scoring::SqrtSoftplus, 17.0)]
        {
            let router = RouterConfig { scoring, ..RouterConfig::softmax_top_k(true) };
            let routing = route_in::<Interval, f32>(&shape, &router, &RouteInputs::new(&logits));
            for weight in routing.unwrap().routing_weights {
                let units = weight.bound() / (U * weight.mid);
                assert!(units <= most, "{scoring:?}: {units} units, wanted {most}");
            }
        }
    }
}
