//! Passes that are captured into a graph and replayed with other inputs give the bits that they give when they are enqueued.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr};
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

/// What comes before a layer, or in the place of its router.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    /// Noise on the logits, drawn in the pass.
    Noise(NoiseDistribution),
    /// Noise from the caller, which learned logits scale.
    ScaledNoise,
    /// The router reads jittered tokens.
    Jitter,
    /// Experts choose so many tokens.
    ExpertChoice(usize),
}

/// A device in a context of its own: while it captures, cudarc must not wait for events of other tests.
struct Place {
    device: Device,
    stream: Arc<CudaStream>,
}

impl Place {
    fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: everything of this context runs on one stream.
        unsafe { context.disable_event_tracking() };
        Self { device: Device::new(&context).unwrap(), stream: context.new_stream().unwrap() }
    }
}

/// A pass with all of its memory.
struct Pass<'p, D: Dtype> {
    place: &'p Place,
    before: Before,
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

/// What one pass reads, from one seed.
fn inputs<D: Dtype>(config: &MoeConfig, before: Before, seed: u64) -> MoeInputs<Owned, D> {
    let logits = config.routing(TOKENS).logits();
    let mut inputs = MoeInputs::new(values(TOKENS * config.hidden, 1.0, seed));
    if before == Before::ScaledNoise {
        inputs.noise = Some(values(logits, 1.0, seed ^ 5));
        let noise_logits = (values(logits, 2.0, seed ^ 6), values(logits, 2.0, seed ^ 6));
        inputs.noise_logits = Some(match config.projection.f32_logits {
            true => Typed::F32(noise_logits.0),
            false => Typed::Element(noise_logits.1),
        });
    }
    // Sequences of several lengths, the last one shorter.
    inputs.sequence_tokens = config.capacity.map(|_| 10);
    inputs
}

impl<'p, D: Dtype + DeviceRepr> Pass<'p, D> {
    fn new(
        place: &'p Place,
        before: Before,
        config: MoeConfig,
        weights: &MoeWeights<Owned, D>,
        seed: u64,
    ) -> Self {
        let stream = &place.stream;
        let shape = config.routing(TOKENS);
        let nan = |len: usize| stream.clone_htod(&vec![f32::NAN; len]).unwrap();
        let elements = |len: usize| stream.clone_htod(&vec![D::from_f32(f32::NAN); len]).unwrap();
        let bytes = MoeLayer::workspace_bytes(&config, D::DTYPE, TOKENS).unwrap();
        Self {
            place,
            before,
            config,
            weights: weights.upload(stream).unwrap(),
            inputs: inputs(&config, before, seed).upload(stream).unwrap(),
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

    /// Other inputs in the same memory.
    fn set(&mut self, seed: u64) {
        let new = inputs::<D>(&self.config, self.before, seed);
        let stream = &self.place.stream;
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
        let Self { place, config, weights, workspace, y, before, .. } = self;
        let Place { device, stream } = place;
        let layer = MoeLayer::new(device, *config).unwrap();
        let (mut inputs, weights) = (self.inputs.as_views(), weights.as_views());
        let mut y = y.as_view_mut();
        match *before {
            Before::Nothing | Before::ScaledNoise => {}
            Before::Noise(distribution) => {
                let noise = &mut self.noise.as_view_mut();
                noise_fwd_into(device, stream, distribution, 3, 1, noise).unwrap();
                inputs.noise = Some(self.noise.as_view());
            }
            Before::Jitter => {
                let uniform = NoiseDistribution::Uniform;
                noise_fwd_into(device, stream, uniform, 3, 0, &mut self.u.as_view_mut()).unwrap();
                let (u, to) = (self.u.as_view(), &mut self.jittered.as_view_mut());
                jitter_fwd_into(device, stream, 0.3, &inputs.x, &u, to).unwrap();
                inputs.router_x = Some(self.jittered.as_view());
            }
            Before::ExpertChoice(capacity) => {
                let logits = &mut Typed::F32(self.logits.as_view_mut());
                layer.router_logits(stream, &inputs, &weights, workspace, logits).unwrap();
                let (ids, of_ids) = (&mut self.expert_ids, &mut self.routing_weights);
                let experts = config.num_experts;
                expert_choice_fwd_into(
                    device,
                    stream,
                    TOKENS,
                    experts,
                    capacity,
                    &self.logits.as_view(),
                    &mut ids.as_view_mut(),
                    &mut of_ids.as_view_mut(),
                )
                .unwrap();
                let (ids, of_ids) = (ids.as_view(), of_ids.as_view());
                let x = &inputs.x;
                layer
                    .forward_routed(stream, x, &ids, &of_ids, &weights, workspace, &mut y)
                    .unwrap();
                return;
            }
        }
        layer.forward(stream, &inputs, &weights, workspace, &mut y).unwrap();
    }

    fn y(&self) -> Vec<D> {
        self.place.stream.clone_dtoh(&self.y).unwrap()
    }
}

/// Captures a pass, replays it twice with other inputs, and holds each replay against a pass of its own.
fn check<D: Dtype + DeviceRepr>(gpu: &Gpu, place: &Place, before: Before, config: MoeConfig) {
    let what = format!("{config} after {before:?} in {}", D::DTYPE);
    let weights = random_weights::<D>(&config, &mut Rng::new(8));
    let mut captured = Pass::new(place, before, config, &weights, 1);
    place.device.warm_up(D::DTYPE).unwrap();
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    place.stream.begin_capture(mode).unwrap();
    captured.enqueue();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = place.stream.end_capture(flags).unwrap().unwrap();
    assert!(captured.y().iter().all(|y| y.to_f32().is_nan()), "{what}: capturing runs nothing");

    let mut seen = Vec::new();
    for seed in [2, 3] {
        gpu.reschedule(seed);
        captured.set(seed);
        graph.launch().unwrap();
        let got = captured.y();
        let mut direct = Pass::new(place, before, config, &weights, seed);
        direct.enqueue();
        assert!(got.iter().all(|y| y.to_f32().is_finite()), "{what}");
        assert_eq!(bits(&got), bits(&direct.y()), "{what}, inputs {seed}");
        seen.push(bits(&got));
    }
    assert_ne!(seen[0], seen[1], "{what}: other inputs, other outputs");
}

fn check_dtypes(before: Before, config: MoeConfig) {
    let (gpu, place) = (gpu(), Place::new());
    check::<f32>(&gpu, &place, before, config);
    check::<f16>(&gpu, &place, before, config);
    check::<bf16>(&gpu, &place, before, config);
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
fn plain_layers() {
    for config in [plain(2), with_f32_logits(plain(2))] {
        check_dtypes(Before::Nothing, config);
    }
}

/// A layer with nearly everything in it.
#[test]
fn rich_layers() {
    let mut rng = Rng::new(4);
    let mut left = 3;
    while left > 0 {
        let mut config = random_config(&mut rng, 60);
        config.router.selection_bias = false;
        if config.shared.is_none() || config.router.selection == Selection::Given {
            continue;
        }
        check_dtypes(Before::Nothing, config);
        left -= 1;
    }
}

#[test]
fn capacity() {
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
            check_dtypes(Before::Nothing, config);
        }
    }
}

#[test]
fn noise() {
    for distribution in NoiseDistribution::ALL {
        check_dtypes(Before::Noise(distribution), plain(2));
    }
    for config in [plain(2), with_f32_logits(plain(2))] {
        check_dtypes(Before::ScaledNoise, config);
    }
}

#[test]
fn jitter() {
    check_dtypes(Before::Jitter, plain(2));
}

#[test]
fn expert_choice() {
    for tokens in [1, 7, TOKENS] {
        check_dtypes(Before::ExpertChoice(tokens), with_f32_logits(plain(6)));
    }
}
