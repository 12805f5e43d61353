//! combine: the weighted sum of each token's rows.

use moe_kernels::ops::combine::{CombineInputs, combine_fwd_into};
use moe_kernels::reference;

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::values::normal;
use crate::common::workload::Workload;
use crate::plan::{planned, planned_on_cpu};

/// The seed of yp.
const YP: u64 = 101;

pub(crate) fn on_gpu<'a, D: Element>(
    gpu: &'a Gpu,
    model: &Model,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let hidden = model.config.hidden;
    let plan = planned(gpu, draw)?;
    let yp = gpu.normal::<D>(draw.shape.slots() * hidden, 1.0, YP)?;
    let weights = gpu.upload(&draw.weights)?;
    let mut y = gpu.zeros::<D>(draw.shape.num_tokens * hidden)?;
    Ok(Workload::new(move |_| {
        let (yp, weights, y) = (yp.as_view(), weights.as_view(), &mut y.as_view_mut());
        let inputs = CombineInputs::new(&yp, &weights);
        combine_fwd_into(&gpu.device, &gpu.stream, &plan, hidden, &inputs, y)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<D: Element>(model: &Model, draw: &Draw) -> Result<Workload<'static>> {
    let (shape, hidden) = (draw.shape, model.config.hidden);
    let plan = planned_on_cpu(draw)?;
    let yp = normal::<D>(shape.slots() * hidden, 1.0, YP);
    let weights = draw.weights.clone();
    Ok(Workload::new(move |_| {
        let inputs = reference::CombineInputs::new(&yp, &weights);
        std::hint::black_box(reference::combine_fwd::<f32>(&shape, &plan, hidden, &inputs)?);
        Ok(())
    }))
}
