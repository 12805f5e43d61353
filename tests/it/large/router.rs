//! The router's product, route, and route_scores.

use cudarc::driver::{CudaSlice, DevicePtr};
use half::f16;
use moe_kernels::ops::route::{RouteInputs, route_fwd_into, route_scores_fwd_into};
use moe_kernels::ops::router_gemm::{
    RouterGemmBody, RouterGemmBuffers, RouterGemmShape, RouterGemmTypes, router_gemm_fwd_with,
};
use moe_kernels::{DType, Error, RouterConfig, RouterStep, RoutingShape, Scoring, Selection};

use super::{LIMIT, alone, end_of, ending_in, without_blocks};
use crate::common::{Gpu, bits, values};

const BODIES: [RouterGemmBody; 3] =
    [RouterGemmBody::One, RouterGemmBody::Few, RouterGemmBody::Tile];

/// Tokens and experts of a block.
fn block(body: RouterGemmBody) -> (usize, usize) {
    match body {
        RouterGemmBody::One => (1, 1),
        RouterGemmBody::Few => (8, 4),
        RouterGemmBody::Tile => (64, 32),
    }
}

fn router_gemm(
    gpu: &Gpu,
    body: RouterGemmBody,
    shape: RouterGemmShape,
    x: &CudaSlice<f16>,
    gate: &CudaSlice<f16>,
    left_out: usize,
) -> Result<CudaSlice<f16>, Error> {
    let stream = &gpu.stream;
    let logits = ending_in::<f16>(gpu, shape.num_tokens * shape.num_experts, &[]);
    let types = RouterGemmTypes { x: DType::F16, router_gate: DType::F16, logits: DType::F16 };
    let buffers = RouterGemmBuffers {
        logits: logits.device_ptr(stream).0,
        x: x.device_ptr(stream).0,
        router_gate: gate.device_ptr(stream).0,
        bias: 0,
    };
    let (device, on) = (&gpu.device, stream.cu_stream());
    // SAFETY: the buffers have the lengths of the shape, and live until the kernel has run.
    without_blocks(gpu, left_out, || unsafe {
        router_gemm_fwd_with(device, on, body, types, shape, buffers)
    })?;
    stream.synchronize().unwrap();
    Ok(logits)
}

/// The last logits of many tokens, against those of a few.
fn last_tokens(
    gpu: &Gpu,
    body: RouterGemmBody,
    num_tokens: usize,
    num_experts: usize,
    hidden: usize,
) {
    let (block_tokens, block_experts) = block(body);
    let x = values::<f16>(64 * hidden, 1.0, 1);
    let gate = gpu.stream.clone_htod(&values::<f16>(num_experts * hidden, 1.0, 2)).unwrap();
    let near_x = gpu.stream.clone_htod(&x).unwrap();
    let far_x = ending_in(gpu, num_tokens * hidden, &x);
    let shape = |num_tokens| RouterGemmShape { num_tokens, num_experts, hidden };
    let near = router_gemm(gpu, body, shape(64), &near_x, &gate, 0).unwrap();
    // The last block of tokens, with every expert.
    let left_out = (num_tokens / block_tokens - 1) * num_experts.div_ceil(block_experts);
    let far = router_gemm(gpu, body, shape(num_tokens), &far_x, &gate, left_out).unwrap();
    let count = block_tokens * num_experts;
    let near = end_of(gpu, &near, count);
    assert!(near.iter().all(|logit| logit.is_finite()));
    assert!(near.iter().any(|logit| logit.to_f32() != 0.0));
    let what = format!("{body:?} {num_tokens} {num_experts} {hidden}");
    assert_eq!(bits(&end_of(gpu, &far, count)), bits(&near), "{what}");
}

/// In vectors, and element by element.
#[test]
fn tokens_past_2_31_elements_are_multiplied() {
    let (gpu, _turn) = alone();
    for hidden in [2056, 2057] {
        assert!(((1 << 20) - 64) * hidden > LIMIT);
        for body in BODIES {
            last_tokens(&gpu, body, 1 << 20, 3, hidden);
        }
    }
}

#[test]
fn logits_past_2_31_elements_are_stored() {
    let (gpu, _turn) = alone();
    let (num_tokens, num_experts, hidden) = (LIMIT / 4096 + 64, 4096, 8);
    for body in [RouterGemmBody::Few, RouterGemmBody::Tile] {
        last_tokens(&gpu, body, num_tokens, num_experts, hidden);
    }
    // `one` has a block per logit, and a grid has at most 2^31 - 1 blocks.
    let shape = RouterGemmShape { num_tokens, num_experts, hidden };
    let small = gpu.stream.clone_htod(&[f16::ONE]).unwrap();
    let refused = router_gemm(&gpu, RouterGemmBody::One, shape, &small, &small, 0);
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
}

/// The last expert's row of the router gate, for one token.
#[test]
fn router_gates_past_2_31_elements_are_read() {
    let (gpu, _turn) = alone();
    let (experts, hidden) = (4096, (1 << 19) + 136);
    assert!((experts - 1) * hidden > LIMIT);
    let (x, row) = (values::<f16>(hidden, 0.1, 3), values::<f16>(hidden, 0.1, 4));
    let x = gpu.stream.clone_htod(&x).unwrap();
    let near_gate = gpu.stream.clone_htod(&row).unwrap();
    let far_gate = ending_in(&gpu, experts * hidden, &row);
    let shape = |num_experts| RouterGemmShape { num_tokens: 1, num_experts, hidden };
    for (body, left_out) in
        [(RouterGemmBody::One, experts - 1), (RouterGemmBody::Few, experts / 4 - 1)]
    {
        let near = router_gemm(&gpu, body, shape(1), &x, &near_gate, 0).unwrap();
        let far = router_gemm(&gpu, body, shape(experts), &x, &far_gate, left_out).unwrap();
        let near = gpu.download(&near.as_view());
        assert!(near[0].is_finite() && near[0].to_f32() != 0.0);
        assert_eq!(bits(&end_of(&gpu, &far, 1)), bits(&near), "{body:?}");
    }
}

/// The number of tokens that are checked.
const LAST: usize = 8;

/// The inputs of a router for the last tokens.
struct Read {
    logits: Vec<f16>,
    noise: Vec<f32>,
    active: Vec<u8>,
}

/// Ids and weights of the last tokens, of `num_tokens`.
fn route(
    gpu: &Gpu,
    shape: RoutingShape,
    router: &RouterConfig,
    plain: bool,
    read: &Read,
    left_out: usize,
) -> (Vec<u32>, Vec<u32>) {
    let logits = ending_in(gpu, shape.logits(), &read.logits);
    let noise = ending_in(gpu, shape.logits(), &read.noise);
    let active = ending_in(gpu, shape.num_tokens, &read.active);
    let (logits, noise, active) = (logits.as_view(), noise.as_view(), active.as_view());
    let mut inputs = RouteInputs::new(&logits);
    if !plain {
        inputs.noise = Some(&noise);
        // One buffer for both: two exceed the memory of the software device.
        inputs.noise_logits = Some(&logits);
        inputs.active = Some(&active);
    }
    route_inputs(gpu, shape, router, &inputs, left_out)
}

/// Ids and weights of the last tokens.
fn route_inputs(
    gpu: &Gpu,
    shape: RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, f16>,
    left_out: usize,
) -> (Vec<u32>, Vec<u32>) {
    let mut ids = ending_in::<u32>(gpu, shape.slots(), &[]);
    let mut weights = ending_in::<f32>(gpu, shape.slots(), &[]);
    without_blocks(gpu, left_out, || {
        let (ids, weights) = (&mut ids.as_view_mut(), &mut weights.as_view_mut());
        let (device, stream) = (&gpu.device, &gpu.stream);
        route_fwd_into(device, stream, shape, router, inputs, ids, weights).unwrap();
    });
    let count = LAST * shape.top_k;
    (end_of(gpu, &ids, count), bits(&end_of(gpu, &weights, count)))
}

/// Each body: a warp per token with few and with many experts, plain and with options, and a block
/// per token.
#[test]
fn logits_past_2_31_elements_are_routed() {
    let (gpu, _turn) = alone();
    let options = RouterConfig { scoring: Scoring::Sigmoid, scale: 1.5, ..RouterConfig::default() };
    for (num_experts, top_k, plain) in
        [(256, 4, true), (1024, 4, true), (256, 4, false), (1024, 4, false), (4096, 4, false)]
    {
        let num_tokens = LIMIT / num_experts + 2 * LAST;
        let len = LAST * num_experts;
        let read = Read {
            logits: values(len, 4.0, 1),
            noise: values(len, 1.0, 2),
            active: (0..LAST).map(|token| u8::from(token != 2)).collect(),
        };
        let router = if plain { RouterConfig::softmax_top_k(true) } else { options };
        let shape = |num_tokens| RoutingShape::new(num_tokens, num_experts, top_k).unwrap();
        assert!((num_tokens - LAST) * num_experts > LIMIT);
        let near = route(&gpu, shape(LAST), &router, plain, &read, 0);
        let block_tokens = if num_experts > 1024 { 1 } else { 4 };
        let left_out = (num_tokens - LAST) / block_tokens;
        let far = route(&gpu, shape(num_tokens), &router, plain, &read, left_out);
        assert!(near.0.iter().filter(|&&id| id < num_experts as u32).count() >= 7 * top_k);
        assert_eq!(far, near, "E{num_experts} K{top_k} plain: {plain}");
    }
}

/// The noise of each choice of sparsemixer in training, `[T, K, E]`, has more elements than the
/// logits. Each body that reads it.
#[test]
fn selection_noise_past_2_31_elements_is_read() {
    let (gpu, _turn) = alone();
    let scoring = Scoring::Sparsemixer { jitter: 0.5, training: true };
    let router = RouterConfig { scoring, ..RouterConfig::default() };
    for (num_experts, block_tokens) in [(256, 4), (1024, 4), (4096, 1)] {
        let shape = |num_tokens| RoutingShape::new(num_tokens, num_experts, 4).unwrap();
        let (last, num_tokens) = (shape(LAST), LIMIT / (4 * num_experts) + 2 * LAST);
        let logits = values::<f16>(last.logits(), 4.0, 1);
        let noise = values::<f32>(last.by_slot().logits(), 4.0, 2);
        let draws = values::<f32>(last.slots(), 1.0, 3);
        let run = |shape: RoutingShape, left_out| {
            let logits = ending_in(&gpu, shape.logits(), &logits);
            let noise = ending_in(&gpu, shape.by_slot().logits(), &noise);
            let draws = ending_in(&gpu, shape.slots(), &draws);
            let (logits, noise, draws) = (logits.as_view(), noise.as_view(), draws.as_view());
            let mut inputs = RouteInputs::new(&logits);
            (inputs.selection_noise, inputs.midpoint_draws) = (Some(&noise), Some(&draws));
            route_inputs(&gpu, shape, &router, &inputs, left_out)
        };
        assert!(shape(num_tokens - LAST).by_slot().logits() > LIMIT);
        let near = run(last, 0);
        assert!(near.0.iter().all(|&id| id < num_experts as u32));
        let far = run(shape(num_tokens), (num_tokens - LAST) / block_tokens);
        assert_eq!(far, near, "E{num_experts}");
    }
}

/// For logits that are read in vectors, and element by element.
#[test]
fn scores_past_2_31_elements_are_stored() {
    let (gpu, _turn) = alone();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let router = RouterConfig { scoring: Scoring::Sigmoid, ..RouterConfig::default() };
    for num_experts in [256, 257] {
        let shape = |num_tokens| RoutingShape::new(num_tokens, num_experts, 1).unwrap();
        let (last, num_tokens) = (shape(LAST), LIMIT / num_experts + 2 * LAST);
        let logits = values::<f16>(last.logits(), 4.0, 1);
        let active: Vec<u8> = (0..LAST).map(|token| u8::from(token != 2)).collect();
        let run = |shape: RoutingShape, left_out| {
            let logits = ending_in(&gpu, shape.logits(), &logits);
            let active = ending_in(&gpu, shape.num_tokens, &active);
            let (logits, active) = (logits.as_view(), active.as_view());
            let mut inputs = RouteInputs::new(&logits);
            inputs.active = Some(&active);
            let mut scores = ending_in::<f32>(&gpu, shape.logits(), &[]);
            without_blocks(&gpu, left_out, || {
                let (step, to) = (RouterStep::Scores, &mut scores.as_view_mut());
                route_scores_fwd_into(device, stream, shape, &router, step, &inputs, to).unwrap();
            });
            end_of(&gpu, &scores, last.logits())
        };
        assert!(shape(num_tokens - LAST).logits() > LIMIT);
        let near = run(last, 0);
        let positive = near.iter().filter(|&&score| score > 0.0).count();
        assert_eq!(positive, (LAST - 1) * num_experts, "all but the inactive token's");
        let far = run(shape(num_tokens), (num_tokens - LAST) / 4);
        assert_eq!(bits(&far), bits(&near), "E{num_experts}");
    }
}

/// A table of ids by token id.
#[test]
fn tables_past_2_31_elements_are_read() {
    let (gpu, _turn) = alone();
    let (experts, top_k) = (64, 8);
    let table_rows = LIMIT / top_k + 16;
    let rows: Vec<u32> = (0..4 * top_k as u32).map(|i| i * 37 % 64).collect();
    let shape = RoutingShape::new(4, experts, top_k).unwrap();
    let logits = gpu.upload(&values::<f32>(shape.logits(), 2.0, 1));
    let router = RouterConfig { selection: Selection::Given, ..RouterConfig::default() };
    // The last rows, and one past the end, not in the order of the tokens.
    let routed = |table: &CudaSlice<u32>| {
        let len = table.len() / top_k;
        let tokens: Vec<u32> = [1, 4, 0, 2].iter().map(|back| (len - back) as u32).collect();
        let (logits, token_ids) = (logits.view(), gpu.upload(&tokens));
        let (table, token_ids) = (table.as_view(), token_ids.view());
        let mut inputs = RouteInputs::new(&logits);
        (inputs.given_ids, inputs.token_ids) = (Some(&table), Some(&token_ids));
        let mut ids = gpu.poisoned::<u32>(shape.slots());
        let mut weights = gpu.poisoned::<f32>(shape.slots());
        let to = (&mut ids.view_mut(), &mut weights.view_mut());
        route_fwd_into(&gpu.device, &gpu.stream, shape, &router, &inputs, to.0, to.1).unwrap();
        (gpu.download(&ids.view()), bits(&gpu.download(&weights.view())))
    };
    let near = routed(&gpu.stream.clone_htod(&rows).unwrap());
    let wanted = [&rows[24..], &rows[..8], &[u32::MAX; 8], &rows[16..24]].concat();
    assert_eq!(near.0, wanted);
    assert_eq!(routed(&ending_in(&gpu, table_rows * top_k, &rows)), near);
}
