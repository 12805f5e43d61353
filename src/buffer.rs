//! Buffers as operations make them and hand them to kernels: memory, addresses, and where those may lie.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
    DeviceSlice, SyncOnDrop,
};

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

/// Holds a stream, or that of a buffer, against the context of the call. cudarc orders work within one
/// `CudaContext` alone, and two of one GPU are two as well.
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

/// The address of a view that an operation reads. The guard orders what is launched before it is dropped after
/// earlier writes, and later ones after that.
pub(crate) fn reads<'a, T>(
    op: &'static str,
    argument: &'static str,
    view: &'a CudaView<'_, T>,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    check_context(op, argument, view.stream(), stream.context())?;
    Ok(view.device_ptr(stream))
}

/// [`reads`] of a view that may be left out: 0 without one.
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

/// The address of a view that an operation writes, and a guard as that of [`reads`].
pub(crate) fn writes<'a, T>(
    op: &'static str,
    argument: &'static str,
    view: &'a mut CudaViewMut<'_, T>,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    check_context(op, argument, view.stream(), stream.context())?;
    Ok(view.device_ptr_mut(stream))
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
