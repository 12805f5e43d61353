//! What a layer's router makes of every expert, on the way to a choice.

use cudarc::driver::{CudaStream, CudaViewMut};

use super::{MoeLayer, OP, OnDevice, OnDeviceMut, Pass};
use crate::config::RouterStep;
use crate::dtype::Dtype;
use crate::error::{Result, check_len};
use crate::tensors::{MoeInputs, MoeWeights, Typed, no_noise_gate};
use crate::workspace::{Arena, Workspace};

impl MoeLayer {
    /// What a step of the router makes of the logits, `scores` `[T, E']` in f32: the logits with their noise, those that
    /// experts are chosen by, or the scores that [`expert_choice_fwd`](crate::ops::expert_choice) needs.
    /// [`route_scores_fwd_into`](crate::ops::route::route_scores_fwd_into) says more.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Unsupported`](crate::Error::Unsupported) for scores that depend
    /// on the choice.
    pub fn router_scores<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        step: RouterStep,
        scores: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let pass = Pass::new(self, stream, inputs.check(OP, &self.config)?, weights)?;
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

    /// What noise is scaled by in a layer with a [`noise_gate`](crate::RouterProjection::noise_gate), before the
    /// `softplus`: the product of that matrix with what the router reads, `[T, E']`, of either type. In
    /// [`forward`](Self::forward) they have the type of the logits.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and [`Error::Mismatch`](crate::Error::Mismatch) for weights without such a
    /// matrix.
    pub fn noise_logits<D: Dtype>(
        &self,
        stream: &CudaStream,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        weights: &MoeWeights<OnDevice<'_>, D>,
        workspace: &mut Workspace<'_>,
        noise_logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let pass = Pass::new(self, stream, inputs.check(OP, &self.config)?, weights)?;
        let gate = weights.router.noise_gate.as_ref().ok_or_else(|| no_noise_gate(OP))?;
        check_len(OP, "noise_logits", noise_logits.len(), pass.shape.logits())?;
        pass.contexts.inputs(inputs)?;
        pass.contexts.logits("noise_logits", noise_logits)?;
        pass.contexts.workspace(workspace)?;
        let mut arena = Arena::new(OP, workspace, &pass.sections.of_route())?;
        let by_gemm = Pass::by_gemm(Some(gate), !noise_logits.is_f32());
        let dense = pass.dense(&mut arena, by_gemm)?;
        pass.router_gemm(inputs, gate, None, dense.as_ref(), &mut arena, noise_logits)
    }
}
