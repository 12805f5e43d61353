//! A pass of a layer over a batch: its checked tensors and its sections of the workspace.

use cudarc::driver::CudaStream;

use super::contexts::Contexts;
use super::memory::OnDevice;
use super::sections::{OP, Sections, one_expert};
use crate::config::MoeConfig;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::ops::plan::plan_fwd_into;
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;
use crate::tensors::MoeWeights;
use crate::workspace::Arena;

/// A pass whose weights were checked against the configuration.
pub(super) struct Pass<'p, 'w, D: Dtype> {
    pub(super) device: &'p Device,
    pub(super) stream: &'p CudaStream,
    pub(super) config: &'p MoeConfig,
    pub(super) weights: &'p MoeWeights<OnDevice<'w>, D>,
    pub(super) shape: RoutingShape,
    pub(super) sections: Sections,
    pub(super) contexts: Contexts<'p>,
}

impl<'p, 'w, D: Dtype> Pass<'p, 'w, D> {
    pub(super) fn new(
        device: &'p Device,
        config: &'p MoeConfig,
        stream: &'p CudaStream,
        shape: RoutingShape,
        weights: &'p MoeWeights<OnDevice<'w>, D>,
    ) -> Result<Self> {
        weights.check(OP, config)?;
        let contexts = Contexts::new(device, stream)?;
        contexts.weights(weights)?;
        let sections = Sections::new(config, D::DTYPE, shape.num_tokens)?;
        Ok(Self { device, stream, config, weights, shape, sections, contexts })
    }

    /// The plan of dense products: grouped products with one expert, to which every token is sent.
    /// `None` unless `needed`.
    pub(super) fn dense<'a>(
        &self,
        arena: &mut Arena<'a>,
        needed: bool,
    ) -> Result<Option<RoutingPlan<'a>>> {
        let memory = arena.take::<u8>(self.sections.dense)?;
        if !needed {
            return Ok(None);
        }
        let shape = one_expert(self.shape.num_tokens);
        plan_fwd_into(self.device, self.stream, shape, None, memory).map(Some)
    }
}
