//! expert_choice: from scores to the tokens of each expert, T*K/E of them, rounded up.

use moe_kernels::{Dtype, RoutingShape, ops, reference};

use crate::common::error::Result;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::workload::Workload;
use crate::route::logits;

/// The number of tokens of an expert.
fn capacity(shape: RoutingShape) -> usize {
    shape.slots().div_ceil(shape.num_experts)
}

pub(crate) fn on_gpu<'a, D: Element>(gpu: &'a Gpu, draw: &Draw) -> Result<Workload<'a>> {
    let RoutingShape { num_tokens, num_experts, .. } = draw.shape;
    let capacity = capacity(draw.shape);
    let scores = gpu.upload(&logits::<D>(draw))?;
    let mut ids = gpu.zeros::<u32>(draw.shape.logits())?;
    let mut weights = gpu.zeros::<f32>(draw.shape.logits())?;
    Ok(Workload::new(move |_| {
        ops::expert_choice::expert_choice_fwd_into(
            &gpu.device,
            &gpu.stream,
            num_tokens,
            num_experts,
            capacity,
            &scores.as_view(),
            &mut ids.as_view_mut(),
            &mut weights.as_view_mut(),
        )?;
        Ok(())
    }))
}

pub(crate) fn on_cpu<D: Dtype>(draw: &Draw) -> Result<Workload<'static>> {
    let RoutingShape { num_tokens, num_experts, .. } = draw.shape;
    let (capacity, scores) = (capacity(draw.shape), logits::<D>(draw));
    Ok(Workload::new(move |_| {
        let chosen = reference::expert_choice_fwd(num_tokens, num_experts, capacity, &scores)?;
        std::hint::black_box(chosen);
        Ok(())
    }))
}
