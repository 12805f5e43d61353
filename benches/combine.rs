//! combine: bytes moved.

use criterion::{Criterion, Throughput};
use half::bf16;
use moe_kernels::ops::{combine, plan};

use crate::common::bench_device;

pub fn bench(criterion: &mut Criterion) {
    let bench = bench_device();
    let (device, stream) = (&bench.device, &bench.stream);
    for case in bench.cases() {
        let shape = case.routing;
        let ids: Vec<u32> =
            (0..shape.slots()).map(|slot| (slot * 7 % shape.num_experts) as u32).collect();
        let ids = stream.clone_htod(&ids).unwrap();
        let plan = plan::plan_fwd(device, stream, shape, &ids.as_view()).unwrap();
        let yp = stream.alloc_zeros::<bf16>(shape.slots() * case.hidden).unwrap();
        let weights = stream.clone_htod(&vec![0.5f32; shape.slots()]).unwrap();
        let mut y = stream.alloc_zeros::<bf16>(shape.num_tokens * case.hidden).unwrap();
        let bytes = 2 * case.hidden * (shape.num_tokens + shape.slots()) + 8 * shape.slots();
        bench.time(criterion, "combine", &case, Throughput::Bytes(bytes as u64), || {
            let (yp, weights, y) = (&yp.as_view(), &weights.as_view(), &mut y.as_view_mut());
            combine::combine_fwd_into(device, stream, &plan, case.hidden, yp, weights, y).unwrap();
        });
    }
}
