//! Named layers: the shapes and routers of released models, as configurations of the library.

use moe_kernels::{
    GroupScore, Groups, Masked, MoeConfig, Normalization, RouterConfig, Scoring, Selection,
};

/// A named layer: the widths and the router of a model. All layers have plain SwiGLU experts
/// without biases and without a shared expert.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The name on the command line, such as `mixtral-8x7b`.
    pub name: String,
    /// The layer.
    pub config: MoeConfig,
    /// The default numbers of tokens.
    pub tokens: &'static [usize],
}

/// Numbers of tokens from decoding one to a large prefill.
pub const TOKENS: [usize; 6] = [1, 8, 64, 512, 4096, 16384];

/// Mixtral; Qwen3-MoE, whose `norm_topk_prob` is true.
const RENORMALISED: RouterConfig = RouterConfig::softmax_top_k(true);
/// OLMoE and DeepSeek-V2-Lite, whose `norm_topk_prob` is false.
const PLAIN: RouterConfig = RouterConfig::softmax_top_k(false);
/// gpt-oss.
const SELECTED: RouterConfig = RouterConfig::top_k_softmax();
/// Llama 4: the sigmoid of the selected logits.
const LLAMA4: RouterConfig =
    RouterConfig { scoring: Scoring::Sigmoid, selection: Selection::Logit, ..PLAIN };
/// DeepSeek-V3: 4 of 8 groups, and a `routed_scaling_factor` of 2.5.
const DEEPSEEK_V3: RouterConfig = RouterConfig {
    groups: Some(Groups {
        num_groups: 8,
        top_groups: 4,
        score: GroupScore::TopTwoSum,
        masked: Masked::NegativeInfinity,
    }),
    ..biased_sigmoid(2.5)
};

/// DeepSeek-V3's router without groups (`n_group` is 1), with this `routed_scaling_factor`: Kimi K2
/// and GLM-4.5.
const fn biased_sigmoid(scale: f32) -> RouterConfig {
    RouterConfig {
        scoring: Scoring::Sigmoid,
        selection_bias: true,
        normalization: Normalization::Sum { epsilon: 1e-20 },
        scale,
        ..PLAIN
    }
}

/// Name, H, I, E, K and the router.
type Row = (&'static str, usize, usize, usize, usize, RouterConfig);

const INFERENCE: [Row; 12] = [
    ("mixtral-8x7b", 4096, 14336, 8, 2, RENORMALISED),
    ("mixtral-8x22b", 6144, 16384, 8, 2, RENORMALISED),
    ("qwen3-30b-a3b", 2048, 768, 128, 8, RENORMALISED),
    ("qwen3-235b-a22b", 4096, 1536, 128, 8, RENORMALISED),
    ("deepseek-v3", 7168, 2048, 256, 8, DEEPSEEK_V3),
    ("deepseek-v2-lite", 2048, 1408, 64, 6, PLAIN),
    ("gpt-oss-20b", 2880, 2880, 32, 4, SELECTED),
    ("gpt-oss-120b", 2880, 2880, 128, 4, SELECTED),
    ("olmoe-1b-7b", 2048, 1024, 64, 8, PLAIN),
    ("llama-4-scout", 5120, 8192, 16, 1, LLAMA4),
    ("kimi-k2", 7168, 2048, 384, 8, biased_sigmoid(2.827)),
    ("glm-4.5-air", 4096, 1408, 128, 8, biased_sigmoid(1.0)),
];

/// Shapes and T of the training throughput that SonicMoE publishes (arXiv 2512.14080, figure 14).
const TRAINING: [(Row, &[usize]); 10] = [
    (("sonic-d768-i256-e128-k8", 768, 256, 128, 8, SELECTED), &[40960]),
    (("sonic-d768-i1024-e32-k2", 768, 1024, 32, 2, SELECTED), &[40960]),
    (("sonic-d1536-i256-e128-k8", 1536, 256, 128, 8, SELECTED), &[24576]),
    (("sonic-d1536-i1024-e32-k2", 1536, 1024, 32, 2, SELECTED), &[24576]),
    (("sonic-d4096-i256-e256-k16", 4096, 256, 256, 16, SELECTED), &[32768]),
    (("sonic-d4096-i512-e128-k8", 4096, 512, 128, 8, SELECTED), &[32768]),
    (("sonic-d4096-i1024-e64-k4", 4096, 1024, 64, 4, SELECTED), &[32768]),
    (("sonic-d4096-i512-e256-k16", 4096, 512, 256, 16, SELECTED), &[32768]),
    (("sonic-d4096-i1024-e128-k8", 4096, 1024, 128, 8, SELECTED), &[32768]),
    (("sonic-d4096-i2048-e64-k4", 4096, 2048, 64, 4, SELECTED), &[32768]),
];

/// All named layers, those of inference first.
pub fn models() -> Vec<Model> {
    let inference = INFERENCE.iter().map(|row| model(row, &TOKENS));
    inference.chain(TRAINING.iter().map(|(row, tokens)| model(row, tokens))).collect()
}

fn model(
    &(name, hidden, intermediate, num_experts, top_k, router): &Row,
    tokens: &'static [usize],
) -> Model {
    let config = MoeConfig { router, ..MoeConfig::new(hidden, intermediate, num_experts, top_k) };
    Model { name: name.into(), config, tokens }
}

impl Model {
    /// Returns the layer of this name, if there is one.
    pub fn find(name: &str) -> Option<Self> {
        models().into_iter().find(|model| model.name == name)
    }

    /// Divides the widths by `by`, rounding up to multiples of 8, for devices that are too slow for
    /// the real ones. The routing stays the same. The name gets a suffix: `mixtral-8x7b-div32`.
    pub fn shrunk(mut self, by: usize) -> Self {
        if by > 1 {
            for width in [&mut self.config.hidden, &mut self.config.intermediate] {
                *width = width.div_ceil(8 * by) * 8;
            }
            self.name = format!("{}-div{by}", self.name);
        }
        self
    }

    /// The router in words.
    pub fn router(&self) -> String {
        self.config.router.to_string()
    }

    /// The selection bias `[E]` of a router that has one. It is zero, so that the logits alone
    /// decide how tokens spread over experts.
    pub fn selection_bias(&self) -> Option<Vec<f32>> {
        self.config.router.selection_bias.then(|| vec![0.0; self.config.num_experts])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_valid_configuration() {
        let all = models();
        assert_eq!(all.len(), 22);
        for model in all {
            model.config.check().unwrap();
            assert_eq!(Model::find(&model.name), Some(model));
        }
        assert_eq!(Model::find("mixtral"), None);
    }

    #[test]
    fn routers_are_those_of_the_models() {
        let router = |name| Model::find(name).unwrap().router();
        assert_eq!(router("olmoe-1b-7b"), "softmax, top-k");
        for (name, words) in [
            ("deepseek-v3", "4 of 8 groups by top-2 sum"),
            ("deepseek-v3", "* 2.5"),
            ("kimi-k2", "* 2.827"),
            ("glm-4.5-air", "sigmoid"),
            ("llama-4-scout", "sigmoid"),
            ("mixtral-8x7b", "renormalised"),
        ] {
            assert!(router(name).contains(words), "{name}: {}", router(name));
        }
    }

    #[test]
    fn shrinking_keeps_the_routing() {
        let model = Model::find("gpt-oss-20b").unwrap().shrunk(32);
        let MoeConfig { hidden, intermediate, num_experts, top_k, .. } = model.config;
        assert_eq!((hidden, intermediate, num_experts, top_k), (96, 96, 32, 4));
        assert_eq!(model.name, "gpt-oss-20b-div32");
        let whole = Model::find("gpt-oss-20b").unwrap();
        assert_eq!(whole.clone().shrunk(1), whole);
    }
}
