//! The program, from outside: what it prints, what it writes, and its exit status.

#![allow(missing_docs)]

mod bench;
mod check;
mod common;
#[cfg(feature = "emulator")]
mod driver;
mod errors;
mod families;
#[cfg(unix)]
mod files;
mod formats;
mod ids;
mod model;
mod refusals;
mod run;
#[cfg(feature = "emulator")]
mod tune;
mod unread;
