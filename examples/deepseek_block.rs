//! A small block of DeepSeek-V3 with its router gate: `cargo run --example deepseek_block`.

use cudarc::driver::CudaContext;
use moe_kernels::{
    DType, Device, MoeConfig, MoeInputs, MoeLayer, MoeWeights, Owned, RouterConfig, SharedConfig,
    SharedWeights, Workspace,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("running on {}", moe_emulator::choose(moe_emulator::Choice::from_env()?)?);
    let context = CudaContext::new(0)?;
    let (stream, device) = (context.new_stream()?, Device::new(&context)?);

    let mut config = MoeConfig::new(64, 32, 16, 4);
    config.projection.f32_logits = true;
    config.router = RouterConfig::deepseek_v3(4, 2, 2.5);
    config.shared = Some(SharedConfig::new(32));

    let ramp = |len: usize, scale: f32| -> Vec<f32> {
        (0..len).map(|i| scale * ((i * 37 % 101) as f32 / 50.0 - 1.0)).collect()
    };
    let (gate_up, down) = (ramp(config.gate_up_len(), 0.1), ramp(config.down_len(), 0.1));
    let mut weights =
        MoeWeights::<Owned, f32>::plain(gate_up, down).with_router_gate(ramp(16 * 64, 0.3));
    weights.router.selection_bias = Some(ramp(16, 0.1));
    let (gate_up, down) = (ramp(2 * 32 * 64, 0.1), ramp(64 * 32, 0.1));
    weights.shared = Some(SharedWeights::new(gate_up, down));
    let inputs = MoeInputs::<Owned, f32>::new(ramp(5 * 64, 1.0));

    let layer = MoeLayer::new(&device, config)?;
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 5)?;
    let mut workspace = Workspace::alloc(&stream, bytes)?;
    let (weights, inputs) = (weights.upload(&stream)?, inputs.upload(&stream)?);
    let mut y = stream.alloc_zeros::<f32>(5 * 64)?;
    let (weights, inputs) = (weights.as_views(), inputs.as_views());
    layer.forward(&stream, &inputs, &weights, &mut workspace, &mut y.as_view_mut())?;
    println!("{config}: y[0, 0..4] = {:?}", &stream.clone_dtoh(&y)?[..4]);
    Ok(())
}
