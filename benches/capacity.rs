//! capacity: drops the slots beyond each expert's capacity, by weight, which orders every slot.

use moe_kernels::{CapacityConfig, CapacityLimit, Priority, ops, reference};

use crate::common::error::Result;
use crate::common::routing::Draw;
use crate::common::target::Gpu;
use crate::common::workload::Workload;

const CONFIG: CapacityConfig =
    CapacityConfig::new(CapacityLimit::Factor { factor: 1.0 }, Priority::Weight);

pub(crate) fn on_gpu<'a>(gpu: &'a Gpu, draw: &Draw) -> Result<Workload<'a>> {
    let shape = draw.shape;
    let (device, stream) = (&gpu.device, &gpu.stream);
    let ids = gpu.upload(&draw.expert_ids)?;
    let plan = ops::plan::plan_fwd(device, stream, shape.by_slot(), &ids.as_view())?;
    let weights = gpu.upload(&draw.weights)?;
    let mut kept_ids = gpu.zeros::<u32>(shape.slots())?;
    let mut kept = gpu.zeros::<u32>(shape.num_experts)?;
    let mut dropped = gpu.zeros::<u32>(shape.num_experts)?;
    Ok(Workload::new(move |_| {
        ops::capacity::capacity_fwd_into(
            device,
            stream,
            &plan,
            shape,
            &CONFIG,
            None,
            &weights.as_view(),
            &mut kept_ids.as_view_mut(),
            &mut kept.as_view_mut(),
            &mut dropped.as_view_mut(),
        )?;
        Ok(())
    }))
}

pub(crate) fn on_cpu(draw: &Draw) -> Result<Workload<'static>> {
    let draw = draw.clone();
    let plan = reference::plan_fwd(&draw.shape.by_slot(), &draw.expert_ids)?;
    Ok(Workload::new(move |_| {
        let kept = reference::capacity_fwd(&plan, &draw.shape, &CONFIG, None, &draw.weights)?;
        std::hint::black_box(kept);
        Ok(())
    }))
}
