//! The layer, from its logits and from its tokens.

use cudarc::driver::CudaSlice;
use moe_kernels::{MoeInputs, MoeLayer, MoeWeights, Workspace, reference};

use crate::common::error::{Result, driver};
use crate::common::model::Model;
use crate::common::op::Op;
use crate::common::routing::Draw;
use crate::common::target::{Element, Gpu};
use crate::common::weights::{Weights, x};
use crate::common::workload::Workload;
use crate::route::logits;

/// A layer with the tensors and the workspace of a forward pass.
struct Prepared<'a, D> {
    gpu: &'a Gpu,
    layer: MoeLayer,
    x: CudaSlice<D>,
    logits: CudaSlice<D>,
    selection_bias: Option<CudaSlice<f32>>,
    workspace: Workspace<'static>,
    y: CudaSlice<D>,
}

impl<'a, D: Element> Prepared<'a, D> {
    fn new(gpu: &'a Gpu, model: &Model, draw: &Draw) -> Result<Self> {
        let (config, num_tokens) = (model.config, draw.shape.num_tokens);
        let bytes = MoeLayer::workspace_bytes(&config, D::DTYPE, num_tokens)?;
        Ok(Self {
            gpu,
            layer: MoeLayer::new(&gpu.device, config)?,
            x: gpu.upload(&x::<D>(model, num_tokens))?,
            logits: gpu.upload(&logits::<D>(draw))?,
            selection_bias: model.selection_bias().map(|bias| gpu.upload(&bias)).transpose()?,
            workspace: Workspace::alloc(&gpu.stream, bytes)?,
            y: gpu.zeros::<D>(num_tokens * config.hidden)?,
        })
    }

    fn forward(&mut self, op: Op, weights: &Weights<CudaSlice<D>>) -> Result<()> {
        let Self { gpu, layer, x, logits, selection_bias, workspace, y } = self;
        let Weights { router_gate, gate_up, down } = weights;
        let weights = MoeWeights::plain(gate_up.as_view(), down.as_view());
        let mut weights = weights.with_router_gate(router_gate.as_view());
        weights.router.selection_bias = selection_bias.as_ref().map(CudaSlice::as_view);
        let inputs = match op {
            Op::LayerFromX => MoeInputs::new(x.as_view()),
            _ => MoeInputs::with_logits(x.as_view(), logits.as_view()),
        };
        Ok(layer.forward(&gpu.stream, &inputs, &weights, workspace, &mut y.as_view_mut())?)
    }
}

pub(crate) fn on_gpu<'a, D: Element>(
    op: Op,
    gpu: &'a Gpu,
    model: &Model,
    weights: &'a [Weights<CudaSlice<D>>],
    draw: &Draw,
) -> Result<Workload<'a>> {
    let mut prepared = Prepared::new(gpu, model, draw)?;
    Ok(Workload::new(move |set| prepared.forward(op, &weights[set])))
}

pub(crate) fn output_on_gpu<D: Element>(
    gpu: &Gpu,
    model: &Model,
    weights: &Weights<CudaSlice<D>>,
    draw: &Draw,
) -> Result<Vec<D>> {
    let mut prepared = Prepared::new(gpu, model, draw)?;
    prepared.forward(Op::Layer, weights)?;
    gpu.stream.clone_dtoh(&prepared.y).map_err(driver("download the output"))
}

pub(crate) fn on_cpu<'a, D: Element>(
    op: Op,
    model: &Model,
    weights: &'a Weights<Vec<D>>,
    draw: &Draw,
) -> Result<Workload<'a>> {
    let config = model.config;
    let (x, logits) = (x::<D>(model, draw.shape.num_tokens), logits::<D>(draw));
    let bias = model.selection_bias();
    Ok(Workload::new(move |_| {
        let Weights { router_gate, gate_up, down } = weights;
        let mut weights =
            MoeWeights::plain(&gate_up[..], &down[..]).with_router_gate(&router_gate[..]);
        weights.router.selection_bias = bias.as_deref();
        let inputs = match op {
            Op::LayerFromX => MoeInputs::new(&x[..]),
            _ => MoeInputs::with_logits(&x[..], &logits[..]),
        };
        std::hint::black_box(reference::moe_layer_fwd::<f32, D>(&config, &inputs, &weights)?);
        Ok(())
    }))
}

pub(crate) fn output_on_cpu<D: Element>(
    model: &Model,
    weights: &Weights<Vec<D>>,
    draw: &Draw,
) -> Result<Vec<D>> {
    let (x, logits) = (x::<D>(model, draw.shape.num_tokens), logits::<D>(draw));
    let Weights { gate_up, down, .. } = weights;
    let inputs = MoeInputs::with_logits(&x[..], &logits[..]);
    let mut weights = MoeWeights::plain(&gate_up[..], &down[..]);
    let bias = model.selection_bias();
    weights.router.selection_bias = bias.as_deref();
    let y = reference::moe_layer_fwd::<f32, D>(&model.config, &inputs, &weights)?;
    Ok(reference::round(&y))
}
