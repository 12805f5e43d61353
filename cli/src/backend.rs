//! A forward pass of a layer on the device of this process: the CPU reference or the kernels.

use moe_kernels::{Dtype, MoeConfig, MoeInputs, MoeWeights, Owned, Typed, reference};
use moe_kernels_hf::Block;

use crate::device::{Gpu, Place};
use crate::error::Result;
use crate::load::load_weights;
use crate::progress::Steps;

/// Evaluates an expression for the element type of a [`moe_kernels::DType`], as the type `$D`.
macro_rules! dispatch {
    ($dtype:expr, $D:ident => $body:expr) => {
        match $dtype {
            moe_kernels::DType::F32 => {
                type $D = f32;
                $body
            }
            moe_kernels::DType::F16 => {
                type $D = half::f16;
                $body
            }
            moe_kernels::DType::BF16 => {
                type $D = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use dispatch;

/// The device of this process.
pub enum Backend {
    Cpu,
    Gpu(Gpu),
}

/// The output of a block.
pub struct Output<D> {
    /// The router's logits `[T, E]`; E includes zero experts.
    pub logits: Vec<f32>,
    /// `[T, H]`
    pub y: Vec<D>,
    /// `[T, K]`
    pub expert_ids: Vec<u32>,
    /// `[T, K]`
    pub weights: Vec<f32>,
}

/// The name of the step that runs the whole layer.
pub const FORWARD: &str = "layer forward";

/// The names of the steps that run its parts.
pub const PARTS: [&str; 3] = ["  router logits", "  route", "  experts"];

impl Backend {
    /// Opens the device. A process cannot change its driver afterwards.
    pub fn open(place: Place) -> Result<Self> {
        match place {
            Place::Cpu => Ok(Backend::Cpu),
            Place::Cuda | Place::Emulator => {
                let gpu = Gpu::open(place)?;
                gpu.use_all_cores();
                Ok(Backend::Gpu(gpu))
            }
        }
    }

    pub fn place(&self) -> Place {
        match self {
            Backend::Cpu => Place::Cpu,
            Backend::Gpu(gpu) => gpu.place,
        }
    }

    /// The device's kind, name and capability.
    pub fn describe(&self) -> String {
        match self {
            Backend::Cpu => {
                format!("cpu: the reference in f32, {} threads", rayon::current_num_threads())
            }
            Backend::Gpu(gpu) => gpu.describe(),
        }
    }

    /// Runs a block forward.
    pub fn forward<D: Dtype>(
        &self,
        layer: &Block,
        inputs: MoeInputs<Owned, D>,
        steps: &mut Steps,
    ) -> Result<Output<D>> {
        let weights = steps.measure("read the weights", || load_weights::<D>(layer))?;
        match self {
            Backend::Cpu => forward_cpu(layer.config(), &inputs, &weights, steps),
            Backend::Gpu(gpu) => gpu.forward(layer.config(), inputs, &weights, steps),
        }
    }
}

/// Runs the reference in f32. Values between two operations are not rounded to `D`.
pub(crate) fn forward_cpu<D: Dtype>(
    config: &MoeConfig,
    inputs: &MoeInputs<Owned, D>,
    weights: &MoeWeights<Owned, D>,
    steps: &mut Steps,
) -> Result<Output<D>> {
    let (mut inputs, weights) = (inputs.as_host(), weights.as_host());
    let computed;
    if inputs.logits.is_none() {
        computed = steps
            .time(PARTS[0], || reference::router_logits::<f32, D>(config, &inputs, &weights))?;
        inputs.logits = Some(match &computed {
            Typed::Element(logits) => Typed::Element(&logits[..]),
            Typed::F32(logits) => Typed::F32(&logits[..]),
        });
    }
    let logits = match &inputs.logits {
        None => Vec::new(),
        Some(Typed::Element(logits)) => to_f32(logits),
        Some(Typed::F32(logits)) => logits.to_vec(),
    };
    let routing = steps
        .time(PARTS[1], || reference::moe_layer_route_fwd::<f32, D>(config, &inputs, &weights))?;
    let reference::LayerRouting { expert_ids, weights: routing_weights, .. } = routing;
    let y = steps.time(PARTS[2], || {
        let (x, ids) = (inputs.x, &expert_ids);
        reference::moe_layer_experts_fwd::<f32, D>(config, x, ids, &routing_weights, &weights)
    })?;
    steps.add(FORWARD, PARTS.iter().map(|part| steps.of(part)).sum());
    Ok(Output { logits, y: reference::round(&y), expert_ids, weights: routing_weights })
}

/// Converts each value to f32, which is exact.
pub fn to_f32<D: Dtype>(values: &[D]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Counts the slots of each expert.
pub fn rows_per_expert(expert_ids: &[u32], num_experts: usize) -> Vec<usize> {
    let mut rows = vec![0; num_experts];
    for &id in expert_ids {
        if let Some(rows) = rows.get_mut(id as usize) {
            *rows += 1;
        }
    }
    rows
}
