//! Copies each token's row to the rows of its slots, in expert order: `x` `[T, H]` to `xp`
//! `[R, H]`.

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use std::sync::Arc;

use crate::abi::{PERMUTE_THREADS, PermuteArgs, PermuteParams};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, reads,
    vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int, product, width};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

const OP: &str = "permute_fwd";

/// Device addresses for [`permute_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct PermuteBuffers {
    /// `[R, H]`, written whole.
    pub xp: CUdeviceptr,
    /// `[T, H]`
    pub x: CUdeviceptr,
    /// `[T, K]` `i32`: distinct rows below `T * K`, or -1.
    pub row_of_slot: CUdeviceptr,
    /// `[E + 1]` `i32`; the last is the number of rows in use.
    pub expert_offsets: CUdeviceptr,
}

/// `xp[row_of_slot[s], :] = x[s / K, :]` for every slot `s` that has a row. Unused rows (from
/// `expert_offsets[E]` on) are zeroed.
///
/// `x` is `[T, H]` and `xp` is `[T * K, H]`, `H` from 1 to 2^30. Fastest if rows start at 16-byte
/// boundaries and are multiples of 16 bytes. Asynchronous, ordered on `stream`. Exact.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit the plan's shape,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
pub fn permute_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    hidden: usize,
    x: &CudaView<'_, D>,
    xp: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    let shape = plan.shape();
    check_stream(OP, device, stream)?;
    plan.check_stream(OP, stream)?;
    check_len(OP, "x", x.len(), product(OP, "num_tokens * hidden", shape.num_tokens, hidden)?)?;
    check_len(OP, "xp", xp.len(), product(OP, "rows * hidden", shape.slots(), hidden)?)?;
    let (row_of_slot, expert_offsets) = (plan.row_of_slot(), plan.expert_offsets());
    let (xp, _xp_guard) = writes(OP, "xp", xp, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let (row_of_slot, _rows_guard) = row_of_slot.device_ptr(stream);
    let (expert_offsets, _offsets_guard) = expert_offsets.device_ptr(stream);
    let buffers = PermuteBuffers { xp, x, row_of_slot, expert_offsets };
    // SAFETY: the lengths were checked above, and kernels check the indices that they read from a
    // RoutingPlan. The guards order the launch after earlier uses of the buffers and outlive it.
    unsafe { permute_fwd_raw(device, stream.cu_stream(), D::DTYPE, shape, hidden, buffers) }
}

/// [`permute_fwd_into`] that allocates its output.
///
/// # Errors
/// Those of [`permute_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation
/// fails.
pub fn permute_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    hidden: usize,
    x: &CudaView<'_, D>,
) -> Result<CudaSlice<D>> {
    let len = product(OP, "rows * hidden", plan.shape().slots(), hidden)?;
    // SAFETY: the operation writes every element.
    let mut xp = unsafe { alloc::<D>(OP, stream, len) }?;
    permute_fwd_into(device, stream, plan, hidden, x, &mut xp.as_view_mut())?;
    Ok(xp)
}

/// [`permute_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`PermuteBuffers`] and `shape` give it, of `dtype` or `i32`,
/// in memory of `device`'s context that stays valid until the kernel has run; `row_of_slot`
/// contains distinct values below `shape.slots()`, or -1; `xp` overlaps none of the others;
/// `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn permute_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    hidden: usize,
    buffers: PermuteBuffers,
) -> Result<()> {
    shape.check_rows(OP)?;
    let PermuteBuffers { xp, x, row_of_slot, expert_offsets } = buffers;
    for (name, address, bytes) in [
        ("xp", xp, dtype.size()),
        ("x", x, dtype.size()),
        ("row_of_slot", row_of_slot, 4),
        ("expert_offsets", expert_offsets, 4),
    ] {
        check_aligned(OP, name, address, bytes)?;
    }
    let args = PermuteArgs {
        num_experts: int(OP, "num_experts", shape.num_experts)?,
        hidden: width(OP, "hidden", hidden)?,
        top_k: int(OP, "top_k", shape.top_k)?,
        vector: vector_rows(hidden * dtype.size(), &[xp, x]).into(),
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [shape.num_tokens as u32, 1, 1],
        threads: PERMUTE_THREADS as u32,
        shared_bytes: 0,
    };
    let params = PermuteParams { xp, x, row_of_slot, expert_offsets, args };
    // SAFETY: PermuteParams is the parameter of moe_permute_fwd in kernels/permute.cu; the caller
    // guarantees the buffers; the shape was checked above, so that num_tokens fits a grid.
    unsafe { device.launch(stream, Kernel::PermuteFwd, dtype, launch, &params) }
}
