//! `tune`: compares variants of grouped_gemm, compiled with other constants, with the built-in
//! kernels.
//!
//! gpu/tune-variants compiles the images. A variant is timed only if its output has the bits of the
//! built-in kernels, and between two measurements of those (A/B/A), so that a drift of clocks does
//! not appear as a gain.

mod variant;

use std::ffi::c_void;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::ptr::from_mut;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, result, sys};
use half::bf16;
use moe_bench::{Draw, Model, Routing, Samples, normal};
use moe_kernels::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd_into, grouped_gemm_gate_up_fwd_into,
};
use moe_kernels::{DType, ExpertConfig, RoutingPlan, ops};
use serde_json::{Value, json};

use crate::device::{Choice, Gpu, Place};
use crate::error::{Error, Result, io};
use crate::text::{Table, escaped, print, seconds};
use crate::write::replace;
use variant::{Variant, bad_file, read_list};

/// Times variants of grouped_gemm, compiled by gpu/tune-variants, against the built-in kernels
#[derive(clap::Args)]
pub struct Arguments {
    /// Folder with variants.json and the images
    #[arg(long)]
    variants: PathBuf,

    /// Device; the emulator ignores the images and runs its own kernels, to test this command
    #[arg(long, default_value = "cuda")]
    device: Choice,

    /// Names of layers; on the emulator H and I are divided by 32
    #[arg(long, value_delimiter = ',', default_values = ["mixtral-8x7b", "qwen3-30b-a3b"])]
    model: Vec<String>,

    /// Numbers of tokens
    #[arg(long, value_delimiter = ',', default_values_t = [8, 512, 4096])]
    tokens: Vec<usize>,

    /// Folder for tune.json, which is rewritten after each row
    #[arg(long)]
    output: PathBuf,

    /// Starts no measurement after this time
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    time_limit: Option<Duration>,
}

/// Rows of a tile of the plan; variants have to use the same number.
const TILE_ROWS: usize = 128;

/// Repetitions of A/B/A. Each gives a sample of the variant and two of the built-in kernels.
const TURNS: usize = 7;

/// The least time of a sample between two events.
const SAMPLE_SECONDS: f64 = 2e-3;

pub fn tune(arguments: &Arguments) -> Result<bool> {
    let start = Instant::now();
    let place = arguments.device.place();
    if place == Place::Cpu {
        let why = "the CPU reference runs no kernels, wanted cuda, emulator or auto".into();
        return Err(Error::Option { option: "--device", why });
    }
    let gpu = Gpu::open(place)?;
    let list_file = arguments.variants.join("variants.json");
    let list = read_list(&list_file)?;
    let entries = list["variants"].as_array();
    let entries = entries.ok_or_else(|| bad_file(&list_file, "no list `variants`"))?;
    let mut variants = Vec::new();
    for entry in entries.iter().filter(|entry| !entry["image"].is_null()) {
        match Variant::load(&gpu, &arguments.variants, entry) {
            Ok(variant) => variants.push(variant),
            // For example more shared memory than this GPU has.
            Err(why @ Error::Device { .. }) => {
                print(format!("{}: {why}\n", escaped(&entry["name"].to_string())));
            }
            Err(why) => return Err(why),
        }
    }
    fs::create_dir_all(&arguments.output).map_err(io("create", &arguments.output))?;

    let total = arguments.model.len() * arguments.tokens.len() * variants.len();
    let late = || arguments.time_limit.is_some_and(|limit| start.elapsed() > limit);
    let (mut rows, mut all_agree) = (Vec::new(), true);
    let mut table = Table::new(&["model", "T", "variant", "us", "built-in us", "speedup"]);
    'limit: for name in &arguments.model {
        let model = Model::find(name).ok_or_else(|| Error::Option {
            option: "--model",
            why: format!("unknown layer '{name}'"),
        })?;
        let model = if place == Place::Emulator { model.shrunk(32) } else { model };
        let weights = Weights::new(&gpu, &model)?;
        for &tokens in &arguments.tokens {
            let draw = Draw::new(&model, tokens, Routing::Uniform, DType::BF16)?;
            let mut problem = Problem::new(&gpu, &model, &draw, &weights)?;
            for variant in &variants {
                if late() {
                    break 'limit;
                }
                let times = problem.compare(variant)?;
                all_agree &= times.is_some();
                table.row(cells(&model.name, tokens, variant, times.as_ref()));
                rows.push(row(&model.name, tokens, variant, times.as_ref()));
                let complete = rows.len() == total;
                let (compiler, file) = (&list["compiler"], arguments.output.join("tune.json"));
                let all = json!({
                    "format": 1, "compiler": compiler, "complete": complete, "rows": rows,
                });
                replace(&file, |_, file| writeln!(file, "{all:#}"))?;
            }
        }
    }
    print(table);
    print(format!("{} rows, {} not reached\n", rows.len(), total - rows.len()));
    Ok(all_agree)
}

/// Samples of a variant, and of the built-in kernels.
type Times = (Samples, Samples);

/// A row of the printed table.
fn cells(model: &str, tokens: usize, variant: &Variant, times: Option<&Times>) -> Vec<String> {
    let mut cells = vec![model.into(), tokens.to_string(), variant.name.clone()];
    cells.extend(match times {
        Some((variant, built_in)) => [
            format!("{:.1}", variant.median() * 1e6),
            format!("{:.1}", built_in.median() * 1e6),
            format!("{:.3}", built_in.median() / variant.median()),
        ],
        None => ["other bits".into(), String::new(), String::new()],
    });
    cells
}

/// A row of tune.json.
fn row(model: &str, tokens: usize, variant: &Variant, times: Option<&Times>) -> Value {
    json!({
        "model": model, "tokens": tokens, "dtype": "bf16", "routing": "uniform",
        "variant": variant.name, "constants": variant.constants, "same_bits": times.is_some(),
        "seconds": times.map(|(variant, _)| spread(variant)),
        "built_in_seconds": times.map(|(_, built_in)| spread(built_in)),
    })
}

/// Median and quantiles of samples, for tune.json.
fn spread(samples: &Samples) -> Value {
    json!({
        "median": samples.median(), "p10": samples.quantile(0.1), "p90": samples.quantile(0.9),
        "samples": samples.count(),
    })
}

/// GroupedGemmArgs of kernels/abi.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct KernelArgs {
    expert_stride: i64,
    out_stride: i32,
    in_stride: i32,
    rows: i32,
    x_rows: i32,
    max_tiles: i32,
    out_features: i32,
    in_features: i32,
    num_experts: i32,
    vector_load: i32,
    vector_store: i32,
}

/// GroupedGemmParams of kernels/abi.h.
#[repr(C)]
struct LinearParams {
    y: sys::CUdeviceptr,
    x: sys::CUdeviceptr,
    w: sys::CUdeviceptr,
    bias: sys::CUdeviceptr,
    token_of_row: sys::CUdeviceptr,
    expert_offsets: sys::CUdeviceptr,
    tiles: sys::CUdeviceptr,
    num_tiles: sys::CUdeviceptr,
    args: KernelArgs,
}

/// GateUpParams of kernels/abi.h, for SwiGLU.
#[repr(C)]
struct SwigluParams {
    act: sys::CUdeviceptr,
    x: sys::CUdeviceptr,
    gate: sys::CUdeviceptr,
    up: sys::CUdeviceptr,
    biases: [sys::CUdeviceptr; 2],
    routing_weights: sys::CUdeviceptr,
    row_of_slot: sys::CUdeviceptr,
    token_of_row: sys::CUdeviceptr,
    expert_offsets: sys::CUdeviceptr,
    tiles: sys::CUdeviceptr,
    num_tiles: sys::CUdeviceptr,
    gemm: KernelArgs,
    function: i32,
    alpha: f32,
    limits: [f32; 3],
    up_offset: f32,
    soft_cap: i32,
    caps: [f32; 2],
    gated: i32,
    gather: i32,
    top_k: i32,
    num_tokens: i32,
    weight_inside: i32,
    bias_strides: [i32; 2],
}

// ---- A problem ----------------------------------------------------------------------------------

struct Weights {
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
}

impl Weights {
    fn new(gpu: &Gpu, model: &Model) -> Result<Self> {
        let config = &model.config;
        let upload = |len: usize, depth: usize, seed| {
            let values = normal::<bf16>(len, (depth as f64).sqrt().recip(), seed);
            gpu.stream.clone_htod(&values).map_err(gpu.failed("upload weights"))
        };
        Ok(Self {
            gate_up: upload(config.gate_up_len(), config.hidden, 1)?,
            down: upload(config.down_len(), config.intermediate, 2)?,
        })
    }
}

/// Both products of a layer for a draw of tokens.
struct Problem<'a> {
    gpu: &'a Gpu,
    weights: &'a Weights,
    plan: RoutingPlan<'static>,
    hidden: usize,
    intermediate: usize,
    x: CudaSlice<bf16>,
    act: CudaSlice<bf16>,
    yp: CudaSlice<bf16>,
    /// The outputs of the built-in kernels, as bits.
    expected: (Vec<u16>, Vec<u16>),
}

impl<'a> Problem<'a> {
    fn new(gpu: &'a Gpu, model: &Model, draw: &Draw, weights: &'a Weights) -> Result<Self> {
        let (hidden, intermediate) = (model.config.hidden, model.config.intermediate);
        let (stream, shape) = (&gpu.stream, draw.shape);
        let upload = gpu.failed("upload a problem");
        let ids = stream.clone_htod(&draw.expert_ids).map_err(&upload)?;
        let x = normal::<bf16>(shape.num_tokens * hidden, 1.0, 3);
        let mut problem = Self {
            gpu,
            weights,
            plan: ops::plan::plan_fwd(&gpu.device, stream, shape, &ids.as_view())?,
            hidden,
            intermediate,
            x: stream.clone_htod(&x).map_err(&upload)?,
            act: stream.alloc_zeros(shape.slots() * intermediate).map_err(&upload)?,
            yp: stream.alloc_zeros(shape.slots() * hidden).map_err(&upload)?,
            expected: (Vec::new(), Vec::new()),
        };
        problem.expected = problem.output_bits(Self::built_in)?;
        Ok(problem)
    }

    /// Poisons both outputs, calls `run`, and returns their bits.
    fn output_bits(
        &mut self,
        run: impl Fn(&mut Self) -> Result<()>,
    ) -> Result<(Vec<u16>, Vec<u16>)> {
        let stream = &self.gpu.stream;
        for output in [&mut self.act, &mut self.yp] {
            let poison = vec![bf16::NAN; output.len()];
            stream.memcpy_htod(&poison, output).map_err(self.gpu.failed("poison an output"))?;
        }
        run(self)?;
        let read = |output: &CudaSlice<bf16>| -> Result<Vec<u16>> {
            let values = stream.clone_dtoh(output).map_err(self.gpu.failed("read an output"))?;
            Ok(values.into_iter().map(bf16::to_bits).collect())
        };
        Ok((read(&self.act)?, read(&self.yp)?))
    }

    /// Times a variant. Returns `None` if its bits differ from those of the built-in kernels.
    fn compare(&mut self, variant: &Variant) -> Result<Option<Times>> {
        if self.output_bits(|problem| problem.launch(variant))? != self.expected {
            return Ok(None);
        }
        let once = self.seconds(1, Self::built_in)?;
        let calls = (SAMPLE_SECONDS / once.max(1e-9)).ceil().clamp(1.0, 4096.0) as usize;
        let (mut of_variant, mut built_in) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            built_in.push(self.seconds(calls, Self::built_in)?);
            of_variant.push(self.seconds(calls, |problem| problem.launch(variant))?);
            built_in.push(self.seconds(calls, Self::built_in)?);
        }
        Ok(Some((Samples::new(of_variant), Samples::new(built_in))))
    }

    /// The mean time of a call in seconds, over `calls` calls between two events.
    fn seconds(&mut self, calls: usize, run: impl Fn(&mut Self) -> Result<()>) -> Result<f64> {
        let gpu = self.gpu;
        let timing = gpu.failed("time with events");
        let event = || gpu.device.context().new_event(Some(CU_EVENT_DEFAULT));
        let (start, end) = (event().map_err(&timing)?, event().map_err(&timing)?);
        start.record(&gpu.stream).map_err(&timing)?;
        (0..calls).try_for_each(|_| run(self))?;
        end.record(&gpu.stream).map_err(&timing)?;
        let milliseconds = start.elapsed_ms(&end).map_err(&timing)?;
        Ok(f64::from(milliseconds) / 1e3 / calls as f64)
    }

    fn built_in(&mut self) -> Result<()> {
        let (device, stream) = (&self.gpu.device, &self.gpu.stream);
        grouped_gemm_gate_up_fwd_into(
            device,
            stream,
            &self.plan,
            &ExpertConfig::default(),
            self.intermediate,
            self.hidden,
            Rows::Gathered,
            &self.x.as_view(),
            GateUpWeights::fused(&self.weights.gate_up.as_view()),
            None,
            &mut self.act.as_view_mut(),
        )?;
        grouped_gemm_fwd_into(
            device,
            stream,
            &self.plan,
            self.hidden,
            self.intermediate,
            Rows::Grouped,
            &self.act.as_view(),
            LinearWeights::new(&self.weights.down.as_view()),
            &mut self.yp.as_view_mut(),
        )?;
        Ok(())
    }

    /// Launches both products as [`Self::built_in`] does, with a variant's kernels.
    fn launch(&mut self, variant: &Variant) -> Result<()> {
        let constants = variant.launch;
        let Self { gpu, weights, plan, hidden, intermediate, x, act, yp, .. } = self;
        let stream = &gpu.stream;
        let (x, _x) = x.device_ptr(stream);
        let (act, _act) = act.device_ptr_mut(stream);
        let (yp, _yp) = yp.device_ptr_mut(stream);
        let (gate_up, _gate_up) = weights.gate_up.device_ptr(stream);
        let (down, _down) = weights.down.device_ptr(stream);
        let views = [plan.token_of_row(), plan.expert_offsets(), plan.tiles(), plan.num_tiles()];
        let [(tokens, _t), (offsets, _o), (tiles, _l), (num_tiles, _n)] =
            views.each_ref().map(|view| view.device_ptr(stream));
        let shape = plan.shape();
        let slots = shape.slots();
        let max_tiles = slots.min(slots.div_ceil(TILE_ROWS) + shape.num_experts);
        let args = |parts: usize, n: usize, k: usize, x_rows: usize| KernelArgs {
            expert_stride: (parts * n * k) as i64,
            out_stride: k as i32,
            in_stride: 1,
            rows: slots as i32,
            x_rows: x_rows as i32,
            max_tiles: max_tiles as i32,
            out_features: n as i32,
            in_features: k as i32,
            num_experts: shape.num_experts as i32,
            // Rows of the named layers are multiples of 16 bytes, and allocations are 256-byte
            // aligned.
            vector_load: 1,
            vector_store: 1,
        };
        let product = |function, parts, n: usize, params: *mut c_void| {
            let columns = n.div_ceil(constants.block_n / parts);
            let blocks = max_tiles.next_multiple_of(constants.tile_group) * columns;
            // A grid that is too large becomes 0, which the driver refuses.
            let blocks = u32::try_from(blocks).unwrap_or(0);
            // SAFETY: moe_grouped_gemm_fwd_gate_up and moe_grouped_gemm_fwd in
            // kernels/grouped_gemm.cu take these structs; buffers have the lengths that the
            // built-in kernels were given, and the plan is of their shape.
            unsafe {
                result::launch_kernel(
                    function,
                    (blocks, 1, 1),
                    (constants.threads, 1, 1),
                    constants.shared_bytes,
                    stream.cu_stream(),
                    &mut [params],
                )
            }
        };
        let mut first = SwigluParams {
            act,
            x,
            gate: gate_up,
            up: gate_up + (*intermediate * *hidden * size_of::<bf16>()) as sys::CUdeviceptr,
            biases: [0; 2],
            routing_weights: 0,
            row_of_slot: 0,
            token_of_row: tokens,
            expert_offsets: offsets,
            tiles,
            num_tiles,
            gemm: args(2, *intermediate, *hidden, shape.num_tokens),
            function: 0,
            alpha: 1.0,
            limits: [f32::INFINITY; 3],
            up_offset: 0.0,
            soft_cap: 0,
            caps: [f32::INFINITY; 2],
            gated: 1,
            gather: 1,
            top_k: shape.top_k as i32,
            num_tokens: shape.num_tokens as i32,
            weight_inside: 0,
            bias_strides: [0; 2],
        };
        let mut second = LinearParams {
            y: yp,
            x: act,
            w: down,
            bias: 0,
            token_of_row: 0,
            expert_offsets: offsets,
            tiles,
            num_tiles,
            args: args(1, *hidden, *intermediate, slots),
        };
        product(variant.gate_up, 2, *intermediate, from_mut(&mut first).cast())
            .and_then(|()| product(variant.plain, 1, *hidden, from_mut(&mut second).cast()))
            .map_err(gpu.failed("launch a variant"))
    }
}
