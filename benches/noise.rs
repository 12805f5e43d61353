//! noise: a normally distributed value for each logit.

use moe_kernels::{NoiseDistribution, ops, reference};

use crate::common::error::Result;
use crate::common::routing::Draw;
use crate::common::target::Gpu;
use crate::common::workload::Workload;

const SEED: u64 = 102;

pub(crate) fn on_gpu<'a>(gpu: &'a Gpu, draw: &Draw) -> Result<Workload<'a>> {
    let mut noise = gpu.zeros::<f32>(draw.shape.logits())?;
    Ok(Workload::new(move |_| {
        let (distribution, noise) = (NoiseDistribution::Normal, &mut noise.as_view_mut());
        ops::noise::noise_fwd_into(&gpu.device, &gpu.stream, distribution, SEED, 0, noise)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu(draw: &Draw) -> Result<Workload<'static>> {
    let len = draw.shape.logits();
    Ok(Workload::new(move |_| {
        std::hint::black_box(reference::noise_fwd(NoiseDistribution::Normal, SEED, 0, len));
        Ok(())
    }))
}
