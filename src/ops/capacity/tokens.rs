//! Operations on the slots of each token: reassignment of dropped slots, and normalisation of kept
//! ones.

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};

use crate::abi::{
    CAPACITY_TOKEN_THREADS, CapacityNormalizeArgs, CapacityNormalizeParams, CapacityReassignArgs,
    CapacityReassignParams,
};
use crate::config::{Normalization, kept_divisor};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, check_aligned, check_stream, optional, reads,
    writes,
};
use crate::dtype::DType;
use crate::error::{Result, check_len, int, product};
use crate::shape::RoutingShape;

const REASSIGN: &str = "capacity_reassign_fwd";
const NORMALIZE: &str = "capacity_normalize_fwd";

/// Device addresses for [`capacity_reassign_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct CapacityReassignBuffers {
    /// `[T, K]` `u32`, written whole.
    pub requests: CUdeviceptr,
    /// `[T, K]` `f32`, written for slots with a request.
    pub routing_weights: CUdeviceptr,
    /// `[T]` `u32`, written whole; from the second round on also read.
    pub next_candidate: CUdeviceptr,
    /// `[T, K]` `u32`
    pub expert_ids: CUdeviceptr,
    /// `[T, K]` `u32`
    pub kept_ids: CUdeviceptr,
    /// `[T, C]` `u32`
    pub candidates: CUdeviceptr,
    /// `[T, C]` `f32`
    pub candidate_weights: CUdeviceptr,
}

/// Requests the next candidate of its token for each dropped slot.
///
/// `candidates` `[T, C]` are each token's experts in the order of scores, with their weights:
/// `route`'s result with a larger `top_k`. `expert_ids` `[T, K]` are the router's, `kept_ids` those
/// that the rounds so far have kept. A dropped slot requests the next candidate that is an expert
/// and is not in its token's own `expert_ids`; the slots of a token in order, and each candidate at
/// most once. `requests` `[T, K]` receives that expert, or `u32::MAX` without a request;
/// `routing_weights` `[T, K]` receives the candidate's weight. `next_candidate` `[T]` is each
/// token's position in its candidates: written in the `first` round, read and written in later
/// ones; a token at `C` or beyond (any bits) makes no request. Asynchronous, ordered on `stream`;
/// exact.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range,
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
#[allow(clippy::too_many_arguments)]
pub fn capacity_reassign_fwd_into(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    num_candidates: usize,
    first: bool,
    expert_ids: &CudaView<'_, u32>,
    kept_ids: &CudaView<'_, u32>,
    candidates: &CudaView<'_, u32>,
    candidate_weights: &CudaView<'_, f32>,
    next_candidate: &mut CudaViewMut<'_, u32>,
    requests: &mut CudaViewMut<'_, u32>,
    routing_weights: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    shape.check(REASSIGN)?;
    check_stream(REASSIGN, device, stream)?;
    let listed = product(REASSIGN, "num_tokens * candidates", shape.num_tokens, num_candidates)?;
    for (name, len, wanted) in [
        ("expert_ids", expert_ids.len(), shape.slots()),
        ("kept_ids", kept_ids.len(), shape.slots()),
        ("candidates", candidates.len(), listed),
        ("candidate_weights", candidate_weights.len(), listed),
        ("next_candidate", next_candidate.len(), shape.num_tokens),
        ("requests", requests.len(), shape.slots()),
        ("routing_weights", routing_weights.len(), shape.slots()),
    ] {
        check_len(REASSIGN, name, len, wanted)?;
    }
    let (requests, _requests_guard) = writes(REASSIGN, "requests", requests, stream)?;
    let (routing_weights, _weights_guard) =
        writes(REASSIGN, "routing_weights", routing_weights, stream)?;
    let (next_candidate, _next_guard) = writes(REASSIGN, "next_candidate", next_candidate, stream)?;
    let (expert_ids, _ids_guard) = reads(REASSIGN, "expert_ids", expert_ids, stream)?;
    let (kept_ids, _kept_guard) = reads(REASSIGN, "kept_ids", kept_ids, stream)?;
    let (candidates, _candidates_guard) = reads(REASSIGN, "candidates", candidates, stream)?;
    let (candidate_weights, _candidate_weights_guard) =
        reads(REASSIGN, "candidate_weights", candidate_weights, stream)?;
    let buffers = CapacityReassignBuffers {
        requests,
        routing_weights,
        next_candidate,
        expert_ids,
        kept_ids,
        candidates,
        candidate_weights,
    };
    let stream = stream.cu_stream();
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { capacity_reassign_fwd_raw(device, stream, shape, num_candidates, first, buffers) }
}

/// [`capacity_reassign_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`CapacityReassignBuffers`] gives it, in memory of `device`'s
/// context that stays valid until the kernel has run; none that is written overlaps another;
/// `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn capacity_reassign_fwd_raw(
    device: &Device,
    stream: CUstream,
    shape: RoutingShape,
    num_candidates: usize,
    first: bool,
    buffers: CapacityReassignBuffers,
) -> Result<()> {
    shape.check(REASSIGN)?;
    let CapacityReassignBuffers {
        requests,
        routing_weights,
        next_candidate,
        expert_ids,
        kept_ids,
        candidates,
        candidate_weights,
    } = buffers;
    for (name, address) in [
        ("requests", requests),
        ("routing_weights", routing_weights),
        ("next_candidate", next_candidate),
        ("expert_ids", expert_ids),
        ("kept_ids", kept_ids),
        ("candidates", candidates),
        ("candidate_weights", candidate_weights),
    ] {
        check_aligned(REASSIGN, name, address, 4)?;
    }
    let args = CapacityReassignArgs {
        num_tokens: int(REASSIGN, "num_tokens", shape.num_tokens)?,
        num_experts: int(REASSIGN, "num_experts", shape.num_experts)?,
        top_k: int(REASSIGN, "top_k", shape.top_k)?,
        num_candidates: int(REASSIGN, "candidates of a token", num_candidates)?,
        later: (!first).into(),
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let params = CapacityReassignParams {
        requests,
        routing_weights,
        next_candidate,
        expert_ids,
        kept_ids,
        candidates,
        candidate_weights,
        args,
        padding: 0,
    };
    let launch = thread_per_token(shape);
    // SAFETY: the parameter is that of moe_capacity_fwd_reassign in kernels/capacity.cu; the caller
    // guarantees the buffers; the shape was checked above.
    unsafe { device.launch(stream, Kernel::CapacityFwdReassign, DType::F32, launch, &params) }
}

/// Normalises the weights of kept slots: `routing_weights[t, k]` divided by the sum over the
/// token's kept slots, times `scale`, times the expert's element of `expert_scale` `[E]`; 0 for
/// other slots, and for NaN (of `0 / 0` or `inf / inf`).
///
/// `expert_ids` `[T, K]` are those of
/// [`capacity_fwd_into`](crate::ops::capacity::capacity_fwd_into). A slot is kept if its id is less
/// than `E`; sums are f32, in the order of `k`. [`Normalization::None`] does not divide.
/// Asynchronous, ordered on `stream`; the same bits on every device.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range or a p-norm,
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
#[allow(clippy::too_many_arguments)]
pub fn capacity_normalize_fwd_into(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    normalization: Normalization,
    scale: f32,
    expert_scale: Option<&CudaView<'_, f32>>,
    expert_ids: &CudaView<'_, u32>,
    routing_weights: &CudaView<'_, f32>,
    normalized: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    shape.check(NORMALIZE)?;
    check_stream(NORMALIZE, device, stream)?;
    check_len(NORMALIZE, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(NORMALIZE, "routing_weights", routing_weights.len(), shape.slots())?;
    check_len(NORMALIZE, "normalized", normalized.len(), shape.slots())?;
    if let Some(expert_scale) = expert_scale {
        check_len(NORMALIZE, "expert_scale", expert_scale.len(), shape.num_experts)?;
    }
    let (normalized, _normalized_guard) = writes(NORMALIZE, "normalized", normalized, stream)?;
    let (expert_scale, _scale_guard) = optional(NORMALIZE, "expert_scale", expert_scale, stream)?;
    let (expert_ids, _ids_guard) = reads(NORMALIZE, "expert_ids", expert_ids, stream)?;
    let (routing_weights, _weights_guard) =
        reads(NORMALIZE, "routing_weights", routing_weights, stream)?;
    let buffers =
        CapacityNormalizeBuffers { normalized, expert_scale, expert_ids, routing_weights };
    let stream = stream.cu_stream();
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { capacity_normalize_fwd_raw(device, stream, shape, normalization, scale, buffers) }
}

/// Device addresses for [`capacity_normalize_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct CapacityNormalizeBuffers {
    /// `[T, K]` `f32`, written whole.
    pub normalized: CUdeviceptr,
    /// `[E]` `f32`, or 0 (null) for no scales.
    pub expert_scale: CUdeviceptr,
    /// `[T, K]` `u32`
    pub expert_ids: CUdeviceptr,
    /// `[T, K]` `f32`
    pub routing_weights: CUdeviceptr,
}

/// [`capacity_normalize_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`CapacityNormalizeBuffers`] gives it, in memory of `device`'s
/// context that stays valid until the kernel has run; `normalized` overlaps none of the others;
/// `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range or a p-norm,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn capacity_normalize_fwd_raw(
    device: &Device,
    stream: CUstream,
    shape: RoutingShape,
    normalization: Normalization,
    scale: f32,
    buffers: CapacityNormalizeBuffers,
) -> Result<()> {
    shape.check(NORMALIZE)?;
    let CapacityNormalizeBuffers { normalized, expert_scale, expert_ids, routing_weights } =
        buffers;
    check_aligned(NORMALIZE, "normalized", normalized, 4)?;
    check_aligned(NORMALIZE, "expert_scale", expert_scale, 4)?;
    check_aligned(NORMALIZE, "expert_ids", expert_ids, 4)?;
    check_aligned(NORMALIZE, "routing_weights", routing_weights, 4)?;
    let (divide, epsilon, min) = kept_divisor(NORMALIZE, "normalization", normalization)?;
    let args = CapacityNormalizeArgs {
        num_tokens: int(NORMALIZE, "num_tokens", shape.num_tokens)?,
        num_experts: int(NORMALIZE, "num_experts", shape.num_experts)?,
        top_k: int(NORMALIZE, "top_k", shape.top_k)?,
        divide: divide.into(),
        epsilon,
        min,
        scale,
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let params = CapacityNormalizeParams {
        normalized,
        expert_scale,
        expert_ids,
        routing_weights,
        args,
        padding: 0,
    };
    let launch = thread_per_token(shape);
    // SAFETY: the parameter is that of moe_capacity_fwd_normalize in kernels/capacity.cu; the
    // caller guarantees the buffers; the shape was checked above.
    unsafe { device.launch(stream, Kernel::CapacityFwdNormalize, DType::F32, launch, &params) }
}

fn thread_per_token(shape: RoutingShape) -> Launch {
    let blocks = shape.num_tokens.div_ceil(CAPACITY_TOKEN_THREADS as usize);
    Launch { grid: [blocks as u32, 1, 1], threads: CAPACITY_TOKEN_THREADS as u32, shared_bytes: 0 }
}
