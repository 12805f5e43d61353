//! The range of f16: an expert's output may exceed it before its routing weight is applied.

use half::f16;
use moe_kernels::{
    ExpertConfig, GateUpTensors, LatentConfig, MoeConfig, MoeInputs, MoeWeights, RouterConfig,
    SharedConfig, Typed, ZeroExperts, ZeroOutput, reference,
};

use super::{Case, plain};
use crate::common::gpu;

/// A part of the sum of the experts' outputs.
#[derive(Clone, Copy)]
enum Part {
    /// The whole sum.
    Whole,
    /// The term of one of a token's choices, times its weight.
    Weighted,
    /// The term of one of a token's choices without its weight.
    Raw,
}

impl Case<f16> {
    /// The largest magnitude of such a part, in f64.
    fn largest(&self, part: Part) -> f64 {
        let (config, inputs) = (&self.config, self.inputs.as_host());
        let config = MoeConfig { shared: None, output_norm: None, ..*config };
        let weights = MoeWeights { shared: None, ..self.weights.as_host() };
        let routing =
            reference::moe_layer_route_fwd::<f64, f16>(&config, &inputs, &weights).unwrap();
        let top_k = config.top_k;
        let parts = if matches!(part, Part::Whole) { 1 } else { top_k };
        let mut largest = 0.0f64;
        for k in 0..parts {
            let weight_of_slot = |(slot, &weight): (usize, &f64)| match part {
                Part::Whole => weight,
                _ if slot % top_k != k => 0.0,
                Part::Weighted => weight,
                Part::Raw => 1.0,
            };
            let used: Vec<f64> = routing.weights.iter().enumerate().map(weight_of_slot).collect();
            let (x, ids) = (inputs.x, &routing.expert_ids);
            let y = reference::moe_layer_experts_fwd::<f64, f16>(&config, x, ids, &used, &weights);
            largest = y.unwrap().iter().fold(largest, |most, y| most.max(y.abs()));
        }
        largest
    }

    /// Scales the last projection so that the largest output, or the largest weighted term of an
    /// expert, is 60000. The unweighted output of some expert then exceeds 65504, the largest f16.
    fn scale(&mut self) {
        // Activations of a few units keep the last projection within f16.
        if let GateUpTensors::Fused(gate_up) = &mut self.weights.experts.gate_up {
            gate_up.iter_mut().for_each(|w| *w = f16::from_f32(w.to_f32() * 8.0));
        }
        let by = 60_000.0 / self.largest(Part::Whole).max(self.largest(Part::Weighted));
        let (weights, is_latent) = (&mut self.weights, self.config.latent.is_some());
        let down = match &mut weights.latent {
            // The last projection is that of the sum; the experts' outputs stay small.
            Some(latent) => &mut latent.proj_out,
            None => &mut weights.experts.down,
        };
        down.iter_mut().for_each(|w| *w = f16::from_f64(w.to_f64() * by));
        if let (Some(bias), false) = (&mut weights.experts.down_bias, is_latent) {
            bias.iter_mut().for_each(|w| *w = f16::from_f64(w.to_f64() * by));
        }
        let raw = self.largest(Part::Raw);
        assert!(is_latent || raw > 66_000.0, "{raw}");
        assert!(self.largest(Part::Whole).max(self.largest(Part::Weighted)) < 61_000.0);
    }
}

#[test]
fn unweighted_outputs_may_exceed_f16() {
    let gpu = gpu();
    let router = RouterConfig::softmax_top_k(false);
    let base = MoeConfig { router, ..plain(32, 16, 4, 2) };
    let biased = ExpertConfig { down_bias: true, ..base.experts };
    let identity = ZeroExperts { count: 2, output: ZeroOutput::Identity };
    for config in [
        base,
        MoeConfig { experts: biased, ..base },
        MoeConfig { zero_experts: Some(identity), top_k: 3, ..base },
        MoeConfig { shared: Some(SharedConfig::new(24)), ..base },
        MoeConfig { hidden: 31, intermediate: 13, ..base },
        MoeConfig { latent: Some(LatentConfig { hidden: 20, norm: None }), ..base },
    ] {
        for seed in 0..3 {
            let mut case = Case::<f16>::random(config, 9, seed);
            case.inputs = MoeInputs::new(case.inputs.x);
            case.scale();
            case.check(&gpu, &format!("{config} seed {seed}"));
            let y = case.forward(&gpu);
            assert!(y.iter().all(|y| y.is_finite()), "{config} seed {seed}: {y:?}");
        }
    }
}

/// A layer with one expert per token and large outputs, as in published checkpoints.
#[test]
fn output_near_the_largest_f16_is_finite() {
    let gpu = gpu();
    let mut case = Case::<f16>::plain(MoeConfig::new(8, 1, 2, 1), 1, 3);
    case.inputs.x.fill(f16::ONE);
    case.weights.experts.gate_up = GateUpTensors::Fused(vec![f16::from_f32(4.0); 2 * 2 * 8]);
    // silu(32) * 32 = 1024; times 100 exceeds f16. The weight of the choice is 1 / (1 + exp(-0.2))
    // = 0.55.
    case.weights.experts.down = vec![f16::from_f32(100.0); 2 * 8];
    case.inputs.logits = Some(Typed::F32(vec![0.2, 0.0]));
    let y = case.forward(&gpu);
    assert!(y.iter().all(|y| (y.to_f32() - 56_303.0).abs() < 64.0), "{y:?}");
}
