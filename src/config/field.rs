//! Checks of single fields of a configuration.

use std::fmt::Display;

use crate::error::{Error, Result};

/// The checks of one operation, which their errors name.
pub(super) struct Checked {
    pub op: &'static str,
}

impl Checked {
    /// Returns an error that names the field unless `good`.
    pub fn require(
        &self,
        argument: &'static str,
        good: bool,
        wanted: &str,
        got: impl Display,
    ) -> Result<()> {
        if good {
            return Ok(());
        }
        Err(Error::Unsupported {
            op: self.op,
            argument,
            wanted: wanted.into(),
            got: got.to_string(),
        })
    }

    /// Returns an error that names the field unless `good(value)`.
    pub fn require_number(
        &self,
        argument: &'static str,
        value: f32,
        good: impl Fn(f32) -> bool,
        wanted: &str,
    ) -> Result<()> {
        self.require(argument, good(value), wanted, value)
    }
}

pub(super) fn finite(value: f32) -> bool {
    value.is_finite()
}

pub(super) fn positive(value: f32) -> bool {
    value.is_finite() && value > 0.0
}
