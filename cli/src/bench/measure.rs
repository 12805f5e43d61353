//! Goes through everything that was asked for and makes a row of each.

use std::path::Path;
use std::time::Duration;

use cudarc::cublas::{CudaBlas, Gemm};
use moe_bench::{Ceilings, Dense, Draw, Model, Op, Repeater, Samples, Stage, Target, least_work};

use crate::backend::Element;
use crate::bench::record::{self, Record, Row, Seconds};
use crate::bench::{Request, traffic};
use crate::device::Place;
use crate::error::Result;
use crate::progress::Progress;

/// Samples of one row on a device; on the CPU as many as there is patience for.
pub const SAMPLES: usize = 25;
const PATIENCE: Duration = Duration::from_secs(2);

/// One run of the program.
pub struct Bench<'a> {
    pub target: &'a Target<'a>,
    pub place: Place,
    pub request: &'a Request,
    pub output: &'a Path,
    pub record: &'a mut Record,
    pub progress: &'a Progress,
    pub ceilings: Ceilings,
}

/// A model at one number of tokens with one routing.
#[derive(Clone, Copy)]
pub struct Setting<'a, D> {
    pub model: &'a Model,
    pub stage: &'a Stage<'a, D>,
    pub draw: &'a Draw,
}

impl Bench<'_> {
    /// `Ok(false)` if a result is wrong, ours or a peer's.
    pub fn run<D: Element>(&mut self) -> Result<bool>
    where
        CudaBlas: Gemm<D>,
    {
        let request = self.request;
        if self.place != Place::Emulator && !request.is_over() {
            self.progress.say("ceilings".into());
            self.ceilings = Ceilings::measure(self.target, D::DTYPE)?;
        }
        self.record.ceilings = record::Ceilings {
            copy_bytes_per_second: self.ceilings.copy,
            read_bytes_per_second: self.ceilings.read,
            dense_flops_per_second: self.ceilings.dense,
        };
        let mut good = true;
        for model in &request.models {
            let tokens = request.tokens_of(model);
            let fewest = Draw::new(model, tokens[0], request.routings[0], D::DTYPE)?;
            let stage = Stage::<D>::new(self.target, model, &fewest)?;
            for &tokens in tokens {
                for &routing in &request.routings {
                    let draw = Draw::new(model, tokens, routing, D::DTYPE)?;
                    let setting = Setting { model, stage: &stage, draw: &draw };
                    for op in request.ops_with(routing) {
                        if request.is_over() {
                            return Ok(good);
                        }
                        self.operation(op, setting)?;
                    }
                    good &= self.peers(setting)?;
                }
            }
        }
        self.record.complete = !request.is_over();
        Ok(good)
    }

    fn operation<D: Element>(&mut self, op: Op, setting: Setting<'_, D>) -> Result<()>
    where
        CudaBlas: Gemm<D>,
    {
        let Setting { model, stage, draw } = setting;
        self.progress.say(format!("{} {} T{}", op.name(), model.name, draw.shape.num_tokens));
        let mut row = empty_row(op, setting);
        if self.place == Place::Emulator {
            row.traffic = Some(traffic::of(self.target, stage.workload(op, draw)?)?);
        } else {
            let (samples, launch, cache) = self.time(op, setting)?;
            row.launch = Some(launch.into());
            row.cache = Some(cache.into());
            row.take(&samples, &self.ceilings);
            row.dense = self.dense(op, setting, samples.median())?;
        }
        self.progress.advance();
        self.push(row)
    }

    /// The times of ours, how calls came to the device, and whether the data was cold.
    pub fn time<D: Element>(
        &self,
        op: Op,
        setting: Setting<'_, D>,
    ) -> Result<(Samples, &'static str, &'static str)> {
        let workload = setting.stage.workload(op, setting.draw)?;
        let num_tokens = setting.draw.shape.num_tokens;
        let mut repeater = Repeater::new(self.target, workload, num_tokens)?;
        let samples = repeater.samples(SAMPLES, PATIENCE)?;
        Ok((samples, repeater.launch(), repeater.cache()))
    }

    /// What cuBLAS needs for the same products.
    fn dense<D: Element>(
        &self,
        op: Op,
        setting: Setting<'_, D>,
        ours: f64,
    ) -> Result<Option<record::Dense>>
    where
        CudaBlas: Gemm<D>,
    {
        let Target::Gpu(gpu) = self.target else { return Ok(None) };
        let Some(dense) = Dense::new(gpu)? else { return Ok(None) };
        let Some(workload) = dense.matching::<D>(op, setting.model, setting.draw)? else {
            return Ok(None);
        };
        let mut repeater = Repeater::new(self.target, workload, setting.draw.shape.num_tokens)?;
        let seconds = repeater.samples(SAMPLES, PATIENCE)?.median();
        Ok(Some(record::Dense { by: "cublas", seconds, percent: 100.0 * seconds / ours }))
    }

    /// Adds a row, and writes the file: what has been measured is not lost.
    pub fn push(&mut self, row: Row) -> Result<()> {
        self.record.rows.push(row);
        self.record.write(self.output)
    }
}

/// A row of ours without a result.
pub fn empty_row<D: Element>(op: Op, setting: Setting<'_, D>) -> Row {
    let Setting { model, draw, .. } = setting;
    let num_tokens = draw.shape.num_tokens;
    let work = least_work::<D>(op, model, draw);
    Row {
        op: op.name(),
        pass: "forward",
        boundary: op.boundary(),
        model: model.name.clone(),
        hidden: model.config.hidden,
        intermediate: model.config.intermediate,
        num_experts: model.config.num_experts,
        top_k: model.config.top_k,
        tokens: num_tokens,
        dtype: D::DTYPE.name(),
        routing: draw.routing.name(),
        router: model.router(),
        by: "moe-kernels".into(),
        version: Some(env!("CARGO_PKG_VERSION").into()),
        seconds: None,
        ours_around: None,
        launch: None,
        cache: None,
        bytes: work.bytes as u64,
        flops: work.flops as u64,
        floor_seconds: None,
        bound: None,
        percent_of_floor: None,
        dense: None,
        traffic: None,
        relative_error: None,
        note: None,
    }
}

impl Row {
    /// Takes times over, and compares them with the floor.
    pub fn take(&mut self, samples: &Samples, ceilings: &Ceilings) {
        let median = samples.median();
        self.seconds = Some(Seconds {
            median,
            p10: samples.quantile(0.1),
            p90: samples.quantile(0.9),
            samples: samples.count(),
        });
        let work = moe_bench::Work { bytes: self.bytes as f64, flops: self.flops as f64 };
        if let Some(floor) = work.floor(ceilings.bandwidth(), ceilings.dense) {
            self.floor_seconds = Some(floor.seconds);
            self.bound = Some(floor.bound.name());
            self.percent_of_floor = Some(100.0 * floor.seconds / median);
        }
    }
}
