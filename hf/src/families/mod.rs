//! The table of families.
//!
//! Rows with the same kind of router are in one file. Sizes are `[H, I, E, K]`, the defaults of
//! transformers' classes.

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

/// Models with another selection of experts than this crate supports, and the reason.
pub(super) const NOT_COVERED: &[(&str, &str)] = &[
    ("doge", "its experts are single neurons, found by product keys, not a routed FFN"),
    ("vitpose", "its experts are chosen by data set, without a router"),
    ("vitpose_backbone", "its experts are chosen by data set, without a router"),
    ("granite_docling", "its router chooses the path of a connector, not experts"),
    ("bamba", "it has one expert, and so no router"),
];
