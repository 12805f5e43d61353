//! Inputs for the tests of this module.

use super::plan::{Plan, plan_fwd};
use crate::dtype::Dtype;
use crate::shape::RoutingShape;

/// A small random number generator; a seed gives the same numbers on every machine.
pub(super) struct Sampler(u64);

impl Sampler {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    /// Numbers from -1 to 1, rounded to the element type.
    pub(super) fn elements<D: Dtype>(&mut self, count: usize) -> Vec<D> {
        let unit = |bits: u32| f64::from(bits) / f64::from(1u32 << 30) - 1.0;
        (0..count).map(|_| D::from_f64(unit(self.next()))).collect()
    }

    /// Random experts; some slots have none.
    pub(super) fn expert_ids(&mut self, shape: &RoutingShape) -> Vec<u32> {
        (0..shape.slots()).map(|_| self.below(shape.num_experts + 1) as u32).collect()
    }

    pub(super) fn plan(&mut self, shape: &RoutingShape) -> Plan {
        plan_fwd(shape, &self.expert_ids(shape)).unwrap()
    }
}
