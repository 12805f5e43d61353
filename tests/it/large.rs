//! Tensors of more than 2^31 elements: every address is 64-bit.
//!
//! A result at or computed from elements beyond 2^31 is compared bit for bit with the same
//! computation on a small tensor. Device memory that is not written needs no memory of the host,
//! and the software device executes only the blocks that access those elements, so these tests are
//! feasible on any machine. A GPU executes whole grids.

mod elements;
mod products;
mod router;
mod rows;

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaSlice, DeviceRepr};

use crate::common::{Gpu, gpu};

/// The first index beyond the range of a signed 32-bit integer.
const LIMIT: usize = 1 << 31;

/// The device and a lock: these tests run one at a time, since together they need more memory than
/// a small GPU has.
fn alone() -> (Gpu, MutexGuard<'static, ()>) {
    static LOCK: Mutex<()> = Mutex::new(());
    (gpu(), LOCK.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Calls `launch`, of whose blocks the software device skips the first `skipped`.
fn without_blocks<R>(gpu: &Gpu, skipped: usize, launch: impl FnOnce() -> R) -> R {
    let skip_blocks = |count: usize| {
        if gpu.emulated {
            moe_emulator::leave_out_blocks(count as u64);
        }
    };
    skip_blocks(skipped);
    let result = launch();
    skip_blocks(0);
    result
}

/// Allocates `len` elements, of which the last are `end`. The others are uninitialised.
fn ending_in<T: DeviceRepr>(gpu: &Gpu, len: usize, end: &[T]) -> CudaSlice<T> {
    // SAFETY: the tests read only elements that have been written.
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
