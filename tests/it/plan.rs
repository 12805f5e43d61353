//! plan: integers, so device and reference agree bit for bit.

use std::ops::Range;

use moe_kernels::ops::combine::{self, CombineInputs};
use moe_kernels::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_fwd};
use moe_kernels::ops::plan::{self, PlanBuffers};
use moe_kernels::{Error, PlanLayout, RoutingPlan, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Rng, Skew, config, gpu, routing_ids, skew};

/// The poison of memory. Not 0xff: four of those are the -1 that a plan writes.
const POISON: u8 = 0x55;

/// All parts of a plan.
#[derive(Debug, Clone, PartialEq)]
struct Parts {
    expert_offsets: Vec<i32>,
    row_of_slot: Vec<i32>,
    token_of_row: Vec<i32>,
    tiles: Vec<i32>,
    num_tiles: Vec<i32>,
}

impl Parts {
    fn download(gpu: &Gpu, plan: &RoutingPlan<'_>) -> Self {
        Self {
            expert_offsets: gpu.download(&plan.expert_offsets()),
            row_of_slot: gpu.download(&plan.row_of_slot()),
            token_of_row: gpu.download(&plan.token_of_row()),
            tiles: gpu.download(&plan.tiles()),
            num_tiles: gpu.download(&plan.num_tiles()),
        }
    }

    fn reference(shape: RoutingShape, ids: &[u32]) -> Self {
        Self::reference_of(shape, 0..shape.num_experts, ids)
    }

    fn reference_of(shape: RoutingShape, experts: Range<usize>, ids: &[u32]) -> Self {
        let layout = PlanLayout::of_experts(shape, experts.clone()).unwrap();
        let want = reference::plan_range_fwd(&shape, experts, ids).unwrap();
        let list =
            want.tiles.iter().flat_map(|tile| [tile.expert, tile.first_row, tile.num_rows, 0]);
        let mut tiles: Vec<i32> = list.collect();
        tiles.resize(4 * layout.max_tiles(), 0);
        Self {
            num_tiles: vec![want.tiles.len() as i32],
            expert_offsets: want.expert_offsets,
            row_of_slot: want.row_of_slot,
            token_of_row: want.token_of_row,
            tiles,
        }
    }
}

/// Plans in poisoned memory and checks the result against the reference.
fn check(gpu: &Gpu, shape: RoutingShape, ids: &[u32], what: &str) -> Parts {
    let mut memory = gpu.upload(&vec![POISON; PlanLayout::new(shape).unwrap().bytes()]);
    let uploaded = gpu.upload(ids);
    let plan = plan::plan_fwd_into(
        &gpu.device,
        &gpu.stream,
        shape,
        Some(&uploaded.view()),
        memory.view_mut(),
    )
    .unwrap();
    assert_eq!(plan.shape(), shape);
    let got = Parts::download(gpu, &plan);
    assert_eq!(got, Parts::reference(shape, ids), "{shape} {what}");
    got
}

/// The same for some of the experts.
fn check_range(gpu: &Gpu, shape: RoutingShape, experts: Range<usize>, ids: &[u32], what: &str) {
    let layout = PlanLayout::of_experts(shape, experts.clone()).unwrap();
    let mut memory = gpu.upload(&vec![POISON; layout.bytes()]);
    let uploaded = gpu.upload(ids);
    let plan = plan::plan_range_fwd_into(
        &gpu.device,
        &gpu.stream,
        shape,
        experts.clone(),
        &uploaded.view(),
        memory.view_mut(),
    )
    .unwrap();
    assert_eq!((plan.experts(), plan.shape()), (experts.clone(), layout.shape()));
    let want = Parts::reference_of(shape, experts.clone(), ids);
    assert_eq!(Parts::download(gpu, &plan), want, "{shape} {experts:?} {what}");
}

proptest! {
    #![proptest_config(config(64))]

    /// Some of the experts, one block and more, with ids of any bits among the others'.
    #[test]
    fn ranges_match_reference(
        tokens in 0usize..600, experts in 1usize..80, k in 1usize..5, ends in any::<(u64, u64)>(),
        skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let first = ends.0 as usize % experts;
        let range = first..first + 1 + ends.1 as usize % (experts - first);
        let mut ids = routing_ids(shape, skew, seed);
        let mut rng = Rng::new(seed);
        let bits = [u32::MAX, first as u32 | 1 << 31, (first as u32).wrapping_sub(1)];
        ids.iter_mut().skip(1).step_by(7).for_each(|id| *id = bits[rng.below(3)]);
        let gpu = gpu();
        gpu.reschedule(seed);
        check_range(&gpu, shape, range, &ids, &format!("{skew:?} seed {seed}"));
    }

    #[test]
    fn matches_reference(
        tokens in 0usize..300, experts in 1usize..80, k in 1usize..9, skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let gpu = gpu();
        gpu.reschedule(seed);
        check(&gpu, shape, &routing_ids(shape, skew, seed), &format!("{skew:?} seed {seed}"));
    }

    /// Ids may repeat within a token, and have any bits.
    #[test]
    fn any_ids_match_reference(tokens in 0usize..600, experts in 1usize..40, k in 1usize..5, seed in any::<u64>()) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let mut rng = Rng::new(seed);
        let ids: Vec<u32> = (0..shape.slots())
            .map(|_| if rng.below(4) == 0 { rng.next() as u32 } else { rng.below(experts) as u32 })
            .collect();
        let gpu = gpu();
        gpu.reschedule(seed);
        check(&gpu, shape, &ids, &format!("seed {seed}"));
    }
}

/// The sizes at which the division of work changes: groups of 32, blocks, tiles, and the number of
/// warps whose counters fit.
#[test]
fn matches_reference_at_limits() {
    let gpu = gpu();
    let shapes = [
        (0, 1, 1),
        (0, 4096, 8),
        (1, 1, 1),
        (1, 4096, 4096),
        (31, 2, 1),
        (32, 2, 1),
        (33, 2, 1),
        (127, 1, 1),
        (128, 1, 1),
        (129, 1, 1),
        (1023, 3, 1),
        (1024, 3, 1),
        (1025, 3, 1),
        (512, 1500, 2),
        (513, 1501, 2),
        (300, 4096, 8),
        (1100, 4096, 8), // More than two steps of the scan.
        (2049, 33, 1),
        (1000, 257, 3),
    ];
    for (t, e, k) in shapes {
        let shape = RoutingShape::new(t, e, k).unwrap();
        for skew in [Skew::Uniform, Skew::OneHot, Skew::Inactive] {
            if k > 64 && skew != Skew::Uniform {
                continue; // Drawing so many ids without repeats is slow.
            }
            check(&gpu, shape, &routing_ids(shape, skew, 11), &format!("{skew:?}"));
        }
        check(&gpu, shape, &vec![e as u32 - 1; shape.slots()], "all to the last expert");
        check(&gpu, shape, &vec![e as u32; shape.slots()], "all inactive");
        check(&gpu, shape, &vec![u32::MAX; shape.slots()], "all inactive");
    }
}

/// More slots than the most blocks of the least size have, so that blocks are larger.
#[test]
fn many_slots_match_reference() {
    let gpu = gpu();
    let shape = RoutingShape::new(70_000, 5, 2).unwrap();
    let mut rng = Rng::new(1);
    let ids: Vec<u32> = (0..shape.slots()).map(|_| rng.below(6) as u32).collect();
    check(&gpu, shape, &ids, "many slots");
}

/// The ranks of expert parallelism: each has the plan, the weights and the rows of its own experts,
/// and their results add up to the layer's. Integers, so that every sum is exact in any order.
#[test]
fn ranges_add_up_to_the_layer() {
    let gpu = gpu();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let (hidden, n) = (24, 40);
    let shape = RoutingShape::new(70, 6, 3).unwrap();
    let ids = routing_ids(shape, Skew::Inactive, 4);
    let mut rng = Rng::new(9);
    let mut integers =
        |len: usize| -> Vec<f32> { (0..len).map(|_| rng.below(9) as f32 - 4.0).collect() };
    let (x, w) = (integers(shape.num_tokens * hidden), integers(6 * n * hidden));
    let mut weights = integers(shape.slots());
    for (weight, &id) in weights.iter_mut().zip(&ids) {
        if id >= 6 {
            *weight = f32::NAN; // unused
        }
    }
    let (ids, x, weights) = (gpu.upload(&ids), gpu.upload(&x), gpu.upload(&weights));
    let part = |experts: Range<usize>| -> Vec<f32> {
        let w = gpu.upload(&w[experts.start * n * hidden..experts.end * n * hidden]);
        let plan = plan::plan_range_fwd(device, stream, shape, experts, &ids.view()).unwrap();
        let rows = plan.shape().num_experts;
        let rows = gpu.download(&plan.expert_offsets())[rows] as usize;
        let (x, w) = (x.view(), w.view());
        let yp = grouped_gemm_fwd(
            device,
            stream,
            &plan,
            n,
            hidden,
            Rows::Gathered,
            &x,
            LinearWeights::new(&w),
        );
        // Unused rows are ignored, NaN included.
        let mut yp = gpu.download(&yp.unwrap().as_view());
        assert!(yp[rows * n..].iter().all(|&y| y == 0.0));
        yp[rows * n..].fill(f32::NAN);
        let yp = gpu.upload(&yp);
        let mut y = gpu.poisoned::<f32>(shape.num_tokens * n);
        let (yp, weights) = (yp.view(), weights.view());
        let inputs = CombineInputs::new(&yp, &weights);
        combine::combine_fwd_into(device, stream, &plan, n, &inputs, &mut y.view_mut()).unwrap();
        gpu.download(&y.view())
    };
    let whole = part(0..6);
    assert!(whole.iter().all(|y| y.is_finite()) && whole.iter().any(|&y| y != 0.0));
    for ranks in [vec![0..3, 3..6], vec![0..1, 1..2, 2..5, 5..6]] {
        let mut sum = vec![0f32; whole.len()];
        for experts in ranks {
            sum.iter_mut().zip(part(experts)).for_each(|(sum, y)| *sum += y);
        }
        assert_eq!(sum, whole);
    }
}

#[test]
fn missing_ids_are_zeros() {
    let gpu = gpu();
    for tokens in [0, 1, 200, 3000] {
        let shape = RoutingShape::new(tokens, 1, 1).unwrap();
        let mut memory = gpu.upload(&vec![POISON; PlanLayout::new(shape).unwrap().bytes()]);
        let plan =
            plan::plan_fwd_into(&gpu.device, &gpu.stream, shape, None, memory.view_mut()).unwrap();
        assert_eq!(
            Parts::download(&gpu, &plan),
            Parts::reference(shape, &vec![0; tokens]),
            "T{tokens}"
        );
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    for tokens in [200, 800] {
        let shape = RoutingShape::new(tokens, 17, 3).unwrap();
        let ids = routing_ids(shape, Skew::Zipf, 5);
        for seed in 0..10 {
            gpu.reschedule(seed);
            check(&gpu, shape, &ids, &format!("schedule {seed}"));
        }
    }
}

#[test]
fn memory_and_ids_may_start_inside_a_buffer() {
    let gpu = gpu();
    let shape = RoutingShape::new(50, 6, 2).unwrap();
    let ids = routing_ids(shape, Skew::Inactive, 8);
    let uploaded = gpu.upload(&[&[9u32; 3], &ids[..]].concat());
    let bytes = PlanLayout::new(shape).unwrap().bytes();
    let mut memory = gpu.upload(&vec![POISON; bytes + 32]);
    {
        let mut whole = memory.view_mut();
        let (mut before, after) = whole.split_at_mut(16);
        let view = uploaded.view();
        let plan =
            plan::plan_fwd_into(&gpu.device, &gpu.stream, shape, Some(&view.slice(3..)), after)
                .unwrap();
        assert_eq!(Parts::download(&gpu, &plan), Parts::reference(shape, &ids));
        assert!(gpu.download(&before.slice_mut(..).as_view()).iter().all(|&byte| byte == POISON));
    }
    let end = gpu.download(&memory.view().slice(16 + bytes..));
    assert_eq!(end, [POISON; 16], "what lies behind the plan is left alone");
}

#[test]
fn allocating_form_agrees() {
    let gpu = gpu();
    let shape = RoutingShape::new(40, 7, 2).unwrap();
    let ids = routing_ids(shape, Skew::Empty, 2);
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &gpu.upload(&ids).view()).unwrap();
    assert_eq!(Parts::download(&gpu, &plan), Parts::reference(shape, &ids));
}

#[test]
fn errors_come_before_any_launch() {
    let gpu = gpu();
    let shape = RoutingShape { num_tokens: 4, num_experts: 8, top_k: 2 };
    let bytes = PlanLayout::new(shape).unwrap().bytes();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let mut memory = gpu.upload(&vec![POISON; bytes]);
    let mut call = |shape: RoutingShape, ids_len: usize, start: usize, end: usize| {
        let (ids, mut memory) = (ids.view(), memory.view_mut());
        let (_, mut memory) = memory.split_at_mut(start);
        let (memory, _) = memory.split_at_mut(end - start);
        plan::plan_fwd_into(&gpu.device, &gpu.stream, shape, Some(&ids.slice(..ids_len)), memory)
            .map(|_| ())
    };
    let length =
        |argument, wanted, got| Err(Error::Length { op: "plan_fwd", argument, wanted, got });
    assert_eq!(call(shape, 7, 0, bytes), length("expert_ids", 8, 7));
    assert_eq!(call(shape, 8, 0, bytes - 1), length("memory", bytes, bytes - 1));
    for wrong in [
        RoutingShape { top_k: 9, ..shape },
        RoutingShape { num_experts: 4097, ..shape },
        RoutingShape { num_tokens: 1 << 31, ..shape },
    ] {
        assert!(matches!(call(wrong, 8, 0, bytes), Err(Error::Unsupported { .. })), "{wrong:?}");
    }
    for wrong in [3..3, 7..9] {
        let range = plan::plan_range_fwd(&gpu.device, &gpu.stream, shape, wrong, &ids.view());
        assert!(matches!(range, Err(Error::Unsupported { argument: "experts", .. })));
    }
    // One token less needs less memory, so that the view can start later.
    let smaller = RoutingShape { num_tokens: 0, ..shape };
    let misaligned = call(smaller, 0, 4, bytes);
    assert!(
        matches!(misaligned, Err(Error::Alignment { op: "plan_fwd", argument: "plan", .. })),
        "{misaligned:?}"
    );
    assert!(call(shape, 8, 0, bytes).is_ok());

    let layout = PlanLayout::new(shape).unwrap();
    let buffers = PlanBuffers { plan: 256, expert_ids: 255 };
    // SAFETY: the call fails before it launches anything.
    let result =
        unsafe { plan::plan_fwd_raw(&gpu.device, gpu.stream.cu_stream(), &layout, buffers) };
    assert!(matches!(result, Err(Error::Alignment { argument: "expert_ids", .. })), "{result:?}");
}
