//! The layers that people run, by name: each is a configuration of the library.

use moe_kernels::{MoeConfig, RouterConfig};

/// A named layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// As on the command line: `mixtral-8x7b`.
    pub name: String,
    /// What the layer computes.
    pub config: MoeConfig,
    /// Whether the configuration's router is the model's own. Where the library does not have that yet,
    /// a softmax router stands in, which moves the same bytes.
    pub own_router: bool,
    /// The numbers of tokens that are measured if nobody asks for others.
    pub tokens: &'static [usize],
}

/// Numbers of tokens from decoding one to a large prefill.
pub const TOKENS: [usize; 6] = [1, 8, 64, 512, 4096, 16384];

const RENORMALISED: RouterConfig = RouterConfig::softmax_top_k(true);
const PLAIN: RouterConfig = RouterConfig::softmax_top_k(false);
const SELECTED: RouterConfig = RouterConfig::top_k_softmax();

/// Name, H, I, E, K, the router, and whether it is the model's own.
type Row = (&'static str, usize, usize, usize, usize, RouterConfig, bool);

const INFERENCE: [Row; 12] = [
    ("mixtral-8x7b", 4096, 14336, 8, 2, RENORMALISED, true),
    ("mixtral-8x22b", 6144, 16384, 8, 2, RENORMALISED, true),
    ("qwen3-30b-a3b", 2048, 768, 128, 8, RENORMALISED, true),
    ("qwen3-235b-a22b", 4096, 1536, 128, 8, RENORMALISED, true),
    ("deepseek-v3", 7168, 2048, 256, 8, RENORMALISED, false),
    ("deepseek-v2-lite", 2048, 1408, 64, 6, PLAIN, true),
    ("gpt-oss-20b", 2880, 2880, 32, 4, SELECTED, true),
    ("gpt-oss-120b", 2880, 2880, 128, 4, SELECTED, true),
    ("olmoe-1b-7b", 2048, 1024, 64, 8, PLAIN, true),
    ("llama-4-scout", 5120, 8192, 16, 1, RENORMALISED, false),
    ("kimi-k2", 7168, 2048, 384, 8, RENORMALISED, false),
    ("glm-4.5-air", 4096, 1408, 128, 8, RENORMALISED, false),
];

/// The shapes at which SonicMoE (arXiv 2512.14080, figure 14) publishes training throughput, with T.
const TRAINING: [(Row, &[usize]); 10] = [
    (("sonic-d768-i256-e128-k8", 768, 256, 128, 8, SELECTED, true), &[40960]),
    (("sonic-d768-i1024-e32-k2", 768, 1024, 32, 2, SELECTED, true), &[40960]),
    (("sonic-d1536-i256-e128-k8", 1536, 256, 128, 8, SELECTED, true), &[24576]),
    (("sonic-d1536-i1024-e32-k2", 1536, 1024, 32, 2, SELECTED, true), &[24576]),
    (("sonic-d4096-i256-e256-k16", 4096, 256, 256, 16, SELECTED, true), &[32768]),
    (("sonic-d4096-i512-e128-k8", 4096, 512, 128, 8, SELECTED, true), &[32768]),
    (("sonic-d4096-i1024-e64-k4", 4096, 1024, 64, 4, SELECTED, true), &[32768]),
    (("sonic-d4096-i512-e256-k16", 4096, 512, 256, 16, SELECTED, true), &[32768]),
    (("sonic-d4096-i1024-e128-k8", 4096, 1024, 128, 8, SELECTED, true), &[32768]),
    (("sonic-d4096-i2048-e64-k4", 4096, 2048, 64, 4, SELECTED, true), &[32768]),
];

/// All named layers, those of inference first.
pub fn models() -> Vec<Model> {
    let inference = INFERENCE.iter().map(|row| model(row, &TOKENS));
    inference.chain(TRAINING.iter().map(|(row, tokens)| model(row, tokens))).collect()
}

fn model(
    &(name, hidden, intermediate, num_experts, top_k, router, own): &Row,
    tokens: &'static [usize],
) -> Model {
    let config = MoeConfig { router, ..MoeConfig::new(hidden, intermediate, num_experts, top_k) };
    Model { name: name.into(), config, own_router: own, tokens }
}

impl Model {
    /// The layer of this name, if there is one.
    pub fn find(name: &str) -> Option<Self> {
        models().into_iter().find(|model| model.name == name)
    }

    /// The same routing with widths divided by `by` and rounded up to multiples of 8: for devices
    /// that are too slow for the real ones. Says so in its name, as in `mixtral-8x7b-div32`.
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
        if self.own_router { self.config.router.to_string() } else { "softmax router".into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_can_be_configured_and_found() {
        let all = models();
        assert_eq!(all.len(), 22);
        for model in all {
            model.config.check().unwrap();
            assert_eq!(Model::find(&model.name), Some(model));
        }
        assert_eq!(Model::find("mixtral"), None);
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
