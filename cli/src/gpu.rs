//! A forward pass of a layer on a CUDA device.

use moe_kernels::{
    Dtype, MoeConfig, MoeInputs, MoeLayer, MoeWeights, OnDevice, Owned, OwnedOnDevice, Typed,
    Workspace,
};

use crate::backend::{FORWARD, Output, PARTS, to_f32};
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::progress::Steps;

impl Gpu {
    /// Runs a layer twice: in one call, as a user of the library does, and part by part with a
    /// synchronisation after each part, for the time of the part. Both have to give the same bits.
    pub fn forward<D: Dtype>(
        &self,
        config: &MoeConfig,
        inputs: MoeInputs<Owned, D>,
        weights: &MoeWeights<Owned, D>,
        steps: &mut Steps,
    ) -> Result<Output<D>> {
        let (device, stream) = (&self.device, &self.stream);
        steps.time("load the kernels", || device.warm_up(D::DTYPE))?;
        let num_tokens = inputs.x.len() / config.hidden;
        let weights = steps.time("upload the weights", || -> Result<_> {
            let weights = weights.upload(stream)?;
            self.wait()?;
            Ok(weights)
        })?;
        let inputs = steps.time("upload the input", || inputs.upload(stream))?;
        let weights = weights.as_views();
        let workspace_bytes = MoeLayer::workspace_bytes(config, D::DTYPE, num_tokens)?;
        let pass = Pass {
            gpu: self,
            layer: MoeLayer::new(device, *config)?,
            weights: &weights,
            num_tokens,
            workspace: Workspace::alloc(stream, workspace_bytes)?,
        };
        pass.run(&inputs, steps)
    }

    pub(crate) fn wait(&self) -> Result<()> {
        self.stream.synchronize().map_err(self.failed("wait for the device"))
    }

    /// The device's kind, name and capability.
    pub fn describe(&self) -> String {
        let name = self.device.context().name().unwrap_or_else(|_| "unnamed device".into());
        let (major, minor) = self.device.capability();
        format!("{}: {name}, compute capability {major}.{minor}", self.place.name())
    }
}

/// A layer with its weights and workspace on the device.
struct Pass<'p, 'w, D: Dtype> {
    gpu: &'p Gpu,
    layer: MoeLayer,
    weights: &'p MoeWeights<OnDevice<'w>, D>,
    num_tokens: usize,
    workspace: Workspace<'static>,
}

impl<D: Dtype> Pass<'_, '_, D> {
    fn run(mut self, inputs: &MoeInputs<OwnedOnDevice, D>, steps: &mut Steps) -> Result<Output<D>> {
        let (gpu, config) = (self.gpu, *self.layer.config());
        let (stream, shape) = (&gpu.stream, config.routing(self.num_tokens));
        let (mut element, mut wide);
        let mut inputs = inputs.as_views();
        let mut whole = gpu.poisoned::<D>(inputs.x.len())?;
        steps.time(FORWARD, || -> Result<()> {
            let (workspace, to) = (&mut self.workspace, &mut whole.as_view_mut());
            self.layer.forward(stream, &inputs, self.weights, workspace, to)?;
            gpu.wait()
        })?;

        if inputs.logits.is_none() {
            let workspace = &mut self.workspace;
            let f32_logits = config.projection.f32_logits;
            element = gpu.poisoned::<D>(if f32_logits { 1 } else { shape.logits() })?;
            wide = gpu.poisoned::<f32>(if f32_logits { shape.logits() } else { 1 })?;
            steps.time(PARTS[0], || -> Result<()> {
                let mut logits = match f32_logits {
                    true => Typed::F32(wide.as_view_mut()),
                    false => Typed::Element(element.as_view_mut()),
                };
                let (layer, weights) = (&self.layer, self.weights);
                layer.router_logits(stream, &inputs, weights, workspace, &mut logits)?;
                gpu.wait()
            })?;
            inputs.logits = Some(match f32_logits {
                true => Typed::F32(wide.as_view()),
                false => Typed::Element(element.as_view()),
            });
        }
        let mut expert_ids = gpu.poisoned::<u32>(shape.slots())?;
        let mut routing_weights = gpu.poisoned::<f32>(shape.slots())?;
        steps.time(PARTS[1], || -> Result<()> {
            let ids = &mut expert_ids.as_view_mut();
            let routing_weights = &mut routing_weights.as_view_mut();
            let (layer, weights, workspace) = (&self.layer, self.weights, &mut self.workspace);
            layer.route(stream, &inputs, weights, workspace, ids, routing_weights)?;
            gpu.wait()
        })?;
        let mut y = gpu.poisoned::<D>(inputs.x.len())?;
        steps.time(PARTS[2], || -> Result<()> {
            let (ids, routing_weights) = (expert_ids.as_view(), routing_weights.as_view());
            let (layer, weights, to) = (&self.layer, self.weights, &mut y.as_view_mut());
            let (x, workspace) = (&inputs.x, &mut self.workspace);
            layer.forward_routed(stream, x, &ids, &routing_weights, weights, workspace, to)?;
            gpu.wait()
        })?;
        let y = gpu.download(&y.as_view())?;
        if bytemuck::cast_slice::<D, u8>(&y)
            != bytemuck::cast_slice::<D, u8>(&gpu.download(&whole.as_view())?)
        {
            let why = "the layer in one call and its parts called one by one differ in bits".into();
            return Err(Error::Device { device: gpu.place.name(), why });
        }
        let logits = match &inputs.logits {
            None => Vec::new(),
            Some(Typed::Element(logits)) => to_f32(&gpu.download(logits)?),
            Some(Typed::F32(logits)) => gpu.download(logits)?,
        };
        let expert_ids = gpu.download(&expert_ids.as_view())?;
        Ok(Output { logits, y, expert_ids, weights: gpu.download(&routing_weights.as_view())? })
    }
}
