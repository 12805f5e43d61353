//! Tests of the program as a process: its output, its files and its exit status.

#![allow(missing_docs)]

mod bench;
mod check;
#[cfg(feature = "emulator")]
mod check_fails;
mod common;
#[cfg(feature = "emulator")]
mod driver;
mod errors;
mod families;
#[cfg(unix)]
mod files;
mod formats;
mod fp8;
mod ids;
mod model;
mod refusals;
mod run;
#[cfg(feature = "emulator")]
mod tune;
mod unread;
