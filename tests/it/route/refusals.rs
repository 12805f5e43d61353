//! Shapes, routers and buffers that route rejects by name before a launch.

use moe_kernels::ops::route::{self, RouteBuffers, RouteInputs};
use moe_kernels::{DType, Error, RouterConfig, RoutingShape, Scoring, Selection};

use super::{Logits, make};
use crate::common::gpu;

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
            &RouteInputs::new(&logits.view().slice(..lens[0])),
            &mut ids.view_mut().slice_mut(..lens[1]),
            &mut weights.view_mut().slice_mut(..lens[2]),
        )
    };
    let shape = RoutingShape { num_tokens: 4, num_experts: 8, top_k: 2 };
    let length =
        |argument, wanted, got| Err(Error::Length { op: "route_fwd", argument, wanted, got });
    assert_eq!(call(shape, [31, 8, 8]), length("logits", 32, 31));
    assert_eq!(call(shape, [32, 7, 8]), length("expert_ids", 8, 7));
    assert_eq!(call(shape, [32, 8, 7]), length("routing_weights", 8, 7));
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

/// Buffers that the router needs and that are not given, or the reverse. Device and reference share
/// the check, and the reference tests every case.
#[test]
fn rejects_missing_and_unneeded_buffers() {
    let gpu = gpu();
    let shape = RoutingShape::new(4, 8, 2).unwrap();
    let (logits, bias) = (gpu.upload(&[0.0f32; 32]), gpu.upload(&[0.0f32; 8]));
    let (logits, bias) = (logits.view(), bias.view());
    let bare = RouteInputs::new(&logits);
    let biased = RouteInputs { selection_bias: Some(&bias), ..bare };
    let plain = RouterConfig::softmax_top_k(true);
    let biased_router = RouterConfig { selection_bias: true, ..plain };
    let given = RouterConfig { selection: Selection::Given, ..plain };
    let scoring = Scoring::Sparsemixer { jitter: 0.01, training: true };
    let sampled = RouterConfig { scoring, ..RouterConfig::default() };
    let eval = RouterConfig {
        scoring: Scoring::Sparsemixer { jitter: 0.01, training: false },
        ..RouterConfig::default()
    };
    let (noise, draws) = (gpu.upload(&[0.0f32; 64]), gpu.upload(&[0.0f32; 8]));
    let (noise, draws) = (noise.view(), draws.view());
    let drawn = RouteInputs { selection_noise: Some(&noise), midpoint_draws: Some(&draws), ..bare };
    let call = |router: &RouterConfig, inputs: &RouteInputs<'_, f32>| {
        route::route_fwd(&gpu.device, &gpu.stream, shape, router, inputs).err()
    };
    for (router, inputs, wanted) in [
        (plain, biased, "selection_bias"),
        (biased_router, bare, "selection_bias"),
        (given, bare, "given_ids"),
        (sampled, bare, "selection_noise"),
        (sampled, RouteInputs { midpoint_draws: None, ..drawn }, "midpoint_draws"),
        (eval, drawn, "selection_noise"),
        (eval, RouteInputs { selection_noise: None, ..drawn }, "midpoint_draws"),
    ] {
        let error = call(&router, &inputs);
        assert!(
            matches!(error, Some(Error::Presence { argument, .. }) if argument == wanted),
            "{error:?}"
        );
    }
    assert_eq!(call(&biased_router, &biased), None);
    assert_eq!(call(&sampled, &drawn), None);
    let short = noise.slice(..63);
    let error = call(&sampled, &RouteInputs { selection_noise: Some(&short), ..drawn });
    assert!(matches!(error, Some(Error::Length { argument: "selection_noise", .. })), "{error:?}");
    let bad = RouterConfig { scale: f32::NAN, ..plain };
    assert!(matches!(call(&bad, &bare), Some(Error::Unsupported { .. })));
}

#[test]
fn raw_addresses_must_be_aligned() {
    let gpu = gpu();
    let router = RouterConfig::top_k_softmax();
    let shape = RoutingShape::new(1, 8, 2).unwrap();
    let good = RouteBuffers {
        expert_ids: 256,
        routing_weights: 256,
        logits: 256,
        ..RouteBuffers::default()
    };
    let drawn = RouteBuffers { selection_noise: 256, midpoint_draws: 256, ..good };
    let scoring = Scoring::Sparsemixer { jitter: 0.01, training: true };
    let sparsemixer = RouterConfig { scoring, ..RouterConfig::default() };
    for (argument, buffers) in [
        ("expert_ids", RouteBuffers { expert_ids: 257, ..good }),
        ("routing_weights", RouteBuffers { routing_weights: 258, ..good }),
        ("logits", RouteBuffers { logits: 257, ..good }),
        ("noise", RouteBuffers { noise: 258, ..good }),
        ("noise_logits", RouteBuffers { noise: 256, noise_logits: 257, ..good }),
        ("selection_noise", RouteBuffers { selection_noise: 258, ..drawn }),
        ("midpoint_draws", RouteBuffers { midpoint_draws: 257, ..drawn }),
    ] {
        let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
        let sampled = buffers.selection_noise != 0;
        let router = if sampled { &sparsemixer } else { &router };
        // SAFETY: the call fails before it launches anything.
        let result =
            unsafe { route::route_fwd_raw(device, stream, DType::BF16, shape, router, buffers) };
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
}
