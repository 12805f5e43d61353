//! Loads a MoE block of a checkpoint and runs it on the CPU reference.
//!
//!     cargo run --example load_block -p moe-kernels-hf -- [FOLDER [LAYER]]

use moe_kernels::{MoeInputs, reference};
use moe_kernels_hf::Checkpoint;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/mixtral-tiny");
    let folder = arguments.next().unwrap_or(fixture.into());
    let layer = arguments.next().map_or(Ok(1), |number| number.parse())?;

    let checkpoint = Checkpoint::open(folder.as_str())?;
    for block in checkpoint.blocks(layer)? {
        let config = block.config();
        println!("layer {layer} of {folder}, {}: {config}", block.info().model_type);
        let weights = block.load::<f32>()?;

        // Four tokens. `weights.upload(&stream)` and a `MoeLayer` run the same block on a GPU.
        let x: Vec<f32> = (0..4 * config.hidden).map(|i| (i as f32 * 0.37).sin()).collect();
        let inputs = MoeInputs::new(x);
        let (inputs, weights) = (inputs.as_host(), weights.as_host());
        let y = reference::moe_layer_fwd::<f32, f32>(config, &inputs, &weights)?;
        for (token, y) in y.chunks(config.hidden).enumerate() {
            println!("token {token}: y = [{:.4}, {:.4}, {:.4}, ...]", y[0], y[1], y[2]);
        }
    }
    Ok(())
}
