//! Adds up each token's experts: `yp` `[R, H]` and `weights` `[T, K]` to `y` `[T, H]`.

use std::sync::Arc;

use cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
};

use crate::abi::{COMBINE_THREADS, CombineArgs};
use crate::device::{
    Argument, CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream,
    vector_rows,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len, int, product, width};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

const OP: &str = "combine_fwd";

/// Bytes of a row that a thread has.
const VECTOR_BYTES: usize = 16;

/// The second dimension of a grid.
const MAX_GRID_Y: usize = 65535;

/// Device addresses for [`combine_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct CombineBuffers {
    /// `[T, H]`, written whole.
    pub y: CUdeviceptr,
    /// `[R, H]`
    pub yp: CUdeviceptr,
    /// `[T, K]` `f32`
    pub weights: CUdeviceptr,
    /// `[T * K]` `i32`: rows below `T * K`, or -1.
    pub row_of_slot: CUdeviceptr,
}

/// `y[t, :] = sum over k of weights[t, k] * yp[row_of_slot[t * K + k], :]`, in f32 and in the order of `k`.
///
/// `yp` is `[T * K, H]` and `y` is `[T, H]`, any `H`. Inactive slots are left out: neither their weight
/// nor any row is looked at; a token without active slots becomes 0. Rows of 16-byte multiples that
/// start at 16-byte boundaries move fastest. Asynchronous, ordered on `stream`.
///
/// # Errors
/// [`Error::Length`] for a buffer that does not fit the plan's shape, [`Error::Unsupported`] for `H` of more
/// than a grid reaches, [`Error::Mismatch`] for a stream of another context, and what a launch can meet.
pub fn combine_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    hidden: usize,
    yp: &CudaView<'_, D>,
    weights: &CudaView<'_, f32>,
    y: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    let shape = plan.shape();
    check_stream(OP, device, stream)?;
    plan.check_stream(OP, stream)?;
    check_len(OP, "yp", yp.len(), product(OP, "rows * hidden", shape.slots(), hidden)?)?;
    check_len(OP, "weights", weights.len(), shape.slots())?;
    check_len(OP, "y", y.len(), product(OP, "num_tokens * hidden", shape.num_tokens, hidden)?)?;
    let row_of_slot = plan.row_of_slot();
    let (y, _y_guard) = y.device_ptr_mut(stream);
    let (yp, _yp_guard) = yp.device_ptr(stream);
    let (weights, _weights_guard) = weights.device_ptr(stream);
    let (row_of_slot, _rows_guard) = row_of_slot.device_ptr(stream);
    let buffers = CombineBuffers { y, yp, weights, row_of_slot };
    // SAFETY: the lengths were checked above, and a RoutingPlan's maps are valid for its shape. The
    // guards order the launch after earlier uses of the buffers and outlive it.
    unsafe { combine_fwd_raw(device, stream.cu_stream(), D::DTYPE, shape, hidden, buffers) }
}

/// [`combine_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`combine_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn combine_fwd<D: Dtype + DeviceRepr>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    hidden: usize,
    yp: &CudaView<'_, D>,
    weights: &CudaView<'_, f32>,
) -> Result<CudaSlice<D>> {
    let len = product(OP, "num_tokens * hidden", plan.shape().num_tokens, hidden)?;
    // SAFETY: the operation writes every element.
    let mut y = unsafe { alloc::<D>(OP, stream, len) }?;
    combine_fwd_into(device, stream, plan, hidden, yp, weights, &mut y.as_view_mut())?;
    Ok(y)
}

/// [`combine_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`CombineBuffers`] and `shape` give it, of `dtype`, `f32` or `i32`,
/// in memory of `device`'s context that stays valid until the kernel has run; `row_of_slot` holds values
/// below `shape.slots()`, or -1; `y` overlaps none of the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`] for a shape or an `H` out of range, [`Error::Alignment`], and what a launch can
/// meet.
pub unsafe fn combine_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    hidden: usize,
    buffers: CombineBuffers,
) -> Result<()> {
    shape.check_rows(OP)?;
    let CombineBuffers { y, yp, weights, row_of_slot } = buffers;
    check_aligned(OP, "y", y, dtype.size())?;
    check_aligned(OP, "yp", yp, dtype.size())?;
    check_aligned(OP, "weights", weights, 4)?;
    check_aligned(OP, "row_of_slot", row_of_slot, 4)?;

    // Blocks no wider than the row needs, in whole warps.
    let columns = VECTOR_BYTES / dtype.size();
    let threads = hidden.div_ceil(columns).next_multiple_of(32).min(COMBINE_THREADS as usize);
    let blocks = hidden.div_ceil(columns * threads.max(1));
    if blocks > MAX_GRID_Y {
        let wanted = format!("at most {}", MAX_GRID_Y * columns * threads);
        return Err(Error::Unsupported {
            op: OP,
            argument: "hidden",
            wanted,
            got: hidden.to_string(),
        });
    }
    let args = CombineArgs {
        hidden: width(OP, "hidden", hidden)?,
        top_k: int(OP, "top_k", shape.top_k)?,
        vector: vector_rows(hidden * dtype.size(), &[y, yp]).into(),
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [shape.num_tokens as u32, blocks as u32, 1],
        threads: threads as u32,
        shared_bytes: 0,
    };
    let arguments = [
        Argument::of(&y),
        Argument::of(&yp),
        Argument::of(&weights),
        Argument::of(&row_of_slot),
        Argument::of(&args),
    ];
    // SAFETY: the arguments follow moe_combine_fwd in kernels/combine.cu; the caller vouches for the
    // buffers; the shape was checked above, so that num_tokens fits a grid.
    unsafe { device.launch(stream, Kernel::CombineFwd, dtype, launch, &arguments) }
}
