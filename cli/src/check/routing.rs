//! Checks of the operations around routing: noise, jitter, capacity and expert choice, bit for bit.

use moe_kernels::ops::capacity::capacity_fwd_into;
use moe_kernels::ops::expert_choice::expert_choice_fwd_into;
use moe_kernels::ops::jitter::jitter_fwd_into;
use moe_kernels::ops::noise::noise_fwd_into;
use moe_kernels::ops::plan::plan_fwd;
use moe_kernels::{
    CapacityConfig, CapacityLimit, Dtype, NoiseDistribution, Priority, RoutingShape, reference,
};

use super::case::Case;
use super::worst::Worst;
use crate::device::Gpu;
use crate::error::Result;

const SEED: u64 = 7;

/// Every distribution, from an offset that is no multiple of the generator's group.
pub fn noise<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let len = case.shape.logits();
    let mut worst = Worst::none();
    for distribution in NoiseDistribution::ALL {
        let mut noise = gpu.poisoned::<f32>(len)?;
        let view = &mut noise.as_view_mut();
        noise_fwd_into(&gpu.device, &gpu.stream, distribution, SEED, 3, view)?;
        let wanted = reference::noise_fwd(distribution, SEED, 3, len);
        let got = gpu.download(&noise.as_view())?;
        worst.merge(Worst::of_bytes("noise", &got, &wanted));
    }
    Ok(worst)
}

pub fn jitter<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    const EPSILON: f32 = 0.1;
    let u = reference::noise_fwd(NoiseDistribution::Uniform, SEED, 0, case.x.len());
    let wanted = reference::jitter_fwd(EPSILON, &case.x, &u)?;
    let (x, u) = (gpu.upload(&case.x)?, gpu.upload(&u)?);
    let mut jittered = gpu.poisoned::<D>(wanted.len())?;
    let view = &mut jittered.as_view_mut();
    jitter_fwd_into(&gpu.device, &gpu.stream, EPSILON, &x.as_view(), &u.as_view(), view)?;
    let got = gpu.download(&jittered.as_view())?;
    Ok(Worst::of_bytes("jittered", &got, &wanted))
}

/// Every priority, in sequences of a third of the tokens.
pub fn capacity<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let shape = case.shape;
    let tokens = Some(shape.num_tokens.div_ceil(3));
    let cells = shape.sequences(tokens) * shape.num_experts;
    let (device, stream) = (&gpu.device, &gpu.stream);
    let (ids, weights) = (gpu.upload(&case.expert_ids)?, gpu.upload(&case.weights)?);
    let plan = plan_fwd(device, stream, shape.by_slot(), &ids.as_view())?;
    let mut worst = Worst::none();
    for priority in
        [Priority::Token, Priority::Choice, Priority::Weight, Priority::ChoiceByTopWeight]
    {
        let limit = CapacityLimit::Factor { factor: 0.75 };
        let config = CapacityConfig::new(limit, priority);
        let mut kept_ids = gpu.poisoned::<u32>(shape.slots())?;
        let (mut kept, mut dropped) = (gpu.poisoned::<u32>(cells)?, gpu.poisoned::<u32>(cells)?);
        capacity_fwd_into(
            device,
            stream,
            &plan,
            shape,
            &config,
            tokens,
            &weights.as_view(),
            &mut kept_ids.as_view_mut(),
            &mut kept.as_view_mut(),
            &mut dropped.as_view_mut(),
        )?;
        let by_slot = reference::plan_fwd(&shape.by_slot(), &case.expert_ids)?;
        let wanted = reference::capacity_fwd(&by_slot, &shape, &config, tokens, &case.weights)?;
        for (name, got, wanted) in [
            ("expert_ids", &kept_ids, &wanted.expert_ids),
            ("kept", &kept, &wanted.kept),
            ("dropped", &dropped, &wanted.dropped),
        ] {
            worst.merge(Worst::of_integers(name, &gpu.download(&got.as_view())?, wanted));
        }
    }
    Ok(worst)
}

/// The logits are the scores; the capacity is the mean number of slots of an expert.
pub fn expert_choice<D: Dtype>(gpu: &Gpu, case: &Case<D>) -> Result<Worst> {
    let RoutingShape { num_tokens, num_experts, .. } = case.shape;
    let (capacity, len) = (case.shape.slots().div_ceil(num_experts), case.shape.logits());
    let scores = gpu.upload(&case.logits)?;
    let (mut ids, mut weights) = (gpu.poisoned::<u32>(len)?, gpu.poisoned::<f32>(len)?);
    expert_choice_fwd_into(
        &gpu.device,
        &gpu.stream,
        num_tokens,
        num_experts,
        capacity,
        &scores.as_view(),
        &mut ids.as_view_mut(),
        &mut weights.as_view_mut(),
    )?;
    let (wanted_ids, wanted_weights) =
        reference::expert_choice_fwd(num_tokens, num_experts, capacity, &case.logits)?;
    let mut worst = Worst::of_integers("expert_ids", &gpu.download(&ids.as_view())?, &wanted_ids);
    let weights = gpu.download(&weights.as_view())?;
    worst.merge(Worst::of_bytes("weights", &weights, &wanted_weights));
    Ok(worst)
}
