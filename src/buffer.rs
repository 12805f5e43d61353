//! Buffers as operations make them and hand them to kernels: memory, addresses, and where those may lie.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr, SyncOnDrop};

use crate::device::{CUdeviceptr, driver_error};
use crate::error::{Error, Result, product};

/// Holds an address against the element type that the kernel reads there.
pub(crate) fn check_aligned(
    op: &'static str,
    argument: &'static str,
    address: CUdeviceptr,
    bytes: usize,
) -> Result<()> {
    if address.is_multiple_of(bytes as u64) {
        Ok(())
    } else {
        Err(Error::Alignment { op, argument, wanted: bytes, got: address })
    }
}

/// Whether rows of `row_bytes` can be moved in 16-byte pieces in all of these buffers. One that is not
/// there, at address 0, stands in nobody's way.
pub(crate) fn vector_rows(row_bytes: usize, addresses: &[CUdeviceptr]) -> bool {
    row_bytes.is_multiple_of(16) && addresses.iter().all(|address| address.is_multiple_of(16))
}

/// The address of a view that may be left out, 0 without one; the guard is that of `device_ptr`.
pub(crate) fn optional<'a, T>(
    view: Option<&'a CudaView<'a, T>>,
    stream: &'a CudaStream,
) -> (CUdeviceptr, Option<SyncOnDrop<'a>>) {
    view.map_or((0, None), |view| {
        let (address, guard) = view.device_ptr(stream);
        (address, Some(guard))
    })
}

/// Device memory for what an operation returns; `len` may be 0, which the driver itself refuses.
///
/// # Safety
/// The memory is unset: every element must be written before it is read.
pub(crate) unsafe fn alloc<T: DeviceRepr>(
    op: &'static str,
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>> {
    product(op, "bytes", len, size_of::<T>())?;
    // SAFETY: the caller's promise.
    let slice = unsafe { stream.alloc::<T>(len.max(1)) }.map_err(driver_error(op))?;
    if len > 0 {
        return Ok(slice);
    }
    // SAFETY: the address was allocated on this stream, and no element of it is ever reached.
    Ok(unsafe { stream.upgrade_device_ptr(slice.leak(), 0) })
}

/// Numbers of the host's in memory of their own; there may be none, which the driver itself refuses.
pub(crate) fn upload<T: DeviceRepr>(
    op: &'static str,
    stream: &Arc<CudaStream>,
    data: &[T],
) -> Result<CudaSlice<T>> {
    // SAFETY: the copy writes every element.
    let mut slice = unsafe { alloc::<T>(op, stream, data.len()) }?;
    if !data.is_empty() {
        stream.memcpy_htod(data, &mut slice).map_err(driver_error(op))?;
    }
    Ok(slice)
}
