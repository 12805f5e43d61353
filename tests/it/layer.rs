//! The layer, its operations in order, against the reference in f64.

mod capacity;
mod errors;
mod range;
mod scores;
mod sparsemixer;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::{bf16, f16};
use moe_kernels::reference::bound::{self, Bounded};
use moe_kernels::{
    CapacityConfig, CapacityLimit, DType, Device, Dtype, MoeConfig, MoeInputs, MoeLayer,
    MoeWeights, Normalization, OnDevice, Owned, Priority, RouterConfig, Selection, Typed,
    Workspace, reference,
};
use proptest::prelude::*;
use scores::slices_within;

use crate::common::{
    Gpu, Rng, assert_within, bits, config, gpu, random_config, random_inputs, random_weights,
    values,
};

/// The weights of a layer and the inputs of one pass, on the host.
struct Case<D: Dtype> {
    config: MoeConfig,
    weights: MoeWeights<Owned, D>,
    inputs: MoeInputs<Owned, D>,
}

/// Expert ids and routing weights.
type Routing = (Vec<u32>, Vec<f32>);

impl<D: Dtype> Case<D> {
    /// A plain layer with given logits and a router gate.
    fn plain(config: MoeConfig, num_tokens: usize, seed: u64) -> Self {
        let MoeConfig { hidden, num_experts, .. } = config;
        let gate_up = values(config.gate_up_len(), 0.2, seed ^ 3);
        let weights = MoeWeights::plain(gate_up, values(config.down_len(), 0.2, seed ^ 4))
            .with_router_gate(values(num_experts * hidden, 0.5, seed ^ 2));
        let logits = values(num_tokens * num_experts, 3.0, seed ^ 1);
        let inputs = MoeInputs::with_logits(values(num_tokens * hidden, 1.0, seed), logits);
        Self { config, weights, inputs }
    }

    fn random(config: MoeConfig, num_tokens: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let weights = random_weights(&config, &mut rng);
        Self { config, weights, inputs: random_inputs(&config, num_tokens, &mut rng) }
    }

    fn num_tokens(&self) -> usize {
        self.inputs.x.len() / self.config.hidden
    }

    /// Calls `run` with the layer, its tensors on the device, and a workspace full of NaN.
    fn on<R>(&self, gpu: &Gpu, run: impl FnOnce(Prepared<'_, '_, D>) -> R) -> R {
        let layer = MoeLayer::new(&gpu.device, self.config).unwrap();
        let weights = self.weights.upload(&gpu.stream).unwrap();
        let inputs = self.inputs.upload(&gpu.stream).unwrap();
        let bytes = MoeLayer::workspace_bytes(&self.config, D::DTYPE, self.num_tokens()).unwrap();
        let mut memory = gpu.poisoned::<u8>(bytes);
        let mut memory = memory.view_mut();
        let workspace = Workspace::borrow(memory.slice_mut(..));
        let (weights, inputs) = (weights.as_views(), inputs.as_views());
        run(Prepared { gpu, layer, weights, inputs, workspace })
    }

    fn forward(&self, gpu: &Gpu) -> Vec<D> {
        self.on(gpu, |mut prepared| {
            let mut y = gpu.poisoned::<D>(self.inputs.x.len());
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            layer.forward(&gpu.stream, inputs, weights, workspace, &mut y.view_mut()).unwrap();
            gpu.download(&y.view())
        })
    }

    fn router_logits(&self, gpu: &Gpu) -> Typed<Owned, D> {
        let len = self.config.routing(self.num_tokens()).logits();
        self.on(gpu, |mut prepared| {
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            if self.config.projection.f32_logits {
                let mut logits = gpu.poisoned::<f32>(len);
                let to = &mut Typed::F32(logits.view_mut());
                layer.router_logits(&gpu.stream, inputs, weights, workspace, to).unwrap();
                Typed::F32(gpu.download(&logits.view()))
            } else {
                let mut logits = gpu.poisoned::<D>(len);
                let to = &mut Typed::Element(logits.view_mut());
                layer.router_logits(&gpu.stream, inputs, weights, workspace, to).unwrap();
                Typed::Element(gpu.download(&logits.view()))
            }
        })
    }

    fn route(&self, gpu: &Gpu) -> Routing {
        let slots = self.config.routing(self.num_tokens()).slots();
        self.on(gpu, |mut prepared| {
            let (mut ids, mut routing_weights) = (gpu.poisoned(slots), gpu.poisoned(slots));
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            let to = (&mut ids.view_mut(), &mut routing_weights.view_mut());
            layer.route(&gpu.stream, inputs, weights, workspace, to.0, to.1).unwrap();
            (gpu.download(&ids.view()), gpu.download(&routing_weights.view()))
        })
    }

    fn forward_routed(&self, gpu: &Gpu, (ids, routing_weights): &Routing) -> Vec<D> {
        let (ids, routing_weights) = (gpu.upload(ids), gpu.upload(routing_weights));
        self.on(gpu, |mut prepared| {
            let mut y = gpu.poisoned::<D>(self.inputs.x.len());
            let Prepared { layer, weights, inputs, workspace, .. } = &mut prepared;
            let (ids, routing_weights) = (ids.view(), routing_weights.view());
            let (x, stream, y_view) = (&inputs.x, &gpu.stream, &mut y.view_mut());
            layer
                .forward_routed(stream, x, &ids, &routing_weights, weights, workspace, y_view)
                .unwrap();
            gpu.download(&y.view())
        })
    }

    /// The bounds of the experts' part for exact routing weights.
    fn wanted(&self, (ids, routing_weights): &Routing) -> Bounded {
        let exact = Bounded {
            value: routing_weights.iter().map(|&weight| f64::from(weight)).collect(),
            bound: vec![0.0; routing_weights.len()],
        };
        let weights = self.weights.as_host();
        bound::moe_layer_experts(&self.config, &self.inputs.x, ids, &exact, &weights).unwrap()
    }

    /// Checks each part of the layer against the reference, with the device's result of the part
    /// before it as input, and the whole layer against its parts.
    fn check(&self, gpu: &Gpu, what: &str) {
        let (inputs, weights) = (self.inputs.as_host(), self.weights.as_host());
        let mut given = self.inputs.as_host();
        let computed_logits;
        if inputs.logits.is_none() {
            computed_logits = self.router_logits(gpu);
            let wanted = bound::router_logits(&self.config, &inputs, &weights).unwrap();
            given.logits = Some(slices_within(&computed_logits, &wanted, what));
        }
        let computed_noise;
        if self.config.projection.noise_gate
            && inputs.noise.is_some()
            && inputs.noise_logits.is_none()
        {
            computed_noise = self.noise_logits(gpu);
            let wanted = bound::noise_logits(&self.config, &inputs, &weights).unwrap();
            given.noise_logits = Some(slices_within(&computed_noise, &wanted, what));
        }
        let mut routing = self.route(gpu);
        let wanted =
            reference::moe_layer_route_fwd::<f32, D>(&self.config, &given, &weights).unwrap();
        assert_eq!(routing.0, wanted.expert_ids, "ids of {what}");
        assert_eq!(bits(&routing.1), bits(&wanted.weights), "weights of {what}");
        assert_eq!(
            bits(&self.forward(gpu)),
            bits(&self.forward_routed(gpu, &routing)),
            "the parts of {what}"
        );
        // Scores without normalisation or with a small sum can cause weights beyond the range of
        // f16.
        routing.1.iter_mut().for_each(|weight| *weight = weight.clamp(-2.0, 2.0));
        assert_within(&self.forward_routed(gpu, &routing), &self.wanted(&routing), what);
    }
}

/// The arguments that [`Case::on`] passes.
struct Prepared<'v, 'w, D: Dtype> {
    gpu: &'v Gpu,
    layer: MoeLayer,
    weights: MoeWeights<OnDevice<'v>, D>,
    inputs: MoeInputs<OnDevice<'v>, D>,
    workspace: Workspace<'w>,
}

proptest! {
    #![proptest_config(config(24))]

    /// Random layers.
    #[test]
    fn matches_reference(tokens in 0usize..40, seed in any::<u64>()) {
        let layer = random_config(&mut Rng::new(seed), 100);
        let gpu = gpu();
        gpu.reschedule(seed);
        let what = format!("T{tokens} {layer} seed {seed}");
        Case::<f32>::random(layer, tokens, seed).check(&gpu, &what);
        Case::<f16>::random(layer, tokens, seed).check(&gpu, &what);
        Case::<bf16>::random(layer, tokens, seed).check(&gpu, &what);
    }
}

const RENORMALISED: RouterConfig = RouterConfig::softmax_top_k(true);

fn plain(hidden: usize, intermediate: usize, num_experts: usize, top_k: usize) -> MoeConfig {
    MoeConfig { router: RENORMALISED, ..MoeConfig::new(hidden, intermediate, num_experts, top_k) }
}

#[test]
fn extreme_routings_match_reference() {
    let gpu = gpu();
    for (tokens, experts, k) in [(1, 1, 1), (1, 8, 8), (70, 1, 1), (3, 4, 4), (130, 2, 1)] {
        let config = plain(72, 40, experts, k);
        Case::<bf16>::plain(config, tokens, 7).check(&gpu, &format!("T{tokens} {config}"));
    }
    // All tokens go to expert 2; the other experts are empty.
    let mut case = Case::<f32>::plain(plain(48, 32, 6, 1), 150, 11);
    let Some(Typed::Element(logits)) = &mut case.inputs.logits else { unreachable!() };
    logits.iter_mut().skip(2).step_by(6).for_each(|logit| *logit = 50.0);
    case.check(&gpu, "one hot expert");
}

/// Slots beyond the limit are reassigned to the next-best experts of their token, in rounds.
#[test]
fn overflow_reassigns_slots() {
    let gpu = gpu();
    for priority in
        [Priority::Token, Priority::Choice, Priority::Weight, Priority::ChoiceByTopWeight]
    {
        for (overflow, rows) in [(1, 12), (2, 12), (9, 13), (9, 20)] {
            let limit = CapacityLimit::Rows { rows };
            let normalization = Normalization::Sum { epsilon: 1e-20 };
            let capacity =
                CapacityConfig { overflow, normalization, ..CapacityConfig::new(limit, priority) };
            let router = RouterConfig { scale: 1.5, ..RouterConfig::softmax_top_k(false) };
            let config = MoeConfig { capacity: Some(capacity), router, ..plain(24, 16, 6, 2) };
            let case = Case::<f32>::plain(config, 40, 23);
            case.check(&gpu, &config.to_string());
            let kept = case.route(&gpu).0.iter().filter(|&&id| id < 6).count();
            // There are 80 slots. With enough rounds, as many are kept as the limits allow.
            assert!(kept <= 6 * rows);
            assert!(overflow < 9 || kept >= 6 * rows - 2 || kept == 80, "{config}: {kept}");
            let wanted =
                bound::moe_layer(&config, &case.inputs.as_host(), &case.weights.as_host()).unwrap();
            assert_within(&case.forward(&gpu), &wanted, &config.to_string());
        }
    }
}

/// Reassigned slots are still ordered by the score of their token's first choice.
#[test]
fn reassigned_slots_keep_the_priority_of_the_first_choice() {
    let gpu = gpu();
    for seed in 0..6 {
        let capacity = CapacityConfig {
            overflow: 3,
            ..CapacityConfig::new(CapacityLimit::Rows { rows: 30 }, Priority::ChoiceByTopWeight)
        };
        let router = RouterConfig::softmax_top_k(false);
        let config = MoeConfig { capacity: Some(capacity), router, ..plain(8, 8, 7, 2) };
        let mut case = Case::<f32>::plain(config, 120, seed);
        // Most tokens select the first experts, so many slots are reassigned to the others.
        let Some(Typed::Element(logits)) = &mut case.inputs.logits else { unreachable!() };
        logits.chunks_mut(7).for_each(|logits| (0..3).for_each(|e| logits[e] += 3.0));
        case.check(&gpu, &format!("{config} seed {seed}"));
    }
}

/// The bounds of a whole pass, including the router, hold for the device.
#[test]
fn whole_pass_is_within_bounds() {
    let gpu = gpu();
    let limit = CapacityLimit::Factor { factor: 0.8 };
    let capacity = CapacityConfig {
        normalization: Normalization::Sum { epsilon: 0.0 },
        ..CapacityConfig::new(limit, Priority::Weight)
    };
    for capacity in [None, Some(capacity)] {
        let config = MoeConfig { capacity, ..plain(64, 48, 6, 2) };
        let case = Case::<bf16>::plain(config, 50, 17);
        let wanted =
            bound::moe_layer(&config, &case.inputs.as_host(), &case.weights.as_host()).unwrap();
        assert_within(&case.forward(&gpu), &wanted, &config.to_string());
        // Without one slot the result exceeds the bounds.
        let mut routing = case.route(&gpu);
        let kept = routing.0.iter().position(|&id| id < 6).unwrap();
        routing.0[kept] = u32::MAX;
        let incomplete = case.forward_routed(&gpu, &routing);
        assert!(wanted.worst(&incomplete).is_some_and(|(_, excess)| excess > 1.0));
    }
}

/// A layer with a latent width, a shared expert and random other options.
fn rich(seed: u64) -> MoeConfig {
    let mut seeds = Rng::new(seed);
    loop {
        let config = random_config(&mut seeds, 80);
        if config.shared.is_some() && config.latent.is_some() && config.capacity.is_none() {
            return config;
        }
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    for config in [plain(80, 56, 5, 2), rich(1), rich(2)] {
        let case = Case::<bf16>::random(config, 45, 3);
        let runs: Vec<_> = (0..6)
            .map(|seed| {
                gpu.reschedule(seed);
                bits(&case.forward(&gpu))
            })
            .collect();
        assert!(runs.windows(2).all(|pair| pair[0] == pair[1]), "{config}");
    }
}

/// A row of `y` does not depend on the other tokens of the batch.
#[test]
fn rows_do_not_depend_on_the_batch() {
    fn check<D: Dtype>(gpu: &Gpu, config: MoeConfig) {
        let mut case = Case::<D>::random(config, 140, 21);
        case.inputs = MoeInputs::new(case.inputs.x);
        let experts = config.router_experts();
        let given = config.router.selection == Selection::Given;
        let tables = |tokens: usize| given.then(|| (0..tokens as u32).map(|t| t % 17).collect());
        case.inputs.token_ids = tables(140);
        let whole = case.forward(gpu);
        case.inputs.x.truncate(config.hidden * 9);
        case.inputs.token_ids = tables(9);
        let part = case.forward(gpu);
        assert_eq!(bits(&part), bits(&whole[..config.hidden * 9]), "{config}, {experts} experts");
    }
    let gpu = gpu();
    for config in [plain(64, 48, 6, 2), rich(1), rich(2), rich(3)] {
        check::<f32>(&gpu, config);
        check::<bf16>(&gpu, config);
    }
}

#[test]
fn captured_graph_replays_with_new_routing() {
    // A separate context: during a capture, cudarc must not wait for events of other tests.
    let gpu = gpu();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything of this context runs on one stream.
    unsafe { context.disable_event_tracking() };
    let (device, stream) = (Device::new(&context).unwrap(), context.new_stream().unwrap());
    for config in [plain(40, 24, 6, 2), rich(4)] {
        let mut case = Case::<f32>::random(config, 33, 1);
        case.inputs = MoeInputs::new(case.inputs.x);
        case.config.router.selection = Selection::Logit;
        case.weights.router.table = None;
        case.weights.router.selection_bias = None;
        case.config.router.selection_bias = false;
        let others: Vec<Vec<f32>> =
            (0..2).map(|seed| values(33 * config.hidden, 1.0, seed)).collect();

        let layer = MoeLayer::new(&device, case.config).unwrap();
        let weights = case.weights.upload(&stream).unwrap();
        let mut inputs = case.inputs.upload(&stream).unwrap();
        let mut y = stream.clone_htod(&vec![f32::NAN; case.inputs.x.len()]).unwrap();
        let bytes = MoeLayer::workspace_bytes(&case.config, DType::F32, 33).unwrap();
        let mut workspace = Workspace::alloc(&stream, bytes).unwrap();

        device.warm_up(DType::F32).unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let (views, to) = (weights.as_views(), &mut y.as_view_mut());
        layer.forward(&stream, &inputs.as_views(), &views, &mut workspace, to).unwrap();
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).unwrap().unwrap();
        assert!(
            stream.clone_dtoh(&y).unwrap().iter().all(|y| y.is_nan()),
            "a capture executes nothing"
        );

        for seed in 0..4 {
            gpu.reschedule(seed);
            for x in &others {
                case.inputs.x.clone_from(x);
                stream.memcpy_htod(x, &mut inputs.x).unwrap();
                graph.launch().unwrap();
                let got = stream.clone_dtoh(&y).unwrap();
                assert_eq!(bits(&got), bits(&case.forward(&gpu)), "{config}");
            }
        }
    }
}

#[test]
fn workspace_size_follows_from_the_shape() {
    let config = plain(4096, 14336, 8, 2);
    let bytes = |tokens| MoeLayer::workspace_bytes(&config, DType::BF16, tokens).unwrap();
    let rows = 4096 * 2;
    assert!(bytes(4096) >= rows * (14336 + 4096) * 2);
    assert!(bytes(4096) < rows * (14336 + 4096) * 2 + (1 << 21), "{}", bytes(4096));
    assert!((0..100).map(bytes).is_sorted());
    assert!(MoeLayer::workspace_bytes(&config, DType::F32, usize::MAX / 8).is_err());
}
