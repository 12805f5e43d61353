//! Plans with arbitrary contents: the kernels that write the plan were captured but not executed,
//! or another launch writes the plan at the same time. Results are undefined, but no kernel
//! accesses memory outside its buffers.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream};
use half::{bf16, f16};
use moe_kernels::ops::combine::{self, CombineInputs, Identity};
use moe_kernels::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd, grouped_gemm_gate_up_fwd,
    grouped_gemm_weighted_fwd,
};
use moe_kernels::ops::rms_norm::RmsNormInputs;
use moe_kernels::ops::{capacity, permute, plan, rms_norm};
use moe_kernels::{
    CapacityConfig, CapacityLimit, DType, Device, Dtype, ExpertConfig, PlanLayout, Priority,
    RmsNorm, RoutingPlan, RoutingShape, WeightOrder, WeightPosition,
};

use crate::common::{Gpu, Rng, gpu, values};

/// A context without event tracking, as captures require.
fn untracked() -> (Gpu, Arc<CudaContext>) {
    let emulated = gpu().emulated;
    let context = CudaContext::new(0).unwrap();
    // SAFETY: streams share buffers only where a test intends it; buffers are freed after both have
    // finished.
    unsafe { context.disable_event_tracking() };
    let (device, stream) = (Device::new(&context).unwrap(), context.new_stream().unwrap());
    device.warm_up(DType::F32).unwrap();
    (Gpu { device, stream, emulated }, context)
}

fn captured(stream: &Arc<CudaStream>, record: impl FnOnce()) -> CudaGraph {
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    record();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    stream.end_capture(flags).unwrap().unwrap()
}

/// The bytes of a plan: any bits, or numbers near the sizes that kernels compare them with.
fn contents(layout: &PlanLayout, rng: &mut Rng) -> Vec<u8> {
    let shape = layout.shape();
    let sizes = [0, shape.num_tokens, shape.slots(), shape.num_experts, layout.max_tiles(), 128];
    let wild = rng.below(3) == 0;
    let number = |rng: &mut Rng| -> u32 {
        if wild || rng.below(8) == 0 {
            return rng.next() as u32;
        }
        (sizes[rng.below(sizes.len())] as u32).wrapping_add(rng.below(5) as u32).wrapping_sub(2)
    };
    (0..layout.bytes().div_ceil(4)).flat_map(|_| number(rng).to_le_bytes()).collect()
}

/// Calls every operation that reads a plan, and adds failures to the list.
fn call_operations<D: Dtype>(
    gpu: &Gpu,
    plan: &RoutingPlan<'_>,
    seed: u64,
    failures: &mut Vec<String>,
) {
    let (device, stream, shape) = (&gpu.device, &gpu.stream, plan.shape());
    let (tokens, slots, experts) = (shape.num_tokens, shape.slots(), shape.num_experts);
    // Rows of 256 bytes: a row past the end of a buffer is outside its allocation.
    let width = 256 / size_of::<D>();
    let mut finish = |what: &str| {
        if let Err(error) = stream.synchronize() {
            failures.push(format!("{what} of {shape} seed {seed}: {error:?}"));
            if gpu.emulated {
                moe_emulator::clear_errors();
            }
        }
    };
    let of_tokens = gpu.upload(&values::<D>(tokens * width, 1.0, seed));
    let of_rows = gpu.upload(&values::<D>(slots * width, 1.0, seed));
    let weights = gpu.upload(&values::<f32>(slots, 1.0, seed));
    let (x, rows, weights) = (of_tokens.view(), of_rows.view(), weights.view());

    permute::permute_fwd(device, stream, plan, width, &x).unwrap();
    finish("permute");
    let norm = RmsNorm { epsilon: 0.0, offset: 0.0, scale_first: false };
    let inputs = RmsNormInputs { plan: Some(plan), ..RmsNormInputs::default() };
    rms_norm::rms_norm_fwd(device, stream, &norm, width, &rows, &inputs).unwrap();
    finish("rms_norm");
    let ids = gpu.upload(&vec![experts as u32; slots]);
    let ids = ids.view();
    let identity = 0..experts as u32 + 1;
    let identity = Identity { experts: identity, expert_ids: &ids, x: &x, routing_weights: None };
    for identity in [None, Some(identity)] {
        let inputs = CombineInputs { identity, ..CombineInputs::new(&rows, &weights) };
        combine::combine_fwd(device, stream, plan, width, &inputs).unwrap();
        finish("combine");
    }
    let w = gpu.upload(&values::<D>(experts * width * width, 0.1, seed));
    let both = gpu.upload(&values::<D>(experts * 2 * width * width, 0.1, seed));
    let bias = gpu.upload(&values::<D>(experts * width, 0.1, seed));
    let (w, both, bias) = (w.view(), both.view(), bias.view());
    for order in [WeightOrder::OutIn, WeightOrder::InOut] {
        for (from, x) in [(Rows::Gathered, &x), (Rows::Grouped, &rows)] {
            let linear = LinearWeights { order, bias: Some(&bias), ..LinearWeights::new(&w) };
            grouped_gemm_fwd(device, stream, plan, width, width, from, x, linear).unwrap();
            finish("grouped_gemm");
            if D::DTYPE == DType::F16 {
                grouped_gemm_weighted_fwd(
                    device, stream, plan, width, width, from, x, linear, &weights,
                )
                .unwrap();
                finish("weighted grouped_gemm");
            }
            for weight_position in [WeightPosition::Output, WeightPosition::Input] {
                let config =
                    ExpertConfig { gate_up_order: order, weight_position, ..Default::default() };
                let weights = (weight_position == WeightPosition::Input).then_some(&weights);
                let gate_up = GateUpWeights::fused(&both);
                grouped_gemm_gate_up_fwd(
                    device, stream, plan, &config, width, width, from, x, gate_up, weights,
                )
                .unwrap();
                finish("gate_up");
            }
        }
    }
}

/// Calls both operations of capacity for each priority, with a plan of slots.
fn call_capacity(
    gpu: &Gpu,
    plan: &RoutingPlan<'_>,
    shape: RoutingShape,
    seed: u64,
    failures: &mut Vec<String>,
) {
    let (device, stream) = (&gpu.device, &gpu.stream);
    let weights = gpu.upload(&values::<f32>(shape.slots(), 1.0, seed));
    for priority in
        [Priority::Token, Priority::Choice, Priority::Weight, Priority::ChoiceByTopWeight]
    {
        let config = CapacityConfig::new(CapacityLimit::Rows { rows: 3 }, priority);
        let (weights, sequence) = (weights.view(), Some(20));
        let mut made =
            capacity::capacity_fwd(device, stream, plan, shape, &config, sequence, &weights)
                .unwrap();
        capacity::capacity_later_fwd_into(
            device,
            stream,
            plan,
            shape,
            &config,
            sequence,
            &weights,
            &mut made.expert_ids.as_view_mut(),
            &mut made.kept.as_view_mut(),
            &mut made.dropped.as_view_mut(),
        )
        .unwrap();
        if let Err(error) = stream.synchronize() {
            failures.push(format!("capacity of {shape} {priority:?} seed {seed}: {error:?}"));
            if gpu.emulated {
                moe_emulator::clear_errors();
            }
        }
    }
}

#[test]
fn operations_stay_in_bounds_with_any_plan() {
    let (gpu, _context) = untracked();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let mut failures = Vec::new();
    for seed in 0..24 {
        let rng = &mut Rng::new(seed);
        gpu.reschedule(seed);
        let experts = 1 + rng.below(5);
        let shape = RoutingShape::new(1 + rng.below(150), experts, 1 + rng.below(experts)).unwrap();
        for shape in [shape, shape.by_slot()] {
            let layout = PlanLayout::new(shape).unwrap();
            let ids = gpu.upload(&vec![0u32; shape.slots()]);
            let mut memory = gpu.upload(&contents(&layout, rng));
            let mut made = None;
            let graph = captured(stream, || {
                let (ids, memory) = (ids.view(), memory.view_mut());
                made =
                    Some(plan::plan_fwd_into(device, stream, shape, Some(&ids), memory).unwrap());
            });
            drop(graph);
            let plan = made.unwrap();
            call_operations::<f32>(&gpu, &plan, seed, &mut failures);
            call_operations::<bf16>(&gpu, &plan, seed, &mut failures);
            call_operations::<f16>(&gpu, &plan, seed, &mut failures);
        }
        let by_slot = shape.by_slot();
        let mut memory = gpu.upload(&contents(&PlanLayout::new(by_slot).unwrap(), rng));
        let ids = gpu.upload(&vec![0u32; by_slot.slots()]);
        let mut made = None;
        captured(stream, || {
            let (ids, memory) = (ids.view(), memory.view_mut());
            made = Some(plan::plan_fwd_into(device, stream, by_slot, Some(&ids), memory).unwrap());
        });
        call_capacity(&gpu, &made.unwrap(), shape, seed, &mut failures);
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// A graph that writes a plan is replayed on one stream while another stream overwrites the plan.
#[test]
fn plan_kernels_stay_in_bounds_while_their_memory_changes() {
    let (gpu, context) = untracked();
    let other = context.new_stream().unwrap();
    // One block of slots, for which a plan has a single launch, and several blocks.
    for slots in [300, 3000] {
        let shape = RoutingShape::new(slots, 7, 1).unwrap();
        let layout = PlanLayout::new(shape).unwrap();
        let ids: Vec<u32> = (0..slots as u32).map(|slot| slot % 8).collect();
        let ids = gpu.upload(&ids);
        let mut memory = gpu.upload(&vec![0u8; layout.bytes()]);
        let graph = captured(&gpu.stream, || {
            let (ids, memory) = (ids.view(), memory.view_mut());
            plan::plan_fwd_into(&gpu.device, &gpu.stream, shape, Some(&ids), memory).unwrap();
        });
        for seed in 1..48 {
            gpu.reschedule(seed);
            let bytes = contents(&layout, &mut Rng::new(seed));
            graph.launch().unwrap();
            other.memcpy_htod(&bytes[..layout.bytes()], &mut memory.view_mut()).unwrap();
            let finished = [gpu.stream.synchronize(), other.synchronize()];
            assert!(finished.iter().all(Result::is_ok), "{slots} slots, seed {seed}: {finished:?}");
        }
    }
}
