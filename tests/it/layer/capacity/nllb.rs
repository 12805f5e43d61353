//! NLLB-MoE's router in evaluation: the capacity of an expert, and the slots that it keeps.

use half::bf16;
use moe_kernels::reference::{self, RouteInputs};
use moe_kernels::{
    ActivationFunction, CapacityConfig, CapacityLimit, MoeConfig, MoeInputs, MoeLayer, MoeWeights,
    Normalization, Priority, RouterConfig, RoutingOutputs, RoutingShape, Typed, Workspace,
};
use proptest::prelude::*;

use crate::common::{Gpu, Rng, config, gpu};

/// The configuration that moe-kernels-hf reads from a config.json with these values of
/// `moe_eval_capacity_token_fraction`, `normalize_router_prob_before_dropping` and
/// `batch_prioritized_routing`.
fn nllb_config(fraction: f64, before: bool, prioritized: bool) -> MoeConfig {
    let mut config = MoeConfig::new(4, 2, 6, 2);
    config.projection.f32_logits = true;
    config.router = RouterConfig { scale: 0.8, ..RouterConfig::softmax_top_k(false) };
    config.experts.activation.function = ActivationFunction::Relu;
    config.experts.gated = false;
    config.experts.gate_up_bias = true;
    config.experts.down_bias = true;
    let priority = if prioritized { Priority::ChoiceByTopWeight } else { Priority::Choice };
    let mut capacity = CapacityConfig::new(CapacityLimit::TokenFraction { fraction }, priority);
    let sum = Normalization::SumAtLeast { min: f32::EPSILON };
    if before {
        config.router.normalization = sum;
    } else {
        capacity.normalization = sum;
    }
    config.capacity = Some(capacity);
    config
}

/// The router of the paper's code, token by token: ids and weights of two experts, `u32::MAX` and 0
/// for a dropped slot. `probabilities` and `logits` are `[T, E]`: the first choice is by the
/// former, the second by the latter.
fn nllb(
    probabilities: &[Vec<f32>],
    logits: &[f32],
    active: &[u8],
    capacity: usize,
    before: bool,
    prioritized: bool,
) -> (Vec<u32>, Vec<f64>) {
    let num_experts = probabilities[0].len();
    let largest = |row: &[f32], but: Option<usize>| {
        let mut best = None;
        for e in (0..row.len()).filter(|e| Some(*e) != but) {
            if best.is_none_or(|best: usize| row[e] > row[best]) {
                best = Some(e);
            }
        }
        best.unwrap()
    };
    let choices: Vec<[usize; 2]> = probabilities
        .iter()
        .zip(logits.chunks(num_experts))
        .map(|(row, logits)| {
            let first = largest(row, None);
            [first, largest(logits, Some(first))]
        })
        .collect();
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    if prioritized {
        let importance = |token: usize| probabilities[token][choices[token][0]];
        order.sort_by(|&a, &b| importance(b).partial_cmp(&importance(a)).unwrap());
    }
    // Second choices are queued after all first choices of their expert, dropped ones included.
    let mut taken = vec![0; num_experts];
    let mut is_kept = vec![[false; 2]; probabilities.len()];
    for choice in 0..2 {
        for &token in order.iter().filter(|token| active[**token] != 0) {
            let expert = choices[token][choice];
            is_kept[token][choice] = taken[expert] < capacity;
            taken[expert] += 1;
        }
    }
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for (token, row) in probabilities.iter().enumerate() {
        let counts = |choice: usize| before || is_kept[token][choice];
        let p = [0, 1].map(|choice| f64::from(row[choices[token][choice]]));
        let sum: f64 = (0..2).filter(|choice| counts(*choice)).map(|choice| p[choice]).sum();
        for choice in 0..2 {
            let kept = is_kept[token][choice];
            ids.push(if kept { choices[token][choice] as u32 } else { u32::MAX });
            let gate = p[choice] / sum.max(f64::from(f32::EPSILON)) * 0.8;
            weights.push(if kept { gate } else { 0.0 });
        }
    }
    (ids, weights)
}

/// Ids and weights of the layer on the device, and of the reference.
fn routed(
    gpu: &Gpu,
    config: MoeConfig,
    logits: Vec<f32>,
    active: &[u8],
) -> [(Vec<u32>, Vec<f32>); 2] {
    let tokens = active.len();
    let zeros = |len: usize| vec![bf16::ZERO; len];
    let mut weights = MoeWeights::plain(zeros(config.gate_up_len()), zeros(config.down_len()));
    weights.experts.gate_up_bias = Some(zeros(config.num_experts * config.intermediate));
    weights.experts.down_bias = Some(zeros(config.num_experts * config.hidden));
    let mut inputs = MoeInputs::new(zeros(tokens * config.hidden));
    inputs.logits = Some(Typed::F32(logits));
    inputs.active = Some(active.to_vec());
    let host =
        reference::moe_layer_route_fwd::<f32, bf16>(&config, &inputs.as_host(), &weights.as_host());
    let host = host.unwrap();

    let layer = MoeLayer::new(&gpu.device, config).unwrap();
    let (weights, inputs) =
        (weights.upload(&gpu.stream).unwrap(), inputs.upload(&gpu.stream).unwrap());
    let bytes = MoeLayer::workspace_bytes(&config, moe_kernels::DType::BF16, tokens).unwrap();
    let mut workspace = Workspace::alloc(&gpu.stream, bytes).unwrap();
    let (mut ids, mut of_slots) = (gpu.poisoned(tokens * 2), gpu.poisoned(tokens * 2));
    let mut outputs = RoutingOutputs::new(ids.view_mut(), of_slots.view_mut());
    let (weights, inputs) = (weights.as_views(), inputs.as_views());
    layer.route_into(&gpu.stream, &inputs, &weights, &mut workspace, &mut outputs).unwrap();
    let device = (gpu.download(&ids.view()), gpu.download(&of_slots.view()));
    [(host.expert_ids, host.weights), device]
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn layer_routes_as_nllb_does(
        tokens in 1usize..60, hundredths in 1usize..60, before in any::<bool>(),
        prioritized in any::<bool>(), ties in any::<bool>(), seed in any::<u64>(),
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        let mut rng = Rng::new(seed);
        let config = nllb_config(hundredths as f64 / 100.0, before, prioritized);
        let experts = config.num_experts;
        // Occasionally a probability so small that the epsilon makes a difference.
        let mut logits = Vec::new();
        for _ in 0..tokens {
            let scale = if rng.below(6) == 0 { 20.0 } else { 2.0 };
            logits.extend((0..experts).map(|_| {
                let step = rng.below(if ties { 4 } else { 4096 }) as f32;
                scale * step / if ties { 3.0 } else { 4096.0 }
            }));
        }
        let active: Vec<u8> = (0..tokens).map(|_| u8::from(rng.below(8) > 0)).collect();
        // All probabilities of a token, by expert.
        let shape = RoutingShape { num_tokens: tokens, num_experts: experts, top_k: experts };
        let softmax = RouterConfig::softmax_top_k(false);
        let sorted =
            reference::route_fwd::<f32, f32>(&shape, &softmax, &RouteInputs::new(&logits)).unwrap();
        let mut probabilities = vec![vec![0.0; experts]; tokens];
        for (slot, (&id, &p)) in sorted.expert_ids.iter().zip(&sorted.routing_weights).enumerate() {
            probabilities[slot / experts][id as usize] = p;
        }
        let capacity = (f64::from(hundredths as u32) / 100.0 * tokens as f64).ceil() as usize;
        let (ids, weights) = nllb(&probabilities, &logits, &active, capacity, before, prioritized);
        for (got_ids, got_weights) in routed(&gpu, config, logits, &active) {
            prop_assert_eq!(&got_ids, &ids);
            for (slot, (&got, &wanted)) in got_weights.iter().zip(&weights).enumerate() {
                // The weight of a dropped slot is unspecified.
                let near = (f64::from(got) - wanted).abs() <= 4e-7 * wanted.abs();
                prop_assert!(ids[slot] == u32::MAX || near, "slot {}: {} {}", slot, got, wanted);
            }
        }
    }
}
