//! The inputs of a check, generated from a seed.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use moe_kernels::reference::{self, Plan};
use moe_kernels::{Dtype, MoeConfig, RouterConfig, RoutingShape};

use crate::error::Result;

/// The dimensions of a case, written `T37H72I56E5K2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub num_tokens: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub num_experts: usize,
    pub top_k: usize,
}

impl Shape {
    /// Single elements, rows that are no multiple of 16 bytes, tails of every tile, K = E, many
    /// experts.
    pub const DEFAULTS: [&'static str; 6] = [
        "T1H1I1E1K1",
        "T5H33I7E7K7",
        "T37H72I56E5K2",
        "T150H40I136E3K1",
        "T24H136I24E67K6",
        "T9H16I16E513K8",
    ];

    const LETTERS: [char; 5] = ['T', 'H', 'I', 'E', 'K'];
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { num_tokens, hidden, intermediate, num_experts, top_k } = self;
        write!(f, "T{num_tokens}H{hidden}I{intermediate}E{num_experts}K{top_k}")
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wanted = || format!("'{text}' is not a shape like T37H72I56E5K2");
        let mut rest = text;
        let mut numbers = [0; 5];
        for (number, letter) in numbers.iter_mut().zip(Self::LETTERS) {
            rest = rest.strip_prefix(letter).ok_or_else(wanted)?;
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            *number = rest[..end].parse().ok().filter(|number| *number > 0).ok_or_else(wanted)?;
            rest = &rest[end..];
        }
        let [num_tokens, hidden, intermediate, num_experts, top_k] = numbers;
        if !rest.is_empty() {
            return Err(wanted());
        }
        RoutingShape::new(num_tokens, num_experts, top_k).map_err(|error| error.to_string())?;
        Ok(Self { num_tokens, hidden, intermediate, num_experts, top_k })
    }
}

/// The distribution of tokens over experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Skew {
    /// The same probability for every expert
    Uniform,
    /// Probability proportional to 1 / r for expert r, from 1
    Zipf,
    /// Expert 0 is the first choice of every token
    Hot,
    /// Every second expert gets no tokens, as far as K allows
    Empty,
    /// Uniform, with ids outside of 0..E in every third slot
    Inactive,
}

impl Skew {
    pub const NAMES: [&'static str; 5] = ["uniform", "zipf", "hot", "empty", "inactive"];

    /// The value that is added to the logits of an expert.
    fn bias(self, expert: usize) -> f64 {
        const DECIDES: f64 = 30.0;
        match self {
            Skew::Uniform | Skew::Inactive => 0.0,
            Skew::Zipf => -((expert + 1) as f64).ln(),
            Skew::Hot => {
                if expert == 0 {
                    DECIDES
                } else {
                    0.0
                }
            }
            Skew::Empty => {
                if expert % 2 == 1 {
                    -DECIDES
                } else {
                    0.0
                }
            }
        }
    }
}

impl fmt::Display for Skew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let index = Skew::value_variants().iter().position(|skew| skew == self).unwrap_or(0);
        f.write_str(Self::NAMES[index])
    }
}

/// The inputs of every operation, rounded to `D`.
pub struct Case<D> {
    pub config: MoeConfig,
    pub shape: RoutingShape,
    /// `[T, H]`
    pub x: Vec<D>,
    /// `[T, E]`
    pub logits: Vec<D>,
    /// `[E, 2I, H]`
    pub gate_up: Vec<D>,
    /// `[E, H, I]`
    pub down: Vec<D>,
    /// `[T, K]`; with the skew `inactive` some are E or more.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`
    pub weights: Vec<f32>,
    /// The plan of `expert_ids`.
    pub plan: Plan,
    /// `[R, I]`
    pub act: Vec<D>,
    /// `[R, H]`
    pub yp: Vec<D>,
}

impl<D: Dtype> Case<D> {
    pub fn new(dims: Shape, skew: Skew, seed: u64) -> Result<Self> {
        let Shape { num_tokens, hidden, intermediate, num_experts, top_k } = dims;
        // The seed selects the scoring; `route` is checked with all of them.
        let router = ROUTERS[(seed % ROUTERS.len() as u64) as usize];
        let config =
            MoeConfig { router, ..MoeConfig::new(hidden, intermediate, num_experts, top_k) };
        config.check()?;
        let shape = config.routing(num_tokens);
        let slots = shape.slots();

        let mut random = Random(seed);
        // As with trained weights, outputs are about as large as inputs.
        let scale = |width: usize| (3.0 / width as f64).sqrt();
        let x = random.values(num_tokens * hidden, 1.7);
        let gate_up = random.values(config.gate_up_len(), scale(hidden));
        let down = random.values(config.down_len(), scale(intermediate));
        let act = random.values(slots * intermediate, 1.0);
        let yp = random.values(slots * hidden, 1.0);
        let logits: Vec<D> = (0..shape.logits())
            .map(|i| D::from_f64(2.0 * random.signed() + skew.bias(i % num_experts)))
            .collect();

        let routing = reference::route_fwd::<f64, D>(
            &shape,
            &config.router,
            &reference::RouteInputs::new(&logits),
        )?;
        let mut expert_ids = routing.expert_ids;
        if skew == Skew::Inactive {
            let foreign = [num_experts as u32, u32::MAX, i32::MAX as u32];
            for (id, foreign) in expert_ids.iter_mut().step_by(3).zip(foreign.iter().cycle()) {
                *id = *foreign;
            }
        }
        let plan = reference::plan_fwd(&shape, &expert_ids)?;
        let weights = routing.routing_weights.into_iter().map(|weight| weight as f32).collect();
        Ok(Self { config, shape, x, logits, gate_up, down, expert_ids, weights, plan, act, yp })
    }
}

/// All scorings.
pub const ROUTERS: [RouterConfig; 3] = [
    RouterConfig::softmax_top_k(true),
    RouterConfig::softmax_top_k(false),
    RouterConfig::top_k_softmax(),
];

/// SplitMix64, which gives the same values on every machine.
struct Random(u64);

impl Random {
    /// Uniform from -1 to 1.
    fn signed(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn values<D: Dtype>(&mut self, len: usize, scale: f64) -> Vec<D> {
        (0..len).map(|_| D::from_f64(scale * self.signed())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_round_trips_through_text() {
        for text in Shape::DEFAULTS {
            assert_eq!(text.parse::<Shape>().map(|shape| shape.to_string()), Ok(text.to_string()));
        }
        for text in [
            "",
            "T1H1I1E1",
            "T1H1I1E1K1x",
            "T0H1I1E1K1",
            "H1T1I1E1K1",
            "T1H1I1E2K3",
            "T1H1I1E5000K1",
        ] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_match_clap_values() {
        for (name, skew) in Skew::NAMES.iter().zip(Skew::value_variants()) {
            assert_eq!(Skew::from_str(name, false).as_ref(), Ok(skew));
            assert_eq!(*name, skew.to_string());
        }
    }

    #[test]
    fn skews_give_stated_distributions() -> Result<()> {
        let rows = |skew| -> Result<Vec<usize>> {
            let dims =
                Shape { num_tokens: 300, hidden: 1, intermediate: 1, num_experts: 8, top_k: 2 };
            let case = Case::<f32>::new(dims, skew, 5)?;
            let offsets = &case.plan.expert_offsets;
            Ok(offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).collect())
        };
        assert_eq!(rows(Skew::Uniform)?.iter().sum::<usize>(), 600);
        assert!(rows(Skew::Uniform)?.iter().all(|&rows| rows > 30));
        assert_eq!(rows(Skew::Hot)?[0], 300);
        assert!(rows(Skew::Empty)?.iter().skip(1).step_by(2).all(|&rows| rows == 0));
        assert_eq!(rows(Skew::Inactive)?.iter().sum::<usize>(), 400);
        let zipf = rows(Skew::Zipf)?;
        assert!(zipf[0] > 2 * zipf[7], "{zipf:?}");
        Ok(())
    }
}
