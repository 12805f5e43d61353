//! The driver API of the software device, used through cudarc and through the raw API.

mod capture;
mod common;
mod constants;
mod context;
mod event;
mod failure;
mod graph;
mod launch;
mod memory;
mod module;
mod observe;
mod process;
mod stream;
mod tensor_map;
mod threads;
