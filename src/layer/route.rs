//! The first half of a pass: from tokens to the ids and weights of their experts.

use cudarc::driver::{CudaView, CudaViewMut};

use super::{OP, OnDevice, OnDeviceMut, Pass, RoutingOutputs};
use crate::config::{CapacityConfig, Normalization, Priority, RouterConfig};
use crate::dtype::Dtype;
use crate::error::{Result, product};
use crate::ops::capacity::{
    capacity_ask_fwd_into, capacity_fwd_into, capacity_later_fwd_into, capacity_normalize_fwd_into,
};
use crate::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_fwd_into};
use crate::ops::plan::plan_fwd_into;
use crate::ops::project::{ProjectInputs, project_fwd_into};
use crate::ops::rms_norm::{RmsNormInputs, rms_norm_fwd_into};
use crate::ops::route::{RouteInputs, route_fwd_into};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;
use crate::tensors::{MoeInputs, Typed, no_gate};
use crate::workspace::Arena;

impl<D: Dtype> Pass<'_, '_, D> {
    /// Whether tensor cores make the logits: where they are 16-bit numbers like both factors.
    pub(super) fn projects_by_gemm(&self, inputs: &MoeInputs<OnDevice<'_>, D>) -> bool {
        let gate = self.weights.router.gate.as_ref().and_then(Typed::element);
        let narrow = D::DTYPE.size() == 2 && !self.config.projection.f32_logits;
        inputs.logits.is_none() && gate.is_some() && narrow
    }

    /// The ids and weights of each token's experts.
    pub(super) fn route(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        outputs: &mut RoutingOutputs<'_>,
    ) -> Result<()> {
        if let Some(logits) = &inputs.logits {
            return match logits {
                Typed::Element(logits) => {
                    let noise = inputs.noise_logits.as_ref().and_then(Typed::element);
                    self.choose(inputs, logits, noise, arena, outputs)
                }
                Typed::F32(logits) => {
                    let noise = inputs.noise_logits.as_ref().and_then(Typed::f32);
                    self.choose(inputs, logits, noise, arena, outputs)
                }
            };
        }
        let section = self.sections.logits;
        let mut logits = match self.config.projection.f32_logits {
            true => Typed::F32(arena.take::<f32>(section)?),
            false => Typed::Element(arena.take::<D>(section)?),
        };
        self.project(inputs, dense, arena, &mut logits)?;
        match &logits {
            Typed::Element(logits) => {
                let noise = inputs.noise_logits.as_ref().and_then(Typed::element);
                self.choose(inputs, &logits.as_view(), noise, arena, outputs)
            }
            Typed::F32(logits) => {
                let noise = inputs.noise_logits.as_ref().and_then(Typed::f32);
                self.choose(inputs, &logits.as_view(), noise, arena, outputs)
            }
        }
    }

    /// The router's norm and projection.
    pub(super) fn project(
        &self,
        inputs: &MoeInputs<OnDevice<'_>, D>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        logits: &mut Typed<OnDeviceMut<'_>, D>,
    ) -> Result<()> {
        let (device, stream, config) = (self.device, self.stream, self.config);
        let (experts, hidden, router) =
            (config.router_experts(), config.hidden, &self.weights.router);
        let mut normed = arena.take::<D>(self.sections.router_x)?;
        let x = inputs.router_x.as_ref().unwrap_or(&inputs.x);
        let normed_x;
        let x = match &config.projection.norm {
            Some(norm) => {
                let beside = RmsNormInputs { weight: router.norm.as_ref(), plan: None };
                rms_norm_fwd_into(device, stream, norm, hidden, x, &beside, &mut normed)?;
                normed_x = normed.as_view();
                &normed_x
            }
            None => x,
        };
        // Gate and bias are of one type, as was checked.
        let bias = router.bias.as_ref();
        match (&router.gate, logits) {
            (Some(Typed::Element(gate)), Typed::Element(logits)) => {
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
                        let inputs = ProjectInputs { x, gate, bias };
                        project_fwd_into(device, stream, experts, hidden, &inputs, logits)
                    }
                }
            }
            (Some(Typed::Element(gate)), Typed::F32(logits)) => {
                let inputs = ProjectInputs { x, gate, bias: bias.and_then(Typed::element) };
                project_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (Some(Typed::F32(gate)), Typed::Element(logits)) => {
                let inputs = ProjectInputs { x, gate, bias: bias.and_then(Typed::f32) };
                project_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (Some(Typed::F32(gate)), Typed::F32(logits)) => {
                let inputs = ProjectInputs { x, gate, bias: bias.and_then(Typed::f32) };
                project_fwd_into(device, stream, experts, hidden, &inputs, logits)
            }
            (None, _) => Err(no_gate(OP)),
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
        let (config, router) = (self.config, &self.weights.router);
        let read = RouteInputs {
            logits,
            selection_bias: router.selection_bias.as_ref(),
            expert_scale: router.expert_scale.as_ref(),
            noise: inputs.noise.as_ref(),
            noise_logits,
            given_ids: inputs.given_ids.as_ref().or(router.table.as_ref()),
            token_ids: inputs.token_ids.as_ref(),
            active: inputs.active.as_ref(),
        };
        let route = |router: &RouterConfig,
                     shape: RoutingShape,
                     ids: &mut CudaViewMut<'_, u32>,
                     weights: &mut CudaViewMut<'_, f32>| {
            let expert_scale = read.expert_scale.filter(|_| router.expert_scale);
            let read = RouteInputs { expert_scale, ..read };
            route_fwd_into(device, stream, shape, router, &read, ids, weights)
        };
        let Some(capacity) = &config.capacity else {
            return route(&config.router, shape, &mut outputs.expert_ids, &mut outputs.weights);
        };
        let tokens = inputs.sequence_tokens;
        let by = capacity.normalization;
        if by == Normalization::None {
            return self.keep(capacity, tokens, &route, arena, outputs);
        }
        let RoutingOutputs { expert_ids, weights: normalized, kept, dropped } = outputs;
        let mut kept_weights = RoutingOutputs {
            expert_ids: expert_ids.slice_mut(..),
            weights: arena.take::<f32>(self.sections.chosen_weights)?,
            kept: kept.as_mut().map(|kept| kept.slice_mut(..)),
            dropped: dropped.as_mut().map(|dropped| dropped.slice_mut(..)),
        };
        self.keep(capacity, tokens, &route, arena, &mut kept_weights)?;
        let (ids, weights) = (kept_weights.expert_ids.as_view(), kept_weights.weights.as_view());
        let (scale, of_experts) = (config.router.scale, router.expert_scale.as_ref());
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
        let RoutingOutputs { expert_ids, weights, kept: kept_out, dropped: dropped_out } = outputs;
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
            capacity_ask_fwd_into(
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
