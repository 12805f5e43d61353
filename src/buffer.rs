//! Buffers of operations: allocation, device addresses, and the checks of both.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    DeviceSlice, SyncOnDrop,
};

use crate::driver::{CUdeviceptr, driver_error};
use crate::error::{Error, Result, product};

/// Checks the alignment of an address: a multiple of `bytes`, the size of an element.
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

/// Returns whether rows of `row_bytes` can be moved with 16-byte accesses in all of these buffers.
/// A null address is ignored.
pub(crate) fn vector_rows(row_bytes: usize, addresses: &[CUdeviceptr]) -> bool {
    row_bytes.is_multiple_of(16) && addresses.iter().all(|address| address.is_multiple_of(16))
}

/// Checks that a stream, or the stream of a buffer, belongs to the context of the call. cudarc
/// orders work within one `CudaContext` only, so two contexts of the same GPU must not be mixed
/// either.
pub(crate) fn check_context(
    op: &'static str,
    argument: &'static str,
    stream: &CudaStream,
    context: &Arc<CudaContext>,
) -> Result<()> {
    if Arc::ptr_eq(stream.context(), context) {
        Ok(())
    } else {
        Err(Error::Context { op, argument })
    }
}

/// The address of a view that an operation reads. Launches before the guard is dropped are ordered
/// after earlier writes of the buffer, and later writes after those launches.
pub(crate) fn reads<'a, T>(
    op: &'static str,
    argument: &'static str,
    view: &'a CudaView<'_, T>,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    check_context(op, argument, view.stream(), stream.context())?;
    Ok(view.device_ptr(stream))
}

/// [`reads`] for an optional view; the address is null without one.
pub(crate) fn optional<'a, T>(
    op: &'static str,
    argument: &'static str,
    view: Option<&'a CudaView<'_, T>>,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, Option<SyncOnDrop<'a>>)> {
    view.map_or(Ok((0, None)), |view| {
        let (address, guard) = reads(op, argument, view, stream)?;
        Ok((address, Some(guard)))
    })
}

/// The address of a view that an operation writes, with a guard like that of [`reads`].
pub(crate) fn writes<'a, T>(
    op: &'static str,
    argument: &'static str,
    view: &'a mut CudaViewMut<'_, T>,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    check_context(op, argument, view.stream(), stream.context())?;
    Ok(view.device_ptr_mut(stream))
}

/// Allocates device memory. `len` may be 0, which the driver itself rejects.
///
/// # Safety
/// The memory is uninitialised: every element must be written before it is read.
pub(crate) unsafe fn alloc<T: DeviceRepr>(
    op: &'static str,
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>> {
    product(op, "bytes", len, size_of::<T>())?;
    // SAFETY: the caller writes every element before it is read.
    let slice = unsafe { stream.alloc::<T>(len.max(1)) }.map_err(driver_error(op))?;
    if len > 0 {
        return Ok(slice);
    }
    // SAFETY: the address was allocated on this stream, and the slice has no elements.
    Ok(unsafe { stream.upgrade_device_ptr(slice.leak(), 0) })
}

/// Copies a host slice to newly allocated device memory. The slice may be empty, which the driver
/// itself rejects.
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
