//! Code that all benches share: models, routings, tensors, rooflines, devices and timing.

pub(crate) mod ceiling;
pub(crate) mod error;
pub(crate) mod model;
pub(crate) mod op;
pub(crate) mod roofline;
pub(crate) mod routing;
pub(crate) mod target;
pub(crate) mod timing;
pub(crate) mod values;
pub(crate) mod weights;
pub(crate) mod workload;
