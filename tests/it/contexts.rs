//! cudarc orders work within one CudaContext: a buffer of another one is refused by its name, in every operation and
//! in the layer, before anything is launched.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, DeviceRepr, ValidAsZeroBits};
use half::f16;
use moe_kernels::ops::combine::{self, CombineInputs, Identity, Shared};
use moe_kernels::ops::grouped_gemm::{
    GateUpTensors, GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd_into,
    grouped_gemm_gate_up_fwd_into, grouped_gemm_weighted_fwd_into,
};
use moe_kernels::ops::rms_norm::RmsNormInputs;
use moe_kernels::ops::route::RouteInputs;
use moe_kernels::ops::router_gemm::RouterGemmInputs;
use moe_kernels::ops::{
    capacity, expert_choice, jitter, noise, permute, plan, rms_norm, route, router_gemm,
};
use moe_kernels::{
    CapacityConfig, CapacityLimit, DType, Error, ExpertConfig, GateUpLayout, MoeConfig, MoeInputs,
    MoeLayer, MoeWeights, NoiseDistribution, Normalization, OnDevice, OnDeviceMut, Owned, Priority,
    RmsNorm, RouterConfig, RouterStep, RoutingPlan, RoutingShape, Scoring, Selection, Typed,
    WeightPosition, Workspace,
};

use crate::common::{Gpu, Rng, gpu, random_config, random_inputs, random_weights};

const SHAPE: RoutingShape = RoutingShape { num_tokens: 4, num_experts: 3, top_k: 2 };
const NORM: RmsNorm = RmsNorm { epsilon: 0.0, offset: 0.0, scale_first: false };

/// Buffers of a call, of which the one with this name is another context's.
struct Buffers<'g> {
    gpu: &'g Gpu,
    other: &'g Arc<CudaStream>,
    foreign: &'static str,
}

impl Buffers<'_> {
    fn of<T: DeviceRepr + ValidAsZeroBits>(&self, name: &str, len: usize) -> CudaSlice<T> {
        let stream = if name == self.foreign { self.other } else { &self.gpu.stream };
        stream.alloc_zeros(len).unwrap()
    }
}

/// A call is refused for each of its buffers in turn, and not without.
fn check(
    op: &'static str,
    names: &[&'static str],
    call: impl Fn(&Buffers<'_>) -> Result<(), Error>,
) {
    let gpu = gpu();
    let context = CudaContext::new(0).unwrap();
    let other = &context.new_stream().unwrap();
    for &foreign in names {
        let result = call(&Buffers { gpu: &gpu, other, foreign });
        assert_eq!(result, Err(Error::Context { op, argument: foreign }));
    }
    assert_eq!(call(&Buffers { gpu: &gpu, other, foreign: "" }), Ok(()), "{op}");
    gpu.stream.synchronize().unwrap();
}

/// A plan, which `shape.by_slot()` makes one of slots.
fn planned(gpu: &Gpu, shape: RoutingShape) -> RoutingPlan<'static> {
    let ids = gpu.upload(&vec![0u32; shape.slots()]);
    plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap()
}

#[test]
fn scores() {
    let names = ["scores", "logits", "noise", "noise_logits", "active"];
    check("route_scores_fwd", &names, |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (logits, noise) = (buffers.of::<f32>("logits", 12), buffers.of("noise", 12));
        let (noise_logits, active) = (buffers.of("noise_logits", 12), buffers.of("active", 4));
        let mut to = buffers.of("scores", 12);
        let (logits, noise, active) = (logits.as_view(), noise.as_view(), active.as_view());
        let read = RouteInputs {
            noise: Some(&noise),
            noise_logits: Some(&noise_logits.as_view()),
            active: Some(&active),
            ..RouteInputs::new(&logits)
        };
        let (step, to) = (RouterStep::Scores, &mut to.as_view_mut());
        let router = RouterConfig { scoring: Scoring::Sigmoid, ..RouterConfig::default() };
        route::route_scores_fwd_into(&gpu.device, &gpu.stream, SHAPE, &router, step, &read, to)
    });
}

#[test]
fn routing() {
    let names = ["expert_ids", "weights", "logits", "selection_bias", "expert_scale", "noise"];
    let names = [&names[..], &["noise_logits", "active"]].concat();
    let router = RouterConfig {
        scoring: Scoring::Sigmoid,
        selection_bias: true,
        expert_scale: true,
        ..RouterConfig::default()
    };
    check("route_fwd", &names, |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (logits, noise) = (buffers.of::<f32>("logits", 12), buffers.of::<f32>("noise", 12));
        let (bias, scale) = (buffers.of("selection_bias", 3), buffers.of("expert_scale", 3));
        let (noise_logits, active) = (buffers.of("noise_logits", 12), buffers.of("active", 4));
        let (mut ids, mut weights) = (buffers.of("expert_ids", 8), buffers.of("weights", 8));
        let logits = logits.as_view();
        let inputs = RouteInputs {
            selection_bias: Some(&bias.as_view()),
            expert_scale: Some(&scale.as_view()),
            noise: Some(&noise.as_view()),
            noise_logits: Some(&noise_logits.as_view()),
            active: Some(&active.as_view()),
            ..RouteInputs::new(&logits)
        };
        let to = (&mut ids.as_view_mut(), &mut weights.as_view_mut());
        route::route_fwd_into(&gpu.device, &gpu.stream, SHAPE, &router, &inputs, to.0, to.1)
    });
    let router = RouterConfig {
        scoring: Scoring::Sigmoid,
        selection: Selection::Given,
        ..RouterConfig::default()
    };
    check("route_fwd", &["given_ids", "token_ids"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let logits = buffers.of::<f32>("logits", 12);
        let (given, tokens) = (buffers.of("given_ids", 6), buffers.of("token_ids", 4));
        let logits = logits.as_view();
        let inputs = RouteInputs {
            given_ids: Some(&given.as_view()),
            token_ids: Some(&tokens.as_view()),
            ..RouteInputs::new(&logits)
        };
        route::route_fwd(&gpu.device, &gpu.stream, SHAPE, &router, &inputs).map(|_| ())
    });
    let scoring = Scoring::Sparsemixer { jitter: 0.1, training: true };
    let router = RouterConfig { scoring, ..RouterConfig::default() };
    check("route_fwd", &["selection_noise", "midpoint_draws"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let logits = buffers.of::<f32>("logits", 12);
        let (noise, draws) = (buffers.of("selection_noise", 24), buffers.of("midpoint_draws", 8));
        let logits = logits.as_view();
        let inputs = RouteInputs {
            selection_noise: Some(&noise.as_view()),
            midpoint_draws: Some(&draws.as_view()),
            ..RouteInputs::new(&logits)
        };
        route::route_fwd(&gpu.device, &gpu.stream, SHAPE, &router, &inputs).map(|_| ())
    });
    check("expert_choice_fwd", &["expert_ids", "weights", "scores"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (scores, mut ids) = (buffers.of::<f32>("scores", 12), buffers.of("expert_ids", 12));
        let mut weights = buffers.of("weights", 12);
        let to = (&mut ids.as_view_mut(), &mut weights.as_view_mut());
        let scores = scores.as_view();
        expert_choice::expert_choice_fwd_into(
            &gpu.device,
            &gpu.stream,
            4,
            3,
            2,
            &scores,
            to.0,
            to.1,
        )
    });
    check("plan_fwd", &["memory", "expert_ids"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let ids = buffers.of("expert_ids", 8);
        let bytes = moe_kernels::PlanLayout::new(SHAPE).unwrap().bytes();
        let mut memory = buffers.of("memory", bytes);
        let (ids, memory) = (ids.as_view(), memory.as_view_mut());
        plan::plan_fwd_into(&gpu.device, &gpu.stream, SHAPE, Some(&ids), memory).map(|_| ())
    });
}

#[test]
fn noise_and_projection() {
    check("noise_fwd", &["noise"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let mut to = buffers.of("noise", 12);
        let kind = NoiseDistribution::Normal;
        noise::noise_fwd_into(&gpu.device, &gpu.stream, kind, 1, 0, &mut to.as_view_mut())
    });
    check("jitter_fwd", &["jittered", "x", "u"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (x, u, mut to) =
            (buffers.of::<f32>("x", 8), buffers.of("u", 8), buffers.of("jittered", 8));
        let (x, u) = (x.as_view(), u.as_view());
        jitter::jitter_fwd_into(&gpu.device, &gpu.stream, 0.1, &x, &u, &mut to.as_view_mut())
    });
    check("router_gemm_fwd", &["logits", "x", "gate", "bias"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (x, gate) = (buffers.of::<f32>("x", 8), buffers.of::<f32>("gate", 6));
        let (bias, mut to) = (buffers.of("bias", 3), buffers.of::<f32>("logits", 12));
        let (x, gate, bias) = (x.as_view(), gate.as_view(), bias.as_view());
        let inputs = RouterGemmInputs { x: &x, gate: &gate, bias: Some(&bias) };
        router_gemm::router_gemm_fwd_into(
            &gpu.device,
            &gpu.stream,
            3,
            2,
            &inputs,
            &mut to.as_view_mut(),
        )
    });
    check("rms_norm_fwd", &["y", "x", "weight"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (x, weight) = (buffers.of::<f32>("x", 8), buffers.of("weight", 2));
        let (weight, mut to) = (weight.as_view(), buffers.of("y", 8));
        let inputs = RmsNormInputs { weight: Some(&weight), plan: None };
        let (x, to) = (x.as_view(), &mut to.as_view_mut());
        rms_norm::rms_norm_fwd_into(&gpu.device, &gpu.stream, &NORM, 2, &x, &inputs, to)
    });
    check("rms_norm_fwd", &["x", "weight"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (mut x, weight) = (buffers.of::<f32>("x", 8), buffers.of("weight", 2));
        let weight = weight.as_view();
        let inputs = RmsNormInputs { weight: Some(&weight), plan: None };
        let x = &mut x.as_view_mut();
        rms_norm::rms_norm_fwd_in_place(&gpu.device, &gpu.stream, &NORM, 2, x, &inputs)
    });
}

#[test]
fn capacities() {
    let config = CapacityConfig::new(CapacityLimit::Rows { rows: 1 }, Priority::Weight);
    check("capacity_fwd", &["expert_ids", "kept", "dropped", "weights"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let plan = planned(gpu, SHAPE.by_slot());
        let (weights, mut ids) = (buffers.of("weights", 8), buffers.of("expert_ids", 8));
        let (mut kept, mut dropped) = (buffers.of("kept", 3), buffers.of("dropped", 3));
        let (weights, ids) = (weights.as_view(), &mut ids.as_view_mut());
        let (kept, dropped) = (&mut kept.as_view_mut(), &mut dropped.as_view_mut());
        let (device, stream) = (&gpu.device, &gpu.stream);
        capacity::capacity_fwd_into(
            device, stream, &plan, SHAPE, &config, None, &weights, ids, kept, dropped,
        )
    });
    let names = ["expert_ids", "kept_ids", "candidates", "candidate_weights"];
    let names = [&names[..], &["next_candidate", "requests", "weights"]].concat();
    check("capacity_ask_fwd", &names, |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (own, kept) = (buffers.of("expert_ids", 8), buffers.of("kept_ids", 8));
        let listed = buffers.of("candidates", 12);
        let of_candidates = buffers.of("candidate_weights", 12);
        let (mut next, mut requests) = (buffers.of("next_candidate", 4), buffers.of("requests", 8));
        let mut weights = buffers.of("weights", 8);
        capacity::capacity_ask_fwd_into(
            &gpu.device,
            &gpu.stream,
            SHAPE,
            3,
            true,
            &own.as_view(),
            &kept.as_view(),
            &listed.as_view(),
            &of_candidates.as_view(),
            &mut next.as_view_mut(),
            &mut requests.as_view_mut(),
            &mut weights.as_view_mut(),
        )
    });
    let arguments = ["normalized", "expert_scale", "expert_ids", "weights"];
    check("capacity_normalize_fwd", &arguments, |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (ids, weights) = (buffers.of("expert_ids", 8), buffers.of("weights", 8));
        let (ids, weights, by) = (ids.as_view(), weights.as_view(), Normalization::None);
        let scale = buffers.of("expert_scale", SHAPE.num_experts);
        let scale = Some(&scale.as_view());
        let mut to = buffers.of("normalized", 8);
        let to = &mut to.as_view_mut();
        capacity::capacity_normalize_fwd_into(
            &gpu.device,
            &gpu.stream,
            SHAPE,
            by,
            1.0,
            scale,
            &ids,
            &weights,
            to,
        )
    });
}

#[test]
fn rows_of_experts() {
    check("permute_fwd", &["xp", "x"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (x, mut to) = (buffers.of::<f32>("x", 8), buffers.of("xp", 16));
        let (x, to) = (x.as_view(), &mut to.as_view_mut());
        permute::permute_fwd_into(&gpu.device, &gpu.stream, &planned(gpu, SHAPE), 2, &x, to)
    });
    check("grouped_gemm_fwd", &["y", "x", "w", "bias"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (x, w) = (buffers.of::<f32>("x", 8), buffers.of("w", 12));
        let (bias, mut to) = (buffers.of("bias", 6), buffers.of("y", 16));
        let (x, w, bias, plan) = (x.as_view(), w.as_view(), bias.as_view(), planned(gpu, SHAPE));
        let weights = LinearWeights { bias: Some(&bias), ..LinearWeights::new(&w) };
        let (rows, to) = (Rows::Gathered, &mut to.as_view_mut());
        grouped_gemm_fwd_into(&gpu.device, &gpu.stream, &plan, 2, 2, rows, &x, weights, to)
    });
    check("grouped_gemm_weighted_fwd", &["y", "x", "w", "bias", "routing_weights"], |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (x, w) = (buffers.of::<f16>("x", 8), buffers.of("w", 12));
        let (bias, mut to) = (buffers.of("bias", 6), buffers.of("y", 16));
        let (x, w, bias, plan) = (x.as_view(), w.as_view(), bias.as_view(), planned(gpu, SHAPE));
        let linear = LinearWeights { bias: Some(&bias), ..LinearWeights::new(&w) };
        let (rows, to) = (Rows::Gathered, &mut to.as_view_mut());
        let weights = buffers.of("routing_weights", 8);
        let (device, stream, weights) = (&gpu.device, &gpu.stream, weights.as_view());
        grouped_gemm_weighted_fwd_into(device, stream, &plan, 2, 2, rows, &x, linear, &weights, to)
    });
    for separate in [false, true] {
        let names = ["act", "x", "bias", "routing_weights"];
        let tensors = if separate { &["gate", "up"][..] } else { &["gate_up"] };
        check("grouped_gemm_gate_up_fwd", &[&names[..], tensors].concat(), |buffers| {
            let Buffers { gpu, .. } = buffers;
            let experts = ExpertConfig {
                gate_up: if separate { GateUpLayout::Separate } else { GateUpLayout::Concatenated },
                gate_up_bias: true,
                weight_position: WeightPosition::Input,
                ..ExpertConfig::default()
            };
            let (x, weights) = (buffers.of::<f32>("x", 8), buffers.of("routing_weights", 8));
            let (bias, fused) = (buffers.of("bias", 12), buffers.of("gate_up", 24));
            let (gate, up) = (buffers.of("gate", 12), buffers.of("up", 12));
            let (fused, gate, up) = (fused.as_view(), gate.as_view(), up.as_view());
            let tensors = match separate {
                true => GateUpTensors::Separate { gate: &gate, up: &up },
                false => GateUpTensors::Fused(&fused),
            };
            let (bias, weights, plan) = (bias.as_view(), weights.as_view(), planned(gpu, SHAPE));
            let mut to = buffers.of("act", 16);
            grouped_gemm_gate_up_fwd_into(
                &gpu.device,
                &gpu.stream,
                &plan,
                &experts,
                2,
                2,
                Rows::Gathered,
                &x.as_view(),
                GateUpWeights { tensors, bias: Some(&bias) },
                Some(&weights),
                &mut to.as_view_mut(),
            )
        });
    }
    let names = ["y", "yp", "weights", "expert_ids", "x", "output_bias", "shared.y", "shared.gate"];
    check("combine_fwd", &names, |buffers| {
        let Buffers { gpu, .. } = buffers;
        let (yp, weights) = (buffers.of::<f32>("yp", 16), buffers.of("weights", 8));
        let (ids, x) = (buffers.of("expert_ids", 8), buffers.of("x", 8));
        let (bias, shared) = (buffers.of("output_bias", 2), buffers.of("shared.y", 8));
        let (gate, mut to) = (buffers.of("shared.gate", 4), buffers.of("y", 8));
        let (yp, weights, ids, x) = (yp.as_view(), weights.as_view(), ids.as_view(), x.as_view());
        let (bias, shared, gate) = (bias.as_view(), shared.as_view(), gate.as_view());
        let inputs = CombineInputs {
            yp: &yp,
            routing_weights: Some(&weights),
            identity: Some(Identity { experts: 3..4, expert_ids: &ids, x: &x, routing_weights: None }),
            output_bias: Some(&bias),
            shared: Some(Shared { y: &shared, gate: Some(&gate), average: false }),
        };
        let (plan, to) = (planned(gpu, SHAPE), &mut to.as_view_mut());
        combine::combine_fwd_into(&gpu.device, &gpu.stream, &plan, 2, &inputs, to)
    });
}

// ---- The layer ----------------------------------------------------------------------------------

/// Layers over every option, each of whose tensors is another context's in turn.
#[test]
fn tensors_of_a_layer() {
    let gpu = gpu();
    let context = CudaContext::new(0).unwrap();
    let other = context.new_stream().unwrap();
    let mut refused = std::collections::BTreeSet::new();
    for seed in 0..60 {
        let rng = &mut Rng::new(seed);
        let config = random_config(rng, 40);
        let host: MoeWeights<Owned, f32> = random_weights(&config, rng);
        let inputs: MoeInputs<Owned, f32> = random_inputs(&config, 6, rng);
        let own = (host.upload(&gpu.stream).unwrap(), inputs.upload(&gpu.stream).unwrap());
        let foreign = (host.upload(&other).unwrap(), inputs.upload(&other).unwrap());
        let layer = MoeLayer::new(&gpu.device, config).unwrap();
        let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 6).unwrap();
        let mut workspace = Workspace::alloc(&gpu.stream, bytes).unwrap();
        let mut run = |weights: &MoeWeights<OnDevice<'_>, f32>,
                       inputs: &MoeInputs<OnDevice<'_>, f32>| {
            let mut y = gpu.poisoned::<f32>(6 * config.hidden);
            let to = &mut y.view_mut();
            let done = layer.forward(&gpu.stream, inputs, weights, &mut workspace, to);
            assert!(done.is_ok() || gpu.download(&y.view()).iter().all(|y| y.is_nan()));
            done
        };
        // Everything is foreign, and what is refused by name becomes the device's own, one by one.
        let (mut weights, mut inputs) = (foreign.0.as_views(), foreign.1.as_views());
        let (own_weights, own_inputs) = (own.0.as_views(), own.1.as_views());
        for _ in 0..40 {
            let argument = match run(&weights, &inputs) {
                Ok(()) => break,
                Err(Error::Context { op: "MoeLayer", argument }) => argument,
                Err(other) => panic!("{config}: {other}"),
            };
            refused.insert(argument);
            replace(argument, &mut weights, &mut inputs, &own_weights, &own_inputs);
        }
        assert_eq!(run(&weights, &inputs), Ok(()), "{config}");
    }
    assert!(refused.len() >= 26, "{refused:?}");
}

/// Puts the device's own tensor in the place of the one with this name.
fn replace<'v>(
    name: &str,
    weights: &mut MoeWeights<OnDevice<'v>, f32>,
    inputs: &mut MoeInputs<OnDevice<'v>, f32>,
    own: &MoeWeights<OnDevice<'v>, f32>,
    own_inputs: &MoeInputs<OnDevice<'v>, f32>,
) {
    use moe_kernels::GateUpTensors as Tensors;
    let typed = |tensor: &Option<Typed<OnDevice<'v>, f32>>| match tensor {
        Some(Typed::Element(view)) => Some(Typed::Element(view.slice(..))),
        Some(Typed::F32(view)) => Some(Typed::F32(view.slice(..))),
        None => None,
    };
    let view = |tensor: &Option<CudaView<'v, f32>>| tensor.as_ref().map(|view| view.slice(..));
    let ids = |tensor: &Option<CudaView<'v, u32>>| tensor.as_ref().map(|view| view.slice(..));
    match name {
        "router.gate" => weights.router.gate = typed(&own.router.gate),
        "router.bias" => weights.router.bias = typed(&own.router.bias),
        "router.norm" => weights.router.norm = view(&own.router.norm),
        "router.noise_gate" => weights.router.noise_gate = typed(&own.router.noise_gate),
        "router.selection_bias" => weights.router.selection_bias = view(&own.router.selection_bias),
        "router.expert_scale" => weights.router.expert_scale = view(&own.router.expert_scale),
        "router.table" => weights.router.table = ids(&own.router.table),
        "experts.gate_up" | "experts.gate" | "experts.up" => {
            let gate_up = match (&own.experts.gate_up, &weights.experts.gate_up) {
                (Tensors::Fused(gate_up), _) => Tensors::Fused(gate_up.slice(..)),
                (Tensors::Separate { gate, .. }, Tensors::Separate { up, .. })
                    if name == "experts.gate" =>
                {
                    Tensors::Separate { gate: gate.slice(..), up: up.slice(..) }
                }
                (Tensors::Separate { gate, up }, _) => {
                    Tensors::Separate { gate: gate.slice(..), up: up.slice(..) }
                }
            };
            weights.experts.gate_up = gate_up;
        }
        "experts.gate_up_bias" => weights.experts.gate_up_bias = view(&own.experts.gate_up_bias),
        "experts.down" => weights.experts.down = own.experts.down.slice(..),
        "experts.down_bias" => weights.experts.down_bias = view(&own.experts.down_bias),
        "experts.output_bias" => weights.experts.output_bias = view(&own.experts.output_bias),
        "experts.post_norm" => weights.experts.post_norm = view(&own.experts.post_norm),
        "latent.proj_in" | "latent.norm" | "latent.proj_out" => {
            let (to, from) = (weights.latent.as_mut().unwrap(), own.latent.as_ref().unwrap());
            match name {
                "latent.proj_in" => to.proj_in = from.proj_in.slice(..),
                "latent.norm" => to.norm = view(&from.norm),
                _ => to.proj_out = from.proj_out.slice(..),
            }
        }
        _ if name.starts_with("shared.") => {
            let (to, from) = (weights.shared.as_mut().unwrap(), own.shared.as_ref().unwrap());
            match name {
                "shared.gate_up" => to.gate_up = from.gate_up.slice(..),
                "shared.gate_up_bias" => to.gate_up_bias = view(&from.gate_up_bias),
                "shared.down" => to.down = from.down.slice(..),
                "shared.down_bias" => to.down_bias = view(&from.down_bias),
                _ => to.sigmoid_gate = view(&from.sigmoid_gate),
            }
        }
        "output_norm" => weights.output_norm = view(&own.output_norm),
        "x" => inputs.x = own_inputs.x.slice(..),
        "router_x" => inputs.router_x = view(&own_inputs.router_x),
        "logits" => inputs.logits = typed(&own_inputs.logits),
        "given_ids" => inputs.given_ids = ids(&own_inputs.given_ids),
        "token_ids" => inputs.token_ids = ids(&own_inputs.token_ids),
        "noise" => inputs.noise = view(&own_inputs.noise),
        "noise_logits" => inputs.noise_logits = typed(&own_inputs.noise_logits),
        "selection_noise" => inputs.selection_noise = view(&own_inputs.selection_noise),
        "midpoint_draws" => inputs.midpoint_draws = view(&own_inputs.midpoint_draws),
        "active" => inputs.active = own_inputs.active.as_ref().map(|view| view.slice(..)),
        _ => panic!("a tensor named {name}"),
    }
}

/// Outputs and workspaces of each part of a layer.
#[test]
fn outputs_of_a_layer() {
    let config =
        MoeConfig { router: RouterConfig::softmax_top_k(true), ..MoeConfig::new(2, 2, 3, 2) };
    let bytes = MoeLayer::workspace_bytes(&config, DType::F32, 4).unwrap();
    let with_layer = |names: &[&'static str], part: usize| {
        check("MoeLayer", names, |buffers| {
            let Buffers { gpu, .. } = buffers;
            let layer = MoeLayer::new(&gpu.device, config).unwrap();
            let (gate_up, down) =
                (buffers.of::<f32>("weights", 24), buffers.of::<f32>("weights", 12));
            let (gate, x) = (buffers.of::<f32>("weights", 6), buffers.of::<f32>("x", 8));
            let weights =
                MoeWeights::plain(gate_up.as_view(), down.as_view()).with_gate(gate.as_view());
            let inputs = MoeInputs::new(x.as_view());
            let mut memory = buffers.of("workspace", bytes);
            let mut workspace = Workspace::borrow(memory.as_view_mut());
            let (mut ids, mut of_slots) =
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
                    let to = (&mut ids.as_view_mut(), &mut of_slots.as_view_mut());
                    layer.route(stream, &inputs, &weights, &mut workspace, to.0, to.1)
                }
                _ => {
                    let (ids, of_slots, x) = (ids.as_view(), of_slots.as_view(), x.as_view());
                    layer.forward_routed(stream, &x, &ids, &of_slots, &weights, &mut workspace, y)
                }
            }
        });
    };
    with_layer(&["x", "workspace", "y"], 0);
    with_layer(&["x", "workspace", "logits"], 1);
    with_layer(&["x", "workspace", "expert_ids", "routing_weights"], 2);
    with_layer(&["x", "workspace", "expert_ids", "routing_weights", "y"], 3);
}
