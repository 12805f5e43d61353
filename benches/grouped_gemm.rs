//! grouped_gemm: floating-point operations.

use criterion::{Criterion, Throughput};
use half::bf16;
use moe_kernels::ops::grouped_gemm::{Rows, grouped_gemm_fwd_into, grouped_gemm_swiglu_fwd_into};
use moe_kernels::ops::plan;

use crate::common::bench_device;

/// Numbers without a pattern: a GPU multiplies zeros faster than it multiplies anything else, since it
/// draws less power. They repeat after a prime number of elements, so that filling 2 GB is quick.
fn noise(len: usize) -> Vec<bf16> {
    let mut state = 1u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f64((state >> 40) as f64 / f64::from(1 << 23) - 1.0)
    };
    let period: Vec<bf16> = (0..len.min(1_048_573)).map(|_| next()).collect();
    period.iter().copied().cycle().take(len).collect()
}

pub fn bench(criterion: &mut Criterion) {
    let bench = bench_device();
    let (device, stream) = (&bench.device, &bench.stream);
    for case in bench.cases() {
        let (shape, h, i) = (case.routing, case.hidden, case.intermediate);
        let ids: Vec<u32> =
            (0..shape.slots()).map(|slot| (slot * 7 % shape.num_experts) as u32).collect();
        let ids = stream.clone_htod(&ids).unwrap();
        let plan = plan::plan_fwd(device, stream, shape, &ids.as_view()).unwrap();
        let upload = |len| stream.clone_htod(&noise(len)).unwrap();
        let x = upload(shape.num_tokens * h);
        let gate_up = upload(shape.num_experts * 2 * i * h);
        let down = upload(shape.num_experts * h * i);
        let mut act = stream.alloc_zeros::<bf16>(shape.slots() * i).unwrap();
        let mut yp = stream.alloc_zeros::<bf16>(shape.slots() * h).unwrap();
        let (x, gate_up, down) = (x.as_view(), gate_up.as_view(), down.as_view());

        let flops = |parts: usize| Throughput::Elements((2 * parts * shape.slots() * h * i) as u64);
        bench.time(criterion, "grouped_gemm/swiglu", &case, flops(2), || {
            let act = &mut act.as_view_mut();
            grouped_gemm_swiglu_fwd_into(
                device,
                stream,
                &plan,
                i,
                h,
                Rows::Gathered,
                &x,
                &gate_up,
                act,
            )
            .unwrap();
        });
        bench.time(criterion, "grouped_gemm/down", &case, flops(1), || {
            let (act, yp) = (act.as_view(), &mut yp.as_view_mut());
            grouped_gemm_fwd_into(device, stream, &plan, h, i, Rows::Grouped, &act, &down, yp)
                .unwrap();
        });
    }
}
