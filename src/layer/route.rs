//! The first half of a pass: from tokens to their routing.

use cudarc::driver::{CudaView, CudaViewMut};

use super::memory::{OnDevice, OnDeviceMut};
use super::outputs::RoutingOutputs;
use super::pass::Pass;
use super::sections::OP;
use crate::config::{CapacityConfig, Normalization, Priority, RouterConfig, RouterStep};
use crate::dtype::Dtype;
use crate::error::{Result, product};
use crate::ops::capacity::{
    capacity_reassign_fwd_into, capacity_fwd_into, capacity_later_fwd_into, capacity_normalize_fwd_into,
};
use crate::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_fwd_into};
use crate::ops::plan::plan_fwd_into;
use crate::ops::rms_norm::{RmsNormInputs, rms_norm_fwd_into};
use crate::ops::route::{RouteInputs, route_fwd_into, route_scores_fwd_into};
use crate::ops::router_gemm::{RouterGemmInputs, router_gemm_fwd_into};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;
use crate::tensors::{MoeInputs, Typed, no_router_gate};
use crate::workspace::Arena;

impl<D: Dtype> Pass<'_, '_, D> {
    /// Returns whether a product of the router runs on tensor cores as a grouped product, for which
    /// it needs the plan of dense products: if both factors and the result are 16-bit.
    pub(super) fn projects_by_gemm(&self, inputs: &MoeInputs<OnDevice<'_>, D>) -> bool {
        let router = &self.weights.router;
        let MoeInputs { logits, noise, noise_logits, .. } = inputs;
        let f32_logits = logits.as_ref().map(Typed::is_f32);
        let narrow = !f32_logits.unwrap_or(self.config.projection.f32_logits);
        let logits = logits.is_none() && Self::by_gemm(router.router_gate.as_ref(), narrow);
        let scales_noise = noise.is_some() && noise_logits.is_none();
        logits || scales_noise && Self::by_gemm(router.noise_gate.as_ref(), narrow)
    }

    /// Returns the same for one product.
    pub(super) fn by_gemm(matrix: Option<&Typed<OnDevice<'_>, D>>, narrow: bool) -> bool {
        D::DTYPE.size() == 2 && narrow && matrix.and_then(Typed::element).is_some()
    }

    /// Computes the routing of each token.
    pub(super) fn route(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        let computed = self.compute_logits(inputs, dense, arena)?;
        let logits = Logits::new(computed.logits.as_ref(), inputs.logits.as_ref());
        let noise = Logits::new(computed.noise_logits.as_ref(), inputs.noise_logits.as_ref());
        match (&logits.element, &logits.f32) {
            (Some(logits), _) => {
                let noise = noise.element.as_ref();
                self.choose(inputs, logits, noise, arena, outputs)
            }
            (None, Some(logits)) => {
                let noise = noise.f32.as_ref();
                self.choose(inputs, logits, noise, arena, outputs)
            }
            (None, None) => Err(no_router_gate(OP)),
        }
    }

    /// Computes a step of the router for every expert.
    pub(super) fn scores(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        step: RouterStep,
        scores: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (device, stream, shape) = (self.device, self.stream, self.shape);
        let computed = self.compute_logits(inputs, dense, arena)?;
        let logits = Logits::new(computed.logits.as_ref(), inputs.logits.as_ref());
        let noise = Logits::new(computed.noise_logits.as_ref(), inputs.noise_logits.as_ref());
        let router = &self.config.router;
        match (&logits.element, &logits.f32) {
            (Some(logits), _) => {
                let inputs = self.route_inputs(inputs, logits, noise.element.as_ref());
                route_scores_fwd_into(device, stream, shape, router, step, &inputs, scores)
            }
            (None, Some(logits)) => {
                let inputs = self.route_inputs(inputs, logits, noise.f32.as_ref());
                route_scores_fwd_into(device, stream, shape, router, step, &inputs, scores)
            }
            (None, None) => Err(no_router_gate(OP)),
        }
    }

    /// Computes the products of the router: the logits unless they are given, and the noise logits
    /// if a noise gate scales the noise.
    fn compute_logits<'a>(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'a>,
    ) -> Result<ComputedLogits<'a, D>> {
        let MoeInputs { logits: given, noise, noise_logits: given_noise, .. } = inputs;
        let router_gate = self.weights.router.router_gate.as_ref().filter(|_| given.is_none());
        let scales_noise = noise.is_some() && given_noise.is_none();
        let noise_gate = self.weights.router.noise_gate.as_ref().filter(|_| scales_noise);
        let f32_logits = given.as_ref().map_or(self.config.projection.f32_logits, Typed::is_f32);
        let mut take = |section| -> Result<Typed<OnDeviceMut<'a>, D>> {
            Ok(match f32_logits {
                true => Typed::F32(arena.take::<f32>(section)?),
                false => Typed::Element(arena.take::<D>(section)?),
            })
        };
        let mut computed = ComputedLogits { logits: None, noise_logits: None };
        if router_gate.is_some() {
            computed.logits = Some(take(self.sections.logits)?);
        }
        if noise_gate.is_some() {
            computed.noise_logits = Some(take(self.sections.noise_logits)?);
        }
        if router_gate.is_none() && noise_gate.is_none() {
            return Ok(computed);
        }
        let normed = self.normed(inputs, arena)?;
        let normed = normed.as_ref().map(|normed| normed.as_view());
        let x = normed.as_ref().unwrap_or(inputs.router_x.as_ref().unwrap_or(&inputs.x));
        if let (Some(matrix), Some(to)) = (router_gate, &mut computed.logits) {
            self.product(x, matrix, self.weights.router.bias.as_ref(), dense, to)?;
        }
        if let (Some(matrix), Some(to)) = (noise_gate, &mut computed.noise_logits) {
            self.product(x, matrix, None, dense, to)?;
        }
        Ok(computed)
    }

    /// Computes the router's norm, and the product with one of the router's matrices.
    pub(super) fn router_gemm(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        matrix: &Typed<OnDevice<'_>, D>,
        bias: Option<&Typed<OnDevice<'_>, D>>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let normed = self.normed(inputs, arena)?;
        let normed = normed.as_ref().map(|normed| normed.as_view());
        let x = normed.as_ref().unwrap_or(inputs.router_x.as_ref().unwrap_or(&inputs.x));
        self.product(x, matrix, bias, dense, logits)
    }

    /// The router's input after its norm; `None` without a norm.
    fn normed<'a>(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        arena: &mut Arena<'a>,
    ) -> Result<Option<CudaViewMut<'a, D>>> {
        let (device, stream, hidden) = (self.device, self.stream, self.config.hidden);
        let Some(norm) = &self.config.projection.norm else { return Ok(None) };
        let mut normed = arena.take::<D>(self.sections.router_x)?;
        let x = inputs.router_x.as_ref().unwrap_or(&inputs.x);
        let inputs = RmsNormInputs { weight: self.weights.router.norm.as_ref(), plan: None };
        rms_norm_fwd_into(device, stream, norm, hidden, x, &inputs, &mut normed)?;
        Ok(Some(normed))
    }

    /// Computes a product of the router. Matrix and bias have the same type, which was checked.
    fn product(
        &self,
        x: &CudaView<'_, D>,
        matrix: &Typed<OnDevice<'_>, D>,
        bias: Option<&Typed<OnDevice<'_>, D>>,
        dense: Option<&RoutingPlan<'_>>,
        logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let (device, stream) = (self.device, self.stream);
        let (experts, hidden) = (self.config.router_experts(), self.config.hidden);
        match (matrix, logits) {
            (Typed::Element(gate), Typed::Element(logits)) => {
                let bias = bias.and_then(Typed::element);
                match dense {
                    Some(plan) if D::DTYPE.size() == 2 => {
                        let gate = LinearWeights { bias, ..LinearWeights::new(gate) };
                        let rows = Rows::Grouped;
                        grouped_gemm_fwd_into(
                            device, stream, plan, experts, hidden, rows, x, gate, logits,
                        )
                    }
                    _ => {
                        let inputs = RouterGemmInputs { x, router_gate: gate, bias };
                        router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
                    }
                }
            }
            (Typed::Element(gate), Typed::F32(logits)) => {
                let inputs =
                    RouterGemmInputs { x, router_gate: gate, bias: bias.and_then(Typed::element) };
                router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (Typed::F32(gate), Typed::Element(logits)) => {
                let inputs =
                    RouterGemmInputs { x, router_gate: gate, bias: bias.and_then(Typed::f32) };
                router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (Typed::F32(gate), Typed::F32(logits)) => {
                let inputs =
                    RouterGemmInputs { x, router_gate: gate, bias: bias.and_then(Typed::f32) };
                router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
        }
    }

    /// The inputs of the operation `route`.
    fn route_inputs<'r, L: Dtype>(
        &'r self,
        inputs: &'r MoeInputs<OnDevice<'_>, D>,
        logits: &'r CudaView<'r, L>,
        noise_logits: Option<&'r CudaView<'r, L>>,
    ) -> RouteInputs<'r, L> {
        let router = &self.weights.router;
        RouteInputs {
            logits,
            selection_bias: router.selection_bias.as_ref(),
            expert_scale: router.expert_scale.as_ref(),
            noise: inputs.noise.as_ref(),
            noise_logits,
            selection_noise: inputs.selection_noise.as_ref(),
            midpoint_draws: inputs.midpoint_draws.as_ref(),
            given_ids: inputs.given_ids.as_ref().or(router.table.as_ref()),
            token_ids: inputs.token_ids.as_ref(),
            active: inputs.active.as_ref(),
        }
    }

    /// Computes the routing from logits, including capacity.
    fn choose<L: Dtype>(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        logits: &CudaView<'_, L>,
        noise_logits: Option<&CudaView<'_, L>>,
        arena: &mut Arena<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        let (device, stream, shape) = (self.device, self.stream, self.shape);
        let config = self.config;
        let route_inputs = self.route_inputs(inputs, logits, noise_logits);
        let route = |router: &RouterConfig,
                     shape: RoutingShape,
                     ids: &mut CudaViewMut<'_, u32>,
                     weights: &mut CudaViewMut<'_, f32>| {
            let expert_scale = route_inputs.expert_scale.filter(|_| router.expert_scale);
            let inputs = RouteInputs { expert_scale, ..route_inputs };
            route_fwd_into(device, stream, shape, router, &inputs, ids, weights)
        };
        let Some(capacity) = &config.capacity else {
            return route(
                &config.router,
                shape,
                &mut outputs.expert_ids,
                &mut outputs.routing_weights,
            );
        };
        let sequence_tokens = inputs.sequence_tokens;
        let normalization = capacity.normalization;
        if normalization == Normalization::None {
            return self.apply_capacity(capacity, sequence_tokens, &route, arena, outputs);
        }
        let RoutingOutputs { expert_ids, routing_weights: normalized, kept, dropped } = outputs;
        let mut unnormalized = RoutingOutputs {
            expert_ids: expert_ids.slice_mut(..),
            routing_weights: arena.take::<f32>(self.sections.chosen_weights)?,
            kept: kept.as_mut().map(|kept| kept.slice_mut(..)),
            dropped: dropped.as_mut().map(|dropped| dropped.slice_mut(..)),
        };
        self.apply_capacity(capacity, sequence_tokens, &route, arena, &mut unnormalized)?;
        let ids = unnormalized.expert_ids.as_view();
        let weights = unnormalized.routing_weights.as_view();
        let (scale, expert_scale) =
            (config.router.scale, self.weights.router.expert_scale.as_ref());
        capacity_normalize_fwd_into(
            device,
            stream,
            shape,
            normalization,
            scale,
            expert_scale,
            &ids,
            &weights,
            normalized,
        )
    }

    /// Computes the kept slots and their weights: those of the router's choices, then up to
    /// `overflow` rounds of reassignment to the next-best experts.
    fn apply_capacity(
        &self,
        capacity: &CapacityConfig,
        sequence_tokens: Option<usize>,
        route: &Route<'_>,
        arena: &mut Arena<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        let (device, stream, shape) = (self.device, self.stream, self.shape);
        let RoutingOutputs {
            expert_ids,
            routing_weights: weights,
            kept: kept_out,
            dropped: dropped_out,
        } = outputs;
        let router = self.config.router_before_capacity();
        let mut chosen = arena.take::<u32>(self.sections.chosen)?;
        // The scores of first choices before normalisation; this call selects the same ids.
        let mut top_scores = arena.take::<f32>(self.sections.top_scores)?;
        let by_top_score = capacity.priority == Priority::ChoiceByTopWeight;
        if by_top_score {
            route(&self.config.router.of_scores(), shape, &mut chosen, &mut top_scores)?;
        }
        route(&router, shape, &mut chosen, weights)?;
        let mut memory = arena.take::<u8>(self.sections.slot_plan)?;
        let sequences = shape.sequences(sequence_tokens);
        let cells = product(OP, "sequences * num_experts", sequences, shape.num_experts)?;
        let mut kept = arena.take::<u32>(self.sections.kept)?;
        let mut dropped = arena.take::<u32>(self.sections.dropped)?;
        // Counts that the caller does not request are written to the workspace.
        let mut kept = match kept_out {
            Some(kept) => kept.slice_mut(..cells),
            None => kept.slice_mut(..cells),
        };
        let mut dropped = match dropped_out {
            Some(dropped) => dropped.slice_mut(..cells),
            None => dropped.slice_mut(..cells),
        };
        let chosen = chosen.as_view();
        let by_slot = shape.by_slot();
        let plan = plan_fwd_into(device, stream, by_slot, Some(&chosen), memory.slice_mut(..))?;
        let priorities = if by_top_score { top_scores.as_view() } else { weights.as_view() };
        capacity_fwd_into(
            device,
            stream,
            &plan,
            shape,
            capacity,
            sequence_tokens,
            &priorities,
            expert_ids,
            &mut kept,
            &mut dropped,
        )?;
        let num_candidates = self.config.candidates();
        if num_candidates == 0 {
            return Ok(());
        }

        let mut candidates = arena.take::<u32>(self.sections.candidates)?;
        let mut candidate_weights = arena.take::<f32>(self.sections.candidate_weights)?;
        let next_best = RoutingShape { top_k: num_candidates, ..shape };
        route(&router, next_best, &mut candidates, &mut candidate_weights)?;
        let (candidates, candidate_weights) = (candidates.as_view(), candidate_weights.as_view());
        let mut next = arena.take::<u32>(self.sections.next_candidate)?;
        let mut requests = arena.take::<u32>(self.sections.requests)?;
        // Each candidate is requested at most once.
        for round in 0..capacity.overflow.min(num_candidates) {
            capacity_reassign_fwd_into(
                device,
                stream,
                shape,
                num_candidates,
                round == 0,
                &chosen,
                &expert_ids.as_view(),
                &candidates,
                &candidate_weights,
                &mut next,
                &mut requests,
                weights,
            )?;
            let ids = requests.as_view();
            let plan = plan_fwd_into(device, stream, by_slot, Some(&ids), memory.slice_mut(..))?;
            let priorities = if by_top_score { top_scores.as_view() } else { weights.as_view() };
            capacity_later_fwd_into(
                device,
                stream,
                &plan,
                shape,
                capacity,
                sequence_tokens,
                &priorities,
                expert_ids,
                &mut kept,
                &mut dropped,
            )?;
        }
        Ok(())
    }
}

/// Selects the experts of a shape with a router that makes the layer's selection, into ids and
/// weights.
type Route<'r> = dyn Fn(
        &RouterConfig,
        RoutingShape,
        &mut CudaViewMut<'_, u32>,
        &mut CudaViewMut<'_, f32>,
    ) -> Result<()>
    + 'r;

/// The logits that a pass computes; `None` for those that are given or not needed.
struct ComputedLogits<'a, D: Dtype> {
    logits: Option<Typed<OnDeviceMut<'a>, D>>,
    noise_logits: Option<Typed<OnDeviceMut<'a>, D>>,
}

/// Logits of either type; at most one of the two is set.
struct Logits<'l, D> {
    element: Option<CudaView<'l, D>>,
    f32: Option<CudaView<'l, f32>>,
}

impl<'l, D: Dtype> Logits<'l, D> {
    /// The computed logits, or else the given ones.
    fn new(
        computed: Option<&'l Typed<OnDeviceMut<'_>, D>>,
        given: Option<&'l Typed<OnDevice<'_>, D>>,
    ) -> Self {
        let (mut element, mut f32) = (None, None);
        match (computed, given) {
            (Some(Typed::Element(logits)), _) => element = Some(logits.as_view()),
            (Some(Typed::F32(logits)), _) => f32 = Some(logits.as_view()),
            (None, Some(Typed::Element(logits))) => element = Some(logits.slice(..)),
            (None, Some(Typed::F32(logits))) => f32 = Some(logits.slice(..)),
            (None, None) => {}
        }
        Self { element, f32 }
    }
}
