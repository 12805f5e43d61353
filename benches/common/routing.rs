//! Random routings: how tokens spread over experts.

use moe_kernels::{DType, Dtype, RoutingShape, reference};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Gumbel};

use crate::common::error::Result;
use crate::common::model::Model;

/// A distribution of tokens over experts. A router with groups changes it: a token whose best
/// expert is in a masked group does not choose that expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// All experts are equally likely.
    Uniform,
    /// The likelihood of the expert of rank r is proportional to 1 / r.
    Zipf,
    /// 60 % of the tokens choose one expert; the others are equally likely.
    Hot,
}

/// The share of the tokens that choose the hot expert.
const HOT_SHARE: f64 = 0.6;

impl Routing {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Uniform, Self::Zipf, Self::Hot];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::Hot => "hot",
        }
    }

    /// Draws logits `[T, E]`: the logarithm of each probability plus Gumbel noise, so that the `K`
    /// largest are a draw without replacement from the distribution.
    fn logits(self, shape: &RoutingShape, seed: u64) -> Vec<f32> {
        let RoutingShape { num_tokens, num_experts, .. } = *shape;
        let mut random = SmallRng::seed_from_u64(seed);
        let gumbel = Gumbel::new(0.0f32, 1.0).expect("a scale of one");
        // The ranks are drawn too, so that rank does not depend on the expert's id.
        let mut rank: Vec<usize> = (0..num_experts).collect();
        rank.shuffle(&mut random);
        let mut logits = Vec::with_capacity(shape.logits());
        for _ in 0..num_tokens {
            // Larger than any noise.
            let hot = if random.random_bool(HOT_SHARE) { 100.0 } else { -100.0 };
            for rank in &rank {
                let preference = match self {
                    Self::Uniform => 0.0,
                    Self::Zipf => -((rank + 1) as f32).ln(),
                    Self::Hot if *rank == 0 => hot,
                    Self::Hot => 0.0,
                };
                logits.push(preference + gumbel.sample(&mut random));
            }
        }
        logits
    }
}

/// The routing of one number of tokens.
#[derive(Debug, Clone)]
pub struct Draw {
    /// T, E and K.
    pub shape: RoutingShape,
    /// The distribution that it was drawn from.
    pub routing: Routing,
    /// `[T, E]`, rounded to the element type that it was drawn for.
    pub logits: Vec<f32>,
    /// `[T, K]`, the choice of the model's router.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`
    pub weights: Vec<f32>,
    /// The number of experts that have a row. Only their weights have to be read.
    pub distinct: usize,
}

impl Draw {
    /// Draws a routing, which depends on the arguments alone and not on the machine.
    ///
    /// # Errors
    /// Errors of the library for an invalid configuration.
    pub fn new(model: &Model, num_tokens: usize, routing: Routing, dtype: DType) -> Result<Self> {
        let shape = model.config.routing(num_tokens);
        let mut logits = routing.logits(&shape, num_tokens as u64);
        match dtype {
            DType::F32 => {}
            DType::F16 => round::<half::f16>(&mut logits),
            DType::BF16 => round::<half::bf16>(&mut logits),
        }
        let bias = model.selection_bias();
        let inputs = reference::RouteInputs {
            selection_bias: bias.as_deref(),
            ..reference::RouteInputs::new(&logits)
        };
        let chosen = reference::route_fwd::<f32, f32>(&shape, &model.config.router, &inputs)?;
        let mut used = vec![false; shape.num_experts];
        chosen.expert_ids.iter().for_each(|&id| used[id as usize] = true);
        Ok(Self {
            shape,
            routing,
            logits,
            expert_ids: chosen.expert_ids,
            weights: chosen.routing_weights,
            distinct: used.into_iter().filter(|&used| used).count(),
        })
    }
}

fn round<D: Dtype>(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = D::from_f32(*value).to_f32());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share_of_the_busiest(routing: Routing, model: &str, num_tokens: usize) -> (f64, usize) {
        let model = Model::find(model).unwrap();
        let draw = Draw::new(&model, num_tokens, routing, DType::BF16).unwrap();
        let mut rows = vec![0usize; draw.shape.num_experts];
        draw.expert_ids.iter().for_each(|&id| rows[id as usize] += 1);
        (*rows.iter().max().unwrap() as f64 / num_tokens as f64, draw.distinct)
    }

    #[test]
    fn distributions_have_their_busiest_expert() {
        let (uniform, distinct) = share_of_the_busiest(Routing::Uniform, "qwen3-30b-a3b", 4096);
        assert!((0.06..0.08).contains(&uniform), "8 of 128 is 0.0625, not {uniform}");
        assert_eq!(distinct, 128);
        let (hot, _) = share_of_the_busiest(Routing::Hot, "qwen3-30b-a3b", 4096);
        assert!((0.57..0.63).contains(&hot), "{hot}");
        let (hot, _) = share_of_the_busiest(Routing::Hot, "deepseek-v3", 4096);
        assert!((0.5..0.6).contains(&hot), "{hot} with groups");
        // One choice of 16, in proportion to 1 / rank: the share of the first is 1 / H(16) = 0.296.
        let (zipf, _) = share_of_the_busiest(Routing::Zipf, "llama-4-scout", 4096);
        assert!((0.27..0.32).contains(&zipf), "{zipf}");
    }

    #[test]
    fn a_draw_is_reproducible() {
        let model = Model::find("olmoe-1b-7b").unwrap();
        let draw = || Draw::new(&model, 8, Routing::Zipf, DType::F32).unwrap().expert_ids;
        assert_eq!(draw(), draw());
    }

    #[test]
    fn one_token_has_top_k_distinct_experts() {
        let (_, distinct) = share_of_the_busiest(Routing::Uniform, "deepseek-v3", 1);
        assert_eq!(distinct, 8);
    }
}
