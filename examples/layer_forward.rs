//! The forward pass of a layer on cudarc buffers and a stream: `cargo run --example layer_forward`.

use cudarc::driver::CudaContext;
use half::bf16;
use moe_kernels::{
    DType, Device, MoeConfig, MoeInputs, MoeLayer, MoeWeights, RouterConfig, Workspace,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Selects the GPU if there is one, else the software device. An application for GPUs omits this
    // line.
    println!("running on {}", moe_emulator::choose(moe_emulator::Choice::from_env()?)?);
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let device = Device::new(&context)?;

    let router = RouterConfig::softmax_top_k(true);
    let config = MoeConfig { router, ..MoeConfig::new(64, 96, 8, 2) };
    let layer = MoeLayer::new(&device, config)?;
    let num_tokens = 5;

    let ramp = |len: usize, scale: f32| -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(scale * ((i * 37 % 101) as f32 / 50.0 - 1.0))).collect()
    };
    let x = stream.clone_htod(&ramp(num_tokens * config.hidden, 1.0))?;
    let logits = stream.clone_htod(&ramp(num_tokens * config.num_experts, 2.0))?;
    let gate_up = stream.clone_htod(&ramp(config.gate_up_len(), 0.1))?;
    let down = stream.clone_htod(&ramp(config.down_len(), 0.1))?;
    let mut y = stream.alloc_zeros::<bf16>(num_tokens * config.hidden)?;

    // The size does not depend on the device, so a server can reserve it for its largest batch.
    let bytes = MoeLayer::workspace_bytes(&config, DType::BF16, num_tokens)?;
    let mut workspace = Workspace::alloc(&stream, bytes)?;
    let weights = MoeWeights::plain(gate_up.as_view(), down.as_view());
    let inputs = MoeInputs::with_logits(x.as_view(), logits.as_view());
    layer.forward(&stream, &inputs, &weights, &mut workspace, &mut y.as_view_mut())?;

    let y = stream.clone_dtoh(&y)?;
    println!("{config}: {bytes} bytes of workspace, y[0, 0..4] = {:?}", &y[..4]);
    Ok(())
}
