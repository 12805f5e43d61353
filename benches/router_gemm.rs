//! router_gemm: the router's product, with a router gate of the tokens' type and logits in f32.

use cudarc::driver::CudaSlice;
use moe_kernels::ops::router_gemm::{RouterGemmInputs, router_gemm_fwd_into};
use moe_kernels::reference;

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::weights::{Weights, x};
use crate::common::workload::Workload;

pub(crate) fn on_gpu<'a, D: Element>(
    gpu: &'a Gpu,
    model: &Model,
    weights: &'a [Weights<CudaSlice<D>>],
    draw: &Draw,
) -> Result<Workload<'a>> {
    let (num_experts, hidden) = (model.config.num_experts, model.config.hidden);
    let x = gpu.upload(&x::<D>(model, draw.shape.num_tokens))?;
    let mut logits = gpu.zeros::<f32>(draw.shape.logits())?;
    Ok(Workload::new(move |set| {
        let (x, router_gate) = (x.as_view(), weights[set].router_gate.as_view());
        let inputs = RouterGemmInputs { x: &x, router_gate: &router_gate, bias: None };
        let logits = &mut logits.as_view_mut();
        router_gemm_fwd_into(&gpu.device, &gpu.stream, num_experts, hidden, &inputs, logits)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<'a, D: Element>(
    model: &Model,
    weights: &'a Weights<Vec<D>>,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let (num_experts, hidden) = (model.config.num_experts, model.config.hidden);
    let x = x::<D>(model, draw.shape.num_tokens);
    Ok(Workload::new(move |_| {
        let router_gate = &weights.router_gate;
        let inputs = reference::RouterGemmInputs { x: &x, router_gate, bias: None };
        std::hint::black_box(reference::router_gemm_fwd::<f32>(num_experts, hidden, &inputs)?);
        Ok(())
    }))
}
