//! permute: bytes moved.

use criterion::{Criterion, Throughput};
use half::bf16;
use moe_kernels::ops::{permute, plan};

use crate::common::{bench_device, ramp};

pub fn bench(criterion: &mut Criterion) {
    let bench = bench_device();
    let (device, stream) = (&bench.device, &bench.stream);
    for case in bench.cases() {
        let shape = case.routing;
        let ids: Vec<u32> =
            (0..shape.slots()).map(|slot| (slot * 7 % shape.num_experts) as u32).collect();
        let ids = stream.clone_htod(&ids).unwrap();
        let plan = plan::plan_fwd(device, stream, shape, &ids.as_view()).unwrap();
        let x = stream.clone_htod(&ramp::<bf16>(shape.num_tokens * case.hidden, 1.0)).unwrap();
        let mut xp = stream.alloc_zeros::<bf16>(shape.slots() * case.hidden).unwrap();
        let bytes = 2 * case.hidden * (shape.num_tokens + shape.slots()) + 4 * shape.slots();
        bench.time(criterion, "permute", &case, Throughput::Bytes(bytes as u64), || {
            permute::permute_fwd_into(
                device,
                stream,
                &plan,
                case.hidden,
                &x.as_view(),
                &mut xp.as_view_mut(),
            )
            .unwrap();
        });
    }
}
