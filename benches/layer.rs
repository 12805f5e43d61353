//! The layer from its logits: operations of the experts' products.

use criterion::{Criterion, Throughput};
use half::bf16;
use moe_kernels::{DType, Experts, MoeConfig, MoeLayer, RouterConfig, Scoring, Workspace};

use crate::common::{bench_device, ramp};

pub fn bench(criterion: &mut Criterion) {
    let bench = bench_device();
    let (device, stream) = (&bench.device, &bench.stream);
    for case in bench.cases() {
        let shape = case.routing;
        let config = MoeConfig {
            hidden: case.hidden,
            intermediate: case.intermediate,
            num_experts: shape.num_experts,
            top_k: shape.top_k,
            router: RouterConfig { scoring: Scoring::SoftmaxThenTopK { renormalize: true } },
        };
        let layer = MoeLayer::new(device, config).unwrap();
        let x = stream.clone_htod(&ramp::<bf16>(shape.num_tokens * case.hidden, 1.0)).unwrap();
        let logits = stream.clone_htod(&ramp::<bf16>(shape.logits(), 2.0)).unwrap();
        let gate_up = stream.clone_htod(&ramp::<bf16>(config.gate_up_len(), 0.02)).unwrap();
        let down = stream.clone_htod(&ramp::<bf16>(config.down_len(), 0.02)).unwrap();
        let experts = Experts { gate_up: gate_up.as_view(), down: down.as_view() };
        let bytes = MoeLayer::workspace_bytes(&config, DType::BF16, shape.num_tokens).unwrap();
        let mut workspace = Workspace::alloc(stream, bytes).unwrap();
        let mut y = stream.alloc_zeros::<bf16>(shape.num_tokens * case.hidden).unwrap();
        let flops = 6 * shape.slots() * case.hidden * case.intermediate;
        bench.time(criterion, "layer", &case, Throughput::Elements(flops as u64), || {
            layer
                .forward(
                    stream,
                    &x.as_view(),
                    &logits.as_view(),
                    &experts,
                    &mut workspace,
                    &mut y.as_view_mut(),
                )
                .unwrap();
        });
    }
}
