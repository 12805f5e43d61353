//! Limits the rows of each expert: selects the slots that keep their expert, and drops or reassigns
//! the others.
//!
//! The operations read a plan of slots, which is one of [`RoutingShape::by_slot`]. Without
//! overflow:
//!
//! ```text
//! expert_ids, weights -plan (by slot)-> RoutingPlan
//!                     -capacity-> kept_ids, kept [S, E], dropped [S, E]
//! kept_ids, weights -capacity_normalize-> weights, for families that renormalise the kept weights
//! kept_ids -plan-> RoutingPlan of the layer
//! ```
//!
//! With overflow, up to [`CapacityConfig::overflow`] rounds of reassignment come between the first
//! two steps:
//!
//! ```text
//! expert_ids, kept_ids, candidates -capacity_reassign-> requests, weights
//! requests -plan (by slot)-> RoutingPlan -capacity_later-> kept_ids, kept, dropped
//! ```

mod tokens;

pub use tokens::*;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};

use crate::abi::{
    CAPACITY_BY_CHOICE, CAPACITY_BY_CHOICE_AND_TOP_WEIGHT, CAPACITY_BY_TOKEN, CAPACITY_BY_WEIGHT,
    CAPACITY_SELECT_THREADS, CapacitySelectArgs, CapacitySelectParams,
};
use crate::config::{CapacityConfig, Priority};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, reads,
    writes,
};
use crate::dtype::DType;
use crate::error::{Error, Result, check_len, int, product};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

const OP: &str = "capacity_fwd";

/// The slots that experts keep, on the device.
#[derive(Debug)]
pub struct Capacity {
    /// `[T, K]`: the expert of a kept slot, else `u32::MAX`.
    pub expert_ids: CudaSlice<u32>,
    /// `[S, E]`: the number of slots of each sequence that each expert keeps.
    pub kept: CudaSlice<u32>,
    /// `[S, E]`: the number of slots of each sequence that each expert drops.
    pub dropped: CudaSlice<u32>,
}

/// Device addresses for [`capacity_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct CapacityBuffers {
    /// `[T, K]` `u32`, written whole; in a later round for accepted requests alone.
    pub expert_ids: CUdeviceptr,
    /// `[S, E]` `u32`, written whole; in a later round added to.
    pub kept: CUdeviceptr,
    /// `[S, E]` `u32`, as `kept`.
    pub dropped: CUdeviceptr,
    /// `[T, K]` `f32`
    pub routing_weights: CUdeviceptr,
    /// `[E + 1]` `i32`
    pub expert_offsets: CUdeviceptr,
    /// `[T * K]` `i32`: rows, or -1.
    pub row_of_slot: CUdeviceptr,
    /// `[T * K]` `i32`: the slots of each expert, ascending; `token_of_row` of a plan of slots.
    pub slot_of_row: CUdeviceptr,
}

/// Keeps, in each sequence, the first slots of each expert in the order of `config`'s priority, up
/// to its limit.
///
/// `shape` is that of the routing, and `plan` the plan of its ids by slot
/// ([`RoutingShape::by_slot`]), which may be of some of the experts. A sequence has
/// `sequence_tokens` tokens, the last one possibly fewer; without a length the batch is one
/// sequence. `expert_ids` `[T, K]` receives the expert of each kept slot, else `u32::MAX`: inactive
/// slots stay inactive and never count. `kept` and `dropped` are `[S, E]`, for `S` sequences and
/// the plan's `E` experts. `routing_weights` `[T, K]` are read for priorities by weight; for
/// [`Priority::ChoiceByTopWeight`] they are those before any normalisation, of which the first
/// choices' are read. This is the first round; the caller enqueues rounds of reassignment, as this
/// module's description states. Asynchronous, ordered on `stream`; exact.
///
/// # Errors
/// [`Error::Unsupported`] for a shape or a limit out of range, [`Error::Length`] for a buffer that
/// does not fit, [`Error::Mismatch`] for a plan that is not of these slots, [`Error::Context`], and
/// any launch error.
#[allow(clippy::too_many_arguments)]
pub fn capacity_fwd_into(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    shape: RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    routing_weights: &CudaView<'_, f32>,
    expert_ids: &mut CudaViewMut<'_, u32>,
    kept: &mut CudaViewMut<'_, u32>,
    dropped: &mut CudaViewMut<'_, u32>,
) -> Result<()> {
    let round = Round { shape, config, sequence_tokens, later: false };
    round.enqueue(device, stream, plan, routing_weights, expert_ids, kept, dropped)
}

/// A round of reassignment: experts keep their slots, `kept` of them, and accept requests up to
/// their limit.
///
/// `plan` is the plan by slot of the requests of [`capacity_reassign_fwd_into`]. `expert_ids` is
/// written for accepted requests alone. Accepted requests are added to `kept` and the others to
/// `dropped`; an expert whose `kept` (any bits) is at or above its limit accepts none.
/// `routing_weights` are those of the requests, but the first round's for
/// [`Priority::ChoiceByTopWeight`]. The rest is as for [`capacity_fwd_into`].
///
/// # Errors
/// Those of [`capacity_fwd_into`].
#[allow(clippy::too_many_arguments)]
pub fn capacity_later_fwd_into(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    shape: RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    routing_weights: &CudaView<'_, f32>,
    expert_ids: &mut CudaViewMut<'_, u32>,
    kept: &mut CudaViewMut<'_, u32>,
    dropped: &mut CudaViewMut<'_, u32>,
) -> Result<()> {
    let round = Round { shape, config, sequence_tokens, later: true };
    round.enqueue(device, stream, plan, routing_weights, expert_ids, kept, dropped)
}

/// [`capacity_fwd_into`] new buffers.
///
/// # Errors
/// Those of [`capacity_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn capacity_fwd(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    shape: RoutingShape,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    routing_weights: &CudaView<'_, f32>,
) -> Result<Capacity> {
    shape.check(OP)?;
    let sequences = shape.sequences(sequence_tokens);
    let cells = product(OP, "sequences * num_experts", sequences, plan.shape().num_experts)?;
    // SAFETY: the operation writes every element.
    let mut expert_ids = unsafe { alloc::<u32>(OP, stream, shape.slots()) }?;
    // SAFETY: as above.
    let mut kept = unsafe { alloc::<u32>(OP, stream, cells) }?;
    // SAFETY: as above.
    let mut dropped = unsafe { alloc::<u32>(OP, stream, cells) }?;
    let round = Round { shape, config, sequence_tokens, later: false };
    let (ids, kept_view) = (&mut expert_ids.as_view_mut(), &mut kept.as_view_mut());
    round.enqueue(
        device,
        stream,
        plan,
        routing_weights,
        ids,
        kept_view,
        &mut dropped.as_view_mut(),
    )?;
    Ok(Capacity { expert_ids, kept, dropped })
}

/// One round of selection.
#[derive(Clone, Copy)]
struct Round<'a> {
    shape: RoutingShape,
    config: &'a CapacityConfig,
    sequence_tokens: Option<usize>,
    later: bool,
}

impl Round<'_> {
    #[allow(clippy::too_many_arguments)]
    fn enqueue(
        self,
        device: &Device,
        stream: &CudaStream,
        plan: &RoutingPlan<'_>,
        routing_weights: &CudaView<'_, f32>,
        expert_ids: &mut CudaViewMut<'_, u32>,
        kept: &mut CudaViewMut<'_, u32>,
        dropped: &mut CudaViewMut<'_, u32>,
    ) -> Result<()> {
        let Self { shape, config, sequence_tokens, later } = self;
        shape.check(OP)?;
        check_stream(OP, device, stream)?;
        plan.check_stream(OP, stream)?;
        let (plan_shape, experts) = (plan.shape(), plan.experts());
        let by_slot = RoutingShape { num_experts: plan_shape.num_experts, ..shape.by_slot() };
        if plan_shape != by_slot || experts.end > shape.num_experts {
            let why = format!(
                "the plan is of {plan_shape}, experts {experts:?}; wanted one of {by_slot}, made by slot for {shape}"
            );
            return Err(Error::Mismatch { op: OP, why });
        }
        let sequences = shape.sequences(sequence_tokens);
        let cells = product(OP, "sequences * num_experts", sequences, experts.len())?;
        check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
        check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
        check_len(OP, "kept", kept.len(), cells)?;
        check_len(OP, "dropped", dropped.len(), cells)?;
        let (expert_offsets, row_of_slot) = (plan.expert_offsets(), plan.row_of_slot());
        let slot_of_row = plan.token_of_row();
        let (expert_ids, _ids_guard) = writes(OP, "expert_ids", expert_ids, stream)?;
        let (kept, _kept_guard) = writes(OP, "kept", kept, stream)?;
        let (dropped, _dropped_guard) = writes(OP, "dropped", dropped, stream)?;
        let (routing_weights, _weights_guard) =
            reads(OP, "routing_weights", routing_weights, stream)?;
        let (expert_offsets, _offsets_guard) = expert_offsets.device_ptr(stream);
        let (row_of_slot, _rows_guard) = row_of_slot.device_ptr(stream);
        let (slot_of_row, _slots_guard) = slot_of_row.device_ptr(stream);
        let buffers = CapacityBuffers {
            expert_ids,
            kept,
            dropped,
            routing_weights,
            expert_offsets,
            row_of_slot,
            slot_of_row,
        };
        let stream = stream.cu_stream();
        // SAFETY: the lengths were checked above, and kernels check the indices of a RoutingPlan.
        // The guards order the launch after earlier uses of the buffers and outlive it.
        unsafe {
            capacity_fwd_raw(
                device,
                stream,
                shape,
                experts,
                config,
                sequence_tokens,
                later,
                buffers,
            )
        }
    }
}

/// [`capacity_fwd_into`] on addresses, or a later round as [`capacity_later_fwd_into`]; `experts`
/// are the plan's.
///
/// # Safety
/// Each buffer has the elements that [`CapacityBuffers`], `shape` and `experts` give it, in memory
/// of `device`'s context that stays valid until the kernel has run; the maps are those of one plan
/// of `experts` for `shape.by_slot()`; `expert_ids`, `kept` and `dropped` overlap none of the
/// others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`] for a shape, a range or a limit out of range, [`Error::Alignment`], and
/// any launch error.
#[allow(clippy::too_many_arguments)]
pub unsafe fn capacity_fwd_raw(
    device: &Device,
    stream: CUstream,
    shape: RoutingShape,
    experts: std::ops::Range<usize>,
    config: &CapacityConfig,
    sequence_tokens: Option<usize>,
    later: bool,
    buffers: CapacityBuffers,
) -> Result<()> {
    let own = shape.of_experts(OP, experts.start, experts.end)?;
    if sequence_tokens == Some(0) {
        let (wanted, got) = ("1 or more".into(), "0".into());
        return Err(Error::Unsupported { op: OP, argument: "sequence_tokens", wanted, got });
    }
    let CapacityBuffers {
        expert_ids,
        kept,
        dropped,
        routing_weights,
        expert_offsets,
        row_of_slot,
        slot_of_row,
    } = buffers;
    for (name, address) in [
        ("expert_ids", expert_ids),
        ("kept", kept),
        ("dropped", dropped),
        ("routing_weights", routing_weights),
        ("expert_offsets", expert_offsets),
        ("row_of_slot", row_of_slot),
        ("slot_of_row", slot_of_row),
    ] {
        check_aligned(OP, name, address, 4)?;
    }
    // The limit is that of a whole sequence, even if the batch is shorter.
    let tokens = sequence_tokens.unwrap_or(shape.num_tokens);
    let capacity = config.rows(&shape, tokens)?.min(shape.slots());
    // The bits of an index below `count`.
    let bits = |count: usize| (usize::BITS - count.saturating_sub(1).leading_zeros()) as i32;
    let (slot, token, choice) = (bits(shape.slots()), bits(shape.num_tokens), bits(shape.top_k));
    let (priority, token_bits, key_bits) = match config.priority {
        Priority::Token => (CAPACITY_BY_TOKEN, slot, slot),
        Priority::Choice => (CAPACITY_BY_CHOICE, token, choice + token),
        Priority::Weight => (CAPACITY_BY_WEIGHT, slot, 32 + slot),
        Priority::ChoiceByTopWeight => {
            (CAPACITY_BY_CHOICE_AND_TOP_WEIGHT, token, choice + 32 + token)
        }
    };
    let args = CapacitySelectArgs {
        num_tokens: int(OP, "num_tokens", shape.num_tokens)?,
        num_experts: int(OP, "num_experts", own.num_experts)?,
        top_k: int(OP, "top_k", shape.top_k)?,
        first_expert: int(OP, "first expert", experts.start)?,
        sequence_tokens: int(OP, "sequence_tokens", tokens.min(shape.num_tokens))?,
        capacity: int(OP, "capacity", capacity)?,
        priority,
        token_bits,
        key_bits,
        later: later.into(),
    };
    let sequences = int(OP, "sequences", shape.sequences(sequence_tokens))?;
    if sequences == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [sequences as u32, own.num_experts as u32 + 1, 1],
        threads: CAPACITY_SELECT_THREADS as u32,
        shared_bytes: 0,
    };
    let params = CapacitySelectParams {
        expert_ids,
        kept,
        dropped,
        routing_weights,
        expert_offsets,
        row_of_slot,
        slot_of_row,
        args,
    };
    // SAFETY: the parameter is that of moe_capacity_fwd_select in kernels/capacity.cu; the caller
    // guarantees the buffers; shape and range were checked above.
    unsafe { device.launch(stream, Kernel::CapacityFwdSelect, DType::F32, launch, &params) }
}
