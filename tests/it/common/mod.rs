//! Shared parts of the tests: the device, random cases, poisoned buffers, comparisons.

mod case;
mod compare;
mod gpu;
mod layers;
mod router;

pub use case::{Rng, Skew, routing_ids, skew, values};
pub use compare::{assert_within, bits};
pub use gpu::{Buffer, Gpu, config, gpu};
pub use layers::{random_config, random_inputs, random_weights};
pub use router::{RouterCase, any_bits, router};
