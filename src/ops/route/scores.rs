//! The values of one step of the router for every expert: `logits` `[T, E]` to `scores` `[T, E]`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut};

use crate::abi::{ROUTE_PICK_THREADS, RouteParams};
use crate::config::{RouteLengths, RouterConfig, RouterStep};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    reads, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len};
use crate::ops::route::{RouteBuffers, RouteInputs, arguments, kind};
use crate::shape::RoutingShape;

const OP: &str = "route_scores_fwd";

/// Writes the values of a step of the router in f32: the scores for
/// [`expert_choice_fwd`](crate::ops::expert_choice), or the logits for losses.
///
/// `scores` is `[T, E]`, of all `E` experts of the router, sinks included. Of `inputs`, `logits`,
/// `noise`, `noise_logits` and `active` are read. The row of an inactive token is 0, or `-inf` for
/// logits. The `K` of the shape is unused. Scores agree with
/// [`reference::route_scores_fwd`](crate::reference::route_scores_fwd) in f32 bit for bit, on every
/// device. Asynchronous, ordered on `stream`; one launch.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape or a router out of range, for
/// noise logits without noise, and for scores that depend on which experts are chosen
/// ([`SoftmaxSelected`](crate::Scoring::SoftmaxSelected) and sparsemixer);
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
pub fn route_scores_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    router: &RouterConfig,
    step: RouterStep,
    inputs: &RouteInputs<'_, D>,
    scores: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    inputs.lengths().check_step(OP, &shape, router)?;
    check_stream(OP, device, stream)?;
    check_len(OP, "scores", scores.len(), shape.logits())?;
    let (scores, _scores) = writes(OP, "scores", scores, stream)?;
    let (logits, _logits) = reads(OP, "logits", inputs.logits, stream)?;
    let (noise, _noise) = optional(OP, "noise", inputs.noise, stream)?;
    let (noise_logits, _noise_logits) = optional(OP, "noise_logits", inputs.noise_logits, stream)?;
    let (active, _active) = optional(OP, "active", inputs.active, stream)?;
    let buffers = RouteBuffers { logits, noise, noise_logits, active, ..RouteBuffers::default() };
    let (stream, dtype) = (stream.cu_stream(), D::DTYPE);
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { route_scores_fwd_raw(device, stream, dtype, shape, router, step, scores, buffers) }
}

/// [`route_scores_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`route_scores_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the
/// allocation fails.
pub fn route_scores_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    shape: RoutingShape,
    router: &RouterConfig,
    step: RouterStep,
    inputs: &RouteInputs<'_, D>,
) -> Result<CudaSlice<f32>> {
    shape.check(OP)?;
    // SAFETY: the operation writes every element.
    let mut scores = unsafe { alloc::<f32>(OP, stream, shape.logits()) }?;
    let to = &mut scores.as_view_mut();
    route_scores_fwd_into(device, stream, shape, router, step, inputs, to)?;
    Ok(scores)
}

/// [`route_scores_fwd_into`] on addresses. Of the buffers, `logits`, `noise`, `noise_logits` and
/// `active` are read.
///
/// # Safety
/// `scores` has `[T, E]` `f32`; each of those buffers that is not 0 has the elements that
/// [`RouteBuffers`] and `shape` give it, `logits` and `noise_logits` of `dtype`, in memory of
/// `device`'s context that stays valid until the kernel has run; `scores` overlaps none of them;
/// `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) as for [`route_scores_fwd_into`],
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
#[allow(clippy::too_many_arguments, reason = "those of the operation")]
pub unsafe fn route_scores_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    router: &RouterConfig,
    step: RouterStep,
    scores: CUdeviceptr,
    buffers: RouteBuffers,
) -> Result<()> {
    let RouteBuffers { logits, noise, noise_logits, active, .. } = buffers;
    shape.check(OP)?;
    let given_len = |address: CUdeviceptr| (address != 0).then_some(shape.logits());
    let lengths = RouteLengths {
        logits: shape.logits(),
        noise: given_len(noise),
        noise_logits: given_len(noise_logits),
        active: (active != 0).then_some(shape.num_tokens),
        ..RouteLengths::default()
    };
    lengths.check_step(OP, &shape, router)?;
    for (argument, address, bytes) in [
        ("scores", scores, 4),
        ("logits", logits, dtype.size()),
        ("noise", noise, 4),
        ("noise_logits", noise_logits, dtype.size()),
    ] {
        check_aligned(OP, argument, address, bytes)?;
    }
    let (router, score) = router.score_of_step(OP, step)?;
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let read = RouteBuffers { logits, noise, noise_logits, active, ..RouteBuffers::default() };
    let mut args = arguments(dtype, &shape, &router, &read)?;
    args.value = kind(score);
    let params = RouteParams { scores, ..read.params(args) };
    let threads = ROUTE_PICK_THREADS as u32;
    let warps = threads / 32;
    let launch = Launch {
        grid: [(args.num_tokens as u32).div_ceil(warps), 1, 1],
        threads,
        shared_bytes: warps * args.row_words as u32 * 4,
    };
    // SAFETY: the parameter is that of kernels/router.cuh; the caller guarantees the buffers; the
    // shape was checked, so that num_tokens fits a grid.
    unsafe { device.launch(stream, Kernel::RouteFwdScores, dtype, launch, &params) }
}
