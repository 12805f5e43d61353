//! Intermediate results of a layer's router, and expert choice by its scores.

use half::bf16;
use moe_kernels::ops::expert_choice::expert_choice_fwd;
use moe_kernels::{
    Error, Host, MoeConfig, NoiseDistribution, Owned, RouterConfig, RouterStep, Scoring, Typed,
    reference,
};

use super::{Case, Prepared, plain};
use crate::common::{Gpu, assert_within, bits, gpu, values};
use moe_kernels::Dtype;
use moe_kernels::reference::bound::{self, Bounded};

impl<D: Dtype> Case<D> {
    /// The noise logits, of the type of the logits, as in a pass.
    pub(super) fn noise_logits(&self, gpu: &Gpu) -> Typed<Owned, D> {
        let len = self.config.routing(self.num_tokens()).logits();
        let f32_given = self.inputs.logits.as_ref().map(|logits| matches!(logits, Typed::F32(_)));
        self.on(gpu, |mut prepared| {
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            if f32_given.unwrap_or(self.config.projection.f32_logits) {
                let mut logits = gpu.poisoned::<f32>(len);
                let to = &mut Typed::F32(logits.view_mut());
                layer.noise_logits(&gpu.stream, inputs, weights, workspace, to).unwrap();
                Typed::F32(gpu.download(&logits.view()))
            } else {
                let mut logits = gpu.poisoned::<D>(len);
                let to = &mut Typed::Element(logits.view_mut());
                layer.noise_logits(&gpu.stream, inputs, weights, workspace, to).unwrap();
                Typed::Element(gpu.download(&logits.view()))
            }
        })
    }

    fn router_scores(&self, gpu: &Gpu, step: RouterStep) -> Result<Vec<f32>, Error> {
        let len = self.config.routing(self.num_tokens()).logits();
        self.on(gpu, |mut prepared| {
            let mut scores = gpu.poisoned::<f32>(len);
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            let to = &mut scores.view_mut();
            layer.router_scores(&gpu.stream, inputs, weights, workspace, step, to)?;
            Ok(gpu.download(&scores.view()))
        })
    }
}

/// Checks that logits of a device are within their bounds, and borrows them as slices.
pub(super) fn slices_within<'l, D: Dtype>(
    logits: &'l Typed<Owned, D>,
    wanted: &Bounded,
    what: &str,
) -> Typed<Host<'l>, D> {
    match logits {
        Typed::Element(logits) => {
            assert_within(logits, wanted, &format!("logits of {what}"));
            Typed::Element(&logits[..])
        }
        Typed::F32(logits) => {
            assert_within(logits, wanted, &format!("logits of {what}"));
            Typed::F32(&logits[..])
        }
    }
}

/// A layer with noisy top-k, a noise gate, and noise of the generator.
fn noisy(num_tokens: usize) -> Case<bf16> {
    let router = RouterConfig {
        scoring: Scoring::Sigmoid,
        noise_deviation: 0.5,
        logit_multiplier: 1.5,
        logit_softcap: Some(4.0),
        ..RouterConfig::softmax_top_k(true)
    };
    let mut config = MoeConfig { router, ..plain(40, 24, 6, 2) };
    config.projection.noise_gate = true;
    let mut case = Case::<bf16>::plain(config, num_tokens, 5);
    case.inputs.logits = None;
    case.weights.router.noise_gate = Some(Typed::Element(values(6 * 40, 0.5, 9)));
    let noise = reference::noise_fwd(NoiseDistribution::Normal, 3, 0, num_tokens * 6);
    case.inputs.noise = Some(noise);
    case
}

/// Every step agrees bit for bit with the reference for the same logits.
#[test]
fn router_steps_of_a_noisy_layer_match_reference() {
    let gpu = gpu();
    let case = noisy(37);
    case.check(&gpu, "a noisy layer");
    let (host, weights) = (case.inputs.as_host(), case.weights.as_host());
    let (logits, noise_logits) = (case.router_logits(&gpu), case.noise_logits(&gpu));
    let mut given = case.inputs.as_host();
    let wanted = bound::router_logits(&case.config, &host, &weights).unwrap();
    given.logits = Some(slices_within(&logits, &wanted, "a noisy layer"));
    let wanted = bound::noise_logits(&case.config, &host, &weights).unwrap();
    given.noise_logits = Some(slices_within(&noise_logits, &wanted, "the noise of a noisy layer"));
    for step in RouterStep::ALL {
        let want = reference::router_scores::<f32, bf16>(&case.config, &given, &weights, step);
        assert_eq!(
            bits(&case.router_scores(&gpu, step).unwrap()),
            bits(&want.unwrap()),
            "{step:?}"
        );
    }
    // In f64: the noise is scaled by the softplus of the noise logits.
    let noise = case.inputs.noise.as_ref().unwrap();
    let got = case.router_scores(&gpu, RouterStep::NoisyLogits).unwrap();
    let (Typed::Element(logits), Typed::Element(scales)) = (&logits, &noise_logits) else {
        panic!("logits of the layer's type");
    };
    for (at, got) in got.iter().enumerate() {
        let softplus = scales[at].to_f64().exp().ln_1p();
        let want = logits[at].to_f64() + 0.5 * f64::from(noise[at]) * softplus;
        assert!((f64::from(*got) - want).abs() < 1e-5 * (1.0 + want.abs()), "{at}: {got} {want}");
    }
    // Without noise the noise gate is ignored.
    let mut noiseless = noisy(37);
    noiseless.inputs.noise = None;
    let y = noiseless.forward(&gpu);
    noiseless.weights.router.noise_gate = Some(Typed::Element(vec![bf16::NAN; 6 * 40]));
    assert_eq!(bits(&noiseless.forward(&gpu)), bits(&y));
    assert_ne!(bits(&y), bits(&case.forward(&gpu)));
}

#[test]
fn presence_and_length_of_the_noise_gate_are_checked() {
    let case = noisy(3);
    let forward = |case: &Case<bf16>| {
        let (inputs, weights) = (case.inputs.as_host(), case.weights.as_host());
        reference::moe_layer_fwd::<f32, bf16>(&case.config, &inputs, &weights).map(|_| ())
    };
    assert_eq!(forward(&case), Ok(()));
    let mut missing = noisy(3);
    missing.weights.router.noise_gate = None;
    let mut unneeded = noisy(3);
    unneeded.config.projection.noise_gate = false;
    for case in [missing, unneeded] {
        let error = forward(&case).unwrap_err().to_string();
        assert!(error.contains("`router.noise_gate`"), "{error}");
    }
    let mut short = noisy(3);
    short.weights.router.noise_gate = Some(Typed::F32(vec![0.0; 6 * 40 - 1]));
    assert!(matches!(forward(&short), Err(Error::Length { argument: "router.noise_gate", .. })));
}

/// A layer with expert choice, from tokens to output: logits, scores, the choice, a plan with K =
/// E, the experts.
#[test]
fn expert_choice_by_the_scores_of_the_layer() {
    let gpu = gpu();
    for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SqrtSoftplus] {
        let router = RouterConfig { scoring, ..RouterConfig::softmax_top_k(false) };
        let config = MoeConfig { router, top_k: 5, ..plain(32, 24, 5, 2) };
        let mut case = Case::<f32>::plain(config, 50, 11);
        case.inputs.logits = None;
        let scores = case.router_scores(&gpu, RouterStep::Scores).unwrap();
        let (device, stream) = (&gpu.device, &gpu.stream);
        let uploaded = gpu.upload(&scores);
        let choice = expert_choice_fwd(device, stream, 50, 5, 13, &uploaded.view()).unwrap();
        let ids = gpu.download(&choice.expert_ids.as_view());
        let weights = gpu.download(&choice.routing_weights.as_view());
        assert!((0..5).all(|expert| ids.iter().filter(|&&id| id == expert).count() == 13));
        // Each expert has chosen the tokens of its 13 largest scores.
        let (inputs, host) = (case.inputs.as_host(), case.weights.as_host());
        let truth =
            reference::router_scores::<f64, f32>(&config, &inputs, &host, RouterStep::Scores)
                .unwrap();
        for expert in 0..5 {
            let score = |token: usize| truth[token * 5 + expert];
            let chosen = |token: &usize| ids[token * 5 + expert] != u32::MAX;
            let least = (0..50).filter(chosen).map(score).fold(f64::INFINITY, f64::min);
            let largest_other = (0..50).filter(|t| !chosen(t)).map(score).fold(0.0, f64::max);
            assert!(least > largest_other - 1e-6, "{scoring:?}: {least} {largest_other}");
        }
        let routing = (ids, weights);
        let exact = Bounded {
            value: routing.1.iter().map(|&weight| f64::from(weight)).collect(),
            bound: vec![0.0; routing.1.len()],
        };
        let wanted =
            bound::moe_layer_experts(&config, inputs.x, &routing.0, &exact, &host).unwrap();
        assert_within(&case.forward_routed(&gpu, &routing), &wanted, &format!("{scoring:?}"));
    }
    let router = RouterConfig::top_k_softmax();
    let case = Case::<f32>::plain(MoeConfig { router, ..plain(16, 8, 4, 2) }, 3, 1);
    let error = case.router_scores(&gpu, RouterStep::Scores);
    assert!(matches!(error, Err(Error::Unsupported { argument: "router.scoring", .. })));
    assert!(case.router_scores(&gpu, RouterStep::Logits).is_ok());
}
