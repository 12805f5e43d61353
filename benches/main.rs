//! Microbenchmarks of every operation and of the layer under criterion. MOE_DEVICE selects the
//! device; the default is a GPU if there is one, else the CPU reference.
//!
//! `cargo bench -- permute` runs one operation, `cargo bench -- mixtral-8x7b` one model. On a GPU
//! the shapes are those of real models. On the CPU their widths are divided by 4. On the software
//! device (MOE_DEVICE=emulator) they are divided by 32, and the times are those of the emulation.

use std::cell::LazyCell;
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{Criterion, Throughput};
use half::bf16;
use moe_bench::{
    Ceilings, Dense, Draw, Gpu, LoadedModel, Model, Op, Repeater, Result, Routing, Samples, Target,
    Work, Workload, least_work, models,
};
use moe_kernels::DType;

/// Samples of one bench.
const SAMPLES: usize = 10;

/// The seconds that the repeater measures, by CUDA events or by the clock.
struct Seconds;

impl Measurement for Seconds {
    type Intermediate = Instant;
    type Value = f64;

    fn start(&self) -> Instant {
        Instant::now()
    }

    fn end(&self, start: Instant) -> f64 {
        start.elapsed().as_secs_f64()
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, seconds: &f64) -> f64 {
        *seconds
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &SecondsFormatter
    }
}

struct SecondsFormatter;

/// Returns the first unit in which `typical` is at least one.
fn unit(typical: f64, units: &[(f64, &'static str)]) -> (f64, &'static str) {
    let fits = units.iter().find(|(size, _)| typical >= *size);
    *fits.unwrap_or(&units[units.len() - 1])
}

impl ValueFormatter for SecondsFormatter {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        let (size, name) = unit(typical, &[(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")]);
        values.iter_mut().for_each(|value| *value /= size);
        name
    }

    fn scale_throughputs(
        &self,
        typical: f64,
        work: &Throughput,
        values: &mut [f64],
    ) -> &'static str {
        const BYTES: [(f64, &str); 3] = [(1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")];
        const FLOPS: [(f64, &str); 3] = [(1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")];
        let (amount, units) = match *work {
            Throughput::Bytes(bytes) => (bytes as f64, BYTES),
            Throughput::Elements(flops) => (flops as f64, FLOPS),
            _ => (f64::NAN, BYTES),
        };
        let (size, name) = unit(amount / typical, &units);
        values.iter_mut().for_each(|value| *value = amount / *value / size);
        name
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        "s"
    }
}

/// The device that MOE_DEVICE selects; `auto` is the CPU reference if there is no GPU.
enum Place {
    Cpu,
    Gpu(Gpu),
    Emulator(Gpu),
}

impl Place {
    fn open() -> std::result::Result<Self, Box<dyn std::error::Error>> {
        use moe_emulator::{Choice, ChooseError, Driver, choose};
        if std::env::var("MOE_DEVICE").is_ok_and(|name| name == "cpu") {
            return Ok(Self::Cpu);
        }
        let driver = match Choice::from_env()? {
            Choice::Auto => match choose(Choice::Cuda) {
                Err(ChooseError::NoGpu(_)) => return Ok(Self::Cpu),
                driver => driver?,
            },
            choice => choose(choice)?,
        };
        let gpu = Gpu::open()?;
        Ok(if driver == Driver::Cuda { Self::Gpu(gpu) } else { Self::Emulator(gpu) })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu(_) => "cuda",
            Self::Emulator(_) => "emulator",
        }
    }

    fn target(&self) -> Target<'_> {
        match self {
            Self::Cpu => Target::Cpu,
            Self::Gpu(gpu) | Self::Emulator(gpu) => Target::Gpu(gpu),
        }
    }

    /// Returns the layers of real models on a GPU, elsewhere two small ones.
    fn shapes(&self) -> Vec<(Model, &'static [usize])> {
        let two = |by, tokens: &'static [usize]| {
            let two = ["olmoe-1b-7b", "qwen3-30b-a3b"].iter().filter_map(|name| Model::find(name));
            two.map(|model| (model.shrunk(by), tokens)).collect()
        };
        match self {
            Self::Cpu => two(4, &[1, 64]),
            Self::Emulator(_) => two(32, &[16]),
            Self::Gpu(_) => {
                models().into_iter().map(|model| (model.clone(), model.tokens)).collect()
            }
        }
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .with_measurement(Seconds)
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    match Place::open() {
        Ok(place) => bench(&mut criterion, &place),
        Err(why) => {
            eprintln!("error: {why}");
            std::process::exit(1);
        }
    }
    criterion.final_summary();
}

/// Measures all operations in bf16 with uniform routing, and with the other routings those whose
/// time depends on it. Operations that a filter excludes are not prepared.
fn bench(criterion: &mut Criterion<Seconds>, place: &Place) {
    let target = place.target();
    let ceilings = LazyCell::new(|| must(Ceilings::measure(&target, DType::BF16)));
    for (model, tokens) in place.shapes() {
        let fewest = must(Draw::new(&model, tokens[0], Routing::Uniform, DType::BF16));
        let loaded = LazyCell::new(|| must(LoadedModel::<bf16>::new(&target, &model, &fewest)));
        for (&tokens, routing) in tokens.iter().flat_map(|t| Routing::ALL.map(|r| (t, r))) {
            let draw = must(Draw::new(&model, tokens, routing, DType::BF16));
            let uneven = [Op::Plan, Op::Experts, Op::Layer];
            for op in Op::ALL {
                if routing != Routing::Uniform && !uneven.contains(&op) {
                    continue;
                }
                let name = format!("{}/T{tokens} {}, {}", model.name, routing.name(), place.name());
                let work = least_work::<bf16>(op, &model, &draw);
                let mut cache = "";
                let samples = bench_one(criterion, op, &name, work, || {
                    let workload = must(loaded.workload(op, &draw));
                    let repeater = must(Repeater::new(&target, workload, tokens));
                    cache = repeater.cache();
                    repeater
                });
                // A filter has excluded the operation, or it was emulated.
                let (Some(samples), false) = (samples, matches!(place, Place::Emulator(_))) else {
                    continue;
                };
                if let Some(roofline) = work.roofline(ceilings.bandwidth(), ceilings.dense) {
                    let percent = 100.0 * roofline.seconds / samples.median();
                    let (time, bound) =
                        (SecondsFormatter.format_value(roofline.seconds), roofline.bound.name());
                    println!(
                        "{:24}roofline: {time} ({bound}), {percent:.1} % of its speed, {cache}",
                        ""
                    );
                }
                if let Some(dense) = dense(&target, op, &model, &draw) {
                    println!(
                        "{:24}cuBLAS: {:.1} % of its speed",
                        "",
                        100.0 * dense / samples.median()
                    );
                }
            }
        }
    }
}

/// Runs one bench of criterion. Returns its times of single calls, `None` if a filter excludes it.
fn bench_one<'a>(
    criterion: &mut Criterion<Seconds>,
    op: Op,
    name: &str,
    work: Work,
    mut prepare: impl FnMut() -> Repeater<'a>,
) -> Option<Samples> {
    let mut group = criterion.benchmark_group(op.name());
    group.throughput(if work.flops > work.bytes {
        Throughput::Elements(work.flops as u64)
    } else {
        Throughput::Bytes(work.bytes as u64)
    });
    let mut taken = Vec::new();
    group.bench_function(name, |bencher| {
        let mut repeater = prepare();
        bencher.iter_custom(|calls| {
            let seconds = must(repeater.seconds(calls as usize));
            taken.push(seconds / calls as f64);
            seconds
        });
    });
    group.finish();
    // The calls before the samples were the warm-up.
    let taken = taken.split_off(taken.len().saturating_sub(SAMPLES));
    (!taken.is_empty()).then(|| Samples::new(taken))
}

/// Returns the seconds of cuBLAS on as many rows, columns and products.
fn dense(target: &Target<'_>, op: Op, model: &Model, draw: &Draw) -> Option<f64> {
    let Target::Gpu(gpu) = target else { return None };
    let dense = must(Dense::new(gpu))?;
    let workload: Workload<'_> = must(dense.matching::<bf16>(op, model, draw))?;
    let mut repeater = must(Repeater::new(target, workload, draw.shape.num_tokens));
    Some(must(repeater.samples(9, Duration::from_secs(1))).median())
}

/// Panics on errors: criterion's closures cannot return them.
fn must<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|why| panic!("{why}"))
}
