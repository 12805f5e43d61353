//! route: ids agree bit for bit, weights within a bound of their own.

use half::{bf16, f16};
use moe_kernels::ops::route::{self, RouteBuffers};
use moe_kernels::reference::bound::Bounded;
use moe_kernels::{DType, Dtype, Error, RouterConfig, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Rng, assert_within, config, gpu};
use cudarc::driver::DeviceRepr;

const ROUTERS: [RouterConfig; 3] = [
    RouterConfig::softmax_top_k(false),
    RouterConfig::softmax_top_k(true),
    RouterConfig::top_k_softmax(),
];

/// What the logits look like.
#[derive(Debug, Clone, Copy)]
enum Logits {
    /// As routers make them.
    Usual,
    /// Few different values, so that ties abound.
    Ties,
    /// Neighbours in the element type, one unit in the last place apart.
    NearTies,
    /// Zeros of both signs.
    Zeros,
    /// Usual ones with NaNs and infinities among them.
    Special,
    /// Nothing but NaN and infinities.
    OnlySpecial,
    /// Any bits.
    Bits,
    /// So far apart that most weights vanish.
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

fn any_bits<D: Dtype>(rng: &mut Rng) -> D {
    let bits = rng.next().to_le_bytes();
    bytemuck::pod_read_unaligned(&bits[..size_of::<D>()])
}

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

/// Routes `logits`, which start `offset` elements into their buffer; ids and the bits of the weights.
fn run<D: Dtype + DeviceRepr>(
    gpu: &Gpu,
    shape: RoutingShape,
    router: RouterConfig,
    logits: &[D],
    offset: usize,
) -> (Vec<u32>, Vec<f32>) {
    let mut padded = vec![D::from_f64(1e4); offset];
    padded.extend_from_slice(logits);
    let logits = gpu.upload(&padded);
    let mut ids = gpu.poisoned::<u32>(shape.slots());
    let mut weights = gpu.poisoned::<f32>(shape.slots());
    route::route_fwd_into(
        &gpu.device,
        &gpu.stream,
        shape,
        &router,
        &logits.view().slice(offset..),
        &mut ids.view_mut(),
        &mut weights.view_mut(),
    )
    .unwrap();
    (gpu.download(&ids.view()), gpu.download(&weights.view()))
}

/// Holds one routing against the reference.
fn check<D: Dtype + DeviceRepr>(
    gpu: &Gpu,
    shape: RoutingShape,
    router: RouterConfig,
    logits: &[D],
    offset: usize,
) {
    let what = format!("{shape} {router:?} {}", D::DTYPE);
    let (want, bound) = reference::bound::route(&shape, &router, logits).unwrap();
    let (ids, weights) = run(gpu, shape, router, logits, offset);
    assert_eq!(ids, want.expert_ids, "{what}");
    let bounded = Bounded { value: want.weights.clone(), bound };
    assert_within(&weights, &bounded, &what);
    for (slot, (got, want)) in weights.iter().zip(&want.weights).enumerate() {
        assert!(
            (f64::from(*got) - want).abs() <= 1e-6,
            "{what}: slot {slot} is {got}, wanted {want}"
        );
    }
    for ids in ids.chunks_exact(shape.top_k) {
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), shape.top_k, "{what}: {ids:?}");
        assert!(ids.iter().all(|&id| (id as usize) < shape.num_experts), "{what}: {ids:?}");
    }
}

fn check_all<D: Dtype + DeviceRepr>(gpu: &Gpu, shape: RoutingShape, kind: Logits, seed: u64) {
    let router = ROUTERS[(seed % 3) as usize];
    let offset = (seed / 3 % 3) as usize;
    check::<D>(gpu, shape, router, &make(shape.logits(), kind, seed), offset);
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn matches_reference(
        tokens in 0usize..12, experts in 1usize..200, k in 1usize..40,
        kind in proptest::sample::select(LOGITS.to_vec()), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let gpu = gpu();
        gpu.reschedule(seed);
        check_all::<f32>(&gpu, shape, kind, seed);
        check_all::<f16>(&gpu, shape, kind, seed);
        check_all::<bf16>(&gpu, shape, kind, seed);
    }
}

/// Every number of experts at which something changes, with K at its limits and beside them.
#[test]
fn edges() {
    let gpu = gpu();
    let experts =
        [1, 2, 3, 7, 31, 32, 33, 64, 67, 100, 128, 256, 257, 384, 512, 1000, 1024, 1025, 4096];
    let mut seed = 0;
    for e in experts {
        for k in [1, 2, 8, 32, 33, e].into_iter().filter(|&k| k <= e) {
            seed += 1;
            let shape = RoutingShape::new(1 + seed as usize % 3, e, k).unwrap();
            let kind = LOGITS[seed as usize % LOGITS.len()];
            match seed % 4 {
                0 => check_all::<f16>(&gpu, shape, kind, seed),
                1 => check_all::<bf16>(&gpu, shape, kind, seed),
                _ => check_all::<f32>(&gpu, shape, kind, seed),
            }
        }
    }
    check_all::<f32>(&gpu, RoutingShape::new(0, 8, 2).unwrap(), Logits::Usual, 1);
}

/// Rows in which everything is the same, or undefined, still give K different experts, lowest first.
#[test]
fn equal_logits_go_to_the_lowest_experts() {
    let gpu = gpu();
    for value in [0.0, -0.0, 1.5, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
        for (e, k) in [(8, 8), (67, 6), (300, 8), (100, 40), (1500, 3)] {
            let shape = RoutingShape::new(2, e, k).unwrap();
            for router in ROUTERS {
                let (ids, weights) = run(&gpu, shape, router, &vec![value; shape.logits()], 0);
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

/// One unit in the last place decides, in every element type and wherever the winner lies.
#[test]
fn near_ties_are_decided() {
    fn one<D: Dtype + DeviceRepr>(gpu: &Gpu) {
        for (e, k) in [(64, 2), (384, 3), (96, 33), (1030, 2)] {
            let shape = RoutingShape::new(1, e, k).unwrap();
            for winner in [0, 1, 31, 32, e / 2, e - 1] {
                let mut logits = vec![D::from_f64(1.0); e];
                logits[winner] = above_one(1);
                let (ids, _) = run(gpu, shape, RouterConfig::top_k_softmax(), &logits, 0);
                assert_eq!(ids[0], winner as u32, "{shape} {}", D::DTYPE);
                check(gpu, shape, RouterConfig::top_k_softmax(), &logits, 0);
            }
        }
    }
    let gpu = gpu();
    one::<f32>(&gpu);
    one::<f16>(&gpu);
    one::<bf16>(&gpu);
}

/// Below a largest logit of 0 nothing is rounded before exp, so that its own error shows: 1.6 units
/// of 2^-24, and half a unit for the division and for the sum.
#[test]
fn exponentials_are_sharp() {
    let gpu = gpu();
    let distances: Vec<f32> = (0..349).map(|step| -0.25 * step as f32).collect();
    let logits: Vec<f32> = distances.iter().flat_map(|&x| [0.0, x]).collect();
    let shape = RoutingShape::new(distances.len(), 2, 2).unwrap();
    let (_, weights) = run(&gpu, shape, RouterConfig::top_k_softmax(), &logits, 0);
    for (x, weights) in distances.iter().zip(weights.chunks_exact(2)) {
        let p = f64::from(*x).exp();
        let error = (f64::from(weights[1]) / (p / (1.0 + p)) - 1.0).abs() * f64::from(1 << 24);
        assert!(error <= 3.0, "exp({x}) is off by {error} units");
    }
}

/// Weights do not depend on alignment or schedule, only on the numbers.
#[test]
fn schedules_and_alignment_do_not_change_bits() {
    let gpu = gpu();
    for (e, k) in [(128, 8), (384, 8), (64, 48)] {
        let shape = RoutingShape::new(9, e, k).unwrap();
        let logits = make::<bf16>(shape.logits(), Logits::Usual, 7);
        for router in ROUTERS {
            let runs: Vec<_> = (0..8)
                .map(|seed| {
                    gpu.reschedule(seed);
                    let (ids, weights) = run(&gpu, shape, router, &logits, seed as usize % 3);
                    (ids, weights.into_iter().map(f32::to_bits).collect::<Vec<_>>())
                })
                .collect();
            assert!(runs.windows(2).all(|pair| pair[0] == pair[1]), "{shape} {router:?}");
        }
    }
}

#[test]
fn the_allocating_form_agrees() {
    let gpu = gpu();
    let router = ROUTERS[1];
    for tokens in [0, 5] {
        let shape = RoutingShape::new(tokens, 16, 4).unwrap();
        let logits = make::<f16>(shape.logits(), Logits::Usual, 3);
        let (ids, weights) = run(&gpu, shape, router, &logits, 0);
        let uploaded = gpu.upload(&logits);
        let routing =
            route::route_fwd(&gpu.device, &gpu.stream, shape, &router, &uploaded.view()).unwrap();
        assert_eq!(gpu.download(&routing.expert_ids.as_view()), ids);
        assert_eq!(gpu.download(&routing.weights.as_view()), weights);
    }
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let router = RouterConfig::top_k_softmax();
    let logits = gpu.upload(&make::<f32>(4 * 8, Logits::Usual, 0));
    let (mut ids, mut weights) = (gpu.poisoned::<u32>(8), gpu.poisoned::<f32>(8));
    let mut call = |shape: RoutingShape, lens: [usize; 3]| {
        route::route_fwd_into(
            &gpu.device,
            &gpu.stream,
            shape,
            &router,
            &logits.view().slice(..lens[0]),
            &mut ids.view_mut().slice_mut(..lens[1]),
            &mut weights.view_mut().slice_mut(..lens[2]),
        )
    };
    let shape = RoutingShape { num_tokens: 4, num_experts: 8, top_k: 2 };
    let length =
        |argument, wanted, got| Err(Error::Length { op: "route_fwd", argument, wanted, got });
    assert_eq!(call(shape, [31, 8, 8]), length("logits", 32, 31));
    assert_eq!(call(shape, [32, 7, 8]), length("expert_ids", 8, 7));
    assert_eq!(call(shape, [32, 8, 7]), length("weights", 8, 7));
    for wrong in [
        RoutingShape { top_k: 9, ..shape },
        RoutingShape { top_k: 0, ..shape },
        RoutingShape { num_experts: 0, ..shape },
        RoutingShape { num_experts: 4097, ..shape },
        RoutingShape { num_tokens: usize::MAX, ..shape },
    ] {
        assert!(
            matches!(call(wrong, [32, 8, 8]), Err(Error::Unsupported { op: "route_fwd", .. })),
            "{wrong:?}"
        );
    }
    assert!(call(shape, [32, 8, 8]).is_ok());
}

#[test]
fn raw_addresses_must_be_aligned() {
    let gpu = gpu();
    let router = RouterConfig::top_k_softmax();
    let shape = RoutingShape::new(1, 8, 2).unwrap();
    let good = RouteBuffers { expert_ids: 256, weights: 256, logits: 256 };
    for (argument, buffers) in [
        ("expert_ids", RouteBuffers { expert_ids: 257, ..good }),
        ("weights", RouteBuffers { weights: 258, ..good }),
        ("logits", RouteBuffers { logits: 257, ..good }),
    ] {
        // SAFETY: the call fails before it launches anything.
        let result = unsafe {
            route::route_fwd_raw(
                &gpu.device,
                gpu.stream.cu_stream(),
                DType::BF16,
                shape,
                &router,
                buffers,
            )
        };
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
}
