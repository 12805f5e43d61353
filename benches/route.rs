//! route: bytes of logits, ids and weights.

use criterion::{Criterion, Throughput};
use moe_kernels::ops::route;
use moe_kernels::{RouterConfig, Scoring};

use crate::common::bench_device;

pub fn bench(criterion: &mut Criterion) {
    let bench = bench_device();
    let (device, stream) = (&bench.device, &bench.stream);
    let router = RouterConfig { scoring: Scoring::SoftmaxThenTopK { renormalize: true } };
    for case in bench.cases() {
        let shape = case.routing;
        // A multiplicative hash: which lane holds the winners must not be always the same.
        let logit = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32;
        let logits: Vec<f32> = (0..shape.logits()).map(logit).collect();
        let logits = stream.clone_htod(&logits).unwrap();
        let mut ids = stream.alloc_zeros::<u32>(shape.slots()).unwrap();
        let mut weights = stream.alloc_zeros::<f32>(shape.slots()).unwrap();
        let bytes = 4 * shape.logits() + 8 * shape.slots();
        bench.time(criterion, "route", &case, Throughput::Bytes(bytes as u64), || {
            let (ids, weights) = (&mut ids.as_view_mut(), &mut weights.as_view_mut());
            route::route_fwd_into(device, stream, shape, &router, &logits.as_view(), ids, weights)
                .unwrap();
        });
    }
}
