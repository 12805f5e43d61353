//! A captured pass that is replayed with other inputs gives the same bits as a pass that is
//! enqueued directly.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use half::{bf16, f16};
use moe_kernels::ops::expert_choice::expert_choice_fwd_into;
use moe_kernels::ops::jitter::jitter_fwd_into;
use moe_kernels::ops::noise::noise_fwd_into;
use moe_kernels::{
    CapacityConfig, CapacityLimit, Device, Dtype, MoeConfig, MoeInputs, MoeLayer, MoeWeights,
    NoiseDistribution, Normalization, Owned, OwnedOnDevice, Priority, RouterConfig, Selection,
    Typed, Workspace,
};

use crate::common::{Gpu, Rng, bits, gpu, random_config, random_weights, values};

const TOKENS: usize = 33;

/// The operations before a layer, or in place of its router.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Prelude {
    Nothing,
    /// Noise on the logits, drawn in the pass.
    Noise(NoiseDistribution),
    /// Noise of the caller, with noise logits.
    ScaledNoise,
    /// Jittered tokens for the router.
    Jitter,
    /// Expert choice with this number of tokens per expert.
    ExpertChoice(usize),
}

/// A device in a separate context: during a capture, cudarc must not wait for events of other
/// tests.
struct CaptureContext {
    device: Device,
    stream: Arc<CudaStream>,
}

impl CaptureContext {
    fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: everything of this context runs on one stream.
        unsafe { context.disable_event_tracking() };
        Self { device: Device::new(&context).unwrap(), stream: context.new_stream().unwrap() }
    }
}

/// A pass and its memory.
struct Pass<'p, D: Dtype> {
    context: &'p CaptureContext,
    prelude: Prelude,
    config: MoeConfig,
    weights: MoeWeights<OwnedOnDevice, D>,
    inputs: MoeInputs<OwnedOnDevice, D>,
    u: CudaSlice<f32>,
    noise: CudaSlice<f32>,
    jittered: CudaSlice<D>,
    logits: CudaSlice<f32>,
    expert_ids: CudaSlice<u32>,
    routing_weights: CudaSlice<f32>,
    workspace: Workspace<'static>,
    y: CudaSlice<D>,
}

/// The inputs of one pass, from a seed.
fn inputs<D: Dtype>(config: &MoeConfig, prelude: Prelude, seed: u64) -> MoeInputs<Owned, D> {
    let logits = config.routing(TOKENS).logits();
    let mut inputs = MoeInputs::new(values(TOKENS * config.hidden, 1.0, seed));
    if prelude == Prelude::ScaledNoise {
        inputs.noise = Some(values(logits, 1.0, seed ^ 5));
        let noise_logits = (values(logits, 2.0, seed ^ 6), values(logits, 2.0, seed ^ 6));
        inputs.noise_logits = Some(match config.projection.f32_logits {
            true => Typed::F32(noise_logits.0),
            false => Typed::Element(noise_logits.1),
        });
    }
    // Sequences of 10 tokens, of which the last is shorter.
    inputs.sequence_tokens = config.capacity.map(|_| 10);
    inputs
}

impl<'p, D: Dtype> Pass<'p, D> {
    fn new(
        context: &'p CaptureContext,
        prelude: Prelude,
        config: MoeConfig,
        weights: &MoeWeights<Owned, D>,
        seed: u64,
    ) -> Self {
        let stream = &context.stream;
        let shape = config.routing(TOKENS);
        let nan = |len: usize| stream.clone_htod(&vec![f32::NAN; len]).unwrap();
        let elements = |len: usize| stream.clone_htod(&vec![D::from_f32(f32::NAN); len]).unwrap();
        let bytes = MoeLayer::workspace_bytes(&config, D::DTYPE, TOKENS).unwrap();
        Self {
            context,
            prelude,
            config,
            weights: weights.upload(stream).unwrap(),
            inputs: inputs(&config, prelude, seed).upload(stream).unwrap(),
            u: nan(TOKENS * config.hidden),
            noise: nan(shape.logits()),
            jittered: elements(TOKENS * config.hidden),
            logits: nan(shape.logits()),
            expert_ids: stream.clone_htod(&vec![u32::MAX; shape.slots()]).unwrap(),
            routing_weights: nan(shape.slots()),
            workspace: Workspace::alloc(stream, bytes).unwrap(),
            y: elements(TOKENS * config.hidden),
        }
    }

    /// Writes other inputs to the same memory.
    fn set_inputs(&mut self, seed: u64) {
        let new = inputs::<D>(&self.config, self.prelude, seed);
        let stream = &self.context.stream;
        stream.memcpy_htod(&new.x, &mut self.inputs.x).unwrap();
        if let (Some(new), Some(noise)) = (&new.noise, &mut self.inputs.noise) {
            stream.memcpy_htod(new, noise).unwrap();
        }
        match (&new.noise_logits, &mut self.inputs.noise_logits) {
            (Some(Typed::F32(new)), Some(Typed::F32(to))) => stream.memcpy_htod(new, to).unwrap(),
            (Some(Typed::Element(new)), Some(Typed::Element(to))) => {
                stream.memcpy_htod(new, to).unwrap();
            }
            (new, to) => assert!(new.is_none() && to.is_none()),
        }
    }

    fn enqueue(&mut self) {
        let Self { context, config, weights, workspace, y, prelude, .. } = self;
        let CaptureContext { device, stream } = context;
        let layer = MoeLayer::new(device, *config).unwrap();
        let (mut inputs, weights) = (self.inputs.as_views(), weights.as_views());
        let mut y = y.as_view_mut();
        match *prelude {
            Prelude::Nothing | Prelude::ScaledNoise => {}
            Prelude::Noise(distribution) => {
                let noise = &mut self.noise.as_view_mut();
                noise_fwd_into(device, stream, distribution, 3, 1, noise).unwrap();
                inputs.noise = Some(self.noise.as_view());
            }
            Prelude::Jitter => {
                let uniform = NoiseDistribution::Uniform;
                noise_fwd_into(device, stream, uniform, 3, 0, &mut self.u.as_view_mut()).unwrap();
                let (u, to) = (self.u.as_view(), &mut self.jittered.as_view_mut());
                jitter_fwd_into(device, stream, 0.3, &inputs.x, &u, to).unwrap();
                inputs.router_x = Some(self.jittered.as_view());
            }
            Prelude::ExpertChoice(capacity) => {
                let logits = &mut Typed::F32(self.logits.as_view_mut());
                layer.router_logits(stream, &inputs, &weights, workspace, logits).unwrap();
                let (ids, routing_weights) = (&mut self.expert_ids, &mut self.routing_weights);
                let experts = config.num_experts;
                expert_choice_fwd_into(
                    device,
                    stream,
                    TOKENS,
                    experts,
                    capacity,
                    &self.logits.as_view(),
                    &mut ids.as_view_mut(),
                    &mut routing_weights.as_view_mut(),
                )
                .unwrap();
                let (x, ids) = (&inputs.x, ids.as_view());
                let routing_weights = routing_weights.as_view();
                layer
                    .forward_routed(stream, x, &ids, &routing_weights, &weights, workspace, &mut y)
                    .unwrap();
                return;
            }
        }
        layer.forward(stream, &inputs, &weights, workspace, &mut y).unwrap();
    }

    fn y(&self) -> Vec<D> {
        self.context.stream.clone_dtoh(&self.y).unwrap()
    }
}

/// Captures a pass, replays it twice with other inputs, and compares each replay with a direct
/// pass.
fn check<D: Dtype>(gpu: &Gpu, context: &CaptureContext, prelude: Prelude, config: MoeConfig) {
    let what = format!("{config} after {prelude:?} in {}", D::DTYPE);
    let weights = random_weights::<D>(&config, &mut Rng::new(8));
    let mut captured = Pass::new(context, prelude, config, &weights, 1);
    context.device.warm_up(D::DTYPE).unwrap();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    context.stream.begin_capture(mode).unwrap();
    captured.enqueue();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = context.stream.end_capture(flags).unwrap().unwrap();
    assert!(captured.y().iter().all(|y| y.to_f32().is_nan()), "{what}: a capture executes nothing");

    let mut seen = Vec::new();
    for seed in [2, 3] {
        gpu.reschedule(seed);
        captured.set_inputs(seed);
        graph.launch().unwrap();
        let got = captured.y();
        let mut direct = Pass::new(context, prelude, config, &weights, seed);
        direct.enqueue();
        assert!(got.iter().all(|y| y.to_f32().is_finite()), "{what}");
        assert_eq!(bits(&got), bits(&direct.y()), "{what}, inputs {seed}");
        seen.push(bits(&got));
    }
    assert_ne!(seen[0], seen[1], "{what}: the outputs do not depend on the inputs");
}

fn check_dtypes(prelude: Prelude, config: MoeConfig) {
    let (gpu, context) = (gpu(), CaptureContext::new());
    check::<f32>(&gpu, &context, prelude, config);
    check::<f16>(&gpu, &context, prelude, config);
    check::<bf16>(&gpu, &context, prelude, config);
}

fn plain(top_k: usize) -> MoeConfig {
    let router = RouterConfig::softmax_top_k(top_k < 6);
    MoeConfig { router, ..MoeConfig::new(40, 24, 6, top_k) }
}

fn with_f32_logits(mut config: MoeConfig) -> MoeConfig {
    config.projection.f32_logits = true;
    config
}

#[test]
fn plain_layers_replay() {
    for config in [plain(2), with_f32_logits(plain(2))] {
        check_dtypes(Prelude::Nothing, config);
    }
}

/// Random layers with a shared expert.
#[test]
fn layers_with_many_options_replay() {
    let mut rng = Rng::new(4);
    let mut remaining = 3;
    while remaining > 0 {
        let mut config = random_config(&mut rng, 60);
        config.router.selection_bias = false;
        if config.shared.is_none() || config.router.selection == Selection::Given {
            continue;
        }
        check_dtypes(Prelude::Nothing, config);
        remaining -= 1;
    }
}

#[test]
fn layers_with_capacity_replay() {
    for priority in
        [Priority::Token, Priority::Choice, Priority::Weight, Priority::ChoiceByTopWeight]
    {
        for overflow in [0, 2] {
            let limit = CapacityLimit::Factor { factor: 0.7 };
            let mut capacity = CapacityConfig::new(limit, priority);
            capacity.overflow = overflow;
            capacity.normalization = Normalization::Sum { epsilon: 1e-9 };
            let router = RouterConfig::softmax_top_k(false);
            let config = MoeConfig { capacity: Some(capacity), router, ..plain(2) };
            check_dtypes(Prelude::Nothing, config);
        }
    }
}

#[test]
fn layers_with_noise_replay() {
    for distribution in NoiseDistribution::ALL {
        check_dtypes(Prelude::Noise(distribution), plain(2));
    }
    for config in [plain(2), with_f32_logits(plain(2))] {
        check_dtypes(Prelude::ScaledNoise, config);
    }
}

#[test]
fn layers_with_jitter_replay() {
    check_dtypes(Prelude::Jitter, plain(2));
}

#[test]
fn expert_choice_replays() {
    for tokens in [1, 7, TOKENS] {
        check_dtypes(Prelude::ExpertChoice(tokens), with_f32_logits(plain(6)));
    }
}
