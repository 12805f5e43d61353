//! `bench`: measures every operation and the layer at real shapes, against the roofline and peers.

mod compare_peers;
mod measure;
mod peers;
#[cfg(feature = "plots")]
mod pictures;
mod record;
mod table;
mod traffic;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use moe_bench::{Model, Op, Routing, Target, models};
use moe_kernels::DType;

use crate::backend::dispatch;
use crate::bench::measure::Bench;
use crate::bench::record::{Device, Record};
use crate::device::{Choice, Gpu, Place, probe};
use crate::error::{Result, io};
use crate::progress::Progress;
use crate::text::{print, seconds};

/// Measures operations and layers at the shapes of real models
///
/// Prints a table and writes bench.json and pictures into a folder. A GPU is timed with events. The
/// CPU runs the reference. The software device counts memory traffic and is not timed.
#[derive(clap::Args)]
pub struct Arguments {
    /// Device; auto is the GPU if there is one, otherwise the CPU
    #[arg(long, default_value = "auto")]
    device: Choice,

    /// Names of layers, or `all`
    #[arg(long, value_delimiter = ',', value_name = "NAMES", default_value = "olmoe-1b-7b", value_parser = parse_model)]
    model: Vec<ModelArgument>,

    /// Numbers of tokens [default: 1,8,64; on a GPU a list for each model]
    #[arg(long, value_delimiter = ',', value_name = "T", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    tokens: Vec<u32>,

    /// Element type: f32, bf16 or f16
    #[arg(long, default_value = "bf16")]
    dtype: DType,

    #[arg(long, value_delimiter = ',', value_name = "OPS", default_value = "all", value_parser = parse_op, help = op_help())]
    op: Vec<OpArgument>,

    /// Distributions of tokens over experts
    #[arg(long, value_delimiter = ',', default_value = "uniform")]
    routing: Vec<Spread>,

    /// Divides H and I by this [default: 1; on the emulator 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    shrink: Option<u32>,

    /// Program that runs peers on the same tensors, which it reads from a file in TMPDIR; may be
    /// repeated. benches/peers/README.md describes the protocol
    #[arg(long, value_name = "PROGRAM")]
    peers: Vec<String>,

    /// Does not measure bandwidth and the rate of dense products, so that no roofline is printed
    #[arg(long)]
    no_ceilings: bool,

    /// Starts no measurement after this time
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    time_limit: Option<Duration>,

    /// Folder for bench.json and the pictures
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    output: PathBuf,
}

/// A value of `--model`.
#[derive(Clone)]
enum ModelArgument {
    All,
    One(Box<Model>),
}

fn parse_model(name: &str) -> std::result::Result<ModelArgument, String> {
    if name == "all" {
        return Ok(ModelArgument::All);
    }
    let known = || models().into_iter().map(|model| model.name).collect::<Vec<_>>().join(", ");
    Model::find(name)
        .map(|model| ModelArgument::One(Box::new(model)))
        .ok_or_else(|| format!("wanted {} or all", known()))
}

/// A value of `--op`.
#[derive(Clone)]
enum OpArgument {
    All,
    One(Op),
}

fn op_help() -> String {
    format!("Operations: {}, or `all`", Op::ALL.map(Op::name).join(", "))
}

fn parse_op(name: &str) -> std::result::Result<OpArgument, String> {
    let known = || Op::ALL.map(Op::name).join(", ");
    match Op::ALL.into_iter().find(|op| op.name() == name) {
        Some(op) => Ok(OpArgument::One(op)),
        None if name == "all" => Ok(OpArgument::All),
        None => Err(format!("wanted {} or all", known())),
    }
}

/// The values of `--routing`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Spread {
    /// The same probability for every expert
    Uniform,
    /// Probability proportional to 1 / r for the expert of rank r
    Zipf,
    /// 60 % of the tokens choose the same expert
    Hot,
}

impl Spread {
    fn routing(self) -> Routing {
        match self {
            Self::Uniform => Routing::Uniform,
            Self::Zipf => Routing::Zipf,
            Self::Hot => Routing::Hot,
        }
    }
}

/// The settings to measure, in order.
struct Request {
    models: Vec<Model>,
    tokens: Vec<usize>,
    ops: Vec<Op>,
    routings: Vec<Routing>,
    dtype: DType,
    peers: Vec<String>,
    ceilings: bool,
    deadline: Option<Instant>,
}

impl Request {
    fn new(arguments: &Arguments, place: Place) -> Self {
        let divisor = arguments.shrink.unwrap_or(if place == Place::Emulator { 32 } else { 1 });
        let chosen = arguments.model.iter().flat_map(|argument| match argument {
            ModelArgument::All => models(),
            ModelArgument::One(model) => vec![Model::clone(model)],
        });
        let mut tokens: Vec<usize> = arguments.tokens.iter().map(|&t| t as usize).collect();
        if tokens.is_empty() && place != Place::Cuda {
            tokens = vec![1, 8, 64];
        }
        tokens.sort_unstable();
        tokens.dedup();
        let ops = arguments.op.iter().flat_map(|argument| match argument {
            OpArgument::All => Op::ALL.to_vec(),
            OpArgument::One(op) => vec![*op],
        });
        Self {
            models: chosen.map(|model| model.shrunk(divisor as usize)).collect(),
            tokens,
            ops: ops.collect(),
            routings: arguments.routing.iter().map(|spread| spread.routing()).collect(),
            dtype: arguments.dtype,
            peers: arguments.peers.clone(),
            ceilings: !arguments.no_ceilings,
            deadline: arguments.time_limit.and_then(|limit| Instant::now().checked_add(limit)),
        }
    }

    /// The numbers of tokens of one model.
    fn tokens_of<'a>(&'a self, model: &'a Model) -> &'a [usize] {
        if self.tokens.is_empty() { model.tokens } else { &self.tokens }
    }

    /// The operations that are defined for a routing.
    fn ops_with(&self, routing: Routing) -> impl Iterator<Item = Op> {
        self.ops.iter().copied().filter(move |op| op.has_routing(routing))
    }

    /// The number of combinations of operation, model, tokens and routing.
    fn count(&self) -> usize {
        let tokens: usize = self.models.iter().map(|model| self.tokens_of(model).len()).sum();
        tokens * self.routings.iter().map(|&routing| self.ops_with(routing).count()).sum::<usize>()
    }

    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// Returns `Ok(false)` if our output or a peer's is wrong.
pub fn bench(arguments: &Arguments) -> Result<bool> {
    let place = match arguments.device {
        Choice::Auto if probe().is_err() => Place::Cpu,
        choice => choice.place(),
    };
    // Checked before the work.
    std::fs::create_dir_all(&arguments.output).map_err(io("create", &arguments.output))?;
    let request = Request::new(arguments, place);
    let gpu = match place {
        Place::Cpu => None,
        Place::Cuda => Some(Gpu::open(place)?),
        Place::Emulator => Some(Gpu::open_counting()?),
    };
    let device = describe(place, gpu.as_ref())?;
    print(format_args!("{}: {}\n", device.kind, device.name));
    let bench_gpu = gpu.as_ref().map(|_| moe_bench::Gpu::open()).transpose()?;
    let target = bench_gpu.as_ref().map_or(Target::Cpu, Target::Gpu);

    let mut record = Record::new(device);
    let progress = Progress::parts("bench", request.count());
    let mut bench = Bench {
        target: &target,
        place,
        request: &request,
        output: &arguments.output,
        record: &mut record,
        progress: &progress,
        ceilings: Default::default(),
    };
    let good = dispatch!(request.dtype, D => bench.run::<D>())?;
    drop(progress);
    record.write(&arguments.output)?;
    print(table::ceilings(&record));
    print(table::rows(&record));
    if !record.complete {
        print("The time limit was reached: some measurements are missing.\n");
    }
    print(format_args!("written: {}\n", arguments.output.join("bench.json").display()));
    draw(&record, &arguments.output)?;
    Ok(good)
}

#[cfg(feature = "plots")]
fn draw(record: &Record, folder: &Path) -> Result<()> {
    let pictures = pictures::draw(record, folder)?;
    let names: Vec<_> = pictures.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
    if !names.is_empty() {
        print(format_args!("pictures, as SVG and PNG: {}\n", names.join(", ")));
    }
    Ok(())
}

#[cfg(not(feature = "plots"))]
fn draw(_: &Record, _: &Path) -> Result<()> {
    print("no pictures: this program was built without the feature `plots`\n");
    Ok(())
}

fn describe(place: Place, gpu: Option<&Gpu>) -> Result<Device> {
    let Some(gpu) = gpu else {
        let threads = rayon::current_num_threads();
        return Ok(Device {
            kind: place.name(),
            name: format!("the reference in f32, {threads} threads"),
            capability: None,
            driver: None,
            threads: Some(threads),
        });
    };
    let (major, minor) = gpu.device.capability();
    let name = gpu.device.context().name().map_err(gpu.failed("read the device's name"))?;
    Ok(Device {
        kind: place.name(),
        name,
        capability: Some(format!("{major}.{minor}")),
        driver: Some(gpu.driver_version()?),
        threads: None,
    })
}
