//! rms_norm: the norm of each output row of the second product, in another buffer.

use moe_kernels::ops::rms_norm::{RmsNormInputs, rms_norm_fwd_into};
use moe_kernels::{RmsNorm, reference};

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::values::normal;
use crate::common::workload::Workload;
use crate::plan::{planned, planned_on_cpu};

/// The seeds of yp and of the weight.
const YP: u64 = 103;
const WEIGHT: u64 = 104;

const NORM: RmsNorm = RmsNorm { epsilon: 1e-6, offset: 0.0, scale_first: false };

pub(crate) fn on_gpu<'a, D: Element>(
    gpu: &'a Gpu,
    model: &Model,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let hidden = model.config.hidden;
    let plan = planned(gpu, draw)?;
    let yp = gpu.normal::<D>(draw.shape.slots() * hidden, 1.0, YP)?;
    let weight = gpu.normal::<D>(hidden, 1.0, WEIGHT)?;
    let mut y = gpu.zeros::<D>(draw.shape.slots() * hidden)?;
    Ok(Workload::new(move |_| {
        let (yp, weight, y) = (yp.as_view(), weight.as_view(), &mut y.as_view_mut());
        let inputs = RmsNormInputs { weight: Some(&weight), plan: Some(&plan) };
        rms_norm_fwd_into(&gpu.device, &gpu.stream, &NORM, hidden, &yp, &inputs, y)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<D: Element>(model: &Model, draw: &Draw) -> Result<Workload<'static>> {
    let (shape, hidden) = (draw.shape, model.config.hidden);
    let plan = planned_on_cpu(draw)?;
    let yp = normal::<D>(shape.slots() * hidden, 1.0, YP);
    let weight = normal::<D>(hidden, 1.0, WEIGHT);
    Ok(Workload::new(move |_| {
        let inputs = reference::RmsNormInputs { x: &yp, weight: Some(&weight), plan: Some(&plan) };
        std::hint::black_box(reference::rms_norm_fwd::<f32>(&NORM, hidden, &inputs)?);
        Ok(())
    }))
}
