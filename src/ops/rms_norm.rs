//! The RMS norm of each row: `x` `[R, H]` to `y` `[R, H]`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::abi::{RMS_NORM_THREADS, RmsNormArgs, RmsNormParams};
use crate::config::RmsNorm;
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    reads, vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int, product, width};
use crate::routing_plan::RoutingPlan;

const OP: &str = "rms_norm_fwd";

/// Bytes of a row that each thread handles at a time.
const VECTOR_BYTES: usize = 16;

/// The optional operands.
#[derive(Clone, Copy)]
pub struct RmsNormInputs<'a, D> {
    /// `[H]`; without it rows are multiplied neither by a weight nor by the offset.
    pub weight: Option<&'a CudaView<'a, D>>,
    /// If given, rows are those of this plan: its unused rows are not read, and are zeroed.
    pub plan: Option<&'a RoutingPlan<'a>>,
}

impl<D> Default for RmsNormInputs<'_, D> {
    fn default() -> Self {
        Self { weight: None, plan: None }
    }
}

/// Device addresses for [`rms_norm_fwd_raw`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RmsNormBuffers {
    /// `[R, H]`, written whole; may be `x`.
    pub y: CUdeviceptr,
    /// `[R, H]`
    pub x: CUdeviceptr,
    /// `[H]`, or 0.
    pub weight: CUdeviceptr,
    /// `[E + 1]` `i32`, or 0: unused rows (from `expert_offsets[E]` on) are zeroed.
    pub expert_offsets: CUdeviceptr,
}

/// The rows of [`rms_norm_fwd_raw`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RmsNormShape {
    /// `R`
    pub rows: usize,
    /// `H`
    pub hidden: usize,
    /// `E` of `expert_offsets`; ignored without them.
    pub num_experts: usize,
}

/// `y[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + epsilon) * (offset + weight[:])` for each row of
/// `x`. With `scale_first`, `x * (offset + weight)` takes the place of `x`, and there is no factor
/// after the norm. Computed in f32 and rounded once.
///
/// `x` and `y` are `[R, H]`, any `H`. Fastest if rows start at 16-byte boundaries and are multiples
/// of 16 bytes. Asynchronous, ordered on `stream`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for a buffer that is not whole rows or not the plan's,
/// [`Error::Unsupported`](crate::Error::Unsupported) for a norm or an `H` out of range,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
pub fn rms_norm_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    norm: &RmsNorm,
    hidden: usize,
    x: &CudaView<'_, D>,
    inputs: &RmsNormInputs<'_, D>,
    y: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    check_len(OP, "y", y.len(), x.len())?;
    let shape = check(device, stream, hidden, x.len(), inputs)?;
    let (y, _y_guard) = writes(OP, "y", y, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let buffers = RmsNormBuffers { y, x, weight: 0, expert_offsets: 0 };
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { enqueue::<D>(device, stream, norm, shape, inputs, buffers) }
}

/// [`rms_norm_fwd_into`] in place: `y` is `x`.
///
/// # Errors
/// Those of [`rms_norm_fwd_into`].
pub fn rms_norm_fwd_in_place<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    norm: &RmsNorm,
    hidden: usize,
    x: &mut CudaViewMut<'_, D>,
    inputs: &RmsNormInputs<'_, D>,
) -> Result<()> {
    let shape = check(device, stream, hidden, x.len(), inputs)?;
    let (x, _x_guard) = writes(OP, "x", x, stream)?;
    let buffers = RmsNormBuffers { y: x, x, weight: 0, expert_offsets: 0 };
    // SAFETY: as above; y may be x.
    unsafe { enqueue::<D>(device, stream, norm, shape, inputs, buffers) }
}

/// [`rms_norm_fwd_into`] that allocates its output.
///
/// # Errors
/// Those of [`rms_norm_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation
/// fails.
pub fn rms_norm_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    norm: &RmsNorm,
    hidden: usize,
    x: &CudaView<'_, D>,
    inputs: &RmsNormInputs<'_, D>,
) -> Result<CudaSlice<D>> {
    // SAFETY: the operation writes every element.
    let mut y = unsafe { alloc::<D>(OP, stream, x.len()) }?;
    rms_norm_fwd_into(device, stream, norm, hidden, x, inputs, &mut y.as_view_mut())?;
    Ok(y)
}

fn check<D>(
    device: &Device,
    stream: &CudaStream,
    hidden: usize,
    x_len: usize,
    inputs: &RmsNormInputs<'_, D>,
) -> Result<RmsNormShape> {
    check_stream(OP, device, stream)?;
    width(OP, "hidden", hidden)?;
    let (mut rows, mut num_experts) = (x_len / hidden, 0);
    if let Some(plan) = inputs.plan {
        plan.check_stream(OP, stream)?;
        rows = plan.shape().slots();
        num_experts = plan.expert_offsets().len() - 1;
    }
    check_len(OP, "x", x_len, product(OP, "rows * hidden", rows, hidden)?)?;
    if let Some(weight) = inputs.weight {
        check_len(OP, "weight", weight.len(), hidden)?;
    }
    Ok(RmsNormShape { rows, hidden, num_experts })
}

/// Adds the addresses of the optional operands to `buffers` and launches.
///
/// # Safety
/// That of [`rms_norm_fwd_raw`], for the addresses that `buffers` already contains.
unsafe fn enqueue<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    norm: &RmsNorm,
    shape: RmsNormShape,
    inputs: &RmsNormInputs<'_, D>,
    buffers: RmsNormBuffers,
) -> Result<()> {
    let offsets = inputs.plan.map(RoutingPlan::expert_offsets);
    let (weight, _weight_guard) = optional(OP, "weight", inputs.weight, stream)?;
    let (expert_offsets, _offsets_guard) = optional(OP, "plan", offsets.as_ref(), stream)?;
    let buffers = RmsNormBuffers { weight, expert_offsets, ..buffers };
    // SAFETY: the caller guarantees the rest; the weight's length was checked, and the kernel only
    // compares rows with the plan's offsets.
    unsafe { rms_norm_fwd_raw(device, stream.cu_stream(), D::DTYPE, norm, shape, buffers) }
}

/// [`rms_norm_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer that is not 0 has the elements that [`RmsNormBuffers`] and `shape` give it, of
/// `dtype` or `i32`, in memory of `device`'s context that stays valid until the kernel has run; `y`
/// is `x`, or overlaps none of the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a norm or a shape out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn rms_norm_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    norm: &RmsNorm,
    shape: RmsNormShape,
    buffers: RmsNormBuffers,
) -> Result<()> {
    norm.check(OP, "norm")?;
    let RmsNormShape { rows, hidden, num_experts } = shape;
    let RmsNormBuffers { y, x, weight, expert_offsets } = buffers;
    for (argument, address) in [("y", y), ("x", x), ("weight", weight)] {
        check_aligned(OP, argument, address, dtype.size())?;
    }
    check_aligned(OP, "expert_offsets", expert_offsets, 4)?;
    let args = RmsNormArgs {
        hidden: width(OP, "hidden", hidden)?,
        num_experts: int(OP, "num_experts", num_experts)?,
        epsilon: norm.epsilon,
        offset: norm.offset,
        scale_first: norm.scale_first.into(),
        vector: vector_rows(hidden * dtype.size(), &[y, x, weight]).into(),
    };
    let grid = int(OP, "rows", rows)? as u32;
    if rows == 0 {
        return Ok(());
    }
    let columns = VECTOR_BYTES / dtype.size();
    let threads = hidden.div_ceil(columns).next_multiple_of(32).min(RMS_NORM_THREADS as usize);
    let launch = Launch { grid: [grid, 1, 1], threads: threads as u32, shared_bytes: 0 };
    let params = RmsNormParams { y, x, weight, expert_offsets, args };
    // SAFETY: RmsNormParams is the parameter of moe_rms_norm_fwd in kernels/rms_norm.cu; the caller
    // guarantees the buffers.
    unsafe { device.launch(stream, Kernel::RmsNormFwd, dtype, launch, &params) }
}
