//! Routing without experts, for an engine with its own experts: `cargo run --example route`.

use cudarc::driver::CudaContext;
use moe_kernels::ops::{plan, route};
use moe_kernels::{Device, RouterConfig, RoutingShape};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("running on {}", moe_emulator::choose(moe_emulator::Choice::from_env()?)?);
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;
    let device = Device::new(&context)?;

    // Three tokens, four experts. In the tie of the second token the lower experts are selected.
    let logits = [0.1f32, 2.0, -1.0, 0.5, 1.0, 1.0, 1.0, 0.0, f32::NAN, -3.0, 0.0, 4.0];
    let shape = RoutingShape::new(3, 4, 2)?;
    let router = RouterConfig::softmax_top_k(true);

    let logits = stream.clone_htod(&logits)?;
    let logits = logits.as_view();
    let inputs = route::RouteInputs::new(&logits);
    let routing = route::route_fwd(&device, &stream, shape, &router, &inputs)?;
    let plan = plan::plan_fwd(&device, &stream, shape, &routing.expert_ids.as_view())?;

    let expert_ids = stream.clone_dtoh(&routing.expert_ids)?;
    let weights = stream.clone_dtoh(&routing.routing_weights)?;
    for (token, (ids, weights)) in expert_ids.chunks(2).zip(weights.chunks(2)).enumerate() {
        println!("token {token}: experts {ids:?}, weights {weights:?}");
    }
    println!("rows of expert e start at {:?}", stream.clone_dtoh(&plan.expert_offsets())?);
    println!("slot s has row {:?}", stream.clone_dtoh(&plan.row_of_slot())?);
    Ok(())
}
