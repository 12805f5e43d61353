//! Multiplies each element by its own factor near 1: `x` `[T, H]` and `u` `[T, H]` to `jittered`
//! `[T, H]`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::abi::{JITTER_THREADS, JitterArgs, JitterParams};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, reads,
    vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len, int};

const OP: &str = "jitter_fwd";

/// Bytes of elements of a thread.
const VECTOR_BYTES: usize = 16;

/// Device addresses for [`jitter_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct JitterBuffers {
    /// `[len]`, written whole.
    pub jittered: CUdeviceptr,
    /// `[len]`
    pub x: CUdeviceptr,
    /// `[len]` `f32`
    pub u: CUdeviceptr,
}

/// `jittered[i] = x[i] * (1 + epsilon * (2 u[i] - 1))`: with uniform `u`, factors from
/// `U(1 - epsilon, 1 + epsilon)`.
///
/// In f32, rounded once. All three have the same length, `T * H`; [`noise`](crate::ops::noise)
/// computes `u`. Buffers that start at 16-byte boundaries move fastest. Asynchronous, ordered on
/// `stream`; the same bits on every device.
///
/// # Errors
/// [`Error::Length`] for buffers of different lengths, [`Error::Unsupported`] for an `epsilon` that
/// is not finite, [`Error::Context`] for a stream or a buffer of another context, and any launch
/// error.
pub fn jitter_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    epsilon: f32,
    x: &CudaView<'_, D>,
    u: &CudaView<'_, f32>,
    jittered: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    check_stream(OP, device, stream)?;
    let len = x.len();
    check_len(OP, "u", u.len(), len)?;
    check_len(OP, "jittered", jittered.len(), len)?;
    let (jittered, _jittered_guard) = writes(OP, "jittered", jittered, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let (u, _u_guard) = reads(OP, "u", u, stream)?;
    let buffers = JitterBuffers { jittered, x, u };
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { jitter_fwd_raw(device, stream.cu_stream(), D::DTYPE, epsilon, len, buffers) }
}

/// [`jitter_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`jitter_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn jitter_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    epsilon: f32,
    x: &CudaView<'_, D>,
    u: &CudaView<'_, f32>,
) -> Result<CudaSlice<D>> {
    // SAFETY: the operation writes every element.
    let mut jittered = unsafe { alloc::<D>(OP, stream, x.len()) }?;
    jitter_fwd_into(device, stream, epsilon, x, u, &mut jittered.as_view_mut())?;
    Ok(jittered)
}

/// [`jitter_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has `len` elements, of `dtype` or `f32`, in memory of `device`'s context that stays
/// valid until the kernel has run; `jittered` overlaps none of the others; `stream` is a stream of
/// that context.
///
/// # Errors
/// [`Error::Unsupported`] for an `epsilon` that is not finite or a `len` that exceeds the largest
/// grid, [`Error::Alignment`], and any launch error.
pub unsafe fn jitter_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    epsilon: f32,
    len: usize,
    buffers: JitterBuffers,
) -> Result<()> {
    let JitterBuffers { jittered, x, u } = buffers;
    check_aligned(OP, "jittered", jittered, dtype.size())?;
    check_aligned(OP, "x", x, dtype.size())?;
    check_aligned(OP, "u", u, 4)?;
    if !epsilon.is_finite() {
        let (wanted, got) = ("a finite number".into(), epsilon.to_string());
        return Err(Error::Unsupported { op: OP, argument: "epsilon", wanted, got });
    }
    let block = JITTER_THREADS as usize * VECTOR_BYTES / dtype.size();
    let blocks = int(OP, "blocks of elements", len.div_ceil(block))?;
    let vector = vector_rows(0, &[jittered, x, u]).into();
    let args = JitterArgs { len: len as i64, epsilon, vector };
    if len == 0 {
        return Ok(());
    }
    let launch =
        Launch { grid: [blocks as u32, 1, 1], threads: JITTER_THREADS as u32, shared_bytes: 0 };
    let params = JitterParams { jittered, x, u, args };
    // SAFETY: the parameter is that of kernels/jitter.cu; the caller guarantees the buffers.
    unsafe { device.launch(stream, Kernel::JitterFwd, dtype, launch, &params) }
}
