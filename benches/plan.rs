//! plan: from expert ids to the maps between slots and rows.

use moe_kernels::{PlanLayout, RoutingPlan, ops, reference};

use crate::common::error::Result;
use crate::common::routing::Draw;
use crate::common::target::Gpu;
use crate::common::workload::Workload;

/// Makes the plan of a draw, for the operations that read it.
pub(crate) fn planned<'a>(gpu: &Gpu, draw: &Draw) -> Result<RoutingPlan<'a>> {
    let ids = gpu.upload(&draw.expert_ids)?;
    Ok(ops::plan::plan_fwd(&gpu.device, &gpu.stream, draw.shape, &ids.as_view())?)
}

/// Makes the plan of the reference, which has no tiles.
pub(crate) fn planned_on_cpu(draw: &Draw) -> Result<reference::Plan> {
    Ok(reference::plan_fwd(&draw.shape, &draw.expert_ids)?)
}

pub(crate) fn on_gpu<'a>(gpu: &'a Gpu, draw: &Draw) -> Result<Workload<'a>> {
    let shape = draw.shape;
    let ids = gpu.upload(&draw.expert_ids)?;
    let mut memory = gpu.zeros::<u8>(PlanLayout::new(shape)?.bytes())?;
    Ok(Workload::new(move |_| {
        let (ids, memory) = (ids.as_view(), memory.as_view_mut());
        ops::plan::plan_fwd_into(&gpu.device, &gpu.stream, shape, Some(&ids), memory)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu(draw: &Draw) -> Result<Workload<'static>> {
    let draw = draw.clone();
    Ok(Workload::new(move |_| {
        std::hint::black_box(planned_on_cpu(&draw)?);
        Ok(())
    }))
}
