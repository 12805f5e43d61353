//! combine: errors name the argument, and come before any launch.

use moe_kernels::ops::combine::{
    self, CombineBuffers, CombineInputs, CombineOptions, Identity, Shared,
};
use moe_kernels::ops::plan;
use moe_kernels::{DType, Error, RoutingShape};

use crate::common::{Skew, gpu, routing_ids, values};

#[test]
fn rejects_invalid_arguments_before_the_launch() {
    let gpu = gpu();
    let shape = RoutingShape::new(4, 4, 2).unwrap();
    let ids = gpu.upload(&routing_ids(shape, Skew::Uniform, 0));
    let plan = plan::plan_fwd(&gpu.device, &gpu.stream, shape, &ids.view()).unwrap();
    let values = gpu.upload(&values::<f32>(8 * 8, 1.0, 0));
    let mut y = gpu.poisoned::<f32>(4 * 8);
    let mut call = |hidden: usize, lens: [usize; 8]| {
        let values = values.view();
        let [yp, weights, x, output_bias, shared, gate] =
            [0, 1, 4, 5, 6, 7].map(|at| values.slice(..lens[at]));
        let ids = ids.view();
        let ids = ids.slice(..lens[3]);
        let inputs = CombineInputs {
            yp: &yp,
            routing_weights: Some(&weights),
            identity: Some(Identity {
                experts: 4..6,
                expert_ids: &ids,
                x: &x,
                routing_weights: None,
            }),
            output_bias: Some(&output_bias),
            shared: Some(Shared { y: &shared, gate: Some(&gate), average: true }),
        };
        let y = &mut y.view_mut();
        let y = &mut y.slice_mut(..lens[2]);
        combine::combine_fwd_into(&gpu.device, &gpu.stream, &plan, hidden, &inputs, y)
    };
    let good = [64, 8, 32, 8, 32, 8, 32, 4];
    for (at, argument) in
        ["yp", "routing_weights", "y", "expert_ids", "x", "output_bias", "shared.y", "shared.gate"]
            .into_iter()
            .enumerate()
    {
        let mut lens = good;
        lens[at] -= 1;
        let (wanted, got) = (good[at], lens[at]);
        let error = Err(Error::Length { op: "combine_fwd", argument, wanted, got });
        assert_eq!(call(8, lens), error);
    }
    assert!(matches!(call(usize::MAX, good), Err(Error::Unsupported { op: "combine_fwd", .. })));
    assert!(call(8, good).is_ok());
    let none = call(0, [0, 8, 0, 8, 0, 0, 0, 4]);
    assert!(matches!(none, Err(Error::Unsupported { argument: "hidden", .. })));
}

#[test]
fn rejects_invalid_raw_arguments() {
    let gpu = gpu();
    let shape = RoutingShape::new(1, 4, 2).unwrap();
    let good = CombineBuffers { y: 256, yp: 256, row_of_slot: 256, ..CombineBuffers::default() };
    let call = |hidden: usize, options: &CombineOptions, buffers: CombineBuffers| {
        let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
        // SAFETY: every call here fails before it launches anything.
        unsafe {
            combine::combine_fwd_raw(device, stream, DType::F16, shape, hidden, options, buffers)
        }
    };
    let none = CombineOptions::default();
    for (argument, buffers) in [
        ("y", CombineBuffers { y: 257, ..good }),
        ("yp", CombineBuffers { yp: 257, ..good }),
        ("x", CombineBuffers { x: 257, ..good }),
        ("output_bias", CombineBuffers { output_bias: 257, ..good }),
        ("shared", CombineBuffers { shared: 257, ..good }),
        ("row_of_slot", CombineBuffers { row_of_slot: 258, ..good }),
        ("routing_weights", CombineBuffers { routing_weights: 258, ..good }),
        ("expert_ids", CombineBuffers { expert_ids: 258, ..good }),
        ("shared_gate", CombineBuffers { shared: 256, shared_gate: 258, ..good }),
    ] {
        let result = call(8, &none, buffers);
        assert!(
            matches!(result, Err(Error::Alignment { argument: got, .. }) if got == argument),
            "{result:?}"
        );
    }
    let identity = CombineOptions { identity: 4..6, ..CombineOptions::default() };
    let average = CombineOptions { average: true, ..CombineOptions::default() };
    let rows_weighted = CombineOptions { rows_weighted: true, ..CombineOptions::default() };
    for dtype in [DType::F32, DType::BF16] {
        let (device, stream) = (&gpu.device, gpu.stream.cu_stream());
        // SAFETY: the call fails before it launches anything.
        let result = unsafe {
            combine::combine_fwd_raw(device, stream, dtype, shape, 8, &rows_weighted, good)
        };
        let refused = |argument| argument == "identity.routing_weights";
        assert!(matches!(result, Err(Error::Unsupported { argument, .. }) if refused(argument)));
    }
    for (options, buffers) in [
        (&identity, CombineBuffers { x: 256, ..good }),
        (&identity, CombineBuffers { expert_ids: 256, ..good }),
        (&average, good),
        (&none, CombineBuffers { shared_gate: 256, ..good }),
    ] {
        assert!(matches!(call(8, options, buffers), Err(Error::Mismatch { .. })));
    }
    // Past the grid's limit, and past an int.
    for hidden in [1 << 30, 1 << 40] {
        let too_wide = call(hidden, &none, good);
        assert!(
            matches!(too_wide, Err(Error::Unsupported { argument: "hidden", .. })),
            "{too_wide:?}"
        );
    }
}
