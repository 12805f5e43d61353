//! What all tests share: the device, random cases, poisoned buffers, comparisons.

mod case;
mod compare;
mod gpu;

pub use case::{Rng, Skew, routing_ids, skew, values};
pub use compare::{assert_within, bits};
pub use gpu::{Gpu, config, gpu};
