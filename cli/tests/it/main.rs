//! The program, from outside: what it prints, what it writes, and its exit status.

#![allow(missing_docs)]

mod bench;
mod check;
#[cfg(feature = "emulator")]
mod check_fails;
mod common;
mod errors;
mod families;
mod fp8;
mod run;
#[cfg(feature = "emulator")]
mod tune;
