//! route: from logits to expert ids and weights.

use cudarc::driver::CudaSlice;
use moe_kernels::ops::route::RouteInputs;
use moe_kernels::{Dtype, ops, reference};

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::workload::Workload;

/// The logits of a draw in the element type.
pub(crate) fn logits<D: Dtype>(draw: &Draw) -> Vec<D> {
    draw.logits.iter().map(|&logit| D::from_f32(logit)).collect()
}

pub(crate) fn on_gpu<'a, D: Element>(
    gpu: &'a Gpu,
    model: &Model,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let (shape, router) = (draw.shape, model.config.router);
    let logits = gpu.upload(&logits::<D>(draw))?;
    let bias = model.selection_bias().map(|bias| gpu.upload(&bias)).transpose()?;
    let mut ids = gpu.zeros::<u32>(shape.slots())?;
    let mut weights = gpu.zeros::<f32>(shape.slots())?;
    Ok(Workload::new(move |_| {
        let (ids, weights) = (&mut ids.as_view_mut(), &mut weights.as_view_mut());
        let (logits, bias) = (logits.as_view(), bias.as_ref().map(CudaSlice::as_view));
        let inputs = RouteInputs { selection_bias: bias.as_ref(), ..RouteInputs::new(&logits) };
        ops::route::route_fwd_into(
            &gpu.device,
            &gpu.stream,
            shape,
            &router,
            &inputs,
            ids,
            weights,
        )?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<D: Dtype>(model: &Model, draw: &Draw) -> Result<Workload<'static>> {
    let (shape, router, logits) = (draw.shape, model.config.router, logits::<D>(draw));
    let bias = model.selection_bias();
    Ok(Workload::new(move |_| {
        let inputs = reference::RouteInputs {
            selection_bias: bias.as_deref(),
            ..reference::RouteInputs::new(&logits)
        };
        std::hint::black_box(reference::route_fwd::<f32, D>(&shape, &router, &inputs)?);
        Ok(())
    }))
}
