//! A layer on the device of this process: the CPU reference, or the kernels.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use moe_kernels::{Dtype, MoeConfig, RouterConfig, reference};

use crate::checkpoint::Layer;
use crate::device::{Gpu, Place};
use crate::error::{Error, Result};
use crate::progress::Steps;
use crate::weights::{HostWeights, RouterGate};

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

/// What a run makes.
pub struct Output<D> {
    /// [T, H]
    pub y: Vec<D>,
    pub rows_per_expert: Vec<usize>,
}

/// The name of the step that is the layer itself.
pub const FORWARD: &str = "layer forward";

/// The names of its operations.
pub const OPERATIONS: [&str; 5] =
    ["  route", "  plan", "  gate, up and activation", "  down", "  combine"];

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

    /// One forward pass of `x` [T, H].
    pub fn forward<D: Element>(
        &self,
        layer: &Layer<'_>,
        x: &[D],
        num_tokens: usize,
        steps: &mut Steps,
    ) -> Result<Output<D>> {
        match self {
            Backend::Cpu => forward_cpu(layer, x, num_tokens, steps),
            Backend::Gpu(gpu) => gpu.forward(layer, x, num_tokens, steps),
        }
    }
}

/// The weights of a layer that the backends run.
pub struct Plain<D> {
    /// [E, H]
    pub gate: Vec<D>,
    /// [E, 2I, H]
    pub gate_up: Vec<D>,
    /// [E, H, I]
    pub down: Vec<D>,
}

impl<D: Element> Plain<D> {
    /// Fails for layers that the backends do not run: they know softmax routers and SwiGLU experts.
    pub fn read(layer: &Layer<'_>) -> Result<Self> {
        let config = &layer.config;
        let MoeConfig { hidden, intermediate, num_experts, top_k, router, .. } = *config;
        let plain =
            MoeConfig { router, ..MoeConfig::new(hidden, intermediate, num_experts, top_k) };
        let routers = [
            RouterConfig::softmax_top_k(false),
            RouterConfig::softmax_top_k(true),
            RouterConfig::top_k_softmax(),
        ];
        if *config == plain && routers.contains(&router) {
            let weights = HostWeights::<D>::read(layer)?;
            if let HostWeights {
                router_gate: Some(RouterGate::Elem(gate)),
                gate_up: Some(gate_up),
                down: Some(down),
                ..
            } = weights
            {
                return Ok(Self { gate, gate_up, down });
            }
        }
        Err(Error::Layer { model_type: layer.block.model_type, config: config.to_string() })
    }
}

/// The reference, computing in f32; what lies between two operations is not rounded to `D`.
fn forward_cpu<D: Element>(
    layer: &Layer<'_>,
    x: &[D],
    num_tokens: usize,
    steps: &mut Steps,
) -> Result<Output<D>> {
    let config = &layer.config;
    let Plain { gate, gate_up, down } = steps.measure("read the weights", || Plain::read(layer))?;
    let logits: Vec<D> = steps.time("router projection", || {
        reference::router_logits::<f32, D>(config, x, &gate).map(|logits| reference::round(&logits))
    })?;
    // What reference::moe_layer_fwd does, one operation at a time.
    let shape = config.routing(num_tokens);
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let inputs = reference::RouteInputs::new(&logits);
    let routing = steps
        .time(OPERATIONS[0], || reference::route_fwd::<f32, D>(&shape, &config.router, &inputs))?;
    let plan = steps.time(OPERATIONS[1], || {
        reference::plan_fwd(&shape, shape.slots().max(1), &routing.expert_ids)
    })?;
    let act = steps.time(OPERATIONS[2], || {
        let (n, k) = (intermediate, hidden);
        let (experts, gate_up) = (&config.experts, reference::GateUpWeights::fused(&gate_up[..]));
        let none = None::<&[f32]>;
        reference::grouped_gemm_gate_up_fwd::<f32, D>(&plan, experts, n, k, x, gate_up, none, true)
    })?;
    let yp = steps.time(OPERATIONS[3], || {
        let down = reference::LinearWeights::new(&down[..]);
        reference::grouped_gemm_fwd::<f32, D>(&plan, hidden, intermediate, &act, down, false)
    })?;
    let y = steps.time(OPERATIONS[4], || {
        let inputs = reference::CombineInputs::new(&yp, &routing.weights);
        reference::combine_fwd::<f32>(&shape, &plan, hidden, &inputs)
    })?;
    steps.add(FORWARD, OPERATIONS.iter().map(|operation| steps.of(operation)).sum());
    Ok(Output {
        y: reference::round(&y),
        rows_per_expert: rows_per_expert(&routing.expert_ids, config.num_experts),
    })
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
