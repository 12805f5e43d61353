//! The tensors of one model's layer: weights on the host or on a device, and its tokens.

use cudarc::driver::CudaSlice;

use crate::common::error::Result;
use crate::common::model::Model;
use crate::common::target::{Element, Gpu};
use crate::common::values::normal;

/// The weights of a layer in buffers of type `B`.
pub(crate) struct Weights<B> {
    /// [E, H]
    pub(crate) router_gate: B,
    /// [E, 2I, H]
    pub(crate) gate_up: B,
    /// [E, H, I]
    pub(crate) down: B,
}

/// The inputs of a layer on the host.
pub struct Tensors<D> {
    /// `[T, H]`
    pub x: Vec<D>,
    /// `[E, H]`
    pub router_gate: Vec<D>,
    /// `[E, 2I, H]`
    pub gate_up: Vec<D>,
    /// `[E, H, I]`
    pub down: Vec<D>,
}

/// The standard deviation of weights that keep a sum of `len` products near one.
fn deviation(len: usize) -> f64 {
    (len as f64).sqrt().recip()
}

/// The seed of `x`. The seeds of the weights follow it.
const X: u64 = 1;

/// `[T, H]` on the host.
pub(crate) fn x<D: Element>(model: &Model, num_tokens: usize) -> Vec<D> {
    normal(num_tokens * model.config.hidden, 1.0, X)
}

/// The lengths, deviations and seeds of router_gate, gate_up and down.
fn parts(model: &Model, set: u64) -> [(usize, f64, u64); 3] {
    let config = &model.config;
    let seed = X + 1 + 3 * set;
    [
        (config.num_experts * config.hidden, deviation(config.hidden), seed),
        (config.gate_up_len(), deviation(config.hidden), seed + 1),
        (config.down_len(), deviation(config.intermediate), seed + 2),
    ]
}

pub(crate) fn host_weights<D: Element>(model: &Model, set: u64) -> Weights<Vec<D>> {
    let [router_gate, gate_up, down] =
        parts(model, set).map(|(len, deviation, seed)| normal(len, deviation, seed));
    Weights { router_gate, gate_up, down }
}

pub(crate) fn device_weights<D: Element>(
    gpu: &Gpu,
    model: &Model,
    set: u64,
) -> Result<Weights<CudaSlice<D>>> {
    let make = |(len, deviation, seed)| gpu.normal(len, deviation, seed);
    let [router_gate, gate_up, down] = parts(model, set).map(make);
    Ok(Weights { router_gate: router_gate?, gate_up: gate_up?, down: down? })
}
