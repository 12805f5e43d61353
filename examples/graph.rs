//! Captures a forward pass and replays it with another routing: `cargo run --example graph`.

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use moe_kernels::{
    DType, Device, MoeConfig, MoeInputs, MoeLayer, MoeWeights, RouterConfig, Workspace,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("running on {}", moe_emulator::choose(moe_emulator::Choice::from_env()?)?);
    let context = CudaContext::new(0)?;
    // A capture must not wait for earlier events. SAFETY: all work below is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream()?;
    let device = Device::new(&context)?;

    let router = RouterConfig::top_k_softmax();
    let config = MoeConfig { router, ..MoeConfig::new(32, 48, 4, 1) };
    let layer = MoeLayer::new(&device, config)?;
    let num_tokens = 3;

    // The output of expert e is proportional to e + 1, so the output shows which expert was
    // selected.
    let gate_up = vec![0.2f32; config.gate_up_len()];
    let per_expert = config.hidden * config.intermediate;
    let down: Vec<f32> =
        (0..config.down_len()).map(|i| (i / per_expert + 1) as f32 * 0.01).collect();
    let x = stream.clone_htod(&vec![0.5f32; num_tokens * config.hidden])?;
    let (gate_up, down) = (stream.clone_htod(&gate_up)?, stream.clone_htod(&down)?);
    let mut logits = stream.clone_htod(&[1f32, 0., 0., 0., 1., 0., 0., 0., 1., 0., 0., 0.])?;
    let mut y = stream.alloc_zeros::<f32>(num_tokens * config.hidden)?;
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, num_tokens)?;
    let mut workspace = Workspace::alloc(&stream, bytes)?;
    let weights = MoeWeights::plain(gate_up.as_view(), down.as_view());

    device.warm_up(DType::F32)?; // Images cannot be loaded during a capture.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let inputs = MoeInputs::with_logits(x.as_view(), logits.as_view());
    layer.forward(&stream, &inputs, &weights, &mut workspace, &mut y.as_view_mut())?;
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?.ok_or("nothing was captured")?;

    // The first column of y shows which expert was selected.
    let show = |y: &[f32]| y.iter().step_by(config.hidden).copied().collect::<Vec<_>>();
    graph.launch()?;
    println!("all to expert 0:    {:?}", show(&stream.clone_dtoh(&y)?));
    stream.memcpy_htod(&[0f32, 0., 0., 1., 0., 0., 1., 0., 0., 1., 0., 0.], &mut logits)?;
    graph.launch()?;
    println!("experts 3, 2 and 1: {:?}", show(&stream.clone_dtoh(&y)?));
    Ok(())
}
