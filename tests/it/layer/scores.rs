//! What a layer's router makes of every expert, and experts that choose their tokens by it.

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
    /// Of the logits' type, as a pass has them.
    pub(super) fn noise_logits(&self, gpu: &Gpu) -> Typed<Owned, D> {
        let len = self.config.routing(self.num_tokens()).logits();
        let of_given = self.inputs.logits.as_ref().map(|logits| matches!(logits, Typed::F32(_)));
        self.on(gpu, |mut prepared| {
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            if of_given.unwrap_or(self.config.projection.f32_logits) {
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

/// Logits of a device that are within their bounds, as slices.
pub(super) fn lent_within<'l, D: Dtype>(
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

/// A layer of noisy top-k: it has its own matrix for the noise, and the noise comes from the generator.
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

/// Every step from the layer's own products, bit for bit what the reference makes of those.
#[test]
fn scores_of_a_noisy_layer() {
    let gpu = gpu();
    let case = noisy(37);
    case.check(&gpu, "a noisy layer");
    let (host, weights) = (case.inputs.as_host(), case.weights.as_host());
    let (logits, noise_logits) = (case.router_logits(&gpu), case.noise_logits(&gpu));
    let mut given = case.inputs.as_host();
    let wanted = bound::router_logits(&case.config, &host, &weights).unwrap();
    given.logits = Some(lent_within(&logits, &wanted, "a noisy layer"));
    let wanted = bound::noise_logits(&case.config, &host, &weights).unwrap();
    given.noise_logits = Some(lent_within(&noise_logits, &wanted, "the noise of a noisy layer"));
    for step in RouterStep::ALL {
        let want = reference::router_scores::<f32, bf16>(&case.config, &given, &weights, step);
        assert_eq!(
            bits(&case.router_scores(&gpu, step).unwrap()),
            bits(&want.unwrap()),
            "{step:?}"
        );
    }
    // By hand, in f64: the noise is scaled by the softplus of its own logits.
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
    // Without noise the matrix is not looked at.
    let mut still = noisy(37);
    still.inputs.noise = None;
    let before = still.forward(&gpu);
    still.weights.router.noise_gate = Some(Typed::Element(vec![bf16::NAN; 6 * 40]));
    assert_eq!(bits(&still.forward(&gpu)), bits(&before));
    assert_ne!(bits(&before), bits(&case.forward(&gpu)));
}

/// The matrix is there exactly where the configuration has it.
#[test]
fn noise_gates_are_checked() {
    let case = noisy(3);
    let run = |case: &Case<bf16>| {
        let (inputs, weights) = (case.inputs.as_host(), case.weights.as_host());
        reference::moe_layer_fwd::<f32, bf16>(&case.config, &inputs, &weights).map(|_| ())
    };
    assert_eq!(run(&case), Ok(()));
    let mut without = noisy(3);
    without.weights.router.noise_gate = None;
    let mut beside = noisy(3);
    beside.config.projection.noise_gate = false;
    for case in [without, beside] {
        let error = run(&case).unwrap_err().to_string();
        assert!(error.contains("`router.noise_gate`"), "{error}");
    }
    let mut short = noisy(3);
    short.weights.router.noise_gate = Some(Typed::F32(vec![0.0; 6 * 40 - 1]));
    assert!(matches!(run(&short), Err(Error::Length { argument: "router.noise_gate", .. })));
}

/// From tokens to the output of a layer whose experts choose: logits, scores, a choice, a plan of K = E, experts.
#[test]
fn experts_choose_by_the_scores_of_the_layer() {
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
        // The scores of the gate's logits, and the 13 largest of each expert.
        let (inputs, host) = (case.inputs.as_host(), case.weights.as_host());
        let truth =
            reference::router_scores::<f64, f32>(&config, &inputs, &host, RouterStep::Scores)
                .unwrap();
        for expert in 0..5 {
            let of = |token: usize| truth[token * 5 + expert];
            let chosen = |token: &usize| ids[token * 5 + expert] != u32::MAX;
            let least = (0..50).filter(chosen).map(of).fold(f64::INFINITY, f64::min);
            let most_left = (0..50).filter(|t| !chosen(t)).map(of).fold(0.0, f64::max);
            assert!(least > most_left - 1e-6, "{scoring:?}: {least} {most_left}");
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
