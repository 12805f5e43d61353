//! The first half of a pass: from tokens to the ids and weights of their experts.

use cudarc::driver::{CudaView, CudaViewMut};

use super::{OP, OnDevice, OnDeviceMut, Pass, RoutingOutputs};
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
use crate::tensors::{MoeInputs, Typed, no_gate};
use crate::workspace::Arena;

impl<D: Dtype> Pass<'_, '_, D> {
    /// Whether tensor cores make what the router's products make: where it is 16-bit numbers like both factors.
    pub(super) fn projects_by_gemm(&self, inputs: &MoeInputs<OnDevice<'_>, D>) -> bool {
        let router = &self.weights.router;
        let MoeInputs { logits, noise, noise_logits, .. } = inputs;
        let f32_logits = logits.as_ref().map(Typed::is_f32);
        let narrow = !f32_logits.unwrap_or(self.config.projection.f32_logits);
        let logits = logits.is_none() && Self::by_gemm(router.gate.as_ref(), narrow);
        let gated = noise.is_some() && noise_logits.is_none();
        logits || gated && Self::by_gemm(router.noise_gate.as_ref(), narrow)
    }

    /// The same of one product.
    pub(super) fn by_gemm(gate: Option<&Typed<OnDevice<'_>, D>>, narrow: bool) -> bool {
        D::DTYPE.size() == 2 && narrow && gate.and_then(Typed::element).is_some()
    }

    /// The ids and weights of each token's experts.
    pub(super) fn route(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        let made = self.make_logits(inputs, dense, arena)?;
        let logits = Logits::of(made.logits.as_ref(), inputs.logits.as_ref());
        let noise = Logits::of(made.noise_logits.as_ref(), inputs.noise_logits.as_ref());
        match (&logits.element, &logits.f32) {
            (Some(logits), _) => {
                let noise = noise.element.as_ref();
                self.choose(inputs, logits, noise, arena, outputs)
            }
            (None, Some(logits)) => {
                let noise = noise.f32.as_ref();
                self.choose(inputs, logits, noise, arena, outputs)
            }
            (None, None) => Err(no_gate(OP)),
        }
    }

    /// The number of every expert that a step of the router makes.
    pub(super) fn scores(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        step: RouterStep,
        scores: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (device, stream, shape) = (self.device, self.stream, self.shape);
        let made = self.make_logits(inputs, dense, arena)?;
        let logits = Logits::of(made.logits.as_ref(), inputs.logits.as_ref());
        let noise = Logits::of(made.noise_logits.as_ref(), inputs.noise_logits.as_ref());
        let router = &self.config.router;
        match (&logits.element, &logits.f32) {
            (Some(logits), _) => {
                let read = self.reads(inputs, logits, noise.element.as_ref());
                route_scores_fwd_into(device, stream, shape, router, step, &read, scores)
            }
            (None, Some(logits)) => {
                let read = self.reads(inputs, logits, noise.f32.as_ref());
                route_scores_fwd_into(device, stream, shape, router, step, &read, scores)
            }
            (None, None) => Err(no_gate(OP)),
        }
    }

    /// What the router's products make: the logits, unless they are given, and the noise's, where it is gated.
    fn make_logits<'a>(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'a>,
    ) -> Result<Made<'a, D>> {
        let MoeInputs { logits: given, noise, noise_logits: given_noise, .. } = inputs;
        let gate = if given.is_none() { self.weights.router.gate.as_ref() } else { None };
        let gated = noise.is_some() && given_noise.is_none();
        let noise_gate = self.weights.router.noise_gate.as_ref().filter(|_| gated);
        let f32_logits = given.as_ref().map_or(self.config.projection.f32_logits, Typed::is_f32);
        let mut take = |section| -> Result<Typed<OnDeviceMut<'a>, D>> {
            Ok(match f32_logits {
                true => Typed::F32(arena.take::<f32>(section)?),
                false => Typed::Element(arena.take::<D>(section)?),
            })
        };
        let mut made = Made { logits: None, noise_logits: None };
        if gate.is_some() {
            made.logits = Some(take(self.sections.logits)?);
        }
        if noise_gate.is_some() {
            made.noise_logits = Some(take(self.sections.noise_logits)?);
        }
        if gate.is_none() && noise_gate.is_none() {
            return Ok(made);
        }
        let normed = self.normed(inputs, arena)?;
        let normed = normed.as_ref().map(|normed| normed.as_view());
        let x = normed.as_ref().unwrap_or(inputs.router_x.as_ref().unwrap_or(&inputs.x));
        if let (Some(gate), Some(to)) = (gate, &mut made.logits) {
            self.times(x, gate, self.weights.router.bias.as_ref(), dense, to)?;
        }
        if let (Some(gate), Some(to)) = (noise_gate, &mut made.noise_logits) {
            self.times(x, gate, None, dense, to)?;
        }
        Ok(made)
    }

    /// The router's norm, and its product with one of the router's matrices.
    pub(super) fn router_gemm(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        gate: &Typed<OnDevice<'_>, D>,
        bias: Option<&Typed<OnDevice<'_>, D>>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let normed = self.normed(inputs, arena)?;
        let normed = normed.as_ref().map(|normed| normed.as_view());
        let x = normed.as_ref().unwrap_or(inputs.router_x.as_ref().unwrap_or(&inputs.x));
        self.times(x, gate, bias, dense, logits)
    }

    /// What the router reads, where it has a norm.
    fn normed<'a>(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        arena: &mut Arena<'a>,
    ) -> Result<Option<CudaViewMut<'a, D>>> {
        let (device, stream, hidden) = (self.device, self.stream, self.config.hidden);
        let Some(norm) = &self.config.projection.norm else { return Ok(None) };
        let mut normed = arena.take::<D>(self.sections.router_x)?;
        let x = inputs.router_x.as_ref().unwrap_or(&inputs.x);
        let beside = RmsNormInputs { weight: self.weights.router.norm.as_ref(), plan: None };
        rms_norm_fwd_into(device, stream, norm, hidden, x, &beside, &mut normed)?;
        Ok(Some(normed))
    }

    /// A product of the router; gate and bias are of one type, as was checked.
    fn times(
        &self,
        x: &CudaView<'_, D>,
        gate: &Typed<OnDevice<'_>, D>,
        bias: Option<&Typed<OnDevice<'_>, D>>,
        dense: Option<&RoutingPlan<'_>>,
        logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let (device, stream) = (self.device, self.stream);
        let (experts, hidden) = (self.config.router_experts(), self.config.hidden);
        match (gate, logits) {
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
                        let inputs = RouterGemmInputs { x, gate, bias };
                        router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
                    }
                }
            }
            (Typed::Element(gate), Typed::F32(logits)) => {
                let inputs = RouterGemmInputs { x, gate, bias: bias.and_then(Typed::element) };
                router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (Typed::F32(gate), Typed::Element(logits)) => {
                let inputs = RouterGemmInputs { x, gate, bias: bias.and_then(Typed::f32) };
                router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (Typed::F32(gate), Typed::F32(logits)) => {
                let inputs = RouterGemmInputs { x, gate, bias: bias.and_then(Typed::f32) };
                router_gemm_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
        }
    }

    /// What the router reads besides its logits.
    fn reads<'r, L: Dtype>(
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

    /// From logits to ids and weights, capacity included.
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
        let read = self.reads(inputs, logits, noise_logits);
        let route = |router: &RouterConfig,
                     shape: RoutingShape,
                     ids: &mut CudaViewMut<'_, u32>,
                     weights: &mut CudaViewMut<'_, f32>| {
            let expert_scale = read.expert_scale.filter(|_| router.expert_scale);
            let read = RouteInputs { expert_scale, ..read };
            route_fwd_into(device, stream, shape, router, &read, ids, weights)
        };
        let Some(capacity) = &config.capacity else {
            return route(&config.router, shape, &mut outputs.expert_ids, &mut outputs.routing_weights);
        };
        let tokens = inputs.sequence_tokens;
        let by = capacity.normalization;
        if by == Normalization::None {
            return self.keep(capacity, tokens, &route, arena, outputs);
        }
        let RoutingOutputs { expert_ids, routing_weights: normalized, kept, dropped } = outputs;
        let mut kept_weights = RoutingOutputs {
            expert_ids: expert_ids.slice_mut(..),
            routing_weights: arena.take::<f32>(self.sections.chosen_weights)?,
            kept: kept.as_mut().map(|kept| kept.slice_mut(..)),
            dropped: dropped.as_mut().map(|dropped| dropped.slice_mut(..)),
        };
        self.keep(capacity, tokens, &route, arena, &mut kept_weights)?;
        let (ids, weights) = (kept_weights.expert_ids.as_view(), kept_weights.routing_weights.as_view());
        let (scale, of_experts) = (config.router.scale, self.weights.router.expert_scale.as_ref());
        capacity_normalize_fwd_into(
            device, stream, shape, by, scale, of_experts, &ids, &weights, normalized,
        )
    }

    /// The choices that experts have room for, with their weights: the router's own, and then, as often as slots may
    /// ask again, the next best ones.
    fn keep(
        &self,
        capacity: &CapacityConfig,
        sequence_tokens: Option<usize>,
        route: &Route<'_>,
        arena: &mut Arena<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        let (device, stream, shape) = (self.device, self.stream, self.shape);
        let RoutingOutputs { expert_ids, routing_weights: weights, kept: kept_out, dropped: dropped_out } = outputs;
        let router = self.config.router_before_capacity();
        let mut chosen = arena.take::<u32>(self.sections.chosen)?;
        // The scores of first choices before any normalisation; the ids beside them are the same.
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
        // Where the caller has no use for the counts, they stay in the workspace.
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
        let of_priority = if by_top_score { top_scores.as_view() } else { weights.as_view() };
        capacity_fwd_into(
            device,
            stream,
            &plan,
            shape,
            capacity,
            sequence_tokens,
            &of_priority,
            expert_ids,
            &mut kept,
            &mut dropped,
        )?;
        let num_candidates = self.config.candidates();
        if num_candidates == 0 {
            return Ok(());
        }

        let mut candidates = arena.take::<u32>(self.sections.candidates)?;
        let mut of_candidates = arena.take::<f32>(self.sections.candidate_weights)?;
        let next_best = RoutingShape { top_k: num_candidates, ..shape };
        route(&router, next_best, &mut candidates, &mut of_candidates)?;
        let (candidates, of_candidates) = (candidates.as_view(), of_candidates.as_view());
        let mut next = arena.take::<u32>(self.sections.next_candidate)?;
        let mut requests = arena.take::<u32>(self.sections.requests)?;
        // Every candidate is asked once.
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
                &of_candidates,
                &mut next,
                &mut requests,
                weights,
            )?;
            let asked = requests.as_view();
            let plan = plan_fwd_into(device, stream, by_slot, Some(&asked), memory.slice_mut(..))?;
            let of_priority = if by_top_score { top_scores.as_view() } else { weights.as_view() };
            capacity_later_fwd_into(
                device,
                stream,
                &plan,
                shape,
                capacity,
                sequence_tokens,
                &of_priority,
                expert_ids,
                &mut kept,
                &mut dropped,
            )?;
        }
        Ok(())
    }
}

/// Chooses the experts of a shape, as many as its `top_k`, into ids and weights, by a router whose choice is the layer's.
type Route<'r> = dyn Fn(
        &RouterConfig,
        RoutingShape,
        &mut CudaViewMut<'_, u32>,
        &mut CudaViewMut<'_, f32>,
    ) -> Result<()>
    + 'r;

/// What a pass makes of its tokens for the router; what it has been given is not made.
struct Made<'a, D: Dtype> {
    logits: Option<Typed<OnDeviceMut<'a>, D>>,
    noise_logits: Option<Typed<OnDeviceMut<'a>, D>>,
}

/// Logits of either type, or none.
struct Logits<'l, D> {
    element: Option<CudaView<'l, D>>,
    f32: Option<CudaView<'l, f32>>,
}

impl<'l, D: Dtype> Logits<'l, D> {
    /// Those that were made, else those that were given.
    fn of(
        made: Option<&'l Typed<OnDeviceMut<'_>, D>>,
        given: Option<&'l Typed<OnDevice<'_>, D>>,
    ) -> Self {
        let (mut element, mut f32) = (None, None);
        match (made, given) {
            (Some(Typed::Element(logits)), _) => element = Some(logits.as_view()),
            (Some(Typed::F32(logits)), _) => f32 = Some(logits.as_view()),
            (None, Some(Typed::Element(logits))) => element = Some(logits.slice(..)),
            (None, Some(Typed::F32(logits))) => f32 = Some(logits.slice(..)),
            (None, None) => {}
        }
        Self { element, f32 }
    }
}
