//! Tests of configurations, tensor names, checkpoints and their errors, with the checkpoints of
//! fixtures/.

mod capacity;
mod config;
mod fixtures;
mod keys;
mod lines;
mod load;
mod random;
mod schedule;
