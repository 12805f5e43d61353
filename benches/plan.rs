//! plan: slots grouped.

use criterion::{Criterion, Throughput};
use moe_kernels::PlanLayout;
use moe_kernels::ops::plan;

use crate::common::bench_device;

pub fn bench(criterion: &mut Criterion) {
    let bench = bench_device();
    let (device, stream) = (&bench.device, &bench.stream);
    for case in bench.cases() {
        let shape = case.routing;
        let ids: Vec<u32> =
            (0..shape.slots()).map(|slot| (slot * 7 % shape.num_experts) as u32).collect();
        let ids = stream.clone_htod(&ids).unwrap();
        let mut memory = stream.alloc_zeros::<u8>(PlanLayout::new(shape).unwrap().bytes()).unwrap();
        bench.time(criterion, "plan", &case, Throughput::Elements(shape.slots() as u64), || {
            plan::plan_fwd_into(device, stream, shape, Some(&ids.as_view()), memory.as_view_mut())
                .unwrap();
        });
    }
}
