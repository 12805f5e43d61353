//! permute: it is a copy, so the device matches the reference bit for bit.

use half::{bf16, f16};
use moe_kernels::ops::permute::PermuteBuffers;
use moe_kernels::ops::{permute, plan};
use moe_kernels::{DType, Dtype, Error, RoutingShape, reference};
use proptest::prelude::*;

use crate::common::{Gpu, Skew, bits, config, gpu, routing_ids, skew, values};

/// Runs the operation on `x` and checks it against the reference; returns the bits of the result.
fn check<D: Dtype>(
    gpu: &Gpu,
    shape: RoutingShape,
    skew: Skew,
    hidden: usize,
    seed: u64,
) -> Vec<u32> {
    let ids = routing_ids(shape, skew, seed);
    let x = values::<D>(shape.num_tokens * hidden, 4.0, seed ^ 1);
    let want = {
        let plan = reference::plan_fwd(&shape, &ids).unwrap();
        reference::permute_fwd(&shape, &plan, hidden, &x).unwrap()
    };
    let (ids, x) = (gpu.upload(&ids), gpu.upload(&x));
    let mut xp = gpu.poisoned::<D>(shape.slots() * hidden);
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    permute::permute_fwd_into(
        &gpu.device,
        &gpu.stream,
        &plan,
        hidden,
        &x.view(),
        &mut xp.view_mut(),
    )
    .unwrap();
    let got = bits(&gpu.download(&xp.view()));
    assert_eq!(got, bits(&want), "{shape} H{hidden} {skew:?} {} seed {seed}", D::DTYPE);
    got
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn matches_reference(
        tokens in 0usize..40, experts in 1usize..20, k in 1usize..5, hidden in 1usize..300,
        skew in skew(), seed in any::<u64>(),
    ) {
        let shape = RoutingShape::new(tokens, experts, k.min(experts)).unwrap();
        let gpu = gpu();
        gpu.reschedule(seed);
        check::<f32>(&gpu, shape, skew, hidden, seed);
        check::<f16>(&gpu, shape, skew, hidden, seed);
        check::<bf16>(&gpu, shape, skew, hidden, seed);
    }
}

#[test]
fn edge_shapes_match_reference() {
    let gpu = gpu();
    for (t, e, k, hidden) in [
        (0, 4, 2, 16),
        (1, 1, 1, 1),
        (1, 8, 8, 8),
        (5, 1, 1, 2048),
        (3, 3, 3, 2049),
        (7, 64, 6, 4104),
    ] {
        let shape = RoutingShape::new(t, e, k).unwrap();
        for skew in [Skew::Uniform, Skew::OneHot, Skew::Inactive] {
            check::<bf16>(&gpu, shape, skew, hidden, 9);
        }
    }
}

#[test]
fn schedules_do_not_change_bits() {
    let gpu = gpu();
    let shape = RoutingShape::new(33, 9, 3).unwrap();
    let runs: Vec<_> = (0..12)
        .map(|seed| {
            gpu.reschedule(seed);
            check::<f16>(&gpu, shape, Skew::Zipf, 72, 5)
        })
        .collect();
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn accepts_views_at_any_offset() {
    let gpu = gpu();
    let (shape, hidden) = (RoutingShape::new(11, 5, 2).unwrap(), 64);
    let ids = routing_ids(shape, Skew::Uniform, 3);
    let reference = reference::plan_fwd(&shape, &ids).unwrap();
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &gpu.upload(&ids).view()).unwrap();
    for (x_offset, xp_offset) in [(1, 3), (1, 0), (0, 3)] {
        let x = values::<bf16>(shape.num_tokens * hidden + x_offset, 1.0, 4);
        let want = reference::permute_fwd(&shape, &reference, hidden, &x[x_offset..]).unwrap();
        let x = gpu.upload(&x);
        let mut xp = gpu.poisoned::<bf16>(shape.slots() * hidden + xp_offset);

        permute::permute_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            hidden,
            &x.view().slice(x_offset..),
            &mut xp.view_mut().slice_mut(xp_offset..),
        )
        .unwrap();
        let got = gpu.download(&xp.view());
        assert_eq!(bits(&got[xp_offset..]), bits(&want));
        assert!(got[..xp_offset].iter().all(|value| value.is_nan()), "writes before the view");
    }
}

#[test]
fn rejects_misaligned_addresses() {
    let gpu = gpu();
    let shape = RoutingShape::new(1, 4, 2).unwrap();
    let good = PermuteBuffers { xp: 256, x: 256, row_of_slot: 256, expert_offsets: 256 };
    for (argument, buffers) in [
        ("xp", PermuteBuffers { xp: 257, ..good }),
        ("x", PermuteBuffers { x: 257, ..good }),
        ("row_of_slot", PermuteBuffers { row_of_slot: 258, ..good }),
        ("expert_offsets", PermuteBuffers { expert_offsets: 258, ..good }),
    ] {
        // SAFETY: the call fails before it launches anything.
        let result = unsafe {
            permute::permute_fwd_raw(
                &gpu.device,
                gpu.stream.cu_stream(),
                DType::F16,
                shape,
                8,
                buffers,
            )
        };
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
}

#[test]
fn rejects_invalid_arguments_before_the_launch() {
    let gpu = gpu();
    let shape = RoutingShape::new(4, 4, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let x = gpu.upload(&values::<f32>(4 * 8, 1.0, 0));
    let mut xp = gpu.poisoned::<f32>(8 * 8);
    let mut call = |hidden: usize, x_len: usize, xp_len: usize| {
        permute::permute_fwd_into(
            &gpu.device,
            &gpu.stream,
            &plan,
            hidden,
            &x.view().slice(..x_len),
            &mut xp.view_mut().slice_mut(..xp_len),
        )
    };
    assert_eq!(
        call(8, 31, 64),
        Err(Error::Length { op: "permute_fwd", argument: "x", wanted: 32, got: 31 })
    );
    assert_eq!(
        call(8, 32, 63),
        Err(Error::Length { op: "permute_fwd", argument: "xp", wanted: 64, got: 63 })
    );
    assert!(matches!(call(usize::MAX, 32, 64), Err(Error::Unsupported { op: "permute_fwd", .. })));
    assert!(call(8, 32, 64).is_ok());
}
