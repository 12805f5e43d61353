//! grouped_gemm: wrong arguments are errors before any launch.

use moe_kernels::ops::grouped_gemm::{
    GateUpBuffers, GateUpTensors, GateUpWeights, GroupedGemmBuffers, LinearWeights, Rows,
    grouped_gemm_fwd_into, grouped_gemm_fwd_raw, grouped_gemm_gate_up_fwd_into,
    grouped_gemm_gate_up_fwd_raw,
};
use moe_kernels::ops::plan;
use moe_kernels::{
    Activation, ActivationFunction, Dtype, Error, ExpertConfig, GateUpLayout, RoutingShape,
    WeightOrder, WeightPosition,
};

use crate::common::{Skew, gpu, routing_ids, values};

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(4, 3, 2).unwrap();
    let plan = plan::plan_fwd(
        device,
        stream,
        shape,
        &gpu.upload(&routing_ids(shape, Skew::Uniform, 0)).view(),
    )
    .unwrap();
    let x = gpu.upload(&values::<f32>(8 * 5, 1.0, 0));
    let w = gpu.upload(&values::<f32>(3 * 2 * 6 * 5, 1.0, 0));
    let mut y = gpu.poisoned::<f32>(8 * 6);
    let mut call = |swiglu: bool, n, k, rows, lens: [usize; 3]| {
        let (x, w) = (x.view(), w.view());
        let (x, w) = (x.slice(..lens[0]), w.slice(..lens[1]));
        let mut y = y.view_mut();
        let y = &mut y.slice_mut(..lens[2]);
        if swiglu {
            let (experts, w) = (ExpertConfig::default(), GateUpWeights::fused(&w));
            return grouped_gemm_gate_up_fwd_into(
                device, stream, &plan, &experts, n, k, rows, &x, w, None, y,
            );
        }
        grouped_gemm_fwd_into(device, stream, &plan, n, k, rows, &x, LinearWeights::new(&w), y)
    };
    let length = |op, argument, wanted, got| Err(Error::Length { op, argument, wanted, got });
    let (plain, swiglu) = ("grouped_gemm_fwd", "grouped_gemm_gate_up_fwd");
    assert_eq!(call(false, 6, 5, Rows::Gathered, [19, 90, 48]), length(plain, "x", 20, 19));
    assert_eq!(call(false, 6, 5, Rows::Grouped, [20, 90, 48]), length(plain, "x", 40, 20));
    assert_eq!(call(false, 6, 5, Rows::Gathered, [20, 89, 48]), length(plain, "w", 90, 89));
    assert_eq!(call(false, 6, 5, Rows::Gathered, [20, 90, 47]), length(plain, "y", 48, 47));
    assert_eq!(call(true, 6, 5, Rows::Gathered, [20, 90, 48]), length(swiglu, "gate_up", 180, 90));
    assert_eq!(call(true, 6, 5, Rows::Gathered, [20, 180, 0]), length(swiglu, "act", 48, 0));
    let unsupported = |result, name: &str| match result {
        Err(Error::Unsupported { argument, .. }) => assert_eq!(argument, name),
        other => panic!("{other:?}"),
    };
    unsupported(call(false, 0, 5, Rows::Gathered, [20, 0, 0]), "out_features");
    unsupported(call(true, 0, 5, Rows::Gathered, [20, 0, 0]), "intermediate");
    unsupported(call(false, 6, 0, Rows::Gathered, [0, 0, 48]), "in_features");
    let (most, rows) = (usize::MAX, Rows::Gathered);
    unsupported(call(false, most, 5, rows, [20, 90, 48]), "num_experts * out_features");
    unsupported(call(true, most, 1, rows, [4, 90, 48]), "num_experts * intermediate");
    assert_eq!(call(false, 6, 5, Rows::Grouped, [40, 90, 48]), Ok(()));
    assert_eq!(call(true, 6, 5, Rows::Gathered, [20, 180, 48]), Ok(()));

    // Arguments of the raw form alone. Nothing is launched.
    let null = GroupedGemmBuffers {
        y: 0,
        x: 0,
        w: 0,
        bias: 0,
        token_of_row: 0,
        expert_offsets: 0,
        tiles: 0,
        num_tiles: 0,
    };
    let raw = |shape, n, k, buffers| {
        // SAFETY: every call is refused before the launch.
        unsafe {
            let (stream, order) = (stream.cu_stream(), WeightOrder::OutIn);
            grouped_gemm_fwd_raw(device, stream, f32::DTYPE, shape, n, k, order, buffers)
        }
    };
    let misaligned = |argument, got| Err(Error::Alignment { op: plain, argument, wanted: 4, got });
    assert_eq!(raw(shape, 6, 5, GroupedGemmBuffers { y: 2, ..null }), misaligned("y", 2));
    assert_eq!(raw(shape, 6, 5, GroupedGemmBuffers { x: 1, ..null }), misaligned("x", 1));
    assert_eq!(raw(shape, 6, 5, GroupedGemmBuffers { w: 3, ..null }), misaligned("w", 3));
    assert_eq!(raw(shape, 6, 5, GroupedGemmBuffers { bias: 3, ..null }), misaligned("bias", 3));
    let tokens = GroupedGemmBuffers { token_of_row: 6, ..null };
    assert_eq!(raw(shape, 6, 5, tokens), misaligned("token_of_row", 6));
    let offsets = GroupedGemmBuffers { expert_offsets: 5, ..null };
    assert_eq!(raw(shape, 6, 5, offsets), misaligned("expert_offsets", 5));
    assert_eq!(raw(shape, 6, 5, GroupedGemmBuffers { tiles: 1, ..null }), misaligned("tiles", 1));
    assert_eq!(
        raw(shape, 6, 5, GroupedGemmBuffers { num_tiles: 2, ..null }),
        misaligned("num_tiles", 2)
    );
    unsupported(raw(RoutingShape { num_experts: 0, ..shape }, 6, 5, null), "num_experts");
    unsupported(raw(shape, (1 << 30) + 1, 5, null), "out_features");
    unsupported(raw(shape, 6, (1 << 30) + 1, null), "in_features");
    let long = RoutingShape { num_tokens: 1 << 29, ..shape };
    unsupported(raw(long, 1 << 20, 5, null), "number of blocks");
    assert_eq!(raw(RoutingShape { num_tokens: 0, ..shape }, 6, 5, null), Ok(()));
}

/// Buffers that the configuration requires and the call lacks, and the reverse.
#[test]
fn gate_and_up_must_match_the_configuration() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let shape = RoutingShape::new(4, 3, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let plan = plan::plan_fwd(device, stream, shape, &ids.view()).unwrap();
    let (n, k) = (6, 5);
    let buffer = gpu.upload(&values::<f32>(3 * 2 * n * k, 1.0, 0));
    let view = buffer.view();
    let at = |len| view.slice(..len);
    let (x, all, half) = (at(4 * k), at(3 * 2 * n * k), at(3 * n * k));
    let (bias, half_bias, slots) = (at(3 * 2 * n), at(3 * n), at(shape.slots()));
    let mut act = gpu.poisoned::<f32>(shape.slots() * n);
    let mut call = |experts: &ExpertConfig, tensors, bias, weights| {
        let (w, rows) = (GateUpWeights { tensors, bias }, Rows::Gathered);
        let mut act = act.view_mut();
        grouped_gemm_gate_up_fwd_into(
            device, stream, &plan, experts, n, k, rows, &x, w, weights, &mut act,
        )
    };
    let plain = ExpertConfig::default();
    let biased = ExpertConfig { gate_up_bias: true, ..plain };
    let alone = ExpertConfig { gated: false, gate_up_bias: true, ..plain };
    let separate = ExpertConfig { gate_up: GateUpLayout::Separate, ..plain };
    let weighted = ExpertConfig { weight_position: WeightPosition::Inside, ..plain };
    let fused = GateUpTensors::Fused(&all);
    let two = GateUpTensors::Separate { gate: &half, up: &half };
    assert_eq!(call(&plain, fused, None, None), Ok(()));
    assert_eq!(call(&biased, fused, Some(&bias), None), Ok(()));
    assert_eq!(call(&alone, GateUpTensors::Fused(&half), Some(&half_bias), None), Ok(()));
    assert_eq!(call(&separate, two, None, None), Ok(()));
    assert_eq!(call(&weighted, fused, None, Some(&slots)), Ok(()));

    let mismatch = |result, word: &str| match result {
        Err(Error::Mismatch { why, .. }) => assert!(why.contains(word), "{why}"),
        other => panic!("{other:?}"),
    };
    mismatch(call(&plain, fused, Some(&bias), None), "`bias` is given");
    mismatch(
        call(&biased, fused, None, None),
        "`bias` is required by the configuration but not given",
    );
    mismatch(call(&plain, two, None, None), "a separate `up` is given");
    mismatch(
        call(&separate, fused, None, None),
        "a separate `up` is required by the configuration but not given",
    );
    mismatch(call(&plain, fused, None, Some(&slots)), "`routing_weights` is given");
    mismatch(
        call(&weighted, fused, None, None),
        "`routing_weights` is required by the configuration but not given",
    );

    let op = "grouped_gemm_gate_up_fwd";
    let length = |argument, wanted, got| Err(Error::Length { op, argument, wanted, got });
    let long = GateUpTensors::Separate { gate: &half, up: &all };
    assert_eq!(call(&separate, long, None, None), length("up", 90, 180));
    let long = GateUpTensors::Separate { gate: &all, up: &half };
    assert_eq!(call(&separate, long, None, None), length("gate", 90, 180));
    assert_eq!(call(&alone, fused, Some(&half_bias), None), length("gate_up", 90, 180));
    assert_eq!(call(&biased, fused, Some(&half_bias), None), length("bias", 36, 18));
    assert_eq!(call(&weighted, fused, None, Some(&x)), length("routing_weights", 8, 20));
    let relu = Activation { function: ActivationFunction::Relu, alpha: 2.0, ..Default::default() };
    let bad = call(&ExpertConfig { activation: relu, ..plain }, fused, None, None);
    assert!(matches!(bad, Err(Error::Unsupported { argument: "activation.alpha", .. })), "{bad:?}");

    // Arguments of the raw form alone. Nothing is launched.
    let null = GateUpBuffers {
        act: 0,
        x: 0,
        gate_up: 0,
        up: 0,
        bias: 0,
        routing_weights: 0,
        row_of_slot: 0,
        token_of_row: 0,
        expert_offsets: 0,
        tiles: 0,
        num_tiles: 0,
    };
    let raw = |experts: &ExpertConfig, n, rows, buffers| {
        let stream = stream.cu_stream();
        // SAFETY: every call is refused before the launch.
        unsafe {
            grouped_gemm_gate_up_fwd_raw(
                device,
                stream,
                f32::DTYPE,
                shape,
                experts,
                n,
                k,
                rows,
                buffers,
            )
        }
    };
    mismatch(
        raw(&plain, n, Rows::Gathered, null),
        "`token_of_row` is required by the configuration but not given",
    );
    let weights = GateUpBuffers { routing_weights: 4, ..null };
    mismatch(
        raw(&weighted, n, Rows::Grouped, weights),
        "`row_of_slot` is required by the configuration but not given",
    );
    let weights = GateUpBuffers { row_of_slot: 4, ..weights };
    mismatch(
        raw(&weighted, n, Rows::Grouped, weights),
        "`token_of_row` is required by the configuration but not given",
    );
    let misaligned = |argument, got| Err(Error::Alignment { op, argument, wanted: 4, got });
    let up = GateUpBuffers { up: 2, ..null };
    assert_eq!(raw(&separate, n, Rows::Grouped, up), misaligned("up", 2));
    let bias = GateUpBuffers { bias: 6, ..null };
    assert_eq!(raw(&biased, n, Rows::Grouped, bias), misaligned("bias", 6));
    let wide = raw(&plain, (1 << 30) + 1, Rows::Grouped, null);
    assert!(matches!(wide, Err(Error::Unsupported { argument: "intermediate", .. })), "{wide:?}");
}
