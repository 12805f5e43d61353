//! Buffers as operations hand them to kernels: their addresses, and where those may lie.

use cudarc::driver::{CudaStream, CudaView, DevicePtr, SyncOnDrop};

use crate::device::CUdeviceptr;
use crate::error::{Error, Result};

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
