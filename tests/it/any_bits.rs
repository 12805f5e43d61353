//! Indices in a caller's buffers may have any bits: kernels access no memory outside their buffers,
//! and treat the indices as unsigned numbers.

use moe_kernels::ops::combine::{self, CombineInputs, Identity};
use moe_kernels::ops::{capacity, plan, route};
use moe_kernels::reference;
use moe_kernels::{
    CapacityConfig, CapacityLimit, MoeConfig, MoeInputs, MoeLayer, MoeWeights, Priority,
    RouterConfig, RoutingShape, Scoring, Selection, Workspace,
};
use proptest::prelude::*;

use crate::common::{Rng, bits, config, gpu, values};

/// Numbers near `limit`, near the ends of the signed and the unsigned range, and any bits.
fn numbers(len: usize, limit: usize, rng: &mut Rng) -> Vec<u32> {
    let limit = limit as u32;
    let ends = [limit, limit.wrapping_sub(1), i32::MAX as u32, 1 << 31, (1 << 31) + 1, u32::MAX];
    (0..len)
        .map(|_| match rng.below(4) {
            0 => rng.next() as u32,
            1 => ends[rng.below(ends.len())],
            _ => rng.below(limit.max(1) as usize) as u32,
        })
        .collect()
}

/// The result of `capacity_reassign_fwd` for one token: the index of the requested candidate of
/// each slot.
fn requested(
    experts: u32,
    chosen: &[u32],
    kept: &[u32],
    candidates: &[u32],
    next: &mut u32,
) -> Vec<Option<usize>> {
    let request = |(&chosen_id, &kept_id): (&u32, &u32)| {
        if chosen_id >= experts || kept_id < experts {
            return None;
        }
        while (*next as usize) < candidates.len() {
            let at = *next as usize;
            *next += 1;
            if candidates[at] < experts && !chosen.contains(&candidates[at]) {
                return Some(at);
            }
        }
        None
    };
    chosen.iter().zip(kept).map(request).collect()
}

proptest! {
    #![proptest_config(config(64))]

    #[test]
    fn any_candidates_stay_in_bounds(
        tokens in 1usize..200, experts in 1usize..9, k in 1usize..5, per_token in 0usize..12,
        seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let (gpu, rng) = (gpu(), &mut Rng::new(seed));
        gpu.reschedule(seed);
        let chosen = numbers(shape.slots(), experts, rng);
        let kept = numbers(shape.slots(), experts, rng);
        let candidates = numbers(tokens * per_token, experts, rng);
        let next = numbers(tokens, per_token, rng);
        let candidate_weights = values::<f32>(candidates.len(), 1.0, seed);
        let weights = values::<f32>(shape.slots(), 1.0, seed ^ 1);

        let mut next_to = gpu.upload(&next);
        let mut requests_to = gpu.poisoned::<u32>(shape.slots());
        let mut weights_to = gpu.upload(&weights);
        capacity::capacity_reassign_fwd_into(
            &gpu.device,
            &gpu.stream,
            shape,
            per_token,
            false,
            &gpu.upload(&chosen).view(),
            &gpu.upload(&kept).view(),
            &gpu.upload(&candidates).view(),
            &gpu.upload(&candidate_weights).view(),
            &mut next_to.view_mut(),
            &mut requests_to.view_mut(),
            &mut weights_to.view_mut(),
        ).unwrap();

        let (mut want_next, mut want_requests, mut want_weights) = (next, Vec::new(), weights);
        for token in 0..tokens {
            let slots = token * shape.top_k..(token + 1) * shape.top_k;
            let row = &candidates[token * per_token..][..per_token];
            let (chosen, kept) = (&chosen[slots.clone()], &kept[slots.clone()]);
            let requests = requested(experts as u32, chosen, kept, row, &mut want_next[token]);
            for (slot, at) in slots.zip(requests) {
                want_requests.push(at.map_or(u32::MAX, |at| row[at]));
                if let Some(at) = at {
                    want_weights[slot] = candidate_weights[token * per_token + at];
                }
            }
        }
        prop_assert_eq!(gpu.download(&requests_to.view()), want_requests);
        prop_assert_eq!(gpu.download(&next_to.view()), want_next);
        prop_assert_eq!(bits(&gpu.download(&weights_to.view())), bits(&want_weights));
    }

    /// An expert whose count of kept rows is at or above its limit, as an unsigned number, keeps no
    /// more.
    #[test]
    fn any_counts_are_unsigned(
        tokens in 1usize..150, experts in 1usize..7, k in 1usize..4, rows in 0usize..9,
        sequence in 1usize..60, seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let (gpu, rng) = (gpu(), &mut Rng::new(seed));
        gpu.reschedule(seed);
        let requests = numbers(shape.slots(), experts, rng);
        let cells = shape.sequences(Some(sequence)) * experts;
        let (kept, dropped) = (numbers(cells, rows, rng), numbers(cells, rows, rng));
        let ids = numbers(shape.slots(), experts, rng);
        let weights = gpu.upload(&vec![0f32; shape.slots()]);
        let plan = plan::plan_fwd(
            &gpu.device, &gpu.stream, shape.by_slot(), &gpu.upload(&requests).view(),
        ).unwrap();
        let (mut kept_to, mut dropped_to) = (gpu.upload(&kept), gpu.upload(&dropped));
        let mut ids_to = gpu.upload(&ids);
        let config = CapacityConfig::new(CapacityLimit::Rows { rows }, Priority::Token);
        capacity::capacity_later_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            shape,
            &config,
            Some(sequence),
            &weights.view(),
            &mut ids_to.view_mut(),
            &mut kept_to.view_mut(),
            &mut dropped_to.view_mut(),
        ).unwrap();

        let (mut want_ids, mut want_kept, mut want_dropped) = (ids, kept, dropped);
        for (slot, &request) in requests.iter().enumerate().filter(|&(_, &id)| id < experts as u32) {
            let cell = slot / shape.top_k / sequence * experts + request as usize;
            if (want_kept[cell] as usize) < rows.min(shape.slots()) {
                want_kept[cell] += 1;
                want_ids[slot] = request;
            } else {
                want_dropped[cell] = want_dropped[cell].wrapping_add(1);
            }
        }
        prop_assert_eq!(gpu.download(&kept_to.view()), want_kept);
        prop_assert_eq!(gpu.download(&dropped_to.view()), want_dropped);
        prop_assert_eq!(gpu.download(&ids_to.view()), want_ids);
    }

    /// Any ids in the table, and any token ids.
    #[test]
    fn any_given_ids_match_reference(
        tokens in 1usize..60, experts in 1usize..40, k in 1usize..6, rows in 0usize..9,
        by_token in any::<bool>(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let (gpu, rng) = (gpu(), &mut Rng::new(seed));
        let rows = if by_token { rows } else { tokens };
        let logits = values::<f32>(shape.logits(), 2.0, seed);
        let table = numbers(rows * shape.top_k, experts, rng);
        let token_ids = by_token.then(|| numbers(tokens, rows, rng));
        let router = RouterConfig {
            selection: Selection::Given,
            scoring: Scoring::Sigmoid,
            ..RouterConfig::default()
        };
        let host = reference::RouteInputs {
            given_ids: Some(&table),
            token_ids: token_ids.as_deref(),
            ..reference::RouteInputs::new(&logits)
        };
        let want = reference::route_fwd::<f32, f32>(&shape, &router, &host).unwrap();
        let (logits, table) = (gpu.upload(&logits), gpu.upload(&table));
        let token_ids = token_ids.map(|ids| gpu.upload(&ids));
        let got = route::route_fwd(&gpu.device, &gpu.stream, shape, &router, &route::RouteInputs {
            given_ids: Some(&table.view()),
            token_ids: token_ids.as_ref().map(|ids| ids.view()).as_ref(),
            ..route::RouteInputs::new(&logits.view())
        }).unwrap();
        prop_assert_eq!(gpu.download(&got.expert_ids.as_view()), want.expert_ids);
        prop_assert_eq!(bits(&gpu.download(&got.routing_weights.as_view())), bits(&want.routing_weights));
    }

    /// Any ids of slots without a row, some of which are those of identity experts.
    #[test]
    fn any_identity_ids_match_reference(
        tokens in 1usize..60, experts in 1usize..7, k in 1usize..5, identity in 1u32..4,
        seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let (gpu, rng) = (gpu(), &mut Rng::new(seed));
        let ids = numbers(shape.slots(), experts + identity as usize, rng);
        let experts = experts as u32;
        let (x, yp) = (values::<f32>(tokens, 1.0, seed), values::<f32>(shape.slots(), 1.0, seed ^ 1));
        let mut want = vec![0f32; tokens];
        let uploaded = gpu.upload(&ids);
        let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &uploaded.view()).unwrap();
        let rows = gpu.download(&plan.row_of_slot());
        for (slot, &id) in ids.iter().enumerate() {
            let token = slot / shape.top_k;
            match rows[slot] {
                -1 if (experts..experts + identity).contains(&id) => want[token] += x[token],
                -1 => {}
                row => want[token] += yp[row as usize],
            }
        }
        let (x, yp) = (gpu.upload(&x), gpu.upload(&yp));
        let (x, yp, ids) = (x.view(), yp.view(), uploaded.view());
        let identity = experts..experts + identity;
        let identity = Identity { experts: identity, expert_ids: &ids, x: &x, routing_weights: None };
        let inputs = CombineInputs {
            yp: &yp, routing_weights: None, identity: Some(identity), output_bias: None, shared: None,
        };
        let y = combine::combine_fwd(&gpu.device, &gpu.stream, &plan, 1, &inputs).unwrap();
        prop_assert_eq!(bits(&gpu.download(&y.as_view())), bits(&want));
    }

    /// Ids that are not below the number of experts are ignored.
    #[test]
    fn ids_of_no_expert_are_ignored_by_a_layer(
        tokens in 1usize..40, experts in 1usize..6, k in 1usize..4, seed in any::<u64>(),
    ) {
        let (gpu, rng) = (gpu(), &mut Rng::new(seed));
        gpu.reschedule(seed);
        let config = MoeConfig::new(8, 8, experts, k.min(experts));
        let layer = MoeLayer::new(&gpu.device, config).unwrap();
        let shape = config.routing(tokens);
        let (stream, x) = (&gpu.stream, gpu.upload(&values::<f32>(tokens * 8, 1.0, seed)));
        let gate_up = gpu.upload(&values::<f32>(config.gate_up_len(), 0.3, seed ^ 1));
        let down = gpu.upload(&values::<f32>(config.down_len(), 0.3, seed ^ 2));
        let weights = MoeWeights::plain(gate_up.view(), down.view());
        let routing_weights = gpu.upload(&values::<f32>(shape.slots(), 1.0, seed ^ 3));
        let bytes = MoeLayer::workspace_bytes(&config, moe_kernels::DType::F32, tokens).unwrap();
        let mut workspace = Workspace::alloc(stream, bytes).unwrap();
        let mut forward = |ids: &[u32]| {
            let mut y = gpu.poisoned::<f32>(tokens * 8);
            let (x, ids, routing_weights) = (x.view(), gpu.upload(ids), routing_weights.view());
            layer
                .forward_routed(
                    stream, &x, &ids.view(), &routing_weights, &weights, &mut workspace,
                    &mut y.view_mut(),
                )
                .unwrap();
            bits(&gpu.download(&y.view()))
        };
        let ids = numbers(shape.slots(), experts, rng);
        let cleaned: Vec<u32> =
            ids.iter().map(|&id| if id < experts as u32 { id } else { u32::MAX }).collect();
        prop_assert_eq!(forward(&ids), forward(&cleaned));
    }
}

/// A layer with any ids in its table and any token ids makes no invalid access.
#[test]
fn any_table_of_a_layer_stays_in_bounds() {
    let gpu = gpu();
    for seed in 0..8 {
        let rng = &mut Rng::new(seed);
        let router = RouterConfig {
            selection: Selection::Given,
            scoring: Scoring::Sigmoid,
            ..RouterConfig::default()
        };
        let config = MoeConfig { router, ..MoeConfig::new(8, 8, 5, 2) };
        let layer = MoeLayer::new(&gpu.device, config).unwrap();
        let x = gpu.upload(&values::<f32>(30 * 8, 1.0, seed));
        let logits = gpu.upload(&values::<f32>(30 * 5, 1.0, seed ^ 1));
        let gate_up = gpu.upload(&values::<f32>(config.gate_up_len(), 0.3, seed ^ 2));
        let down = gpu.upload(&values::<f32>(config.down_len(), 0.3, seed ^ 3));
        let (table, token_ids) = (numbers(7 * 2, 5, rng), numbers(30, 7, rng));
        let (table, token_ids) = (gpu.upload(&table), gpu.upload(&token_ids));
        let mut weights = MoeWeights::plain(gate_up.view(), down.view());
        weights.router.table = Some(table.view());
        let mut inputs = MoeInputs::with_logits(x.view(), logits.view());
        inputs.token_ids = Some(token_ids.view());
        let bytes = MoeLayer::workspace_bytes(&config, moe_kernels::DType::F32, 30).unwrap();
        let mut workspace = Workspace::alloc(&gpu.stream, bytes).unwrap();
        let mut y = gpu.poisoned::<f32>(30 * 8);
        let to = &mut y.view_mut();
        layer.forward(&gpu.stream, &inputs, &weights, &mut workspace, to).unwrap();
        assert!(gpu.download(&y.view()).iter().all(|y| y.is_finite()), "seed {seed}");
    }
}
