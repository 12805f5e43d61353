//! A layer on the device of this process: the CPU reference, or the kernels.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use moe_kernels::{Dtype, MoeConfig, MoeInputs, MoeWeights, Owned, Typed, reference};
use moe_kernels_hf::Block;

use crate::device::{Gpu, Place};
use crate::error::Result;
use crate::load::load_weights;
use crate::progress::Steps;

/// An element type that the CPU and the device know.
pub trait Element: Dtype + DeviceRepr + ValidAsZeroBits {}
impl<D: Dtype + DeviceRepr + ValidAsZeroBits> Element for D {}

/// Evaluates an expression with a type name that stands for the element type.
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

/// What a block makes of tokens.
pub struct Output<D> {
    /// The router's logits, [T, E]; E includes zero experts.
    pub logits: Vec<f32>,
    /// [T, H]
    pub y: Vec<D>,
    /// [T, K]
    pub expert_ids: Vec<u32>,
    /// [T, K]
    pub weights: Vec<f32>,
}

/// The name of the step that is the layer itself.
pub const FORWARD: &str = "layer forward";

/// The names of its parts.
pub const PARTS: [&str; 3] = ["  router logits", "  route", "  experts"];

impl Backend {
    /// A choice for the whole process: a driver that was opened stays.
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

    /// The device in words.
    pub fn describe(&self) -> String {
        match self {
            Backend::Cpu => {
                format!("cpu: the reference in f32, {} threads", rayon::current_num_threads())
            }
            Backend::Gpu(gpu) => gpu.describe(),
        }
    }

    /// One forward pass of a block.
    pub fn forward<D: Element>(
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

/// The reference, computing in f32; what lies between two operations is not rounded to `D`.
pub(crate) fn forward_cpu<D: Element>(
    config: &MoeConfig,
    inputs: &MoeInputs<Owned, D>,
    weights: &MoeWeights<Owned, D>,
    steps: &mut Steps,
) -> Result<Output<D>> {
    let (mut inputs, weights) = (inputs.as_host(), weights.as_host());
    let made;
    if inputs.logits.is_none() {
        made = steps
            .time(PARTS[0], || reference::router_logits::<f32, D>(config, &inputs, &weights))?;
        inputs.logits = Some(match &made {
            Typed::Element(logits) => Typed::Element(&logits[..]),
            Typed::F32(logits) => Typed::F32(&logits[..]),
        });
    }
    let logits = match &inputs.logits {
        None => Vec::new(),
        Some(Typed::Element(logits)) => logits.iter().map(|logit| logit.to_f32()).collect(),
        Some(Typed::F32(logits)) => logits.to_vec(),
    };
    let routing = steps
        .time(PARTS[1], || reference::moe_layer_route_fwd::<f32, D>(config, &inputs, &weights))?;
    let reference::LayerRouting { expert_ids, weights: of_slots, .. } = routing;
    let y = steps.time(PARTS[2], || {
        let (x, ids) = (inputs.x, &expert_ids);
        reference::moe_layer_experts_fwd::<f32, D>(config, x, ids, &of_slots, &weights)
    })?;
    steps.add(FORWARD, PARTS.iter().map(|part| steps.of(part)).sum());
    Ok(Output { logits, y: reference::round(&y), expert_ids, weights: of_slots })
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
