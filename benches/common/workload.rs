//! One prepared operation.

use crate::common::error::Result;

/// The bytes that displace any earlier data from every cache.
pub(crate) const COLD_BYTES: f64 = 256e6;

/// One operation, ready to be called repeatedly.
pub struct Workload<'a> {
    /// The number of sets of weights that calls use in turn.
    pub sets: usize,
    /// True if the weights, or the largest inputs, are read from memory rather than from a cache.
    pub cold: bool,
    call: Box<dyn FnMut(usize) -> Result<()> + 'a>,
}

impl<'a> Workload<'a> {
    pub(crate) fn new(call: impl FnMut(usize) -> Result<()> + 'a) -> Self {
        Self { sets: 1, cold: false, call: Box::new(call) }
    }

    /// Calls the operation with set `set % sets`; on a device, enqueues it.
    ///
    /// # Errors
    /// Errors of the library.
    pub fn call(&mut self, set: usize) -> Result<()> {
        (self.call)(set % self.sets)
    }
}
