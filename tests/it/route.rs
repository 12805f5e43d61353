//! route: ids and weights agree bit for bit with the reference in f32, weights with that in f64
//! within a bound.

mod refusals;
mod scores;
mod sparsemixer;

use cudarc::driver::{CudaView, DeviceRepr};
use half::{bf16, f16};
use moe_kernels::ops::route::{self, RouteInputs};
use moe_kernels::reference::bound::Bounded;
use moe_kernels::{Dtype, RouterConfig, RoutingShape, Scoring, Selection, reference};
use proptest::prelude::*;

use crate::common::{
    Buffer, Gpu, Rng, RouterCase, any_bits, assert_within, bits, config, gpu, router,
};

const ROUTERS: [RouterConfig; 3] = [
    RouterConfig::softmax_top_k(false),
    RouterConfig::softmax_top_k(true),
    RouterConfig::top_k_softmax(),
];

/// Kinds of logits.
#[derive(Debug, Clone, Copy)]
enum Logits {
    /// Typical of routers.
    Usual,
    /// Few different values, so that ties abound.
    Ties,
    /// Neighbours in the element type, one unit in the last place apart.
    NearTies,
    /// Zeros of both signs.
    Zeros,
    /// Typical, with NaNs and infinities among them.
    Special,
    /// NaN and infinities alone.
    OnlySpecial,
    /// Any bits.
    Bits,
    /// Differences so large that most weights vanish.
    Wide,
}

const LOGITS: [Logits; 8] = [
    Logits::Usual,
    Logits::Ties,
    Logits::NearTies,
    Logits::Zeros,
    Logits::Special,
    Logits::OnlySpecial,
    Logits::Bits,
    Logits::Wide,
];

/// The element `steps` units in the last place above 1.
fn above_one<D: Dtype>(steps: usize) -> D {
    let ulp = 2.0 * D::DTYPE.unit_roundoff();
    D::from_f64(1.0 + steps as f64 * ulp)
}

fn make<D: Dtype>(len: usize, logits: Logits, seed: u64) -> Vec<D> {
    let mut rng = Rng::new(seed);
    let special = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    let mut element = || match logits {
        Logits::Usual => D::from_f64(rng.signed() * 8.0),
        Logits::Ties => D::from_f64(rng.below(3) as f64 - 1.0),
        Logits::NearTies => above_one(rng.below(4)),
        Logits::Zeros => D::from_f64([0.0, -0.0][rng.below(2)]),
        Logits::Special if rng.below(8) > 0 => D::from_f64(rng.signed() * 8.0),
        Logits::Special | Logits::OnlySpecial => D::from_f64(special[rng.below(3)]),
        Logits::Bits => any_bits(&mut rng),
        Logits::Wide => D::from_f64(rng.signed() * 200.0),
    };
    (0..len).map(|_| element()).collect()
}

/// Values on the device, `offset` elements into their buffer; `None` for a buffer that is not
/// given.
struct Uploaded<T>(Option<Buffer<T>>, usize);

impl<T: DeviceRepr + bytemuck::Pod> Uploaded<T> {
    fn new(gpu: &Gpu, values: Option<&[T]>, offset: usize) -> Self {
        let padded = |values: &[T]| [&vec![T::zeroed(); offset][..], values].concat();
        Self(values.map(|values| gpu.upload(&padded(values))), offset)
    }

    fn view(&self) -> Option<CudaView<'_, T>> {
        self.0.as_ref().map(|buffer| buffer.view().slice(self.1..))
    }
}

/// Routes a case whose views start `offset` elements into their buffers.
fn run<D: Dtype>(gpu: &Gpu, case: &RouterCase<D>, offset: usize) -> (Vec<u32>, Vec<f32>) {
    let host = case.inputs();
    let logits = Uploaded::new(gpu, Some(host.logits), offset);
    let selection_bias = Uploaded::new(gpu, host.selection_bias, offset);
    let expert_scale = Uploaded::new(gpu, host.expert_scale, offset);
    let noise = Uploaded::new(gpu, host.noise, offset);
    let noise_logits = Uploaded::new(gpu, host.noise_logits, offset);
    let selection_noise = Uploaded::new(gpu, host.selection_noise, offset);
    let midpoint_draws = Uploaded::new(gpu, host.midpoint_draws, offset);
    let given_ids = Uploaded::new(gpu, host.given_ids, offset);
    let token_ids = Uploaded::new(gpu, host.token_ids, offset);
    let active = Uploaded::new(gpu, host.active, offset);
    let mut ids = gpu.poisoned::<u32>(case.shape.slots());
    let mut weights = gpu.poisoned::<f32>(case.shape.slots());
    route::route_fwd_into(
        &gpu.device,
        &gpu.stream,
        case.shape,
        &case.router,
        &RouteInputs {
            logits: &logits.view().unwrap(),
            selection_bias: selection_bias.view().as_ref(),
            expert_scale: expert_scale.view().as_ref(),
            noise: noise.view().as_ref(),
            noise_logits: noise_logits.view().as_ref(),
            selection_noise: selection_noise.view().as_ref(),
            midpoint_draws: midpoint_draws.view().as_ref(),
            given_ids: given_ids.view().as_ref(),
            token_ids: token_ids.view().as_ref(),
            active: active.view().as_ref(),
        },
        &mut ids.view_mut(),
        &mut weights.view_mut(),
    )
    .unwrap();
    (gpu.download(&ids.view()), gpu.download(&weights.view()))
}

/// True if every weight has a bound: values are moderate, and scores are positive.
fn has_bounds<D: Dtype>(case: &RouterCase<D>) -> bool {
    fn moderate<V: Dtype>(values: &[V]) -> bool {
        values.iter().all(|value| value.to_f32().abs() <= 8.0)
    }
    let positive = matches!(
        case.router.scoring,
        Scoring::Softmax
            | Scoring::SoftmaxSelected
            | Scoring::Sigmoid
            | Scoring::Sparsemixer { .. }
    );
    positive
        && case.router.selection != Selection::Given
        && moderate(&case.logits)
        && case.noise.as_deref().is_none_or(moderate)
        && case.noise_logits.as_deref().is_none_or(moderate)
        && case.expert_scale.as_deref().is_none_or(moderate)
}

/// Checks one routing against the reference: in f32 bit for bit, in f64 within the bound.
fn check<D: Dtype>(gpu: &Gpu, case: &RouterCase<D>, offset: usize) {
    let RouterCase { shape, router, .. } = case;
    let what = format!("{shape} {router:?} {}", D::DTYPE);
    let (ids, weights) = run(gpu, case, offset);
    let want = reference::route_fwd::<f32, D>(shape, router, &case.inputs()).unwrap();
    assert_eq!(ids, want.expert_ids, "{what}");
    for (slot, (got, want)) in weights.iter().zip(&want.routing_weights).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{what}: slot {slot} is {got:e}, not {want:e}");
        assert!(!got.is_nan(), "{what}: slot {slot} is NaN");
    }
    let (truth, bound) = reference::bound::route(shape, router, &case.inputs()).unwrap();
    assert_eq!(ids, truth.expert_ids, "{what}");
    // Without a bound if f32 overflows in between, or scores cancel.
    if has_bounds(case) {
        let missing = bound.iter().position(|bound| !bound.is_finite());
        assert_eq!(missing, None, "{what}: a slot without a bound");
    }
    let bounded = (0..ids.len()).filter(|&slot| bound[slot].is_finite());
    let (slots, bounded): (Vec<_>, Vec<_>) =
        bounded.map(|slot| (weights[slot], (truth.routing_weights[slot], bound[slot]))).unzip();
    let (value, bound) = bounded.into_iter().unzip();
    assert_within(&slots, &Bounded { value, bound }, &what);
    let active = |token: usize| case.active.as_ref().is_none_or(|active| active[token] != 0);
    for (token, ids) in ids.chunks_exact(shape.top_k).enumerate() {
        if router.selection == Selection::Given || !active(token) {
            continue;
        }
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), shape.top_k, "{what}: {ids:?}");
        assert!(ids.iter().all(|&id| (id as usize) < shape.num_experts), "{what}: {ids:?}");
    }
}

/// A softmax without options or, twice as often, a random router.
fn check_any<D: Dtype>(gpu: &Gpu, shape: RoutingShape, kind: Logits, seed: u64) {
    let mut rng = Rng::new(seed);
    let logits = make::<D>(shape.logits(), kind, seed);
    let case = match rng.below(9) {
        plain @ 0..3 => RouterCase::bare(shape, ROUTERS[plain], logits),
        _ => {
            let router = router(&mut rng, shape.num_experts, shape.top_k);
            RouterCase::random(&mut rng, shape, router, logits)
        }
    };
    check(gpu, &case, rng.below(3));
}

fn check_dtypes(gpu: &Gpu, shape: RoutingShape, kind: Logits, seed: u64) {
    gpu.reschedule(seed);
    check_any::<f32>(gpu, shape, kind, seed);
    check_any::<f16>(gpu, shape, kind, seed.wrapping_add(1));
    check_any::<bf16>(gpu, shape, kind, seed.wrapping_add(2));
}

/// Every one of these typical routers has bounds.
#[test]
fn typical_routers_have_bounds() {
    let gpu = gpu();
    let shape = RoutingShape::new(7, 24, 5).unwrap();
    for scoring in [
        Scoring::Softmax,
        Scoring::SoftmaxSelected,
        Scoring::Sigmoid,
        Scoring::Sparsemixer { jitter: 0.01, training: false },
    ] {
        let selection = match scoring {
            Scoring::SoftmaxSelected => Selection::Logit,
            _ => RouterConfig::default().selection,
        };
        let logits = make::<f32>(shape.logits(), Logits::Usual, 9);
        let router = RouterConfig { scoring, selection, ..RouterConfig::default() };
        let case = RouterCase::bare(shape, router, logits);
        assert!(has_bounds(&case), "{router}");
        check(&gpu, &case, 0);
    }
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn matches_reference(
        tokens in 0usize..12, experts in 1usize..200, k in 1usize..40,
        kind in proptest::sample::select(LOGITS.to_vec()), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        check_dtypes(&gpu(), shape, kind, seed);
    }

    /// Numbers of experts and choices that many groups divide, as models have them.
    #[test]
    fn matches_reference_in_round_shapes(
        experts in proptest::sample::select(vec![8usize, 16, 24, 60, 64, 96, 128, 160, 256, 384, 512]),
        k in proptest::sample::select(vec![1usize, 2, 4, 6, 8, 12]),
        kind in proptest::sample::select(LOGITS.to_vec()), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(5, experts, k.min(experts)).unwrap();
        check_dtypes(&gpu(), shape, kind, seed);
    }
}

/// The numbers of experts at which the body or a loop count changes, with K at and next to its
/// limits.
#[test]
fn matches_reference_at_limits() {
    let gpu = gpu();
    let experts =
        [1, 2, 3, 7, 31, 32, 33, 64, 67, 100, 128, 256, 257, 384, 512, 1000, 1024, 1025, 4096];
    let mut seed = 0;
    for e in experts {
        for k in [1, 2, 8, 32, 33, e].into_iter().filter(|&k| k <= e) {
            for _ in 0..3 {
                seed += 1;
                let shape = RoutingShape::new(1 + seed as usize % 3, e, k).unwrap();
                let kind = LOGITS[seed as usize % LOGITS.len()];
                match seed % 4 {
                    0 => check_any::<f16>(&gpu, shape, kind, seed),
                    1 => check_any::<bf16>(&gpu, shape, kind, seed),
                    _ => check_any::<f32>(&gpu, shape, kind, seed),
                }
            }
        }
    }
    check_dtypes(&gpu, RoutingShape::new(0, 8, 2).unwrap(), Logits::Usual, 1);
}

/// Rows of equal or NaN logits give K distinct experts, lowest first.
#[test]
fn equal_logits_go_to_the_lowest_experts() {
    let gpu = gpu();
    for value in [0.0, -0.0, 1.5, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
        for (e, k) in [(8, 8), (67, 6), (300, 8), (100, 40), (1500, 3)] {
            let shape = RoutingShape::new(2, e, k).unwrap();
            for router in ROUTERS {
                let case = RouterCase::bare(shape, router, vec![value; shape.logits()]);
                let (ids, weights) = run(&gpu, &case, 0);
                assert!(
                    ids.chunks_exact(k).all(|ids| ids.iter().copied().eq(0..k as u32)),
                    "{value} {ids:?}"
                );
                let all = router == RouterConfig::softmax_top_k(false);
                let share = 1.0 / if all { e as f32 } else { k as f32 };
                assert!(
                    weights.iter().all(|&weight| weight == share),
                    "{value}: {weights:?}, wanted {share}"
                );
            }
        }
    }
}

/// One unit in the last place decides, in every element type and at every position.
#[test]
fn near_ties_are_decided() {
    fn one<D: Dtype>(gpu: &Gpu) {
        for (e, k) in [(64, 2), (384, 3), (96, 33), (1030, 2)] {
            let shape = RoutingShape::new(1, e, k).unwrap();
            for winner in [0, 1, 31, 32, e / 2, e - 1] {
                let mut logits = vec![D::from_f64(1.0); e];
                logits[winner] = above_one(1);
                let case = RouterCase::bare(shape, RouterConfig::top_k_softmax(), logits);
                let (ids, _) = run(gpu, &case, 0);
                assert_eq!(ids[0], winner as u32, "{shape} {}", D::DTYPE);
                check(gpu, &case, 0);
            }
        }
    }
    let gpu = gpu();
    one::<f32>(&gpu);
    one::<f16>(&gpu);
    one::<bf16>(&gpu);
}

/// With a largest logit of 0 nothing is rounded before exp, so that its own error shows: 1.6 units
/// of 2^-24, and half a unit for the division and for the sum.
#[test]
fn exponentials_are_within_their_bound() {
    let gpu = gpu();
    let distances: Vec<f32> = (0..349).map(|step| -0.25 * step as f32).collect();
    let logits: Vec<f32> = distances.iter().flat_map(|&x| [0.0, x]).collect();
    let shape = RoutingShape::new(distances.len(), 2, 2).unwrap();
    let case = RouterCase::bare(shape, RouterConfig::top_k_softmax(), logits);
    let (_, weights) = run(&gpu, &case, 0);
    for (x, weights) in distances.iter().zip(weights.chunks_exact(2)) {
        let p = f64::from(*x).exp();
        let error = (f64::from(weights[1]) / (p / (1.0 + p)) - 1.0).abs() * f64::from(1 << 24);
        assert!(error <= 3.0, "exp({x}) is off by {error} units");
    }
}

/// Weights do not depend on alignment or schedule.
#[test]
fn schedules_and_alignment_do_not_change_bits() {
    let gpu = gpu();
    let mut rng = Rng::new(5);
    for (e, k) in [(128, 8), (384, 8), (64, 48), (96, 6), (96, 40)] {
        let shape = RoutingShape::new(9, e, k).unwrap();
        let logits = make::<bf16>(shape.logits(), Logits::Usual, 7);
        let plain = ROUTERS.map(|router| RouterCase::bare(shape, router, logits.clone()));
        let any = (0..6).map(|_| {
            let router = router(&mut rng, e, k);
            RouterCase::random(&mut rng, shape, router, logits.clone())
        });
        for case in plain.into_iter().chain(any) {
            let runs: Vec<_> = (0..6)
                .map(|seed| {
                    gpu.reschedule(seed);
                    let (ids, weights) = run(&gpu, &case, seed as usize % 3);
                    (ids, bits(&weights))
                })
                .collect();
            assert!(runs.windows(2).all(|pair| pair[0] == pair[1]), "{shape} {:?}", case.router);
        }
    }
}

/// The bodies with options give the same bits for a router without options.
#[test]
fn neutral_options_do_not_change_bits() {
    let gpu = gpu();
    for (e, k) in [(100, 7), (256, 8), (300, 32)] {
        let shape = RoutingShape::new(6, e, k).unwrap();
        for router in ROUTERS {
            let bare =
                RouterCase::bare(shape, router, make::<f16>(shape.logits(), Logits::Bits, 2));
            let active = Some(vec![1; shape.num_tokens]);
            let with_options = RouterCase { active, ..bare.clone() };
            let (ids, weights) = run(&gpu, &bare, 0);
            let (same_ids, same_weights) = run(&gpu, &with_options, 0);
            assert_eq!((ids, bits(&weights)), (same_ids, bits(&same_weights)), "{shape} {router}");
        }
    }
}

#[test]
fn allocating_form_agrees() {
    let gpu = gpu();
    let router = ROUTERS[1];
    for tokens in [0, 5] {
        let shape = RoutingShape::new(tokens, 16, 4).unwrap();
        let logits = make::<f16>(shape.logits(), Logits::Usual, 3);
        let case = RouterCase::bare(shape, router, logits);
        let (ids, weights) = run(&gpu, &case, 0);
        let logits = gpu.upload(&case.logits);
        let logits = logits.view();
        let inputs = RouteInputs::new(&logits);
        let routing = route::route_fwd(&gpu.device, &gpu.stream, shape, &router, &inputs).unwrap();
        assert_eq!(gpu.download(&routing.expert_ids.as_view()), ids);
        assert_eq!(gpu.download(&routing.routing_weights.as_view()), weights);
    }
}
