//! The configuration of a layer, as plain enums and numbers.

mod capacity;
mod experts;
mod field;
mod layer;
mod noise;
mod router;
#[cfg(test)]
#[cfg(feature = "serde")]
mod serialized;
mod steps;

pub(crate) use capacity::kept_divisor;
pub use capacity::{CapacityConfig, CapacityLimit, Priority};
pub use experts::{
    Activation, ActivationFunction, ExpertConfig, GateUpLayout, Limit, RmsNorm, WeightOrder,
    WeightPosition,
};
pub use layer::{LatentConfig, MoeConfig, RouterProjection, SharedConfig, ZeroExperts, ZeroOutput};
pub use noise::NoiseDistribution;
pub use router::{
    GroupScore, Groups, Masked, Normalization, RouterConfig, RouterStep, Scoring, Selection,
};
pub(crate) use steps::{RouteLengths, Score};
