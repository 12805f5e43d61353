//! The outputs of a layer's router.

use cudarc::driver::CudaViewMut;

use crate::config::MoeConfig;
use crate::error::{Result, check_len, check_presence, product};
use crate::shape::RoutingShape;

/// Outputs of [`MoeLayer::route_into`](crate::MoeLayer::route_into), for `S` sequences of
/// [`MoeInputs::sequence_tokens`](crate::MoeInputs::sequence_tokens) tokens:
/// [`RoutingShape::sequences`] of them.
///
/// [`RoutingOutputs::new`] takes ids and weights; struct update syntax adds the optional outputs.
pub struct RoutingOutputs<'o> {
    /// `[T, K]`, the experts of each token; `u32::MAX` for a dropped slot and for slots of inactive
    /// tokens.
    pub expert_ids: CudaViewMut<'o, u32>,
    /// `[T, K]`, the routing weights of the slots.
    pub routing_weights: CudaViewMut<'o, f32>,
    /// `[S, E]`, only for a layer with capacity: the number of slots of each sequence that each
    /// expert keeps.
    pub kept: Option<CudaViewMut<'o, u32>>,
    /// `[S, E]`, only for a layer with capacity: the number of requests beyond the limit of each
    /// expert. Without overflow these are the dropped slots.
    pub dropped: Option<CudaViewMut<'o, u32>>,
}

impl<'o> RoutingOutputs<'o> {
    /// Ids and weights `[T, K]`, without counts.
    pub const fn new(
        expert_ids: CudaViewMut<'o, u32>,
        routing_weights: CudaViewMut<'o, f32>,
    ) -> Self {
        Self { expert_ids, routing_weights, kept: None, dropped: None }
    }

    /// Checks every output against the shape and the configuration.
    pub(super) fn check(
        &self,
        op: &'static str,
        config: &MoeConfig,
        shape: RoutingShape,
        sequence_tokens: Option<usize>,
    ) -> Result<()> {
        check_len(op, "expert_ids", self.expert_ids.len(), shape.slots())?;
        check_len(op, "routing_weights", self.routing_weights.len(), shape.slots())?;
        let sequences = shape.sequences(sequence_tokens);
        let cells = product(op, "sequences * num_experts", sequences, shape.num_experts)?;
        for (name, counts) in [("kept", &self.kept), ("dropped", &self.dropped)] {
            let Some(counts) = counts else { continue };
            check_presence(op, name, true, config.capacity.is_some())?;
            check_len(op, name, counts.len(), cells)?;
        }
        Ok(())
    }
}
