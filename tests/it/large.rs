//! Tensors of more than 2^31 elements: every address is 64-bit.
//!
//! A result that lies beyond element 2^31, or is made of what lies there, is held against the same computation on a
//! small tensor, bit for bit. Device memory costs the host nothing where it is not written, and the software device runs
//! the blocks alone that reach there, so that every one of these tests is what it is called on any machine. A GPU runs
//! whole grids.

mod elements;
mod products;
mod router;
mod rows;

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaSlice, DeviceRepr};

use crate::common::{Gpu, gpu};

/// The first element that a signed 32-bit number does not reach.
const LIMIT: usize = 1 << 31;

/// The device, and the turn: together these tests ask for more memory than a small GPU has.
fn alone() -> (Gpu, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    (gpu(), TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Runs `launch`, of whose blocks the software device leaves out the first ones.
fn without_blocks<R>(gpu: &Gpu, left_out: usize, launch: impl FnOnce() -> R) -> R {
    let leave_out = |count: usize| {
        if gpu.emulated {
            moe_emulator::leave_out_blocks(count as u64);
        }
    };
    leave_out(left_out);
    let result = launch();
    leave_out(0);
    result
}

/// Memory for `len` elements, of which the last ones are `end`. The others are whatever they are.
fn ending_in<T: DeviceRepr>(gpu: &Gpu, len: usize, end: &[T]) -> CudaSlice<T> {
    // SAFETY: the tests look at what is written alone.
    let mut all = unsafe { gpu.stream.alloc::<T>(len) }.unwrap();
    if !end.is_empty() {
        gpu.stream.memcpy_htod(end, &mut all.slice_mut(len - end.len()..)).unwrap();
    }
    all
}

/// The last `count` elements.
fn end_of<T: DeviceRepr + bytemuck::Pod>(gpu: &Gpu, all: &CudaSlice<T>, count: usize) -> Vec<T> {
    gpu.download(&all.slice(all.len() - count..))
}
