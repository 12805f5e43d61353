//! Holding one field of a configuration against its limits.

use std::fmt::Display;

use crate::error::{Error, Result};

/// Whose fields they are: the name that errors begin with.
pub(super) struct Checked {
    pub op: &'static str,
}

impl Checked {
    /// An error that names the field unless `good`.
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

    /// The same for a number.
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
