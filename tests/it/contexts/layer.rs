//! Buffers of another context in the layer: every weight, every input, and the outputs of each
//! part.

use cudarc::driver::{CudaContext, CudaView};
use moe_kernels::{
    DType, Error, GateUpTensors, MoeConfig, MoeInputs, MoeLayer, MoeWeights, OnDevice, OnDeviceMut,
    Owned, RouterConfig, Typed, Workspace,
};

use super::{Buffers, check};
use crate::common::{Rng, gpu, random_config, random_inputs, random_weights};

/// Random layers, of which each tensor in turn belongs to another context.
#[test]
fn foreign_tensors_of_a_layer_are_errors() {
    let gpu = gpu();
    let context = CudaContext::new(0).unwrap();
    let other = context.new_stream().unwrap();
    let mut rejected = std::collections::BTreeSet::new();
    for seed in 0..60 {
        let rng = &mut Rng::new(seed);
        let config = random_config(rng, 40);
        let host: MoeWeights<Owned, f32> = random_weights(&config, rng);
        let inputs: MoeInputs<Owned, f32> = random_inputs(&config, 6, rng);
        let native = (host.upload(&gpu.stream).unwrap(), inputs.upload(&gpu.stream).unwrap());
        let foreign = (host.upload(&other).unwrap(), inputs.upload(&other).unwrap());
        let layer = MoeLayer::new(&gpu.device, config).unwrap();
        let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 6).unwrap();
        let mut workspace = Workspace::alloc(&gpu.stream, bytes).unwrap();
        let mut forward = |weights: &MoeWeights<OnDevice<'_>, f32>,
                           inputs: &MoeInputs<OnDevice<'_>, f32>| {
            let mut y = gpu.poisoned::<f32>(6 * config.hidden);
            let to = &mut y.view_mut();
            let result = layer.forward(&gpu.stream, inputs, weights, &mut workspace, to);
            assert!(result.is_ok() || gpu.download(&y.view()).iter().all(|y| y.is_nan()));
            result
        };
        // All tensors are foreign at first. Each error names one, which is then replaced.
        let (mut weights, mut inputs) = (foreign.0.as_views(), foreign.1.as_views());
        let (native_weights, native_inputs) = (native.0.as_views(), native.1.as_views());
        for _ in 0..40 {
            let argument = match forward(&weights, &inputs) {
                Ok(()) => break,
                Err(Error::Context { op: "MoeLayer", argument }) => argument,
                Err(other) => panic!("{config}: {other}"),
            };
            rejected.insert(argument);
            replace(argument, &mut weights, &mut inputs, &native_weights, &native_inputs);
        }
        assert_eq!(forward(&weights, &inputs), Ok(()), "{config}");
    }
    assert!(rejected.len() >= 26, "{rejected:?}");
}

/// Replaces the tensor of this name by that of the device's context.
fn replace<'v>(
    name: &str,
    weights: &mut MoeWeights<OnDevice<'v>, f32>,
    inputs: &mut MoeInputs<OnDevice<'v>, f32>,
    native: &MoeWeights<OnDevice<'v>, f32>,
    native_inputs: &MoeInputs<OnDevice<'v>, f32>,
) {
    let typed = |tensor: &Option<Typed<OnDevice<'v>, f32>>| match tensor {
        Some(Typed::Element(view)) => Some(Typed::Element(view.slice(..))),
        Some(Typed::F32(view)) => Some(Typed::F32(view.slice(..))),
        None => None,
    };
    let view = |tensor: &Option<CudaView<'v, f32>>| tensor.as_ref().map(|view| view.slice(..));
    let ids = |tensor: &Option<CudaView<'v, u32>>| tensor.as_ref().map(|view| view.slice(..));
    match name {
        "router.router_gate" => weights.router.router_gate = typed(&native.router.router_gate),
        "router.bias" => weights.router.bias = typed(&native.router.bias),
        "router.norm" => weights.router.norm = view(&native.router.norm),
        "router.noise_gate" => weights.router.noise_gate = typed(&native.router.noise_gate),
        "router.selection_bias" => {
            weights.router.selection_bias = view(&native.router.selection_bias)
        }
        "router.expert_scale" => weights.router.expert_scale = view(&native.router.expert_scale),
        "router.table" => weights.router.table = ids(&native.router.table),
        "experts.gate_up" | "experts.gate" | "experts.up" => {
            let gate_up = match (&native.experts.gate_up, &weights.experts.gate_up) {
                (GateUpTensors::Fused(gate_up), _) => GateUpTensors::Fused(gate_up.slice(..)),
                (GateUpTensors::Separate { gate, .. }, GateUpTensors::Separate { up, .. })
                    if name == "experts.gate" =>
                {
                    GateUpTensors::Separate { gate: gate.slice(..), up: up.slice(..) }
                }
                (GateUpTensors::Separate { gate, up }, _) => {
                    GateUpTensors::Separate { gate: gate.slice(..), up: up.slice(..) }
                }
            };
            weights.experts.gate_up = gate_up;
        }
        "experts.gate_up_bias" => weights.experts.gate_up_bias = view(&native.experts.gate_up_bias),
        "experts.down" => weights.experts.down = native.experts.down.slice(..),
        "experts.down_bias" => weights.experts.down_bias = view(&native.experts.down_bias),
        "experts.output_bias" => weights.experts.output_bias = view(&native.experts.output_bias),
        "experts.post_norm" => weights.experts.post_norm = view(&native.experts.post_norm),
        "latent.proj_in" | "latent.norm" | "latent.proj_out" => {
            let (to, from) = (weights.latent.as_mut().unwrap(), native.latent.as_ref().unwrap());
            match name {
                "latent.proj_in" => to.proj_in = from.proj_in.slice(..),
                "latent.norm" => to.norm = view(&from.norm),
                _ => to.proj_out = from.proj_out.slice(..),
            }
        }
        _ if name.starts_with("shared.") => {
            let (to, from) = (weights.shared.as_mut().unwrap(), native.shared.as_ref().unwrap());
            match name {
                "shared.gate_up" => to.gate_up = from.gate_up.slice(..),
                "shared.gate_up_bias" => to.gate_up_bias = view(&from.gate_up_bias),
                "shared.down" => to.down = from.down.slice(..),
                "shared.down_bias" => to.down_bias = view(&from.down_bias),
                _ => to.sigmoid_gate = view(&from.sigmoid_gate),
            }
        }
        "output_norm" => weights.output_norm = view(&native.output_norm),
        "x" => inputs.x = native_inputs.x.slice(..),
        "router_x" => inputs.router_x = view(&native_inputs.router_x),
        "logits" => inputs.logits = typed(&native_inputs.logits),
        "given_ids" => inputs.given_ids = ids(&native_inputs.given_ids),
        "token_ids" => inputs.token_ids = ids(&native_inputs.token_ids),
        "noise" => inputs.noise = view(&native_inputs.noise),
        "noise_logits" => inputs.noise_logits = typed(&native_inputs.noise_logits),
        "selection_noise" => inputs.selection_noise = view(&native_inputs.selection_noise),
        "midpoint_draws" => inputs.midpoint_draws = view(&native_inputs.midpoint_draws),
        "active" => inputs.active = native_inputs.active.as_ref().map(|view| view.slice(..)),
        _ => panic!("a tensor named {name}"),
    }
}

/// The outputs and the workspace of each part of a layer.
#[test]
fn foreign_outputs_of_a_layer_are_errors() {
    let config =
        MoeConfig { router: RouterConfig::softmax_top_k(true), ..MoeConfig::new(2, 2, 3, 2) };
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 4).unwrap();
    let with_layer = |names: &[&'static str], part: usize| {
        check("MoeLayer", names, |buffers| {
            let Buffers { gpu, .. } = buffers;
            let layer = MoeLayer::new(&gpu.device, config).unwrap();
            let (gate_up, down) =
                (buffers.of::<f32>("weights", 24), buffers.of::<f32>("weights", 12));
            let (router_gate, x) = (buffers.of::<f32>("weights", 6), buffers.of::<f32>("x", 8));
            let weights = MoeWeights::plain(gate_up.as_view(), down.as_view())
                .with_router_gate(router_gate.as_view());
            let inputs = MoeInputs::new(x.as_view());
            let mut memory = buffers.of("workspace", bytes);
            let mut workspace = Workspace::borrow(memory.as_view_mut());
            let (mut ids, mut routing_weights) =
                (buffers.of("expert_ids", 8), buffers.of("routing_weights", 8));
            let (mut logits, mut y) = (buffers.of("logits", 12), buffers.of("y", 8));
            let (stream, y) = (&gpu.stream, &mut y.as_view_mut());
            match part {
                0 => layer.forward(stream, &inputs, &weights, &mut workspace, y),
                1 => {
                    let to = &mut Typed::<OnDeviceMut<'_>, f32>::Element(logits.as_view_mut());
                    layer.router_logits(stream, &inputs, &weights, &mut workspace, to)
                }
                2 => {
                    let to = (&mut ids.as_view_mut(), &mut routing_weights.as_view_mut());
                    layer.route(stream, &inputs, &weights, &mut workspace, to.0, to.1)
                }
                _ => {
                    let (x, ids) = (x.as_view(), ids.as_view());
                    let routing_weights = routing_weights.as_view();
                    layer.forward_routed(
                        stream,
                        &x,
                        &ids,
                        &routing_weights,
                        &weights,
                        &mut workspace,
                        y,
                    )
                }
            }
        });
    };
    with_layer(&["x", "workspace", "y"], 0);
    with_layer(&["x", "workspace", "logits"], 1);
    with_layer(&["x", "workspace", "expert_ids", "routing_weights"], 2);
    with_layer(&["x", "workspace", "expert_ids", "routing_weights", "y"], 3);
}
