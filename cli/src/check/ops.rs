//! Runs each operation on the device and compares the output with the reference.
//!
//! Outputs are filled with NaN first, so that an element that is not written is an error.

use std::fmt;

use clap::ValueEnum;
use moe_kernels::ops::combine::{CombineInputs, Identity, Shared, combine_fwd_into};
use moe_kernels::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd_into, grouped_gemm_gate_up_fwd_into,
};
use moe_kernels::ops::permute::permute_fwd_into;
use moe_kernels::ops::plan::{plan_fwd, plan_fwd_into};
use moe_kernels::ops::rms_norm::{RmsNormInputs, rms_norm_fwd_into};
use moe_kernels::ops::route::{RouteInputs, route_fwd_into};
use moe_kernels::ops::router_gemm::{RouterGemmInputs, router_gemm_fwd_into};
use moe_kernels::reference::bound::{self, Bounded};
use moe_kernels::reference::{self, Tile};
use moe_kernels::{
    Activation, ActivationFunction, DType, Dtype, ExpertConfig, GateUpLayout, Limit, MoeConfig,
    MoeInputs, MoeLayer, MoeWeights, PlanLayout, RmsNorm, RoutingPlan, WeightOrder, Workspace,
};

use super::case::{Case, ROUTERS};
use super::worst::Worst;
use super::{routing, weighted};
use crate::backend::to_f32;
use crate::device::Gpu;
use crate::error::Result;

/// The operations that `check` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Op {
    /// With the gate in the element type and in f32
    RouterGemm,
    Route,
    Noise,
    Jitter,
    Capacity,
    ExpertChoice,
    Plan,
    Permute,
    /// With and without the gather; in f16 also with routing weights
    GroupedGemm,
    /// Grouped GEMM with a fused activation, for several activations and weight layouts
    GateUp,
    /// With the scale before and after the normalisation
    RmsNorm,
    /// Alone, and with identity experts, an output bias and a shared expert
    Combine,
    Layer,
}

impl Op {
    pub const NAMES: [&'static str; 13] = [
        "router_gemm",
        "route",
        "noise",
        "jitter",
        "capacity",
        "expert_choice",
        "plan",
        "permute",
        "grouped_gemm",
        "gate_up",
        "rms_norm",
        "combine",
        "layer",
    ];

    /// Runs one case on the device.
    pub fn run<D: Dtype>(self, gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
        match self {
            Op::RouterGemm => router_gemm(gpu, case),
            Op::Route => route(gpu, case),
            Op::Noise => routing::noise(gpu, case),
            Op::Jitter => routing::jitter(gpu, case),
            Op::Capacity => routing::capacity(gpu, case),
            Op::ExpertChoice => routing::expert_choice(gpu, case),
            Op::Plan => plan(gpu, case),
            Op::Permute => permute(gpu, case),
            Op::GroupedGemm => grouped_gemm(gpu, case),
            Op::GateUp => gate_up(gpu, case),
            Op::RmsNorm => rms_norm(gpu, case),
            Op::Combine => combine(gpu, case),
            Op::Layer => layer(gpu, case),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let index = Op::value_variants().iter().position(|op| op == self).unwrap_or(0);
        f.write_str(Self::NAMES[index])
    }
}

/// All scorings: ids bit for bit, weights within their bound.
fn route<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let slots = case.shape.slots();
    let logits = gpu.upload(&case.logits)?;
    let mut worst = Worst::none();
    for router in ROUTERS {
        let (mut ids, mut weights) = (gpu.poisoned::<u32>(slots)?, gpu.poisoned::<f32>(slots)?);
        let (ids_view, weights_view) = (&mut ids.as_view_mut(), &mut weights.as_view_mut());
        let logits = logits.as_view();
        route_fwd_into(
            &gpu.device,
            &gpu.stream,
            case.shape,
            &router,
            &RouteInputs::new(&logits),
            ids_view,
            weights_view,
        )?;
        let (wanted, bound) =
            bound::route(&case.shape, &router, &reference::RouteInputs::new(&case.logits))?;
        let wanted_weights = Bounded { value: wanted.routing_weights, bound };
        let ids =
            Worst::of_integers("expert_ids", &gpu.download(&ids.as_view())?, &wanted.expert_ids);
        let weights =
            Worst::of_bounded("weights", &gpu.download(&weights.as_view())?, &wanted_weights);
        worst.merge(ids);
        worst.merge(weights);
    }
    Ok(worst)
}

fn plan<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let ids = gpu.upload(&case.expert_ids)?;
    let mut memory = gpu.poisoned::<u8>(PlanLayout::new(case.shape)?.bytes())?;
    let ids = ids.as_view();
    let plan =
        plan_fwd_into(&gpu.device, &gpu.stream, case.shape, Some(&ids), memory.as_view_mut())?;
    let wanted = &case.plan;
    let mut worst = Worst::of_integers(
        "expert_offsets",
        &gpu.download(&plan.expert_offsets())?,
        &wanted.expert_offsets,
    );
    worst.merge(Worst::of_integers(
        "row_of_slot",
        &gpu.download(&plan.row_of_slot())?,
        &wanted.row_of_slot,
    ));
    worst.merge(Worst::of_integers(
        "token_of_row",
        &gpu.download(&plan.token_of_row())?,
        &wanted.token_of_row,
    ));
    let num_tiles = i32::try_from(wanted.tiles.len()).unwrap_or(i32::MAX);
    worst.merge(Worst::of_integers("num_tiles", &gpu.download(&plan.num_tiles())?, &[num_tiles]));
    let mut tiles: Vec<i32> = wanted
        .tiles
        .iter()
        .flat_map(|&Tile { expert, first_row, num_rows }| [expert, first_row, num_rows, 0])
        .collect();
    tiles.resize(4 * plan.max_tiles(), 0);
    worst.merge(Worst::of_integers("tiles", &gpu.download(&plan.tiles())?, &tiles));
    Ok(worst)
}

/// Computes the plan of the case on the device.
fn device_plan<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<RoutingPlan<'static>> {
    let ids = gpu.upload(&case.expert_ids)?;
    Ok(plan_fwd(&gpu.device, &gpu.stream, case.shape, &ids.as_view())?)
}

fn permute<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let hidden = case.config.hidden;
    let plan = device_plan(gpu, case)?;
    let x = gpu.upload(&case.x)?;
    let mut xp = gpu.poisoned::<D>(case.shape.slots() * hidden)?;
    permute_fwd_into(&gpu.device, &gpu.stream, &plan, hidden, &x.as_view(), &mut xp.as_view_mut())?;
    let wanted = reference::permute_fwd(&case.shape, &case.plan, hidden, &case.x)?;
    Ok(Worst::of_bytes("xp", &gpu.download(&xp.as_view())?, &wanted))
}

fn grouped_gemm<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let MoeConfig { hidden, intermediate, .. } = case.config;
    let plan = device_plan(gpu, case)?;
    let down = gpu.upload(&case.down)?;
    let act = gpu.upload(&case.act)?;
    let mut y = gpu.poisoned::<D>(case.shape.slots() * hidden)?;
    grouped_gemm_fwd_into(
        &gpu.device,
        &gpu.stream,
        &plan,
        hidden,
        intermediate,
        Rows::Grouped,
        &act.as_view(),
        LinearWeights::new(&down.as_view()),
        &mut y.as_view_mut(),
    )?;
    let wanted = bound::grouped_gemm(
        &case.plan,
        hidden,
        intermediate,
        &case.act,
        reference::LinearWeights::new(&case.down),
        false,
        D::DTYPE,
    )?;
    let mut worst = Worst::of_bounded("y", &gpu.download(&y.as_view())?, &wanted);

    let gate_up = gpu.upload(&case.gate_up)?;
    let x = gpu.upload(&case.x)?;
    let out_features = 2 * intermediate;
    let mut y = gpu.poisoned::<D>(case.shape.slots() * out_features)?;
    grouped_gemm_fwd_into(
        &gpu.device,
        &gpu.stream,
        &plan,
        out_features,
        hidden,
        Rows::Gathered,
        &x.as_view(),
        LinearWeights::new(&gate_up.as_view()),
        &mut y.as_view_mut(),
    )?;
    let linear = reference::LinearWeights::new(&case.gate_up[..]);
    let wanted =
        bound::grouped_gemm(&case.plan, out_features, hidden, &case.x, linear, true, D::DTYPE)?;
    worst.merge(Worst::of_bounded("y (gathered)", &gpu.download(&y.as_view())?, &wanted));
    worst.merge(weighted::grouped_gemm_weighted(gpu, case, &plan)?);
    Ok(worst)
}

/// The case's weights are random, so that they are valid in any layout.
fn gate_up<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let MoeConfig { hidden, intermediate, .. } = case.config;
    let plan = device_plan(gpu, case)?;
    let xp = reference::permute_fwd(&case.shape, &case.plan, hidden, &case.x)?;
    let mut worst = Worst::none();
    for (experts, rows) in experts().iter().zip([Rows::Gathered, Rows::Grouped].iter().cycle()) {
        let x = if *rows == Rows::Gathered { &case.x } else { &xp };
        let weights = match experts.gated {
            true => &case.gate_up[..],
            false => &case.gate_up[..case.gate_up.len() / 2],
        };
        let (device_x, device_weights) = (gpu.upload(x)?, gpu.upload(weights)?);
        let mut act = gpu.poisoned::<D>(case.shape.slots() * intermediate)?;
        grouped_gemm_gate_up_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            experts,
            intermediate,
            hidden,
            *rows,
            &device_x.as_view(),
            GateUpWeights::fused(&device_weights.as_view()),
            None,
            &mut act.as_view_mut(),
        )?;
        let wanted = bound::grouped_gemm_gate_up(
            &case.plan,
            experts,
            intermediate,
            hidden,
            x,
            reference::GateUpWeights::fused(weights),
            None,
            *rows == Rows::Gathered,
            D::DTYPE,
        )?;
        worst.merge(Worst::of_bounded("act", &gpu.download(&act.as_view())?, &wanted));
    }
    Ok(worst)
}

/// SwiGLU twice, with the gather and without; then the activation and layout of gpt-oss, Nemotron's
/// experts without a gate, and Gemma's GELU.
fn experts() -> [ExpertConfig; 5] {
    let swiglu = ExpertConfig::default();
    let with = |function| Activation { function, ..Activation::default() };
    let gpt_oss = ExpertConfig {
        activation: Activation {
            alpha: 1.702,
            limit: Limit::Before { limit: 7.0 },
            up_offset: 1.0,
            ..Activation::default()
        },
        gate_up: GateUpLayout::Interleaved,
        gate_up_order: WeightOrder::InOut,
        ..swiglu
    };
    let nemotron =
        ExpertConfig { activation: with(ActivationFunction::ReluSquared), gated: false, ..swiglu };
    let gemma = ExpertConfig { activation: with(ActivationFunction::GeluTanh), ..swiglu };
    [swiglu, swiglu, gpt_oss, nemotron, gemma]
}

fn router_gemm<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    // The first rows of gate_up serve as the router's gate.
    let (num_experts, hidden) = (case.config.num_experts, case.config.hidden);
    let gate: Vec<D> = case.gate_up.iter().copied().take(num_experts * hidden).collect();
    let mut worst = router_gemm_with(gpu, case, &gate)?;
    worst.merge(router_gemm_with(gpu, case, &to_f32(&gate))?);
    Ok(worst)
}

fn router_gemm_with<D: Dtype, G: Dtype>(gpu: &Gpu, case: &Case<D>, gate: &[G]) -> Result<Worst> {
    let (num_experts, hidden) = (case.config.num_experts, case.config.hidden);
    let (x, gate_device) = (gpu.upload(&case.x)?, gpu.upload(gate)?);
    let (x, gate_device) = (x.as_view(), gate_device.as_view());
    let mut logits = gpu.poisoned::<f32>(case.shape.logits())?;
    let inputs = RouterGemmInputs { x: &x, router_gate: &gate_device, bias: None };
    let to = &mut logits.as_view_mut();
    router_gemm_fwd_into(&gpu.device, &gpu.stream, num_experts, hidden, &inputs, to)?;
    let inputs = reference::RouterGemmInputs { x: &case.x[..], router_gate: gate, bias: None };
    let wanted = bound::router_gemm(num_experts, hidden, &inputs, DType::F32)?;
    Ok(Worst::of_bounded("logits", &gpu.download(&logits.as_view())?, &wanted))
}

fn rms_norm<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let hidden = case.config.hidden;
    let plan = device_plan(gpu, case)?;
    // The first token serves as the norm's weight, which has the same length.
    let weight = &case.x[..hidden];
    let (yp, weight_device) = (gpu.upload(&case.yp)?, gpu.upload(weight)?);
    let (yp, weight_device) = (yp.as_view(), weight_device.as_view());
    let mut worst = Worst::none();
    for scale_first in [false, true] {
        let norm = RmsNorm { epsilon: 1e-6, offset: 1.0, scale_first };
        let mut y = gpu.poisoned::<D>(case.yp.len())?;
        let inputs = RmsNormInputs { weight: Some(&weight_device), plan: Some(&plan) };
        let to = &mut y.as_view_mut();
        rms_norm_fwd_into(&gpu.device, &gpu.stream, &norm, hidden, &yp, &inputs, to)?;
        let inputs = reference::RmsNormInputs {
            x: &case.yp[..],
            weight: Some(weight),
            plan: Some(&case.plan),
        };
        let wanted = bound::rms_norm(&norm, hidden, &inputs, D::DTYPE)?;
        worst.merge(Worst::of_bounded("y", &gpu.download(&y.as_view())?, &wanted));
    }
    Ok(worst)
}

fn combine<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let hidden = case.config.hidden;
    // The first id after those of the experts is an identity expert.
    let experts = case.config.num_experts as u32..case.config.num_experts as u32 + 1;
    let plan = device_plan(gpu, case)?;
    let (yp, weights) = (gpu.upload(&case.yp)?, gpu.upload(&case.weights)?);
    let (ids, x) = (gpu.upload(&case.expert_ids)?, gpu.upload(&case.x)?);
    let (yp, weights, ids, x) = (yp.as_view(), weights.as_view(), ids.as_view(), x.as_view());
    let tokens = case.shape.num_tokens;
    let gate = case.weights.iter().copied().step_by(case.shape.top_k).collect::<Vec<f32>>();
    let (gate_device, bias) = (gpu.upload(&gate)?, x.slice(..hidden));
    let gate_device = gate_device.as_view();
    let mut worst = Worst::none();
    for with_all in [false, true] {
        let mut y = gpu.poisoned::<D>(tokens * hidden)?;
        let inputs = CombineInputs {
            yp: &yp,
            routing_weights: Some(&weights),
            identity: with_all.then_some(Identity {
                experts: experts.clone(),
                expert_ids: &ids,
                x: &x,
                routing_weights: None,
            }),
            output_bias: with_all.then_some(&bias),
            shared: with_all.then_some(Shared { y: &x, gate: Some(&gate_device), average: true }),
        };
        let to = &mut y.as_view_mut();
        combine_fwd_into(&gpu.device, &gpu.stream, &plan, hidden, &inputs, to)?;
        let inputs = reference::CombineInputs {
            yp: &case.yp[..],
            routing_weights: Some(&case.weights[..]),
            identity: with_all.then_some(reference::Identity {
                experts: experts.clone(),
                expert_ids: &case.expert_ids,
                x: &case.x[..],
                routing_weights: None,
            }),
            output_bias: with_all.then_some(&case.x[..hidden]),
            shared: with_all.then_some(reference::Shared {
                y: &case.x[..],
                gate: Some(&gate[..]),
                average: true,
            }),
        };
        let wanted = bound::combine(&case.shape, &case.plan, hidden, &inputs, D::DTYPE)?;
        worst.merge(Worst::of_bounded("y", &gpu.download(&y.as_view())?, &wanted));
    }
    Ok(worst)
}

fn layer<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let (config, num_tokens) = (case.config, case.shape.num_tokens);
    let (x, logits) = (gpu.upload(&case.x)?, gpu.upload(&case.logits)?);
    let (gate_up, down) = (gpu.upload(&case.gate_up)?, gpu.upload(&case.down)?);
    let mut arena =
        gpu.poisoned::<u8>(MoeLayer::workspace_bytes(&config, D::DTYPE, num_tokens)?)?;
    let mut workspace = Workspace::borrow(arena.as_view_mut());
    let mut y = gpu.poisoned::<D>(num_tokens * config.hidden)?;
    let weights = MoeWeights::plain(gate_up.as_view(), down.as_view());
    let inputs = MoeInputs::with_logits(x.as_view(), logits.as_view());
    let (layer, to) = (MoeLayer::new(&gpu.device, config)?, &mut y.as_view_mut());
    layer.forward(&gpu.stream, &inputs, &weights, &mut workspace, to)?;
    let inputs = MoeInputs::with_logits(&case.x[..], &case.logits[..]);
    let weights = MoeWeights::plain(&case.gate_up[..], &case.down[..]);
    let wanted = bound::moe_layer(&config, &inputs, &weights)?;
    Ok(Worst::of_bounded("y", &gpu.download(&y.as_view())?, &wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_clap_values() {
        for (name, op) in Op::NAMES.iter().zip(Op::value_variants()) {
            assert_eq!(Op::from_str(name, false).as_ref(), Ok(op));
            assert_eq!(*name, op.to_string());
        }
    }
}
