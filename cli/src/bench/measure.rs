//! Measures every requested combination of model, tokens, routing and operation.

use std::path::Path;
use std::time::Duration;

use cudarc::cublas::{CudaBlas, Gemm};
use moe_bench::{
    Ceilings, Dense, Draw, LoadedModel, Model, Op, Repeater, Samples, Target, least_work,
};
use moe_kernels::Dtype;

use crate::bench::record::{self, Record, Row, Seconds};
use crate::bench::{Request, traffic};
use crate::device::Place;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Samples of one row on a device.
pub const SAMPLES: usize = 25;
/// After this time no sample starts except the first five.
const PATIENCE: Duration = Duration::from_secs(2);

/// The note of a row that does not fit in memory.
const NO_MEMORY: &str = "the device has not enough memory";

/// The state of a measurement.
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
    pub loaded: &'a LoadedModel<'a, D>,
    pub draw: &'a Draw,
}

impl Bench<'_> {
    /// Measures everything. Returns `Ok(false)` if our output or a peer's is wrong.
    pub fn run<D: Dtype>(&mut self) -> Result<bool>
    where
        CudaBlas: Gemm<D>,
    {
        let request = self.request;
        if self.place != Place::Emulator && request.ceilings && !request.is_over() {
            self.progress.set_message("measure the ceilings".into());
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
            let loaded = LoadedModel::<D>::new(self.target, model, &fewest);
            let loaded = match loaded.map_err(Error::from) {
                Err(error) if error.is_out_of_memory() => {
                    let mut row = empty_row::<D>(Op::Layer, model, &fewest);
                    row.note = Some(NO_MEMORY.into());
                    self.push(row)?;
                    continue;
                }
                loaded => loaded?,
            };
            for &tokens in tokens {
                for &routing in &request.routings {
                    let draw = Draw::new(model, tokens, routing, D::DTYPE)?;
                    let setting = Setting { model, loaded: &loaded, draw: &draw };
                    for op in request.ops_with(routing) {
                        if request.is_over() {
                            return Ok(good);
                        }
                        let row = match self.operation(op, setting) {
                            Err(error) if error.is_out_of_memory() => {
                                let mut row = empty_row::<D>(op, model, &draw);
                                row.note = Some(NO_MEMORY.into());
                                row
                            }
                            row => row?,
                        };
                        self.progress.advance();
                        self.push(row)?;
                    }
                    good &= self.peers(setting)?;
                }
            }
        }
        self.record.complete = !request.is_over();
        Ok(good)
    }

    /// Measures one operation.
    fn operation<D: Dtype>(&self, op: Op, setting: Setting<'_, D>) -> Result<Row>
    where
        CudaBlas: Gemm<D>,
    {
        let Setting { model, loaded, draw } = setting;
        self.progress.set_message(format!(
            "{} {} T{}",
            op.name(),
            model.name,
            draw.shape.num_tokens
        ));
        let mut row = empty_row::<D>(op, model, draw);
        if self.place == Place::Emulator {
            row.traffic = Some(traffic::of(self.target, loaded.workload(op, draw)?)?);
        } else {
            let (samples, launch, cache) = self.time(op, setting)?;
            row.launch = Some(launch.into());
            row.cache = Some(cache.into());
            row.set_times(&samples, &self.ceilings);
            row.dense = self.dense(op, setting, samples.median())?;
        }
        Ok(row)
    }

    /// Times our operation. Returns the samples, how calls were launched, and whether data was
    /// cold.
    pub fn time<D: Dtype>(
        &self,
        op: Op,
        setting: Setting<'_, D>,
    ) -> Result<(Samples, &'static str, &'static str)> {
        let workload = setting.loaded.workload(op, setting.draw)?;
        let num_tokens = setting.draw.shape.num_tokens;
        let mut repeater = Repeater::new(self.target, workload, num_tokens)?;
        let samples = repeater.samples(SAMPLES, PATIENCE)?;
        Ok((samples, repeater.launch(), repeater.cache()))
    }

    /// Times the same products of dense matrices by cuBLAS.
    fn dense<D: Dtype>(
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
        let workload = dense.matching::<D>(op, setting.model, setting.draw).map_err(Error::from);
        let workload = match workload {
            // Our own weights stay allocated, and may leave too little memory.
            Err(error) if error.is_out_of_memory() => return Ok(None),
            workload => workload?,
        };
        let Some(workload) = workload else { return Ok(None) };
        let mut repeater = Repeater::new(self.target, workload, setting.draw.shape.num_tokens)?;
        let seconds = repeater.samples(SAMPLES, PATIENCE)?.median();
        Ok(Some(record::Dense { by: "cublas", seconds, percent: 100.0 * seconds / ours }))
    }

    /// Adds a row and writes the file, so that no result is lost if the program ends early.
    pub fn push(&mut self, row: Row) -> Result<()> {
        self.record.rows.push(row);
        self.record.write(self.output)
    }
}

/// A row of ours, before it is measured.
pub fn empty_row<D: Dtype>(op: Op, model: &Model, draw: &Draw) -> Row {
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
        roofline_seconds: None,
        bound: None,
        percent_of_roofline: None,
        dense: None,
        traffic: None,
        relative_error: None,
        note: None,
    }
}

impl Row {
    /// Sets the times and the percentage of the roofline.
    pub fn set_times(&mut self, samples: &Samples, ceilings: &Ceilings) {
        let median = samples.median();
        self.seconds = Some(Seconds {
            median,
            p10: samples.quantile(0.1),
            p90: samples.quantile(0.9),
            samples: samples.count(),
        });
        let work = moe_bench::Work { bytes: self.bytes as f64, flops: self.flops as f64 };
        if let Some(roofline) = work.roofline(ceilings.bandwidth(), ceilings.dense) {
            self.roofline_seconds = Some(roofline.seconds);
            self.bound = Some(roofline.bound.name());
            self.percent_of_roofline = Some(100.0 * roofline.seconds / median);
        }
    }
}
