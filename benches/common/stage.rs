//! What the operations of one model share: its weights, on one target.

use cudarc::driver::CudaSlice;

use crate::common::error::{Result, driver};
use crate::common::model::Model;
use crate::common::roofline::{Work, expected_distinct, work};
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu, Target};
use crate::common::values::normal;
use crate::{
    Op, capacity, combine, expert_choice, grouped_gemm, jitter, layer, noise, permute, plan,
    rms_norm, route, router_gemm,
};

/// Bytes that leave nothing of what was before them in any cache.
const COLD_BYTES: f64 = 256e6;

/// The most sets of weights that calls take turns with.
const MAX_SETS: usize = 4;

/// The weights of a layer, where they are needed.
pub(crate) struct Weights<B> {
    /// [E, H]
    pub(crate) gate: B,
    /// [E, 2I, H]
    pub(crate) gate_up: B,
    /// [E, H, I]
    pub(crate) down: B,
}

/// A model's layer on a target.
pub struct Stage<'g, D> {
    model: Model,
    place: Place<'g, D>,
}

enum Place<'g, D> {
    Cpu(Weights<Vec<D>>),
    Gpu(&'g Gpu, Vec<Weights<CudaSlice<D>>>),
}

/// One operation, ready to be called again and again.
pub struct Workload<'a> {
    /// Calls take turns with so many sets of weights.
    pub sets: usize,
    /// Whether the weights, or whatever is most of the bytes, come from memory and not from a cache.
    pub cold: bool,
    call: Box<dyn FnMut(usize) -> Result<()> + 'a>,
}

impl<'a> Workload<'a> {
    pub(crate) fn new(call: impl FnMut(usize) -> Result<()> + 'a) -> Self {
        Self { sets: 1, cold: false, call: Box::new(call) }
    }

    /// Calls the operation with one of its sets; on a device, enqueues it.
    ///
    /// # Errors
    /// What the library says.
    pub fn call(&mut self, set: usize) -> Result<()> {
        (self.call)(set % self.sets)
    }
}

/// The standard deviation of weights that keep a sum of `len` products near one.
fn deviation(len: usize) -> f64 {
    (len as f64).sqrt().recip()
}

/// The seed of `x`; those of weights follow.
const X: u64 = 1;

impl<'g, D: Element> Stage<'g, D> {
    /// Makes the weights: more than one set of them where calls on `fewest` tokens would find what
    /// the previous one left in the cache, and there is memory for it.
    ///
    /// # Errors
    /// What the library or the driver says, above all that there is not enough memory.
    pub fn new(target: &Target<'g>, model: &Model, fewest: &Draw) -> Result<Self> {
        model.config.check()?;
        let place = match target {
            Target::Cpu => Place::Cpu(host_weights(model, 0)),
            Target::Gpu(gpu) => {
                let bytes = least_work::<D>(Op::Layer, model, fewest).bytes;
                let wanted = (COLD_BYTES / bytes).ceil().clamp(1.0, MAX_SETS as f64) as usize;
                let (free, _) =
                    gpu.context().mem_get_info().map_err(driver("ask for free memory"))?;
                let one = 3 * model.config.down_len() * size_of::<D>();
                let room = (free / 2 / one.max(1)).max(1);
                let sets = (0..wanted.min(room)).map(|set| device_weights(gpu, model, set as u64));
                Place::Gpu(gpu, sets.collect::<Result<_>>()?)
            }
        };
        Ok(Self { model: model.clone(), place })
    }

    /// An operation on the tokens of a draw.
    ///
    /// # Errors
    /// What the library or the driver says, above all that there is not enough memory.
    pub fn workload(&self, op: Op, draw: &Draw) -> Result<Workload<'_>> {
        let model = &self.model;
        let mut workload = match &self.place {
            Place::Cpu(weights) => match op {
                Op::RouterGemm => router_gemm::on_cpu(model, weights, draw),
                Op::Route => route::on_cpu::<D>(model, draw),
                Op::Noise => noise::on_cpu(draw),
                Op::Jitter => jitter::on_cpu::<D>(model, draw),
                Op::Capacity => capacity::on_cpu(draw),
                Op::ExpertChoice => expert_choice::on_cpu::<D>(draw),
                Op::Plan => plan::on_cpu(draw),
                Op::Permute => permute::on_cpu::<D>(model, draw),
                Op::GateUp | Op::Down | Op::Experts => {
                    grouped_gemm::on_cpu(op, model, weights, draw)
                }
                Op::RmsNorm => rms_norm::on_cpu::<D>(model, draw),
                Op::Combine => combine::on_cpu::<D>(model, draw),
                Op::Layer | Op::LayerFromX => layer::on_cpu(op, model, weights, draw),
            },
            Place::Gpu(gpu, weights) => match op {
                Op::RouterGemm => router_gemm::on_gpu(gpu, model, weights, draw),
                Op::Route => route::on_gpu::<D>(gpu, model, draw),
                Op::Noise => noise::on_gpu(gpu, draw),
                Op::Jitter => jitter::on_gpu::<D>(gpu, model, draw),
                Op::Capacity => capacity::on_gpu(gpu, draw),
                Op::ExpertChoice => expert_choice::on_gpu::<D>(gpu, draw),
                Op::Plan => plan::on_gpu(gpu, draw),
                Op::Permute => permute::on_gpu::<D>(gpu, model, draw),
                Op::GateUp | Op::Down | Op::Experts => {
                    grouped_gemm::on_gpu(op, gpu, model, weights, draw)
                }
                Op::RmsNorm => rms_norm::on_gpu::<D>(gpu, model, draw),
                Op::Combine => combine::on_gpu::<D>(gpu, model, draw),
                Op::Layer | Op::LayerFromX => layer::on_gpu(op, gpu, model, weights, draw),
            },
        }?;
        if op.has_weights() {
            workload.sets = match &self.place {
                Place::Cpu(_) => 1,
                Place::Gpu(_, weights) => weights.len(),
            };
        }
        workload.cold = workload.sets as f64 * least_work::<D>(op, model, draw).bytes >= COLD_BYTES;
        Ok(workload)
    }

    /// The tensors of a layer on the host, for a peer: `x [T, H]`, `gate [E, H]`, `gate_up [E, 2I, H]`
    /// and `down [E, H, I]`, as the first set of weights has them.
    pub fn tensors(&self, num_tokens: usize) -> Tensors<D> {
        let Weights { gate, gate_up, down } = host_weights(&self.model, 0);
        Tensors { x: x(&self.model, num_tokens), gate, gate_up, down }
    }

    /// What the layer makes of a draw, `[T, H]`.
    ///
    /// # Errors
    /// What the library or the driver says.
    pub fn output(&self, draw: &Draw) -> Result<Vec<D>> {
        match &self.place {
            Place::Cpu(weights) => layer::output_on_cpu(&self.model, weights, draw),
            Place::Gpu(gpu, weights) => layer::output_on_gpu(gpu, &self.model, &weights[0], draw),
        }
    }
}

/// The inputs of a layer on the host.
pub struct Tensors<D> {
    /// `[T, H]`
    pub x: Vec<D>,
    /// `[E, H]`
    pub gate: Vec<D>,
    /// `[E, 2I, H]`
    pub gate_up: Vec<D>,
    /// `[E, H, I]`
    pub down: Vec<D>,
}

/// The least work of an operation on the tokens of a draw.
pub fn least_work<D>(op: Op, model: &Model, draw: &Draw) -> Work {
    let num_tokens = draw.shape.num_tokens;
    let distinct = match op {
        // Its routing follows from x and the gate, which are random too.
        Op::LayerFromX => expected_distinct(&model.config, num_tokens),
        _ => draw.distinct as f64,
    };
    work(op, &model.config, num_tokens, size_of::<D>(), distinct)
}

/// `[T, H]` on the host.
pub(crate) fn x<D: Element>(model: &Model, num_tokens: usize) -> Vec<D> {
    normal(num_tokens * model.config.hidden, 1.0, X)
}

/// The lengths, deviations and seeds of gate, gate_up and down.
fn parts(model: &Model, set: u64) -> [(usize, f64, u64); 3] {
    let config = &model.config;
    let seed = X + 1 + 3 * set;
    [
        (config.num_experts * config.hidden, deviation(config.hidden), seed),
        (config.gate_up_len(), deviation(config.hidden), seed + 1),
        (config.down_len(), deviation(config.intermediate), seed + 2),
    ]
}

fn host_weights<D: Element>(model: &Model, set: u64) -> Weights<Vec<D>> {
    let [gate, gate_up, down] =
        parts(model, set).map(|(len, deviation, seed)| normal(len, deviation, seed));
    Weights { gate, gate_up, down }
}

fn device_weights<D: Element>(gpu: &Gpu, model: &Model, set: u64) -> Result<Weights<CudaSlice<D>>> {
    let make = |(len, deviation, seed)| gpu.normal(len, deviation, seed);
    let [gate, gate_up, down] = parts(model, set).map(make);
    Ok(Weights { gate: gate?, gate_up: gate_up?, down: down? })
}
