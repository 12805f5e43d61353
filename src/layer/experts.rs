//! The second half of a pass: from the routing to the output of the layer.

use cudarc::driver::{CudaView, CudaViewMut};

use super::memory::OnDevice;
use super::pass::Pass;
use crate::config::{ExpertConfig, MoeConfig, SharedConfig, WeightPosition, ZeroOutput};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::ops::combine::{CombineInputs, Identity, Shared, combine_fwd_into};
use crate::ops::grouped_gemm::{
    GateUpWeights, LinearWeights, Rows, grouped_gemm_fwd_into, grouped_gemm_gate_up_fwd_into,
    grouped_gemm_weighted_fwd_into,
};
use crate::ops::plan::plan_range_fwd_into;
use crate::ops::rms_norm::{RmsNormInputs, rms_norm_fwd_in_place};
use crate::ops::router_gemm::{RouterGemmInputs, router_gemm_fwd_into};
use crate::routing_plan::RoutingPlan;
use crate::tensors::{LatentWeights, SharedWeights};
use crate::workspace::Arena;

/// The experts of each token.
#[derive(Clone, Copy)]
pub(super) struct Routing<'r> {
    /// `[T, K]`
    pub(super) expert_ids: &'r CudaView<'r, u32>,
    /// `[T, K]`
    pub(super) routing_weights: &'r CudaView<'r, f32>,
}

impl<D: Dtype> Pass<'_, '_, D> {
    /// Returns whether the layer has dense products: those of a latent width or of a shared expert.
    pub(super) fn has_dense_experts(&self) -> bool {
        self.config.latent.is_some() || self.config.shared.is_some()
    }

    /// Computes `y` `[T, H]` from the tokens `x` `[T, H]` and their routing.
    pub(super) fn experts(
        &self,
        x: &CudaView<'_, D>,
        routing: Routing<'_>,
        dense: Option<&RoutingPlan<'_>>,
        arena: &mut Arena<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let (device, stream, config) = (self.device, self.stream, self.config);
        let memory = arena.take::<u8>(self.sections.plan)?;
        let experts = 0..config.num_experts;
        let ids = routing.expert_ids;
        let plan = plan_range_fwd_into(device, stream, self.shape, experts, ids, memory)?;
        let mut shared_y = arena.take::<D>(self.sections.shared_y)?;
        let mut shared_gate = arena.take::<f32>(self.sections.shared_gate)?;
        let shared = match (self.config.shared, &self.weights.shared, dense) {
            (Some(shared), Some(weights), Some(dense)) => {
                let (y, gate_logits) = (&mut shared_y, &mut shared_gate);
                self.shared(&shared, weights, dense, x, arena, y, gate_logits)?;
                Some(shared)
            }
            _ => None,
        };
        let (shared_y, shared_gate) = (shared_y.as_view(), shared_gate.as_view());
        let shared = shared.map(|shared| Shared {
            y: &shared_y,
            gate: shared.sigmoid_gate.then_some(&shared_gate),
            average: shared.average,
        });
        match (&self.weights.latent, dense) {
            (Some(weights), Some(dense)) => {
                self.latent(weights, &plan, dense, x, routing, shared, arena, y)
            }
            _ => self.routed(&plan, x, routing, shared, arena, y),
        }?;
        let Some(norm) = &config.output_norm else { return Ok(()) };
        let inputs = RmsNormInputs { weight: self.weights.output_norm.as_ref(), plan: None };
        rms_norm_fwd_in_place(device, stream, norm, config.hidden, y, &inputs)
    }

    /// The output of a layer whose experts read the tokens themselves.
    fn routed(
        &self,
        plan: &RoutingPlan<'_>,
        x: &CudaView<'_, D>,
        routing: Routing<'_>,
        shared: Option<Shared<'_, D>>,
        arena: &mut Arena<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let config = self.config;
        let yp = self.rows(plan, x, routing, arena)?;
        let identity = config.zero_experts.filter(|zero| zero.output == ZeroOutput::Identity);
        let identity = identity.map(|zero| Identity {
            experts: config.num_experts as u32..(config.num_experts + zero.count) as u32,
            expert_ids: routing.expert_ids,
            x,
            routing_weights: config
                .experts
                .weighs_rows(D::DTYPE)
                .then_some(routing.routing_weights),
        });
        let inputs = CombineInputs {
            yp: &yp.as_view(),
            routing_weights: self.output_weights(routing),
            identity,
            output_bias: self.weights.experts.output_bias.as_ref(),
            shared,
        };
        combine_fwd_into(self.device, self.stream, plan, config.hidden, &inputs, y)
    }

    /// The output of a layer whose experts compute in a latent width, between two projections.
    #[allow(clippy::too_many_arguments, reason = "the parts of a layer")]
    fn latent(
        &self,
        weights: &LatentWeights<OnDevice<'_>, D>,
        plan: &RoutingPlan<'_>,
        dense: &RoutingPlan<'_>,
        x: &CudaView<'_, D>,
        routing: Routing<'_>,
        shared: Option<Shared<'_, D>>,
        arena: &mut Arena<'_>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let (device, stream) = (self.device, self.stream);
        let (hidden, inner, rows) =
            (self.config.hidden, self.config.expert_hidden(), Rows::Grouped);
        let mut latent_x = arena.take::<D>(self.sections.latent_x)?;
        let linear = LinearWeights::new(&weights.proj_in);
        grouped_gemm_fwd_into(
            device,
            stream,
            dense,
            inner,
            hidden,
            rows,
            x,
            linear,
            &mut latent_x,
        )?;
        if let Some(norm) = self.config.latent.and_then(|latent| latent.norm) {
            let inputs = RmsNormInputs { weight: weights.norm.as_ref(), plan: None };
            rms_norm_fwd_in_place(device, stream, &norm, inner, &mut latent_x, &inputs)?;
        }
        let yp = self.rows(plan, &latent_x.as_view(), routing, arena)?;
        let mut latent_y = arena.take::<D>(self.sections.latent_y)?;
        let inputs = CombineInputs {
            yp: &yp.as_view(),
            routing_weights: self.output_weights(routing),
            identity: None,
            output_bias: None,
            shared: None,
        };
        combine_fwd_into(device, stream, plan, inner, &inputs, &mut latent_y)?;
        let latent_y = latent_y.as_view();
        let bias = self.weights.experts.output_bias.as_ref();
        let linear = LinearWeights { bias, ..LinearWeights::new(&weights.proj_out) };
        if shared.is_none() {
            return grouped_gemm_fwd_into(
                device, stream, dense, hidden, inner, rows, &latent_y, linear, y,
            );
        }
        let mut out = arena.take::<D>(self.sections.latent_out)?;
        grouped_gemm_fwd_into(
            device, stream, dense, hidden, inner, rows, &latent_y, linear, &mut out,
        )?;
        let inputs = CombineInputs {
            yp: &out.as_view(),
            routing_weights: None,
            identity: None,
            output_bias: None,
            shared,
        };
        combine_fwd_into(device, stream, dense, hidden, &inputs, y)
    }

    /// The weights that `combine` multiplies by; `None` if an earlier operation applies them.
    fn output_weights<'r>(&self, routing: Routing<'r>) -> Option<&'r CudaView<'r, f32>> {
        let experts = &self.config.experts;
        match experts.weight_position {
            WeightPosition::Output => {
                (!experts.weighs_rows(D::DTYPE)).then_some(routing.routing_weights)
            }
            WeightPosition::Input | WeightPosition::Inside => None,
        }
    }

    /// The outputs of the routed experts `[R, H]`, after their norm if there is one.
    fn rows<'a>(
        &self,
        plan: &RoutingPlan<'_>,
        x: &CudaView<'_, D>,
        routing: Routing<'_>,
        arena: &mut Arena<'a>,
    ) -> Result<CudaViewMut<'a, D>> {
        let (device, stream) = (self.device, self.stream);
        let MoeConfig { intermediate, experts, .. } = self.config;
        let (hidden, weights) = (self.config.expert_hidden(), &self.weights.experts);
        let tensors = weights.gate_up.as_ref();
        let gate_up = GateUpWeights { tensors, bias: weights.gate_up_bias.as_ref() };
        let row_weights =
            (experts.weight_position != WeightPosition::Output).then_some(routing.routing_weights);
        let mut act = arena.take::<D>(self.sections.act)?;
        self.gate_up(plan, experts, [*intermediate, hidden], x, gate_up, row_weights, &mut act)?;
        let down = LinearWeights {
            w: &weights.down,
            bias: weights.down_bias.as_ref(),
            order: experts.down_order,
        };
        let mut yp = arena.take::<D>(self.sections.yp)?;
        let (act, rows) = (act.as_view(), Rows::Grouped);
        let (out_features, in_features) = (hidden, *intermediate);
        if experts.weighs_rows(D::DTYPE) {
            let weights = routing.routing_weights;
            grouped_gemm_weighted_fwd_into(
                device,
                stream,
                plan,
                out_features,
                in_features,
                rows,
                &act,
                down,
                weights,
                &mut yp,
            )?;
            return Ok(yp);
        }
        grouped_gemm_fwd_into(
            device,
            stream,
            plan,
            out_features,
            in_features,
            rows,
            &act,
            down,
            &mut yp,
        )?;
        if let Some(norm) = &experts.post_norm {
            let inputs = RmsNormInputs { weight: weights.post_norm.as_ref(), plan: Some(plan) };
            rms_norm_fwd_in_place(device, stream, norm, hidden, &mut yp, &inputs)?;
        }
        Ok(yp)
    }

    /// Computes the output of the shared expert `y` `[T, H]`, and the logits `[T]` of its sigmoid
    /// gate if it has one.
    #[allow(clippy::too_many_arguments, reason = "the parts of a layer")]
    fn shared(
        &self,
        shared: &SharedConfig,
        weights: &SharedWeights<OnDevice<'_>, D>,
        dense: &RoutingPlan<'_>,
        x: &CudaView<'_, D>,
        arena: &mut Arena<'_>,
        y: &mut CudaViewMut<'_, D>,
        gate_logits: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (device, stream, hidden) = (self.device, self.stream, self.config.hidden);
        let intermediate = shared.intermediate;
        let mut act = arena.take::<D>(self.sections.shared_act)?;
        let bias = weights.gate_up_bias.as_ref();
        let gate_up = GateUpWeights { bias, ..GateUpWeights::fused(&weights.gate_up) };
        let widths = [intermediate, hidden];
        self.gate_up(dense, &shared.experts(), widths, x, gate_up, None, &mut act)?;
        let bias = weights.down_bias.as_ref();
        let down = LinearWeights { bias, ..LinearWeights::new(&weights.down) };
        let (act, rows) = (act.as_view(), Rows::Grouped);
        grouped_gemm_fwd_into(device, stream, dense, hidden, intermediate, rows, &act, down, y)?;
        let Some(gate) = &weights.sigmoid_gate else { return Ok(()) };
        let inputs = RouterGemmInputs { x, router_gate: gate, bias: None };
        router_gemm_fwd_into(device, stream, 1, hidden, &inputs, gate_logits)
    }

    #[allow(clippy::too_many_arguments, reason = "the arguments of the operation")]
    fn gate_up(
        &self,
        plan: &RoutingPlan<'_>,
        experts: &ExpertConfig,
        [intermediate, hidden]: [usize; 2],
        x: &CudaView<'_, D>,
        gate_up: GateUpWeights<'_, D>,
        weights: Option<&CudaView<'_, f32>>,
        act: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let (device, stream, rows) = (self.device, self.stream, Rows::Gathered);
        grouped_gemm_gate_up_fwd_into(
            device,
            stream,
            plan,
            experts,
            intermediate,
            hidden,
            rows,
            x,
            gate_up,
            weights,
            act,
        )
    }
}
