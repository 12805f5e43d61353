//! Layers of Phi-MoE in training: the router uses the draws that a pass is given.

use half::{bf16, f16};
use moe_kernels::{Dtype, Error, MoeConfig, NoiseDistribution, RouterConfig, Scoring, reference};

use super::{Case, Prepared, plain};
use crate::common::{Gpu, gpu};

/// A layer whose choices are sampled, with draws of the generator.
fn case<D: Dtype>(num_tokens: usize, seed: u64) -> Case<D> {
    let scoring = Scoring::Sparsemixer { jitter: 0.4, training: true };
    let router = RouterConfig { scoring, ..RouterConfig::default() };
    let config = MoeConfig { router, ..plain(40, 24, 6, 2) };
    let mut case = Case::<D>::plain(config, num_tokens, 5);
    let shape = config.routing(num_tokens);
    let draw = |kind, len| Some(reference::noise_fwd(kind, seed, 0, len));
    case.inputs.selection_noise = draw(NoiseDistribution::Gumbel, shape.by_slot().logits());
    case.inputs.midpoint_draws = draw(NoiseDistribution::Uniform, shape.slots());
    case
}

/// Checks given logits and logits of the router gate in every type, and that other draws select
/// other experts.
#[test]
fn a_layer_uses_its_draws() {
    fn one<D: Dtype>(gpu: &Gpu) {
        let given = case::<D>(37, 3);
        given.check(gpu, "sparsemixer of training");
        let mut projected = case::<D>(37, 3);
        projected.inputs.logits = None;
        projected.check(gpu, "sparsemixer of training, with a router gate");
        let (ids, weights) = given.route(gpu);
        assert_ne!(ids, case::<D>(37, 4).route(gpu).0);
        // Without noise the choices and weights are those of evaluation, for any midpoint draw.
        let mut noiseless = case::<D>(37, 3);
        noiseless.inputs.selection_noise = Some(vec![0.0; 37 * 2 * 6]);
        let mut evaluated = case::<D>(37, 3);
        (evaluated.inputs.selection_noise, evaluated.inputs.midpoint_draws) = (None, None);
        let scoring = Scoring::Sparsemixer { jitter: 0.4, training: false };
        evaluated.config.router.scoring = scoring;
        assert_eq!(noiseless.route(gpu), evaluated.route(gpu));
        assert_ne!((ids, weights), evaluated.route(gpu));
    }
    let gpu = gpu();
    one::<f32>(&gpu);
    one::<f16>(&gpu);
    one::<bf16>(&gpu);
}

/// Draws are required exactly by a router of training; otherwise nothing is written.
#[test]
fn presence_and_length_of_draws_are_checked() {
    let gpu = gpu();
    let forward_error = |case: &Case<f32>| {
        case.on(&gpu, |mut prepared| {
            let mut y = gpu.poisoned::<f32>(case.inputs.x.len());
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            let to = &mut y.view_mut();
            let error = layer.forward(&gpu.stream, inputs, weights, workspace, to).unwrap_err();
            assert!(gpu.download(&y.view()).iter().all(|y| y.is_nan()));
            error
        })
    };
    let mut missing = case::<f32>(3, 1);
    missing.inputs.selection_noise = None;
    let error = forward_error(&missing);
    assert!(matches!(error, Error::Presence { argument: "selection_noise", .. }), "{error}");
    let mut unneeded = case::<f32>(3, 1);
    unneeded.config.router.scoring = Scoring::Softmax;
    let error = forward_error(&unneeded);
    assert!(matches!(error, Error::Presence { argument: "selection_noise", .. }), "{error}");
    let mut short = case::<f32>(3, 1);
    short.inputs.midpoint_draws = Some(vec![0.0; 5]);
    let error = forward_error(&short);
    let wanted = Error::Length { op: "MoeLayer", argument: "midpoint_draws", wanted: 6, got: 5 };
    assert_eq!(error, wanted);
}
