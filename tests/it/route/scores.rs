//! route_scores: the values of each step of the router for every expert, bit for bit the
//! reference's in f32.

use half::{bf16, f16};
use moe_kernels::ops::route::{
    RouteBuffers, RouteInputs, route_scores_fwd, route_scores_fwd_into, route_scores_fwd_raw,
};
use moe_kernels::{
    DType, Dtype, Error, RouterConfig, RouterStep, RoutingShape, Scoring, reference,
};
use proptest::prelude::*;

use super::{LOGITS, Logits, Uploaded, make};
use crate::common::{Gpu, Rng, RouterCase, config, gpu, router};

/// The scores of a case whose views start `offset` elements into their buffers.
fn run<D: Dtype>(
    gpu: &Gpu,
    case: &RouterCase<D>,
    step: RouterStep,
    offset: usize,
) -> Result<Vec<f32>, Error> {
    let host = case.inputs();
    let logits = Uploaded::new(gpu, Some(host.logits), offset);
    let noise = Uploaded::new(gpu, host.noise, offset);
    let noise_logits = Uploaded::new(gpu, host.noise_logits, offset);
    let active = Uploaded::new(gpu, host.active, offset);
    let (logits, noise) = (logits.view().unwrap(), noise.view());
    let (noise_logits, active) = (noise_logits.view(), active.view());
    let mut scores = gpu.poisoned::<f32>(offset + case.shape.logits());
    let inputs = RouteInputs {
        noise: noise.as_ref(),
        noise_logits: noise_logits.as_ref(),
        active: active.as_ref(),
        ..RouteInputs::new(&logits)
    };
    let (device, stream) = (&gpu.device, &gpu.stream);
    let to = &mut scores.view_mut();
    let to = &mut to.slice_mut(offset..);
    route_scores_fwd_into(device, stream, case.shape, &case.router, step, &inputs, to)?;
    Ok(gpu.download(&scores.view()).split_off(offset))
}

/// True if the scores of all experts exist without a selection.
fn have_scores(router: &RouterConfig) -> bool {
    !matches!(router.scoring, Scoring::SoftmaxSelected | Scoring::Sparsemixer { .. })
}

fn check<D: Dtype>(gpu: &Gpu, case: &RouterCase<D>, offset: usize) {
    let RouterCase { shape, router, .. } = case;
    for step in RouterStep::ALL {
        let what = format!("{shape} {router:?} {} {step:?}", D::DTYPE);
        let got = run(gpu, case, step, offset);
        let want = reference::route_scores_fwd::<f32, D>(shape, router, step, &case.inputs());
        if step == RouterStep::Scores && !have_scores(router) {
            let refused = |error: Error| match error {
                Error::Unsupported { argument, .. } => argument == "router.scoring",
                _ => false,
            };
            assert!(got.is_err_and(refused) && want.is_err_and(refused), "{what}");
            continue;
        }
        let (got, want) = (got.unwrap(), want.unwrap());
        let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got), bits(&want), "{what}");
        assert!(got.iter().all(|score| !score.is_nan()), "{what}");
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn matches_reference(
        tokens in 0usize..9, experts in 1usize..300, k in 1usize..9, seed in any::<u64>(), logits in 0..LOGITS.len(),
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        fn random<D: Dtype>(shape: RoutingShape, logits: Logits, seed: u64) -> RouterCase<D> {
            let mut rng = Rng::new(seed);
            let router = router(&mut rng, shape.num_experts, shape.top_k);
            RouterCase::random(&mut rng, shape, router, make(shape.logits(), logits, seed))
        }
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let offset = seed as usize % 3;
        check(&gpu, &random::<f32>(shape, LOGITS[logits], seed), offset);
        check(&gpu, &random::<f16>(shape, LOGITS[logits], seed), offset);
        check(&gpu, &random::<bf16>(shape, LOGITS[logits], seed), offset);
    }
}

#[test]
fn rows_of_any_length_match_reference() {
    let gpu = gpu();
    for experts in [1, 31, 32, 33, 1024, 1025, 4096] {
        let shape = RoutingShape::new(5, experts, 1).unwrap();
        let case = RouterCase::bare(
            shape,
            RouterConfig { logit_softcap: Some(2.0), ..RouterConfig::softmax_top_k(true) },
            make::<bf16>(shape.logits(), Logits::Usual, experts as u64),
        );
        check(&gpu, &case, 0);
    }
}

/// In f64, step by step: noise, deviation, multiplier, soft-cap and a sigmoid.
#[test]
fn hand_computed_steps() {
    let shape = RoutingShape::new(2, 2, 1).unwrap();
    let router = RouterConfig {
        scoring: Scoring::Sigmoid,
        noise_deviation: 0.5,
        logit_multiplier: 3.0,
        logit_softcap: Some(2.0),
        ..RouterConfig::default()
    };
    let (logits, noise, active) = ([0.25f32, -1.0, 9.0, 9.0], [0.5f32, 0.25, 7.0, 7.0], [1, 0]);
    let inputs = reference::RouteInputs {
        noise: Some(&noise),
        active: Some(&active),
        ..reference::RouteInputs::new(&logits)
    };
    let run = |step| reference::route_scores_fwd::<f64, f32>(&shape, &router, step, &inputs);
    let near = |got: &[f64], want: &[f64]| {
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?}");
    };
    let noisy = run(RouterStep::NoisyLogits).unwrap();
    assert_eq!(noisy, [0.5, -0.875, f64::NEG_INFINITY, f64::NEG_INFINITY]);
    let z = run(RouterStep::Logits).unwrap();
    let want = [2.0 * (0.75f64).tanh(), 2.0 * (-1.3125f64).tanh()];
    near(&z[..2], &want);
    let scores = run(RouterStep::Scores).unwrap();
    near(&scores, &[1.0 / (1.0 + (-want[0]).exp()), 1.0 / (1.0 + (-want[1]).exp()), 0.0, 0.0]);
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(3, 4, 2).unwrap();
    let (router, step) = (RouterConfig::softmax_top_k(true), RouterStep::Scores);
    let floats = gpu.upload(&[0.5f32; 13]);
    let flags = gpu.upload(&[1u8; 4]);
    let mut scores = gpu.poisoned::<f32>(13);
    let mut call = |lens: [usize; 5]| {
        let (floats, flags) = (floats.view(), flags.view());
        let [logits, noise, noise_logits] = [0, 1, 2].map(|at| floats.slice(..lens[at]));
        let flags = flags.slice(..lens[3]);
        let inputs = RouteInputs {
            noise: Some(&noise),
            noise_logits: Some(&noise_logits),
            active: Some(&flags),
            ..RouteInputs::new(&logits)
        };
        let mut scores = scores.view_mut();
        let to = &mut scores.slice_mut(..lens[4]);
        route_scores_fwd_into(device, stream, shape, &router, step, &inputs, to)
    };
    let (good, op) = ([12, 12, 12, 3, 12], "route_scores_fwd");
    let names = ["logits", "noise", "noise_logits", "active", "scores"];
    for (at, argument) in names.into_iter().enumerate() {
        let mut lens = good;
        lens[at] += 1;
        let (wanted, got) = (good[at], lens[at]);
        assert_eq!(call(lens), Err(Error::Length { op, argument, wanted, got }));
    }
    assert_eq!(call(good), Ok(()));
    let floats = floats.view();
    let logits = floats.slice(..12);
    let lonely = RouteInputs { noise_logits: Some(&logits), ..RouteInputs::new(&logits) };
    let error = route_scores_fwd(device, stream, shape, &router, step, &lonely);
    let why = "`noise_logits` is given without `noise`".into();
    assert_eq!(error.err(), Some(Error::Mismatch { op, why }));
    let scores = route_scores_fwd(device, stream, shape, &router, step, &RouteInputs::new(&logits));
    assert_eq!(gpu.download(&scores.unwrap().as_view()), [0.25; 12]);

    let odd = RouteBuffers { logits: 257, ..RouteBuffers::default() };
    // SAFETY: the call is refused before the launch.
    let error = unsafe {
        let (stream, dtype) = (stream.cu_stream(), DType::F16);
        route_scores_fwd_raw(device, stream, dtype, shape, &router, step, 256, odd)
    };
    assert!(matches!(error, Err(Error::Alignment { argument: "logits", .. })), "{error:?}");
}
