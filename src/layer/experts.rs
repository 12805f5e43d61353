//! The second half of a pass: from the choice of experts to the layer's output.

use cudarc::driver::{CudaView, CudaViewMut};

use super::{OnDevice, Pass};
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

/// The ids and weights `[T, K]` of each token's experts.
type Routing<'r> = (&'r CudaView<'r, u32>, &'r CudaView<'r, f32>);

impl<D: Dtype> Pass<'_, '_, D> {
    /// Whether there are products that every token takes part in.
    pub(super) fn has_dense_experts(&self) -> bool {
        self.config.latent.is_some() || self.config.shared.is_some()
    }

    /// What the layer makes of `x`, in `y`.
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
        let plan = plan_range_fwd_into(device, stream, self.shape, experts, routing.0, memory)?;
        let mut shared_y = arena.take::<D>(self.sections.shared_y)?;
        let mut shared_gate = arena.take::<f32>(self.sections.shared_gate)?;
        let shared = match (self.config.shared, &self.weights.shared, dense) {
            (Some(shared), Some(weights), Some(dense)) => {
                let to = (&mut shared_y, &mut shared_gate);
                self.shared(&shared, weights, dense, x, arena, to)?;
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
        let beside = RmsNormInputs { weight: self.weights.output_norm.as_ref(), plan: None };
        rms_norm_fwd_in_place(device, stream, norm, config.hidden, y, &beside)
    }

    /// Experts that read the tokens themselves.
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
            expert_ids: routing.0,
            x,
            routing_weights: config.experts.weighs_rows(D::DTYPE).then_some(routing.1),
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

    /// Experts of a width of their own, between two projections.
    #[allow(clippy::too_many_arguments, reason = "each is a part of a layer")]
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
        let mut before = arena.take::<D>(self.sections.latent_x)?;
        let linear = LinearWeights::new(&weights.proj_in);
        grouped_gemm_fwd_into(device, stream, dense, inner, hidden, rows, x, linear, &mut before)?;
        if let Some(norm) = self.config.latent.and_then(|latent| latent.norm) {
            let beside = RmsNormInputs { weight: weights.norm.as_ref(), plan: None };
            rms_norm_fwd_in_place(device, stream, &norm, inner, &mut before, &beside)?;
        }
        let yp = self.rows(plan, &before.as_view(), routing, arena)?;
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

    /// The weights that `combine` multiplies with, unless they have been used before.
    fn output_weights<'r>(&self, routing: Routing<'r>) -> Option<&'r CudaView<'r, f32>> {
        let experts = &self.config.experts;
        match experts.weight_position {
            WeightPosition::Output => (!experts.weighs_rows(D::DTYPE)).then_some(routing.1),
            WeightPosition::Input | WeightPosition::Inside => None,
        }
    }

    /// The routed experts' outputs `[R, H]`, normed where the configuration says so.
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
        let on_rows = (experts.weight_position != WeightPosition::Output).then_some(routing.1);
        let mut act = arena.take::<D>(self.sections.act)?;
        self.gate_up(plan, experts, [*intermediate, hidden], x, gate_up, on_rows, &mut act)?;
        let down = LinearWeights {
            w: &weights.down,
            bias: weights.down_bias.as_ref(),
            order: experts.down_order,
        };
        let mut yp = arena.take::<D>(self.sections.yp)?;
        let (act, n, k, rows) = (act.as_view(), hidden, *intermediate, Rows::Grouped);
        if experts.weighs_rows(D::DTYPE) {
            let (by, to) = (routing.1, &mut yp);
            grouped_gemm_weighted_fwd_into(device, stream, plan, n, k, rows, &act, down, by, to)?;
            return Ok(yp);
        }
        grouped_gemm_fwd_into(device, stream, plan, n, k, rows, &act, down, &mut yp)?;
        if let Some(norm) = &experts.post_norm {
            let beside = RmsNormInputs { weight: weights.post_norm.as_ref(), plan: Some(plan) };
            rms_norm_fwd_in_place(device, stream, norm, hidden, &mut yp, &beside)?;
        }
        Ok(yp)
    }

    /// The shared expert's output `[T, H]`, and the logits `[T]` of its gate where it has one.
    fn shared(
        &self,
        shared: &SharedConfig,
        weights: &SharedWeights<OnDevice<'_>, D>,
        dense: &RoutingPlan<'_>,
        x: &CudaView<'_, D>,
        arena: &mut Arena<'_>,
        (y, gate_logits): (&mut CudaViewMut<'_, D>, &mut CudaViewMut<'_, f32>),
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
        let inputs = RouterGemmInputs { x, gate, bias: None };
        router_gemm_fwd_into(device, stream, 1, hidden, &inputs, gate_logits)
    }

    #[allow(clippy::too_many_arguments, reason = "those of the operation")]
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
