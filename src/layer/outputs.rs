//! Outputs of a layer's first half.

use cudarc::driver::CudaViewMut;

use crate::config::MoeConfig;
use crate::error::{Error, Result, check_len, product};
use crate::shape::RoutingShape;

/// Outputs of [`MoeLayer::route_into`](crate::MoeLayer::route_into), for `N` sequences of
/// [`MoeInputs::sequence_tokens`](crate::MoeInputs::sequence_tokens) tokens: [`RoutingShape::sequences`] of them.
///
/// [`RoutingOutputs::new`] has ids and weights alone; struct update syntax adds the rest.
pub struct RoutingOutputs<'o> {
    /// `[T, K]`: the experts of each token; `u32::MAX` for a slot that was dropped, or whose token is not active.
    pub expert_ids: CudaViewMut<'o, u32>,
    /// `[T, K]`: their weights.
    pub routing_weights: CudaViewMut<'o, f32>,
    /// `[N, E]`, of a layer with capacity: slots of each sequence that each expert keeps.
    pub kept: Option<CudaViewMut<'o, u32>>,
    /// `[N, E]`, of a layer with capacity: requests that each expert had no room for; without overflow, slots that are
    /// dropped.
    pub dropped: Option<CudaViewMut<'o, u32>>,
}

impl<'o> RoutingOutputs<'o> {
    /// Ids and weights `[T, K]` alone.
    pub const fn new(
        expert_ids: CudaViewMut<'o, u32>,
        routing_weights: CudaViewMut<'o, f32>,
    ) -> Self {
        Self { expert_ids, routing_weights, kept: None, dropped: None }
    }

    /// Holds every output against the shape, and against what the configuration can give.
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
            if config.capacity.is_none() {
                let why = format!("`{name}` is given, and the configuration has no capacity");
                return Err(Error::Mismatch { op, why });
            }
            check_len(op, name, counts.len(), cells)?;
        }
        Ok(())
    }
}
