//! grouped_gemm: the experts' products, each alone and one after the other.

use cudarc::driver::CudaSlice;
use moe_kernels::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd_into, grouped_gemm_gate_up_fwd_into,
};
use moe_kernels::reference;

use crate::common::error::Result;
use crate::common::stage::{Weights, x};
use crate::common::target::{Element, Gpu};
use crate::common::values::normal;
use crate::plan::{planned, planned_on_cpu};
use crate::{Draw, Model, Op, Workload};

/// The seed of the second product's input if the first one does not run.
const ACT: u64 = 102;

pub(crate) fn on_gpu<'a, D: Element>(
    op: Op,
    gpu: &'a Gpu,
    model: &Model,
    weights: &'a [Weights<CudaSlice<D>>],
    draw: &Draw,
) -> Result<Workload<'a>> {
    let (hidden, intermediate) = (model.config.hidden, model.config.intermediate);
    let experts = model.config.experts;
    let (device, stream) = (&gpu.device, &gpu.stream);
    let plan = planned(gpu, draw)?;
    let x = gpu.upload(&x::<D>(model, draw.shape.num_tokens))?;
    let mut act = gpu.normal::<D>(draw.shape.slots() * intermediate, 1.0, ACT)?;
    let mut yp = gpu.zeros::<D>(draw.shape.slots() * hidden)?;
    Ok(Workload::new(move |set| {
        let Weights { gate_up, down, .. } = &weights[set];
        if op != Op::Down {
            grouped_gemm_gate_up_fwd_into(
                device,
                stream,
                &plan,
                &experts,
                intermediate,
                hidden,
                Rows::Gathered,
                &x.as_view(),
                GateUpWeights::fused(&gate_up.as_view()),
                None,
                &mut act.as_view_mut(),
            )?;
        }
        if op != Op::GateUp {
            grouped_gemm_fwd_into(
                device,
                stream,
                &plan,
                hidden,
                intermediate,
                Rows::Grouped,
                &act.as_view(),
                LinearWeights::new(&down.as_view()),
                &mut yp.as_view_mut(),
            )?;
        }
        Ok(())
    }))
}

pub(crate) fn on_cpu<'a, D: Element>(
    op: Op,
    model: &Model,
    weights: &'a Weights<Vec<D>>,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let (hidden, intermediate) = (model.config.hidden, model.config.intermediate);
    let experts = model.config.experts;
    let plan = planned_on_cpu(draw)?;
    let x = x::<D>(model, draw.shape.num_tokens);
    let mut act = normal::<f32>(draw.shape.slots() * intermediate, 1.0, ACT);
    Ok(Workload::new(move |_| {
        let Weights { gate_up, down, .. } = weights;
        if op != Op::Down {
            act = reference::grouped_gemm_gate_up_fwd::<f32, D>(
                &plan,
                &experts,
                intermediate,
                hidden,
                &x,
                reference::GateUpWeights::fused(gate_up),
                None::<&[f32]>,
                true,
            )?;
        }
        if op != Op::GateUp {
            let yp = reference::grouped_gemm_fwd::<f32, D>(
                &plan,
                hidden,
                intermediate,
                &act,
                reference::LinearWeights::new(down),
                false,
            )?;
            std::hint::black_box(yp);
        }
        Ok(())
    }))
}
