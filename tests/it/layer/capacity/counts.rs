//! The counts of kept and dropped slots: per sequence, checked before any launch, and in a captured
//! graph.

use super::*;

#[test]
fn slots_are_counted_per_sequence() {
    let gpu = gpu();
    let rows: Vec<&[f32]> = vec![&[1.0, 0.0]; 5];
    let router = RouterConfig::softmax_top_k(false);
    let mut case = given(router, one_row(Priority::Token), 1, &rows);
    case.inputs.sequence_tokens = Some(2);
    case.inputs.active = Some(vec![1, 1, 1, 0, 1]);
    for got in [on_host(&case), on_device(&gpu, &case)] {
        assert_eq!(got.expert_ids, [0, NONE, 0, NONE, 0]);
        assert_eq!(got.kept, [1, 0, 1, 0, 1, 0]);
        assert_eq!(got.dropped, [1, 0, 0, 0, 0, 0]);
    }
    // With overflow, every request beyond the limit is counted.
    case.config.capacity.as_mut().unwrap().overflow = 1;
    case.inputs.sequence_tokens = None;
    for got in [on_host(&case), on_device(&gpu, &case)] {
        assert_eq!(got.expert_ids, [0, 1, NONE, NONE, NONE]);
        assert_eq!((got.kept, got.dropped), (vec![1, 1], vec![3, 2]));
    }
    // A layer without capacity has no counts.
    case.config.capacity = None;
    let got = on_host(&case);
    assert!(got.kept.is_empty() && got.dropped.is_empty());
}

#[test]
fn invalid_counts_are_errors_before_any_launch() {
    let gpu = gpu();
    let rows: [&[f32]; 3] = [&[1.0, 0.0], &[0.0, 1.0], &[1.0, 2.0]];
    let router = RouterConfig::softmax_top_k(false);
    let mut case = given(router, one_row(Priority::Token), 1, &rows);
    case.inputs.sequence_tokens = Some(2);
    let call = |case: &Case<f32>, lengths: [Option<usize>; 2], slots: usize| {
        case.on(&gpu, |mut prepared| {
            let mut ids = gpu.poisoned::<u32>(slots);
            let mut routing_weights = gpu.poisoned::<f32>(3);
            let [mut kept, mut dropped] =
                lengths.map(|len| len.map(|len| gpu.poisoned::<u32>(len)));
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            let mut outputs = RoutingOutputs {
                kept: kept.as_mut().map(|kept| kept.view_mut()),
                dropped: dropped.as_mut().map(|dropped| dropped.view_mut()),
                ..RoutingOutputs::new(ids.view_mut(), routing_weights.view_mut())
            };
            let result = layer.route_into(&gpu.stream, inputs, weights, workspace, &mut outputs);
            if result.is_err() {
                assert!(gpu.download(&ids.view()).iter().all(|&id| id == u32::MAX));
                assert!(gpu.download(&routing_weights.view()).iter().all(|weight| weight.is_nan()));
            }
            result
        })
    };
    for lengths in [[None, None], [Some(4), None], [None, Some(4)], [Some(4), Some(4)]] {
        assert_eq!(call(&case, lengths, 3), Ok(()));
    }
    let short =
        |argument, wanted, got| Err(Error::Length { op: "MoeLayer", argument, wanted, got });
    assert_eq!(call(&case, [Some(2), None], 3), short("kept", 4, 2));
    assert_eq!(call(&case, [Some(4), Some(5)], 3), short("dropped", 4, 5));
    assert_eq!(call(&case, [None, None], 2), short("expert_ids", 3, 2));
    case.config.capacity = None;
    for (lengths, argument) in [([Some(4), None], "kept"), ([None, Some(4)], "dropped")] {
        let error = Error::Presence { op: "MoeLayer", argument, given: true };
        assert_eq!(call(&case, lengths, 3), Err(error));
    }
}

#[test]
fn captured_counts_replay_with_new_routing() {
    // A separate context: during a capture, cudarc must not wait for events of other tests.
    let gpu = gpu();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything of this context runs on one stream.
    unsafe { context.disable_event_tracking() };
    let (device, stream) = (Device::new(&context).unwrap(), context.new_stream().unwrap());
    let capacity = CapacityConfig {
        overflow: 2,
        normalization: Normalization::Sum { epsilon: 1e-20 },
        ..CapacityConfig::new(CapacityLimit::Rows { rows: 4 }, Priority::ChoiceByTopWeight)
    };
    let router = RouterConfig { scale: 1.5, ..RouterConfig::softmax_top_k(false) };
    let config = MoeConfig { router, capacity: Some(capacity), ..MoeConfig::new(3, 2, 5, 2) };
    assert_eq!(config.router.selection, Selection::Score);
    let (tokens, sequence) = (21, Some(8));
    let cases: Vec<Case<f32>> = (0..3)
        .map(|seed| {
            let mut case = random_case::<f32>(config, tokens, sequence, seed == 1, seed);
            (case.inputs.noise, case.inputs.noise_logits) = (None, None);
            (case.inputs.active, case.inputs.router_x) = (None, None);
            case
        })
        .collect();
    let layer = MoeLayer::new(&device, config).unwrap();
    let weights = cases[0].weights.upload(&stream).unwrap();
    let mut inputs = cases[0].inputs.upload(&stream).unwrap();
    let (slots, cells) = (tokens * 2, 3 * 5);
    let mut ids = stream.clone_htod(&vec![7u32; slots]).unwrap();
    let mut routing_weights = stream.clone_htod(&vec![f32::NAN; slots]).unwrap();
    let mut kept = stream.clone_htod(&vec![77u32; cells]).unwrap();
    let mut dropped = stream.clone_htod(&vec![77u32; cells]).unwrap();
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, tokens).unwrap();
    let mut workspace = Workspace::alloc(&stream, bytes).unwrap();

    device.warm_up(DType::F32).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let mut outputs = RoutingOutputs {
        kept: Some(kept.as_view_mut()),
        dropped: Some(dropped.as_view_mut()),
        ..RoutingOutputs::new(ids.as_view_mut(), routing_weights.as_view_mut())
    };
    let views = weights.as_views();
    layer.route_into(&stream, &inputs.as_views(), &views, &mut workspace, &mut outputs).unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    assert_eq!(stream.clone_dtoh(&kept).unwrap(), [77; 15], "a capture executes nothing");
    for case in &cases {
        let (Some(Typed::Element(logits)), Some(Typed::Element(to))) =
            (&case.inputs.logits, &mut inputs.logits)
        else {
            unreachable!()
        };
        stream.memcpy_htod(logits, to).unwrap();
        graph.launch().unwrap();
        let got = CapacityRouting {
            expert_ids: stream.clone_dtoh(&ids).unwrap(),
            weights: stream.clone_dtoh(&routing_weights).unwrap(),
            kept: stream.clone_dtoh(&kept).unwrap(),
            dropped: stream.clone_dtoh(&dropped).unwrap(),
        };
        got.check(&composed(case), "a replay");
        gpu.reschedule(1);
    }
}
