//! The table of families.
//!
//! Rows stand with those that route alike. Sizes are `[H, I, E, K]`, the defaults of transformers' classes.

mod deepseek;
mod layouts;
mod logit;
mod sigmoid;
mod softmax;
mod special;

use super::family::Family;

/// Every family, by file.
pub(super) const FAMILIES: &[&[Family]] = &[
    softmax::FAMILIES,
    deepseek::FAMILIES,
    deepseek::SOFTMAX_FAMILIES,
    logit::FAMILIES,
    sigmoid::FAMILIES,
    special::FAMILIES,
];

/// Models that choose among experts in a way that is none of this crate's, and what is missing.
pub(super) const NOT_COVERED: &[(&str, &str)] = &[
    ("doge", "its experts are single neurons, found by product keys, which is no routed FFN"),
    ("vitpose", "its experts are chosen by data set, without a router"),
    ("vitpose_backbone", "its experts are chosen by data set, without a router"),
    ("granite_docling", "its router chooses the path of a connector, not experts"),
    ("bamba", "it has one expert, and so no router"),
];
