//! The layer: every operation in order, against the reference in f64.

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, DeviceRepr};
use half::{bf16, f16};
use moe_kernels::reference::{self, bound};
use moe_kernels::{
    Activation, ActivationFunction, CapacityConfig, CapacityLimit, DType, Device, Dtype, Error,
    ExpertConfig, Experts, GateUp, LatentConfig, Limit, MoeConfig, MoeLayer, Priority,
    ProjectionConfig, RmsNorm, RouterConfig, Selection, SharedConfig, WeightOrder, WeightPosition,
    Workspace, ZeroExperts, ZeroOutput,
};
use proptest::prelude::*;

use crate::common::{self, Gpu, Rng, assert_within, bits, config, gpu, values};

fn moe_config(
    hidden: usize,
    intermediate: usize,
    num_experts: usize,
    top_k: usize,
    router: RouterConfig,
) -> MoeConfig {
    MoeConfig { router, ..MoeConfig::new(hidden, intermediate, num_experts, top_k) }
}

/// Any router that reads logits alone.
fn router(rng: &mut Rng, num_experts: usize, top_k: usize) -> RouterConfig {
    let mut router = common::router(rng, num_experts, top_k);
    if router.selection == Selection::Given {
        router.selection = Selection::Logit;
    }
    RouterConfig { selection_bias: false, expert_scale: false, ..router }
}

/// Any experts of two tensors.
fn experts(rng: &mut Rng) -> ExpertConfig {
    let orders = [WeightOrder::OutIn, WeightOrder::InOut];
    let gated = rng.below(4) > 0;
    let functions = [
        ActivationFunction::Silu,
        ActivationFunction::Gelu,
        ActivationFunction::GeluTanh,
        ActivationFunction::Relu,
        ActivationFunction::ReluSquared,
    ];
    ExpertConfig {
        activation: Activation {
            function: functions[rng.below(functions.len())],
            limit: [Limit::None, Limit::Before { limit: 0.5 }, Limit::After { limit: 0.5 }]
                [rng.below(3)],
            up_offset: if gated { rng.below(2) as f32 } else { 0.0 },
            ..Activation::default()
        },
        gated,
        gate_up: [GateUp::Concatenated, GateUp::Interleaved][if gated { rng.below(2) } else { 0 }],
        gate_up_order: orders[rng.below(2)],
        down_order: orders[rng.below(2)],
        ..ExpertConfig::default()
    }
}

/// Inputs of a layer on the host.
struct Case<D> {
    config: MoeConfig,
    x: Vec<D>,
    logits: Vec<D>,
    gate: Vec<D>,
    gate_up: Vec<D>,
    down: Vec<D>,
}

impl<D: Dtype + DeviceRepr> Case<D> {
    fn new(config: MoeConfig, num_tokens: usize, seed: u64) -> Self {
        Self {
            config,
            x: values(num_tokens * config.hidden, 1.0, seed),
            logits: values(num_tokens * config.num_experts, 3.0, seed ^ 1),
            gate: values(config.num_experts * config.hidden, 0.5, seed ^ 2),
            gate_up: values(config.gate_up_len(), 0.2, seed ^ 3),
            down: values(config.down_len(), 0.2, seed ^ 4),
        }
    }

    fn num_tokens(&self) -> usize {
        self.x.len() / self.config.hidden
    }

    /// `y` of the device; with `from_x` the logits come from the gate.
    fn run(&self, gpu: &Gpu, from_x: bool) -> Vec<D> {
        let layer = MoeLayer::new(&gpu.device, self.config).unwrap();
        let bytes = MoeLayer::workspace_bytes(&self.config, D::DTYPE, self.num_tokens()).unwrap();
        let mut memory = gpu.poisoned::<u8>(bytes);
        let mut memory = memory.view_mut();
        let mut workspace = Workspace::borrow(memory.slice_mut(..));
        let (gate_up, down) = (gpu.upload(&self.gate_up), gpu.upload(&self.down));
        let experts = Experts { gate_up: gate_up.view(), down: down.view() };
        let x = gpu.upload(&self.x);
        let mut y = gpu.poisoned::<D>(self.x.len());
        if from_x {
            let gate = gpu.upload(&self.gate);
            layer.forward_from_x(
                &gpu.stream,
                &x.view(),
                &gate.view(),
                &experts,
                &mut workspace,
                &mut y.view_mut(),
            )
        } else {
            let logits = gpu.upload(&self.logits);
            layer.forward(
                &gpu.stream,
                &x.view(),
                &logits.view(),
                &experts,
                &mut workspace,
                &mut y.view_mut(),
            )
        }
        .unwrap();
        gpu.download(&y.view())
    }

    fn check(&self, gpu: &Gpu, what: &str) {
        let want = bound::moe_layer(&self.config, &self.x, &self.logits, &self.gate_up, &self.down)
            .unwrap();
        assert_within(&self.run(gpu, false), &want, what);
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn matches_reference(
        tokens in 0usize..40, num_experts in 1usize..12, k in 1usize..5, hidden in 1usize..140,
        intermediate in 1usize..140, seed in any::<u64>(),
    ) {
        let mut rng = Rng::new(seed);
        let top_k = k.min(num_experts);
        let router = router(&mut rng, num_experts, top_k);
        let config = moe_config(hidden, intermediate, num_experts, top_k, router);
        let config = MoeConfig { experts: experts(&mut rng), ..config };
        let gpu = gpu();
        gpu.reschedule(seed);
        let what = format!("T{tokens} {config} seed {seed}");
        Case::<f32>::new(config, tokens, seed).check(&gpu, &what);
        Case::<f16>::new(config, tokens, seed).check(&gpu, &what);
        Case::<bf16>::new(config, tokens, seed).check(&gpu, &what);
    }
}

const RENORMALISED: RouterConfig = RouterConfig::softmax_top_k(true);

#[test]
fn worst_case_routings() {
    let gpu = gpu();
    for (tokens, experts, k) in [(1, 1, 1), (1, 8, 8), (70, 1, 1), (3, 4, 4), (130, 2, 1)] {
        let config = moe_config(72, 40, experts, k, RENORMALISED);
        Case::<bf16>::new(config, tokens, 7).check(&gpu, &format!("T{tokens} {config}"));
    }
    // Everybody goes to expert 2; the others are empty.
    let config = moe_config(48, 32, 6, 1, RENORMALISED);
    let mut case = Case::<f32>::new(config, 150, 11);
    case.logits.iter_mut().skip(2).step_by(6).for_each(|logit| *logit = 50.0);
    case.check(&gpu, "one hot expert");
}

/// The gate's product goes through a grouped GEMM with one expert.
#[test]
fn logits_from_the_gate() {
    fn check<D: Dtype + DeviceRepr>(gpu: &Gpu) {
        let case = Case::<D>::new(moe_config(96, 40, 7, 3, RENORMALISED), 37, 5);
        // The device's own logits decide: rounding may turn a near-tie of the reference's.
        let logits = bound::grouped_gemm(
            &reference::plan_fwd(&moe_kernels::RoutingShape::new(37, 1, 1).unwrap(), 128, &[0; 37])
                .unwrap(),
            7,
            96,
            &case.x,
            reference::LinearWeights::new(&case.gate),
            false,
            D::DTYPE,
        )
        .unwrap();
        let rounded: Vec<D> = logits.value.iter().map(|&value| D::from_f64(value)).collect();
        let by_hand = Case { logits: rounded, ..Case::new(case.config, 37, 5) };
        let from_x: Vec<f64> = case.run(gpu, true).iter().map(|y| y.to_f64()).collect();
        let want: Vec<f64> = by_hand.run(gpu, false).iter().map(|y| y.to_f64()).collect();
        let error = bound::relative_error(&from_x, &want);
        assert!(error < 0.02, "{}: {error}", D::DTYPE);
    }
    let gpu = gpu();
    check::<f32>(&gpu);
    check::<bf16>(&gpu);
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let case = Case::<bf16>::new(moe_config(80, 56, 5, 2, RENORMALISED), 45, 3);
    let runs: Vec<_> = (0..6)
        .map(|seed| {
            gpu.reschedule(seed);
            bits(&case.run(&gpu, true))
        })
        .collect();
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

/// What a row of y holds does not depend on the other tokens of the batch.
#[test]
fn rows_do_not_depend_on_the_batch() {
    let gpu = gpu();
    let config = moe_config(64, 48, 6, 2, RENORMALISED);
    let whole = Case::<f32>::new(config, 140, 21);
    let y = whole.run(&gpu, true);
    let part = Case {
        x: whole.x[..64 * 9].to_vec(),
        logits: whole.logits[..6 * 9].to_vec(),
        ..Case::new(config, 9, 21)
    };
    assert_eq!(bits(&part.run(&gpu, true)), bits(&y[..64 * 9]));
}

#[test]
fn a_captured_graph_replays_with_new_routing() {
    // A context of its own: while it captures, cudarc must not wait for events of other tests.
    let gpu = gpu();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything of this context runs on one stream.
    unsafe { context.disable_event_tracking() };
    let (device, stream) = (Device::new(&context).unwrap(), context.new_stream().unwrap());
    let config = moe_config(40, 24, 6, 2, RENORMALISED);
    let case = Case::<f32>::new(config, 33, 1);
    let other = Case::<f32>::new(config, 33, 2);

    let layer = MoeLayer::new(&device, config).unwrap();
    let upload = |data: &[f32]| stream.clone_htod(data).unwrap();
    let (gate_up, down) = (upload(&case.gate_up), upload(&case.down));
    let experts = Experts { gate_up: gate_up.as_view(), down: down.as_view() };
    let (mut x, mut logits) = (upload(&case.x), upload(&case.logits));
    let mut y = upload(&vec![f32::NAN; case.x.len()]);
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 33).unwrap();
    let mut workspace = Workspace::alloc(&stream, bytes).unwrap();

    device.warm_up(DType::F32).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    layer
        .forward(
            &stream,
            &x.as_view(),
            &logits.as_view(),
            &experts,
            &mut workspace,
            &mut y.as_view_mut(),
        )
        .unwrap();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    assert!(stream.clone_dtoh(&y).unwrap().iter().all(|y| y.is_nan()), "capturing runs nothing");

    for seed in 0..4 {
        gpu.reschedule(seed);
        for inputs in [&case, &other] {
            stream.memcpy_htod(&inputs.x, &mut x).unwrap();
            stream.memcpy_htod(&inputs.logits, &mut logits).unwrap();
            graph.launch().unwrap();
            let got = stream.clone_dtoh(&y).unwrap();
            let want =
                bound::moe_layer(&config, &inputs.x, &inputs.logits, &case.gate_up, &case.down)
                    .unwrap();
            assert_within(&got, &want, "replay");
        }
    }
}

#[test]
fn the_workspace_is_known_beforehand() {
    let config = moe_config(4096, 14336, 8, 2, RENORMALISED);
    let bytes = |tokens| MoeLayer::workspace_bytes(&config, DType::BF16, tokens).unwrap();
    let rows = 4096 * 2;
    assert!(bytes(4096) >= rows * (14336 + 4096) * 2);
    assert!(bytes(4096) < rows * (14336 + 4096) * 2 + (1 << 21), "{}", bytes(4096));
    assert!((0..100).map(bytes).is_sorted());
    assert!(MoeLayer::workspace_bytes(&config, DType::F32, usize::MAX / 8).is_err());
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let config = moe_config(16, 8, 4, 2, RENORMALISED);
    for bad in [
        MoeConfig { hidden: 0, ..config },
        MoeConfig { intermediate: 1 << 30, ..config },
        MoeConfig { num_experts: 5000, ..config },
        MoeConfig { top_k: 5, ..config },
    ] {
        assert!(matches!(MoeLayer::new(&gpu.device, bad), Err(Error::Unsupported { .. })), "{bad}");
    }
    for (field, bad) in beyond_a_layer(config) {
        bad.check().unwrap();
        let error = MoeLayer::workspace_bytes(&bad, DType::F32, 3).unwrap_err().to_string();
        assert!(error.contains(field), "{error} does not name {field}");
        assert!(MoeLayer::new(&gpu.device, bad).is_err(), "{bad}");
    }
    let layer = MoeLayer::new(&gpu.device, config).unwrap();
    let case = Case::<f32>::new(config, 3, 0);
    let (x, logits) = (gpu.upload(&case.x), gpu.upload(&case.logits));
    let (gate, gate_up, down) =
        (gpu.upload(&case.gate), gpu.upload(&case.gate_up), gpu.upload(&case.down));
    let mut y = gpu.poisoned::<f32>(48);
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 3).unwrap();
    let mut call = |lens: [usize; 6], gate_len: usize| {
        let [x_len, logits_len, gate_up_len, down_len, y_len, workspace] = lens;
        let mut workspace = Workspace::alloc(&gpu.stream, workspace).unwrap();
        let (gate_up, down) = (gate_up.view(), down.view());
        let experts =
            Experts { gate_up: gate_up.slice(..gate_up_len), down: down.slice(..down_len) };
        let (x, y) = (x.view().slice(..x_len), &mut y.view_mut());
        let y = &mut y.slice_mut(..y_len);
        if gate_len > 0 {
            let gate = gate.view().slice(..gate_len - 1);
            layer.forward_from_x(&gpu.stream, &x, &gate, &experts, &mut workspace, y)
        } else {
            let logits = logits.view().slice(..logits_len);
            layer.forward(&gpu.stream, &x, &logits, &experts, &mut workspace, y)
        }
    };
    let right = [48, 12, 4 * 16 * 16, 4 * 16 * 8, 48, bytes];
    assert!(call(right, 0).is_ok());
    let names = ["x", "logits", "gate_up", "down", "y", "workspace"];
    for (index, name) in names.into_iter().enumerate() {
        let mut lens = right;
        lens[index] -= 1;
        let error = call(lens, 0).unwrap_err();
        assert!(
            matches!(error, Error::Length { argument, .. } if argument == name),
            "{name}: {error}"
        );
    }
    let error = call(right, 64).unwrap_err();
    assert!(
        matches!(error, Error::Length { argument: "gate", wanted: 64, got: 63, .. }),
        "{error}"
    );
    let mut memory = gpu.poisoned::<u8>(bytes + 1);
    let (x, logits, y) = (x.view(), logits.view(), &mut y.view_mut());
    let experts = Experts { gate_up: gate_up.view(), down: down.view() };
    let mut memory = memory.view_mut();
    let mut misaligned = Workspace::borrow(memory.slice_mut(1..));
    let error = layer.forward(&gpu.stream, &x, &logits, &experts, &mut misaligned, y).unwrap_err();
    assert!(matches!(error, Error::Alignment { argument: "workspace", .. }), "{error}");
}

/// What the operations compute and a layer does not put together, each with the field that says so.
fn beyond_a_layer(config: MoeConfig) -> Vec<(&'static str, MoeConfig)> {
    let router = |router| MoeConfig { router, ..config };
    let experts = |experts| MoeConfig { experts, ..config };
    let (plain_router, plain) = (config.router, config.experts);
    let norm = RmsNorm { epsilon: 1e-6, offset: 0.0, scale_first: false };
    let capacity = CapacityConfig {
        limit: CapacityLimit::Factor { factor: 1.0 },
        priority: Priority::Token,
        overflow: 0,
    };
    let shared = SharedConfig {
        intermediate: 8,
        activation: Activation::default(),
        gated: true,
        sigmoid_gate: false,
        average: false,
    };
    let zero = ZeroExperts { count: 1, output: ZeroOutput::Identity };
    let f32_logits = ProjectionConfig { f32_logits: true, ..ProjectionConfig::default() };
    vec![
        ("`projection`", MoeConfig { projection: f32_logits, ..config }),
        (
            "`router.selection`",
            router(RouterConfig { selection: Selection::Given, ..plain_router }),
        ),
        ("`router.selection_bias`", router(RouterConfig { selection_bias: true, ..plain_router })),
        ("`router.expert_scale`", router(RouterConfig { expert_scale: true, ..plain_router })),
        ("`zero_experts`", MoeConfig { zero_experts: Some(zero), ..config }),
        ("`capacity`", MoeConfig { capacity: Some(capacity), ..config }),
        ("`experts.gate_up_bias`", experts(ExpertConfig { gate_up_bias: true, ..plain })),
        ("`experts.down_bias`", experts(ExpertConfig { down_bias: true, ..plain })),
        ("`experts.output_bias`", experts(ExpertConfig { output_bias: true, ..plain })),
        ("`experts.post_norm`", experts(ExpertConfig { post_norm: Some(norm), ..plain })),
        ("`experts.gate_up`", experts(ExpertConfig { gate_up: GateUp::Separate, ..plain })),
        (
            "`experts.weight_position`",
            experts(ExpertConfig { weight_position: WeightPosition::Input, ..plain }),
        ),
        ("`latent`", MoeConfig { latent: Some(LatentConfig { hidden: 8, norm: None }), ..config }),
        ("`shared`", MoeConfig { shared: Some(shared), ..config }),
    ]
}
