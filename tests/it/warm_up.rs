//! After `warm_up`, a layer with any options loads no images, so it can be captured.

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::{bf16, f16};
use moe_kernels::ops::noise::noise_fwd_into;
use moe_kernels::{
    Device, Dtype, MoeConfig, MoeInputs, MoeLayer, MoeWeights, NoiseDistribution, Owned,
    RouterConfig, Typed, Workspace,
};

use crate::common::{Rng, bits, gpu, random_config, random_inputs, random_weights, values};

/// Captures a pass of a new device after `warm_up`, and compares the graph with a direct pass.
fn capture<D: Dtype>(
    config: MoeConfig,
    weights: &MoeWeights<Owned, D>,
    inputs: &MoeInputs<Owned, D>,
    what: &str,
) {
    gpu(); // Selects the driver of the process.
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything of this context runs on one stream.
    unsafe { context.disable_event_tracking() };
    let (device, stream) = (Device::new(&context).unwrap(), context.new_stream().unwrap());
    let layer = MoeLayer::new(&device, config).unwrap();
    let (weights, inputs) = (weights.upload(&stream).unwrap(), inputs.upload(&stream).unwrap());
    let (weights, inputs) = (weights.as_views(), inputs.as_views());
    let len = inputs.x.len();
    let bytes = MoeLayer::workspace_bytes(&config, D::DTYPE, len / config.hidden).unwrap();
    let mut workspace = Workspace::alloc(&stream, bytes).unwrap();
    let mut outputs =
        [(); 2].map(|()| stream.clone_htod(&vec![D::from_f64(f64::NAN); len]).unwrap());
    let [replayed, direct] = &mut outputs;

    device.warm_up(D::DTYPE).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let enqueued =
        layer.forward(&stream, &inputs, &weights, &mut workspace, &mut replayed.as_view_mut());
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    assert!(enqueued.is_ok(), "{what}: {enqueued:?}");
    graph.unwrap().unwrap().launch().unwrap();
    layer.forward(&stream, &inputs, &weights, &mut workspace, &mut direct.as_view_mut()).unwrap();
    let [replayed, direct] = [replayed, direct].map(|y| stream.clone_dtoh(y).unwrap());
    assert_eq!(bits(&replayed), bits(&direct), "{what}");
}

/// A plain layer with f32 logits, computed or given; the kernels of a plain router depend on their
/// type.
fn capture_f32_logits<D: Dtype>() {
    for experts in [6, 300] {
        let router = RouterConfig::softmax_top_k(true);
        let mut config = MoeConfig { router, ..MoeConfig::new(16, 8, experts, 2) };
        config.projection.f32_logits = true;
        let mut rng = Rng::new(1);
        let weights: MoeWeights<Owned, D> = random_weights(&config, &mut rng);
        let mut inputs = MoeInputs::new(values(5 * 16, 1.0, 2));
        capture(config, &weights, &inputs, "logits of the router gate");
        config.projection.f32_logits = false;
        inputs.logits = Some(Typed::F32(values(5 * experts, 2.0, 3)));
        capture(config, &weights, &inputs, "logits of the caller");
    }
}

#[test]
fn layers_with_f32_logits_load_nothing() {
    capture_f32_logits::<bf16>();
    capture_f32_logits::<f16>();
    capture_f32_logits::<f32>();
}

/// The error names `warm_up`.
#[test]
fn capture_without_warm_up_is_an_error() {
    gpu();
    let context = CudaContext::new(0).unwrap();
    // SAFETY: everything of this context runs on one stream.
    unsafe { context.disable_event_tracking() };
    let (device, stream) = (Device::new(&context).unwrap(), context.new_stream().unwrap());
    let (mut to, kind) = (stream.alloc_zeros::<f32>(4).unwrap(), NoiseDistribution::Normal);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let result = noise_fwd_into(&device, &stream, kind, 1, 0, &mut to.as_view_mut());
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let _ = stream.end_capture(flags);
    let message = result.unwrap_err().to_string();
    assert!(
        message.contains("STREAM_CAPTURE_UNSUPPORTED") && message.contains("Device::warm_up"),
        "{message}"
    );
}

#[test]
fn random_layers_load_nothing() {
    fn capture_random<D: Dtype>(seed: u64) {
        let mut rng = Rng::new(seed);
        let config = random_config(&mut rng, 60);
        let weights: MoeWeights<Owned, D> = random_weights(&config, &mut rng);
        let inputs = random_inputs(&config, 1 + rng.below(30), &mut rng);
        capture(config, &weights, &inputs, &format!("{config} seed {seed}"));
    }
    for seed in 0..8 {
        capture_random::<bf16>(seed);
        capture_random::<f16>(seed);
        capture_random::<f32>(seed);
    }
}
