//! Checks that every buffer of a pass belongs to the context of its stream, before any launch.

use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceSlice};

use super::memory::{OnDevice, OnDeviceMut};
use super::outputs::RoutingOutputs;
use super::sections::OP;
use crate::buffer::check_context;
use crate::device::{Device, check_stream};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::tensors::{
    ExpertWeights, GateUpTensors, LatentWeights, MoeInputs, MoeWeights, RouterWeights,
    SharedWeights, Typed,
};
use crate::workspace::Workspace;

/// The stream of a pass, whose context its buffers must belong to.
#[derive(Clone, Copy)]
pub(super) struct Contexts<'s>(&'s CudaStream);

impl<'s> Contexts<'s> {
    /// Checks that the stream belongs to the device's context.
    pub(super) fn new(device: &Device, stream: &'s CudaStream) -> Result<Self> {
        check_stream(OP, device, stream)?;
        Ok(Self(stream))
    }

    fn check(self, argument: &'static str, stream: &Arc<CudaStream>) -> Result<()> {
        check_context(OP, argument, stream, self.0.context())
    }

    pub(super) fn read<T>(self, argument: &'static str, view: &CudaView<'_, T>) -> Result<()> {
        self.check(argument, view.stream())
    }

    pub(super) fn written<T>(self, name: &'static str, view: &CudaViewMut<'_, T>) -> Result<()> {
        self.check(name, view.stream())
    }

    fn optional<T>(self, name: &'static str, view: &Option<CudaView<'_, T>>) -> Result<()> {
        view.as_ref().map_or(Ok(()), |view| self.read(name, view))
    }

    fn typed<D: Dtype>(
        self,
        name: &'static str,
        tensor: &Option<Typed<OnDevice<'_>, D>>,
    ) -> Result<()> {
        match tensor {
            Some(Typed::Element(view)) => self.read(name, view),
            Some(Typed::F32(view)) => self.read(name, view),
            None => Ok(()),
        }
    }

    pub(super) fn logits<D: Dtype>(
        self,
        name: &'static str,
        logits: &Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        match logits {
            Typed::Element(view) => self.written(name, view),
            Typed::F32(view) => self.written(name, view),
        }
    }

    pub(super) fn outputs(self, outputs: &RoutingOutputs<'_>) -> Result<()> {
        let RoutingOutputs { expert_ids, routing_weights: weights, kept, dropped } = outputs;
        self.written("expert_ids", expert_ids)?;
        self.written("routing_weights", weights)?;
        kept.as_ref().map_or(Ok(()), |kept| self.written("kept", kept))?;
        dropped.as_ref().map_or(Ok(()), |dropped| self.written("dropped", dropped))
    }

    pub(super) fn workspace(self, workspace: &Workspace<'_>) -> Result<()> {
        self.check("workspace", workspace.stream())
    }

    pub(super) fn inputs<D: Dtype>(self, inputs: &MoeInputs<OnDevice<'_>, D>) -> Result<()> {
        let MoeInputs {
            x,
            router_x,
            logits,
            given_ids,
            token_ids,
            noise,
            noise_logits,
            selection_noise,
            midpoint_draws,
            active,
            ..
        } = inputs;
        self.read("x", x)?;
        self.optional("router_x", router_x)?;
        self.typed("logits", logits)?;
        self.optional("given_ids", given_ids)?;
        self.optional("token_ids", token_ids)?;
        self.optional("noise", noise)?;
        self.typed("noise_logits", noise_logits)?;
        self.optional("selection_noise", selection_noise)?;
        self.optional("midpoint_draws", midpoint_draws)?;
        self.optional("active", active)
    }

    pub(super) fn weights<D: Dtype>(self, weights: &MoeWeights<OnDevice<'_>, D>) -> Result<()> {
        let MoeWeights { router, experts, latent, shared, output_norm } = weights;
        let RouterWeights { router_gate, bias, norm, noise_gate, selection_bias, .. } = router;
        let RouterWeights { expert_scale, table, .. } = router;
        self.typed("router.router_gate", router_gate)?;
        self.typed("router.bias", bias)?;
        self.optional("router.norm", norm)?;
        self.typed("router.noise_gate", noise_gate)?;
        self.optional("router.selection_bias", selection_bias)?;
        self.optional("router.expert_scale", expert_scale)?;
        self.optional("router.table", table)?;
        let ExpertWeights { gate_up, gate_up_bias, down, down_bias, output_bias, post_norm } =
            experts;
        match gate_up {
            GateUpTensors::Fused(gate_up) => self.read("experts.gate_up", gate_up)?,
            GateUpTensors::Separate { gate, up } => {
                self.read("experts.gate", gate)?;
                self.read("experts.up", up)?;
            }
        }
        self.optional("experts.gate_up_bias", gate_up_bias)?;
        self.read("experts.down", down)?;
        self.optional("experts.down_bias", down_bias)?;
        self.optional("experts.output_bias", output_bias)?;
        self.optional("experts.post_norm", post_norm)?;
        if let Some(LatentWeights { proj_in, norm, proj_out }) = latent {
            self.read("latent.proj_in", proj_in)?;
            self.optional("latent.norm", norm)?;
            self.read("latent.proj_out", proj_out)?;
        }
        if let Some(shared) = shared {
            let SharedWeights { gate_up, gate_up_bias, down, down_bias, sigmoid_gate } = shared;
            self.read("shared.gate_up", gate_up)?;
            self.optional("shared.gate_up_bias", gate_up_bias)?;
            self.read("shared.down", down)?;
            self.optional("shared.down_bias", down_bias)?;
            self.optional("shared.sigmoid_gate", sigmoid_gate)?;
        }
        self.optional("output_norm", output_norm)
    }
}
