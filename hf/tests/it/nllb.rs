//! NLLB-MoE's router in evaluation, from its configuration: the capacity of an expert, and which slots it keeps.

use half::bf16;
use moe_kernels::reference::{self, RouteInputs};
use moe_kernels::{
    MoeConfig, MoeInputs, MoeLayer, MoeWeights, RouterConfig, RoutingOutputs, RoutingShape,
    Workspace,
};
use proptest::prelude::*;
use serde_json::json;

use crate::common::{Gpu, Rng, config, gpu};

/// `math.ceil(fraction * tokens)` of Python where it is one more than the exact quotient, of all fractions of two
/// decimals and 0 to 512 tokens; made by `math.ceil(float(f"0.{hundredths:02}") * tokens)`.
const ONE_MORE: [(usize, &[usize]); 10] = [
    (7, &[100, 200, 300, 400]),
    (14, &[50, 100, 150, 200, 300, 350, 400, 450]),
    (17, &[300]),
    (28, &[25, 50, 75, 100, 150, 175, 200, 225, 275, 300, 325, 350, 375, 400, 425, 450]),
    (34, &[150, 300, 350]),
    (54, &[450]),
    (55, &[100, 180, 200, 220, 340, 360, 380, 400, 420, 440, 460]),
    (56, &[25, 50, 75, 100, 150, 175, 200, 225, 275, 300, 325, 350, 375, 400, 425, 450]),
    (68, &[75, 150, 175, 300, 325, 350, 375]),
    (81, &[300]),
];

fn from_hf(fraction: &str, before: bool, prioritized: bool) -> MoeConfig {
    let text = json!({
        "model_type": "nllb-moe", "d_model": 4, "encoder_ffn_dim": 2, "decoder_ffn_dim": 2,
        "num_experts": 6, "moe_token_dropout": 0.2, "encoder_sparse_step": 1, "encoder_layers": 2,
        "normalize_router_prob_before_dropping": before, "batch_prioritized_routing": prioritized,
        "moe_eval_capacity_token_fraction": "FRACTION",
    });
    let text = text.to_string().replace("\"FRACTION\"", fraction);
    MoeConfig::from_hf(&text, 0).unwrap()
}

#[test]
fn the_capacity_is_that_of_pythons_arithmetic() {
    let rows = |fraction: &str, tokens: usize| {
        let config = from_hf(fraction, false, false);
        config.capacity.unwrap().rows(&config.routing(tokens), tokens).unwrap()
    };
    assert_eq!(rows("0.15", 20), 3);
    // The double after that of 0.11, which a reader that rounds twice takes for 0.11.
    assert_eq!((rows("0.11", 100), rows("0.11000000000000001", 100)), (11, 12));
    for hundredths in 1..100 {
        let capacity = from_hf(&format!("0.{hundredths:02}"), false, false).capacity.unwrap();
        let more = ONE_MORE.iter().find(|(of, _)| *of == hundredths).map_or(&[][..], |of| of.1);
        for tokens in 0..=512 {
            let shape = RoutingShape { num_tokens: tokens, num_experts: 6, top_k: 2 };
            let wanted = (hundredths * tokens).div_ceil(100) + usize::from(more.contains(&tokens));
            let got = capacity.rows(&shape, tokens).unwrap();
            assert_eq!(got, wanted, "0.{hundredths:02} of {tokens} tokens");
        }
    }
    // All tokens are no limit.
    assert!(from_hf("1.0", false, false).capacity.is_none());
    assert!(from_hf("7", false, false).capacity.is_none());
}

/// The router as its paper's code has it, token by token: ids and weights of two experts, `u32::MAX` and 0 where one
/// takes no part. `probabilities` and `logits` are `[T, E]`: the first choice is by the former, the second by the latter.
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
    // A second choice has its place behind all first choices of its expert, those without room among them.
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
    inputs.logits = Some(moe_kernels::Typed::F32(logits));
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
    fn the_layer_is_the_models_router(
        tokens in 1usize..60, hundredths in 1usize..60, before in any::<bool>(),
        prioritized in any::<bool>(), ties in any::<bool>(), seed in any::<u64>(),
    ) {
        let gpu = gpu();
        gpu.reschedule(seed);
        let mut rng = Rng::new(seed);
        let config = from_hf(&format!("0.{hundredths:02}"), before, prioritized);
        let experts = config.num_experts;
        // Now and then so small a probability that its epsilon counts.
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
                // A slot that was dropped takes no part, whatever its weight is.
                let near = (f64::from(got) - wanted).abs() <= 4e-7 * wanted.abs();
                prop_assert!(ids[slot] == u32::MAX || near, "slot {}: {} {}", slot, got, wanted);
            }
        }
    }
}
