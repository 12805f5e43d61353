//! What all benches share: shapes, numbers, rooflines, devices and time.

pub(crate) mod ceiling;
pub(crate) mod error;
pub(crate) mod model;
pub(crate) mod roofline;
pub(crate) mod routing;
pub(crate) mod stage;
pub(crate) mod target;
pub(crate) mod timing;
pub(crate) mod values;
