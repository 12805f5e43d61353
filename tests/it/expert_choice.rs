//! expert_choice: a selection, so device and reference agree bit for bit.

use half::{bf16, f16};
use moe_kernels::ops::combine::{self, CombineInputs};
use moe_kernels::ops::expert_choice::{self, ExpertChoiceBuffers};
use moe_kernels::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_fwd};
use moe_kernels::ops::plan;
use moe_kernels::{DType, Dtype, Error, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Rng, bits, config, gpu, values};

/// Runs the operation on `scores` and checks it against the reference.
fn check<D: Dtype>(gpu: &Gpu, (t, e, c): (usize, usize, usize), scores: &[D]) {
    let (want_ids, want_weights) = reference::expert_choice_fwd(t, e, c, scores).unwrap();
    let uploaded = gpu.upload(scores);
    let (mut ids, mut weights) = (gpu.poisoned::<u32>(t * e), gpu.poisoned::<f32>(t * e));
    expert_choice::expert_choice_fwd_into(
        &gpu.device,
        &gpu.stream,
        t,
        e,
        c,
        &uploaded.view(),
        &mut ids.view_mut(),
        &mut weights.view_mut(),
    )
    .unwrap();
    // The poison of ids is the id of a slot that is not chosen, whose weight is checked.
    let what = format!("T{t} E{e}, {c} tokens, {}", D::DTYPE);
    assert_eq!(gpu.download(&ids.view()), want_ids, "{what}");
    assert_eq!(bits(&gpu.download(&weights.view())), bits(&want_weights), "{what}");
}

/// Scores of few values, so that many tie, and of every kind.
fn ties<D: Dtype>(len: usize, rng: &mut Rng) -> Vec<D> {
    let kinds = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0];
    let score = |rng: &mut Rng| match rng.below(20) {
        kind if kind < kinds.len() => kinds[kind],
        _ => rng.below(8) as f32 / 4.0 - 1.0,
    };
    (0..len).map(|_| D::from_f32(score(rng))).collect()
}

fn check_all<D: Dtype>(gpu: &Gpu, shape: (usize, usize, usize), seed: u64) {
    let (t, e, _) = shape;
    check(gpu, shape, &values::<D>(t * e, 2.0, seed));
    check(gpu, shape, &ties::<D>(t * e, &mut Rng::new(seed)));
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn matches_reference(
        tokens in 0usize..300, experts in 1usize..40, capacity in 0usize..320, seed in any::<u64>(),
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        let shape = (tokens, experts, capacity);
        check_all::<f32>(&gpu, shape, seed);
        check_all::<f16>(&gpu, shape, seed);
        check_all::<bf16>(&gpu, shape, seed);
    }
}

#[test]
fn matches_reference_at_limits() {
    let gpu = gpu();
    for shape in [
        (0, 3, 1),
        (1, 1, 1),
        (1, 17, 0),
        (2, 16, 1),
        (127, 8, 126),
        (128, 9, 128),
        (129, 15, usize::MAX),
        (3, 4096, 2),
        (3000, 3, 1500),
    ] {
        check_all::<f32>(&gpu, shape, 1);
        check_all::<bf16>(&gpu, shape, 2);
    }
    // Any bits, and equal scores, which the order of tokens decides.
    let mut rng = Rng::new(4);
    let any: Vec<f32> = (0..700 * 5).map(|_| f32::from_bits(rng.next() as u32)).collect();
    check(&gpu, (700, 5, 300), &any);
    for value in [1.0, f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
        check(&gpu, (700, 5, 300), &vec![value; 700 * 5]);
    }
}

#[test]
fn many_tokens_match_reference() {
    let gpu = gpu();
    let t = if gpu.emulated { 70_000 } else { 1 << 20 };
    check(&gpu, (t, 2, 1000), &values::<bf16>(t * 2, 1.0, 1));
    check(&gpu, (t, 1, t - 1), &values::<f32>(t, 1.0, 2));
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let scores = ties::<f32>(200 * 11, &mut Rng::new(3));
    for seed in 0..10 {
        gpu.reschedule(seed);
        check(&gpu, (200, 11, 60), &scores);
    }
}

/// A layer of expert choice: the plan has K = E, and the other operations are those of a
/// token-choice layer. Integers and eighths, so that every sum is exact and equals that of each
/// token in f64.
#[test]
fn layer_of_expert_choice_is_exact() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let (t, e, c, hidden, n) = (75, 5, 20, 16, 24);
    let mut rng = Rng::new(7);
    let mut integers =
        |len: usize| -> Vec<f32> { (0..len).map(|_| rng.below(7) as f32 - 3.0).collect() };
    let (x, up, down) = (integers(t * hidden), integers(e * n * hidden), integers(e * hidden * n));
    let scores: Vec<f32> = integers(t * e).iter().map(|score| score / 8.0).collect();

    let shape = RoutingShape::new(t, e, e).unwrap();
    let uploaded = gpu.upload(&scores);
    let choice =
        expert_choice::expert_choice_fwd(device, stream, t, e, c, &uploaded.view()).unwrap();
    let plan = plan::plan_fwd(device, stream, shape, &choice.expert_ids.as_view()).unwrap();
    let (x_device, up_device, down_device) = (gpu.upload(&x), gpu.upload(&up), gpu.upload(&down));
    let (x_view, up_view, down_view) = (x_device.view(), up_device.view(), down_device.view());
    let act = grouped_gemm_fwd(
        device,
        stream,
        &plan,
        n,
        hidden,
        Rows::Gathered,
        &x_view,
        LinearWeights::new(&up_view),
    )
    .unwrap();
    let act = act.as_view();
    let yp = grouped_gemm_fwd(
        device,
        stream,
        &plan,
        hidden,
        n,
        Rows::Grouped,
        &act,
        LinearWeights::new(&down_view),
    )
    .unwrap();
    let (yp, weights) = (yp.as_view(), choice.routing_weights.as_view());
    let inputs = CombineInputs::new(&yp, &weights);
    let y = combine::combine_fwd(device, stream, &plan, hidden, &inputs).unwrap();
    let y = gpu.download(&y.as_view());

    let ids = gpu.download(&choice.expert_ids.as_view());
    let chosen = |expert: u32| ids.iter().filter(|&&id| id == expert).count();
    assert!((0..e as u32).all(|expert| chosen(expert) == c));
    let product = |w: &[f32], x: &[f64]| -> Vec<f64> {
        let rows = w.chunks(x.len());
        rows.map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
    };
    for token in 0..t {
        let x: Vec<f64> = x[token * hidden..][..hidden].iter().map(|&x| f64::from(x)).collect();
        let mut sum = vec![0.0; hidden];
        for expert in (0..e).filter(|&expert| ids[token * e + expert] != u32::MAX) {
            let act = product(&up[expert * n * hidden..][..n * hidden], &x);
            let score = f64::from(scores[token * e + expert]);
            let of_expert = product(&down[expert * hidden * n..][..hidden * n], &act);
            sum.iter_mut().zip(of_expert).for_each(|(sum, y)| *sum += score * y);
        }
        let got: Vec<f64> = y[token * hidden..][..hidden].iter().map(|&y| f64::from(y)).collect();
        assert_eq!(got, sum, "token {token}");
    }
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let scores = gpu.upload(&[0f32; 12]);
    let call = |t, e, len: usize| {
        let scores = scores.view().slice(..len);
        expert_choice::expert_choice_fwd(&gpu.device, &gpu.stream, t, e, 1, &scores).map(|_| ())
    };
    assert_eq!(call(4, 3, 12), Ok(()));
    let short = Error::Length { op: "expert_choice_fwd", argument: "scores", wanted: 12, got: 11 };
    assert_eq!(call(4, 3, 11), Err(short));
    for (t, e) in [(4, 0), (4, 4097), (1 << 20, 4096), (usize::MAX, 2)] {
        assert!(matches!(call(t, e, 12), Err(Error::Unsupported { .. })), "T{t} E{e}");
    }
    let buffers = ExpertChoiceBuffers { expert_ids: 256, routing_weights: 256, scores: 255 };
    // SAFETY: the call fails before it launches anything.
    let result = unsafe {
        let stream = gpu.stream.cu_stream();
        let dtype = DType::BF16;
        expert_choice::expert_choice_fwd_raw(&gpu.device, stream, dtype, 4, 3, 1, buffers)
    };
    assert!(matches!(result, Err(Error::Alignment { argument: "scores", .. })), "{result:?}");
}
