//! A model's weights on one target, and the workload of each operation on them.

use cudarc::driver::CudaSlice;

use crate::common::error::{Result, driver};
use crate::common::model::Model;
use crate::common::op::Op;
use crate::common::roofline::least_work;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu, Target};
use crate::common::weights::{Tensors, Weights, device_weights, host_weights, x};
use crate::common::workload::{COLD_BYTES, Workload};
use crate::{
    capacity, combine, expert_choice, grouped_gemm, jitter, layer, noise, permute, plan, rms_norm,
    route, router_gemm,
};

/// The most sets of weights that calls use in turn.
const MAX_SETS: usize = 4;

/// A model with its weights on a target.
pub struct LoadedModel<'g, D> {
    model: Model,
    place: Place<'g, D>,
}

enum Place<'g, D> {
    Cpu(Weights<Vec<D>>),
    Gpu(&'g Gpu, Vec<Weights<CudaSlice<D>>>),
}

impl<'g, D: Element> LoadedModel<'g, D> {
    /// Makes the weights. On a device there are several sets of them if memory suffices and one set
    /// would stay in the cache between calls on `fewest`, the draw of the fewest tokens.
    ///
    /// # Errors
    /// Errors of the library or the driver, such as too little memory.
    pub fn new(target: &Target<'g>, model: &Model, fewest: &Draw) -> Result<Self> {
        model.config.check()?;
        let place = match target {
            Target::Cpu => Place::Cpu(host_weights(model, 0)),
            Target::Gpu(gpu) => {
                let bytes = least_work::<D>(Op::Layer, model, fewest).bytes;
                let wanted = (COLD_BYTES / bytes).ceil().clamp(1.0, MAX_SETS as f64) as usize;
                let (free, _) =
                    gpu.context().mem_get_info().map_err(driver("query the free memory"))?;
                let one = 3 * model.config.down_len() * size_of::<D>();
                let room = (free / 2 / one.max(1)).max(1);
                let sets = (0..wanted.min(room)).map(|set| device_weights(gpu, model, set as u64));
                Place::Gpu(gpu, sets.collect::<Result<_>>()?)
            }
        };
        Ok(Self { model: model.clone(), place })
    }

    /// Prepares an operation on the tokens of a draw.
    ///
    /// # Errors
    /// Errors of the library or the driver, such as too little memory.
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

    /// Returns the layer's tensors on the host, for a peer. The weights are those of the first set.
    pub fn tensors(&self, num_tokens: usize) -> Tensors<D> {
        let Weights { router_gate, gate_up, down } = host_weights(&self.model, 0);
        Tensors { x: x(&self.model, num_tokens), router_gate, gate_up, down }
    }

    /// Computes the layer's output `[T, H]` for a draw.
    ///
    /// # Errors
    /// Errors of the library or the driver.
    pub fn output(&self, draw: &Draw) -> Result<Vec<D>> {
        match &self.place {
            Place::Cpu(weights) => layer::output_on_cpu(&self.model, weights, draw),
            Place::Gpu(gpu, weights) => layer::output_on_gpu(gpu, &self.model, &weights[0], draw),
        }
    }
}

#[cfg(test)]
mod tests {
    use moe_emulator::{Choice, choose};
    use moe_kernels::DType;

    use super::*;
    use crate::common::routing::Routing;

    /// Each router, with widths that take little time on the software device.
    #[test]
    fn layers_agree_on_the_cpu_and_the_software_device() {
        choose(Choice::Emulator).unwrap();
        let gpu = Gpu::open().unwrap();
        for name in ["deepseek-v3", "glm-4.5-air", "llama-4-scout", "olmoe-1b-7b", "gpt-oss-20b"] {
            let model = Model::find(name).unwrap().shrunk(256);
            let draw = Draw::new(&model, 4, Routing::Zipf, DType::F32).unwrap();
            let [cpu, device] = [Target::Cpu, Target::Gpu(&gpu)].map(|target| {
                let loaded = LoadedModel::<f32>::new(&target, &model, &draw).unwrap();
                for op in Op::ALL {
                    loaded.workload(op, &draw).unwrap().call(0).unwrap();
                }
                loaded.output(&draw).unwrap()
            });
            gpu.wait().unwrap();
            let norm = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>().sqrt();
            let difference: Vec<f32> = cpu.iter().zip(&device).map(|(a, b)| a - b).collect();
            assert!(norm(&cpu) > 0.0 && norm(&difference) < 1e-5 * norm(&cpu), "{name}");
        }
    }
}
