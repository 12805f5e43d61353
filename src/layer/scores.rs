//! Intermediate results of a layer's router, one value per expert.

use cudarc::driver::{CudaStream, CudaViewMut};

use super::MoeLayer;
use super::memory::{OnDevice, OnDeviceMut};
use super::pass::Pass;
use super::sections::OP;
use crate::config::RouterStep;
use crate::dtype::Dtype;
use crate::error::{Result, check_len};
use crate::tensors::{MoeInputs, MoeWeights, Typed, no_noise_gate};
use crate::workspace::{Arena, Workspace};

impl MoeLayer {
    /// Computes a step of the router into `scores` `[T, E']` in f32: the logits with noise, the
    /// logits after multiplier and soft-cap, or the scores that
    /// [`expert_choice_fwd`](crate::ops::expert_choice) reads. See
    /// [`route_scores_fwd_into`](crate::ops::route::route_scores_fwd_into).
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Unsupported`](crate::Error::Unsupported)
    /// for scores that depend on the selection.
    pub fn router_scores<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        step: RouterStep,
        scores: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let pass = self.pass(stream, inputs.check(OP, &self.config)?, weights)?;
        inputs.check_route(OP, &self.config, weights)?;
        self.config.router.score_of_step(OP, step)?;
        check_len(OP, "scores", scores.len(), pass.shape.logits())?;
        pass.contexts.inputs(inputs)?;
        pass.contexts.written("scores", scores)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_route())?;
        let dense = pass.dense(&mut arena, pass.projects_by_gemm(inputs))?;
        pass.scores(inputs, dense.as_ref(), &mut arena, step, scores)
    }

    /// Computes the noise logits of a layer with a
    /// [`noise_gate`](crate::RouterProjection::noise_gate): the product of the router's input with
    /// that matrix, `[T, E']`, of either type. The router multiplies the noise by their `softplus`.
    /// In [`forward`](Self::forward) they have the type of the logits.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Mismatch`](crate::Error::Mismatch) for
    /// weights without a noise gate.
    pub fn noise_logits<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        noise_logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let pass = self.pass(stream, inputs.check(OP, &self.config)?, weights)?;
        let noise_gate = weights.router.noise_gate.as_ref().ok_or_else(|| no_noise_gate(OP))?;
        check_len(OP, "noise_logits", noise_logits.len(), pass.shape.logits())?;
        pass.contexts.inputs(inputs)?;
        pass.contexts.logits("noise_logits", noise_logits)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_route())?;
        let by_gemm = Pass::by_gemm(Some(noise_gate), !noise_logits.is_f32());
        let dense = pass.dense(&mut arena, by_gemm)?;
        pass.router_gemm(inputs, noise_gate, None, dense.as_ref(), &mut arena, noise_logits)
    }
}
