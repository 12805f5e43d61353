//! jitter: multiplies each element of the tokens by its own factor.

use moe_kernels::{NoiseDistribution, ops, reference};

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::weights::x;
use crate::common::workload::Workload;

const EPSILON: f32 = 0.01;
const SEED: u64 = 103;

pub(crate) fn on_gpu<'a, D: Element>(
    gpu: &'a Gpu,
    model: &Model,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let (device, stream) = (&gpu.device, &gpu.stream);
    let x = x::<D>(model, draw.shape.num_tokens);
    let u = ops::noise::noise_fwd(device, stream, NoiseDistribution::Uniform, SEED, 0, x.len())?;
    let mut jittered = gpu.zeros::<D>(x.len())?;
    let x = gpu.upload(&x)?;
    Ok(Workload::new(move |_| {
        let (x, u, jittered) = (x.as_view(), u.as_view(), &mut jittered.as_view_mut());
        ops::jitter::jitter_fwd_into(device, stream, EPSILON, &x, &u, jittered)?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<D: Element>(model: &Model, draw: &Draw) -> Result<Workload<'static>> {
    let x = x::<D>(model, draw.shape.num_tokens);
    let u = reference::noise_fwd(NoiseDistribution::Uniform, SEED, 0, x.len());
    Ok(Workload::new(move |_| {
        std::hint::black_box(reference::jitter_fwd(EPSILON, &x, &u)?);
        Ok(())
    }))
}
