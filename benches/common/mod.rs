//! The device, named shapes, and one way to time an operation.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaContext, CudaStream};
use moe_kernels::{Device, Dtype, RoutingShape};

/// Where benches run.
pub struct Bench {
    pub device: Device,
    pub stream: Arc<CudaStream>,
    pub driver: moe_emulator::Driver,
}

/// A model's routing and widths at one number of tokens.
#[derive(Clone, Copy)]
pub struct Case {
    pub model: &'static str,
    pub routing: RoutingShape,
    pub hidden: usize,
    pub intermediate: usize,
}

/// The device that MOE_DEVICE names, the same for all benches of the process.
pub fn bench_device() -> Bench {
    static DRIVER: OnceLock<moe_emulator::Driver> = OnceLock::new();
    let driver = *DRIVER.get_or_init(|| {
        let wanted = moe_emulator::Choice::from_env().unwrap_or_else(|why| panic!("{why}"));
        moe_emulator::choose(wanted).unwrap_or_else(|why| panic!("{why}"))
    });
    let context = CudaContext::new(0).unwrap();
    let stream = context.new_stream().unwrap();
    Bench { device: Device::new(&context).unwrap(), stream, driver }
}

/// Values in `-scale..scale` that repeat only after a long while: never zeros, which run faster.
pub fn ramp<D: Dtype>(len: usize, scale: f32) -> Vec<D> {
    let mut state = 0x2545_f491u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            D::from_f32(scale * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0))
        })
        .collect()
}

impl Bench {
    /// Real layers on a GPU; on the software device the same proportions, small enough to emulate.
    pub fn cases(&self) -> Vec<Case> {
        let case = |model, hidden, intermediate, num_tokens, num_experts, top_k| Case {
            model,
            routing: RoutingShape { num_tokens, num_experts, top_k },
            hidden,
            intermediate,
        };
        if self.driver == moe_emulator::Driver::Emulator {
            return vec![
                case("mixtral-like", 128, 448, 16, 8, 2),
                case("qwen3-like", 128, 48, 16, 32, 8),
            ];
        }
        let tokens = [1, 64, 4096];
        let mixtral = tokens.map(|t| case("mixtral-8x7b", 4096, 14336, t, 8, 2));
        let qwen3 = tokens.map(|t| case("qwen3-30b-a3b", 2048, 768, t, 128, 8));
        mixtral.into_iter().chain(qwen3).collect()
    }

    /// Times `enqueue` with events on the stream; `work` is the bytes or operations of one call.
    pub fn time(
        &self,
        criterion: &mut Criterion,
        op: &str,
        case: &Case,
        work: Throughput,
        mut enqueue: impl FnMut(),
    ) {
        let mut group: BenchmarkGroup<'_, WallTime> = criterion.benchmark_group(op);
        group.throughput(work).sample_size(10).warm_up_time(Duration::from_millis(300));
        let name = format!("{}/{} on {}", case.model, case.routing, self.driver);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|calls| {
                let context = self.device.context();
                let start = context.new_event(Some(CU_EVENT_DEFAULT)).unwrap();
                let end = context.new_event(Some(CU_EVENT_DEFAULT)).unwrap();
                start.record(&self.stream).unwrap();
                (0..calls).for_each(|_| enqueue());
                end.record(&self.stream).unwrap();
                Duration::from_secs_f32(start.elapsed_ms(&end).unwrap() / 1e3)
            });
        });
        group.finish();
    }
}
