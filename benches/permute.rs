//! permute: copies tokens to rows in expert order.

use moe_kernels::{ops, reference};

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::weights::x;
use crate::common::workload::Workload;
use crate::plan::{planned, planned_on_cpu};

pub(crate) fn on_gpu<'a, D: Element>(
    gpu: &'a Gpu,
    model: &Model,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let hidden = model.config.hidden;
    let plan = planned(gpu, draw)?;
    let x = gpu.upload(&x::<D>(model, draw.shape.num_tokens))?;
    let mut xp = gpu.zeros::<D>(draw.shape.slots() * hidden)?;
    Ok(Workload::new(move |_| {
        let (x, xp) = (x.as_view(), &mut xp.as_view_mut());
        ops::permute::permute_fwd_into(&gpu.device, &gpu.stream, &plan, hidden, &x, xp)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<D: Element>(model: &Model, draw: &Draw) -> Result<Workload<'static>> {
    let (shape, hidden) = (draw.shape, model.config.hidden);
    let plan = planned_on_cpu(draw)?;
    let x = x::<D>(model, shape.num_tokens);
    Ok(Workload::new(move |_| {
        std::hint::black_box(reference::permute_fwd(&shape, &plan, hidden, &x)?);
        Ok(())
    }))
}
