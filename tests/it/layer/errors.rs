//! Errors of a layer: they name the argument, and nothing is written.

use moe_kernels::{
    CapacityConfig, CapacityLimit, DType, Error, MoeConfig, MoeLayer, Priority, Selection, Typed,
    Workspace,
};

use super::{Case, plain};
use crate::common::gpu;

#[test]
fn invalid_arguments_are_errors_before_any_launch() {
    let gpu = gpu();
    let config = plain(16, 8, 4, 2);
    let overflow = CapacityConfig {
        overflow: 1,
        ..CapacityConfig::new(CapacityLimit::Rows { rows: 3 }, Priority::Token)
    };
    for bad in [
        MoeConfig { hidden: 0, ..config },
        MoeConfig { intermediate: 1 << 30, ..config },
        MoeConfig { num_experts: 5000, ..config },
        MoeConfig { top_k: 5, ..config },
        MoeConfig { capacity: Some(overflow), ..config },
    ] {
        assert!(matches!(MoeLayer::new(&gpu.device, bad), Err(Error::Unsupported { .. })), "{bad}");
    }
    let good = || Case::<f32>::plain(config, 3, 0);
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 3).unwrap();
    // After an error neither `y` nor the workspace has been written.
    let call = |case: &Case<f32>, y_len: usize, bytes: usize| {
        let layer = MoeLayer::new(&gpu.device, case.config).unwrap();
        let weights = case.weights.upload(&gpu.stream).unwrap();
        let inputs = case.inputs.upload(&gpu.stream).unwrap();
        let (mut y, mut memory) = (gpu.poisoned::<f32>(y_len), gpu.poisoned::<u8>(bytes));
        let result = {
            let mut memory = memory.view_mut();
            let mut workspace = Workspace::borrow(memory.slice_mut(..));
            let (inputs, weights) = (inputs.as_views(), weights.as_views());
            layer.forward(&gpu.stream, &inputs, &weights, &mut workspace, &mut y.view_mut())
        };
        if result.is_err() {
            assert!(gpu.download(&y.view()).iter().all(|y| y.is_nan()));
            assert!(gpu.download(&memory.view()).iter().all(|&byte| byte == 0xff));
        }
        result
    };
    assert!(call(&good(), 48, bytes).is_ok());
    type Break = fn(&mut Case<f32>);
    let breaks: [(&str, Break); 8] = [
        ("noise", |case| case.inputs.noise = Some(vec![0.0; 13])),
        ("token_ids", |case| {
            case.config.router.selection = Selection::Given;
            case.weights.router.table = Some(vec![0; 8]);
            case.inputs.token_ids = Some(vec![0; 4]);
        }),
        ("x", |case| case.inputs.x.truncate(47)),
        ("logits", |case| case.inputs.logits = Some(Typed::Element(vec![0.0; 11]))),
        ("router_x", |case| case.inputs.router_x = Some(vec![0.0; 47])),
        ("router.router_gate", |case| {
            case.weights.router.router_gate = Some(Typed::F32(vec![0.0; 63]));
        }),
        ("experts.down", |case| case.weights.experts.down.truncate(511)),
        ("active", |case| case.inputs.active = Some(vec![1; 2])),
    ];
    for (name, damage) in breaks {
        let mut case = good();
        damage(&mut case);
        let error = call(&case, 48, bytes).unwrap_err();
        let named = matches!(error, Error::Length { argument, .. } if argument == name);
        assert!(named, "{name}: {error}");
    }
    for (argument, y_len, bytes) in [("y", 47, bytes), ("workspace", 48, bytes - 1)] {
        let error = call(&good(), y_len, bytes).unwrap_err();
        assert!(matches!(error, Error::Length { argument: got, .. } if got == argument), "{error}");
    }
    let breaks: [(&str, Break); 2] = [
        ("`router.router_gate`", |case| {
            case.weights.router.router_gate = None;
            case.inputs.logits = None;
        }),
        ("`noise_logits`", |case| {
            case.inputs.noise = Some(vec![0.0; 12]);
            case.inputs.noise_logits = Some(Typed::F32(vec![0.0; 12]));
        }),
    ];
    for (name, damage) in breaks {
        let mut case = good();
        damage(&mut case);
        let error = call(&case, 48, bytes).unwrap_err();
        assert!(matches!(&error, Error::Mismatch { why, .. } if why.contains(name)), "{error}");
    }
    let breaks: [(&str, Break); 5] = [
        ("router.bias", |case| case.weights.router.bias = Some(Typed::F32(vec![0.0; 4]))),
        ("output_norm", |case| case.weights.output_norm = Some(vec![0.0; 16])),
        ("router.table", |case| case.weights.router.table = Some(vec![0; 4])),
        ("given_ids", |case| case.config.router.selection = Selection::Given),
        ("token_ids", |case| case.inputs.token_ids = Some(vec![0; 3])),
    ];
    for (name, damage) in breaks {
        let mut case = good();
        damage(&mut case);
        let error = call(&case, 48, bytes).unwrap_err();
        let named = matches!(&error, Error::Presence { argument, .. } if *argument == name);
        assert!(named, "{name}: {error}");
    }
    let mut case = good();
    case.inputs.sequence_tokens = Some(0);
    let error = call(&case, 48, bytes).unwrap_err();
    assert!(matches!(error, Error::Unsupported { argument: "sequence_tokens", .. }), "{error}");
    good().on(&gpu, |prepared| {
        let mut memory = gpu.poisoned::<u8>(bytes + 1);
        let mut memory = memory.view_mut();
        let mut misaligned = Workspace::borrow(memory.slice_mut(1..));
        let (inputs, weights) = (&prepared.inputs, &prepared.weights);
        let mut y = gpu.poisoned::<f32>(48);
        let layer = &prepared.layer;
        let error = layer
            .forward(&prepared.gpu.stream, inputs, weights, &mut misaligned, &mut y.view_mut())
            .unwrap_err();
        assert!(matches!(error, Error::Alignment { argument: "workspace", .. }), "{error}");
    });
}
