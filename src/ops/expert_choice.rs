//! Experts choose tokens: `scores` `[T, E]` to `expert_ids` `[T, E]` and `routing_weights`
//! `[T, E]`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::abi::{
    EXPERT_CHOICE_COLUMN_BYTES, EXPERT_CHOICE_THREADS, ExpertChoiceArgs, ExpertChoiceParams,
};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, reads,
    writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int};
use crate::shape::RoutingShape;

const OP: &str = "expert_choice_fwd";

/// Device addresses for [`expert_choice_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct ExpertChoiceBuffers {
    /// `[T, E]` `u32`, written whole.
    pub expert_ids: CUdeviceptr,
    /// `[T, E]` `f32`, written whole.
    pub routing_weights: CUdeviceptr,
    /// `[T, E]`
    pub scores: CUdeviceptr,
}

/// The result of [`expert_choice_fwd`], on the device.
#[derive(Debug)]
pub struct ExpertChoice {
    /// `[T, E]`: `e` at `(t, e)` if expert `e` has chosen token `t`, else `u32::MAX`.
    pub expert_ids: CudaSlice<u32>,
    /// `[T, E]`: the score if the expert has chosen the token, else 0.
    pub routing_weights: CudaSlice<f32>,
}

/// Expert `e` chooses the `capacity` tokens whose `scores[t, e]` are largest, ties to the lower
/// token.
///
/// -0 counts as 0 and NaN as minus infinity; a `capacity` above `T` selects all tokens. Slot
/// `(t, e)` of the outputs pairs token `t` with expert `e`: `expert_ids` is `e` if the token was
/// chosen, else `u32::MAX`, and `routing_weights` is the score, else 0. A
/// [`plan`](crate::ops::plan) with `K = E` follows, in which at most `E * capacity` slots have
/// rows, and `combine` with these weights. `T * E` is at most 2^31 - 4097, the bound on slots.
/// Asynchronous, ordered on `stream`; exact.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for `T` or `E` out of range,
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit them,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
#[allow(clippy::too_many_arguments)]
pub fn expert_choice_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    num_tokens: usize,
    num_experts: usize,
    capacity: usize,
    scores: &CudaView<'_, D>,
    expert_ids: &mut CudaViewMut<'_, u32>,
    routing_weights: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let shape = RoutingShape { num_tokens, num_experts, top_k: num_experts };
    shape.check(OP)?;
    check_stream(OP, device, stream)?;
    check_len(OP, "scores", scores.len(), shape.slots())?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
    let (expert_ids, _ids_guard) = writes(OP, "expert_ids", expert_ids, stream)?;
    let (routing_weights, _weights_guard) = writes(OP, "routing_weights", routing_weights, stream)?;
    let (scores, _scores_guard) = reads(OP, "scores", scores, stream)?;
    let buffers = ExpertChoiceBuffers { expert_ids, routing_weights, scores };
    let stream = stream.cu_stream();
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe {
        expert_choice_fwd_raw(device, stream, D::DTYPE, num_tokens, num_experts, capacity, buffers)
    }
}

/// [`expert_choice_fwd_into`] new buffers.
///
/// # Errors
/// Those of [`expert_choice_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the
/// allocation fails.
pub fn expert_choice_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    num_tokens: usize,
    num_experts: usize,
    capacity: usize,
    scores: &CudaView<'_, D>,
) -> Result<ExpertChoice> {
    let shape = RoutingShape { num_tokens, num_experts, top_k: num_experts };
    shape.check(OP)?;
    // SAFETY: the operation writes every element.
    let mut expert_ids = unsafe { alloc::<u32>(OP, stream, shape.slots()) }?;
    // SAFETY: as above.
    let mut routing_weights = unsafe { alloc::<f32>(OP, stream, shape.slots()) }?;
    let (ids, weights) = (&mut expert_ids.as_view_mut(), &mut routing_weights.as_view_mut());
    expert_choice_fwd_into(
        device,
        stream,
        num_tokens,
        num_experts,
        capacity,
        scores,
        ids,
        weights,
    )?;
    Ok(ExpertChoice { expert_ids, routing_weights })
}

/// [`expert_choice_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has `num_tokens * num_experts` elements, `scores` of `dtype`, in memory of
/// `device`'s context that stays valid until the kernel has run; no two overlap; `stream` is a
/// stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a dimension out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn expert_choice_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    num_tokens: usize,
    num_experts: usize,
    capacity: usize,
    buffers: ExpertChoiceBuffers,
) -> Result<()> {
    RoutingShape { num_tokens, num_experts, top_k: num_experts }.check(OP)?;
    let ExpertChoiceBuffers { expert_ids, routing_weights, scores } = buffers;
    check_aligned(OP, "expert_ids", expert_ids, 4)?;
    check_aligned(OP, "routing_weights", routing_weights, 4)?;
    check_aligned(OP, "scores", scores, dtype.size())?;
    let last_token = num_tokens.saturating_sub(1);
    let args = ExpertChoiceArgs {
        num_tokens: int(OP, "num_tokens", num_tokens)?,
        num_experts: int(OP, "num_experts", num_experts)?,
        capacity: int(OP, "capacity", capacity.min(num_tokens))?,
        token_bits: (usize::BITS - last_token.leading_zeros()) as i32,
    };
    if num_tokens == 0 {
        return Ok(());
    }
    let columns = EXPERT_CHOICE_COLUMN_BYTES as usize / dtype.size();
    let launch = Launch {
        grid: [num_experts.div_ceil(columns) as u32, 1, 1],
        threads: EXPERT_CHOICE_THREADS as u32,
        shared_bytes: 0,
    };
    let params = ExpertChoiceParams { expert_ids, routing_weights, scores, args };
    // SAFETY: the parameter is that of kernels/expert_choice.cu; the caller guarantees the buffers;
    // dimensions were checked above.
    unsafe { device.launch(stream, Kernel::ExpertChoiceFwd, dtype, launch, &params) }
}
