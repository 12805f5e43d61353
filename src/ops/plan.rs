//! Groups slots by expert: `expert_ids` `[T, K]` to a [`RoutingPlan`].

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut};

use crate::abi::{
    GEMM_BLOCK_M, PLAN_MAX_COUNTERS, PLAN_SCAN_THREADS, PLAN_THREADS, PlanArgs, PlanParams,
};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    writes,
};
use crate::dtype::DType;
use crate::error::{Error, Result, check_len, int};
use crate::routing_plan::{PlanLayout, PlanMemory, RoutingPlan};
use crate::shape::RoutingShape;

const OP: &str = "plan_fwd";

/// Kernels read four counts at once. The parts of a plan are aligned to more than that within it.
const PLAN_ALIGNMENT: usize = 16;

/// Device addresses for [`plan_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct PlanBuffers {
    /// [`PlanLayout::bytes`] bytes at a multiple of 16; every part is written whole.
    pub plan: CUdeviceptr,
    /// `[T, K]` `u32`, or 0 (null): all ids are 0.
    pub expert_ids: CUdeviceptr,
}

/// Groups the slots by expert into `memory`, which must have [`PlanLayout::bytes`] bytes.
///
/// A slot whose id is `E` or more (any bits) is inactive and has no row. Without ids every id is 0,
/// so that a dense product is a grouped one with `E = 1`. [`plan_range_fwd_into`] groups the slots
/// of some of the experts. Rows of an expert are in the order of their slots. Tiles have at most
/// 128 rows. Asynchronous, ordered on `stream`; exact.
///
/// # Errors
/// [`Error::Unsupported`] for a shape out of range, [`Error::Length`] for a buffer that does not
/// fit it, [`Error::Alignment`], [`Error::Context`] for a stream or a buffer of another context,
/// and any launch error.
pub fn plan_fwd_into<'a>(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    expert_ids: Option<&CudaView<'_, u32>>,
    memory: CudaViewMut<'a, u8>,
) -> Result<RoutingPlan<'a>> {
    enqueue_into(device, stream, PlanLayout::new(shape)?, expert_ids, memory)
}

/// [`plan_fwd_into`] for the experts whose ids are in `experts`: those of one device under expert
/// parallelism.
///
/// `shape` and `expert_ids` are those of the whole routing. Slots of other experts are inactive.
/// Expert `e` of the plan is the router's `experts.start + e`, so that the products which follow
/// read the weights of these experts alone; `memory` has the bytes of [`PlanLayout::of_experts`].
/// The layer's output is the sum of `combine`'s outputs over all ranges.
///
/// # Errors
/// Those of [`plan_fwd_into`], and [`Error::Unsupported`] for a range that is empty or not within
/// `E`.
pub fn plan_range_fwd_into<'a>(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    experts: Range<usize>,
    expert_ids: &CudaView<'_, u32>,
    memory: CudaViewMut<'a, u8>,
) -> Result<RoutingPlan<'a>> {
    let layout = PlanLayout::of_experts(shape, experts)?;
    enqueue_into(device, stream, layout, Some(expert_ids), memory)
}

fn enqueue_into<'a>(
    device: &Device,
    stream: &CudaStream,
    layout: PlanLayout,
    expert_ids: Option<&CudaView<'_, u32>>,
    mut memory: CudaViewMut<'a, u8>,
) -> Result<RoutingPlan<'a>> {
    enqueue(device, stream, &layout, expert_ids, &mut memory)?;
    // SAFETY: length and alignment were checked before the launch.
    Ok(unsafe { RoutingPlan::new(layout, PlanMemory::Borrowed(memory.into_view())) })
}

/// [`plan_fwd_into`] new memory, from ids.
///
/// # Errors
/// Those of [`plan_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn plan_fwd(
    device: &Device,
    stream: &Arc<CudaStream>,
    shape: RoutingShape,
    expert_ids: &CudaView<'_, u32>,
) -> Result<RoutingPlan<'static>> {
    plan_range_fwd(device, stream, shape, 0..shape.num_experts, expert_ids)
}

/// [`plan_range_fwd_into`] new memory.
///
/// # Errors
/// Those of [`plan_range_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn plan_range_fwd(
    device: &Device,
    stream: &Arc<CudaStream>,
    shape: RoutingShape,
    experts: Range<usize>,
    expert_ids: &CudaView<'_, u32>,
) -> Result<RoutingPlan<'static>> {
    let layout = PlanLayout::of_experts(shape, experts)?;
    // SAFETY: the operation writes every part, and kernels check every index that they read from a
    // plan.
    let mut memory = unsafe { alloc::<u8>(OP, stream, layout.bytes()) }?;
    enqueue(device, stream, &layout, Some(expert_ids), &mut memory.as_view_mut())?;
    // SAFETY: it was allocated with that length, at a multiple of 256 bytes.
    Ok(unsafe { RoutingPlan::new(layout, PlanMemory::Owned(memory)) })
}

fn enqueue(
    device: &Device,
    stream: &CudaStream,
    layout: &PlanLayout,
    expert_ids: Option<&CudaView<'_, u32>>,
    memory: &mut CudaViewMut<'_, u8>,
) -> Result<()> {
    check_stream(OP, device, stream)?;
    if let Some(expert_ids) = expert_ids {
        check_len(OP, "expert_ids", expert_ids.len(), layout.shape().slots())?;
    }
    if memory.len() < layout.bytes() {
        let (wanted, got) = (layout.bytes(), memory.len());
        return Err(Error::Length { op: OP, argument: "memory", wanted, got });
    }
    let (plan, _plan_guard) = writes(OP, "memory", memory, stream)?;
    let (expert_ids, _ids_guard) = optional(OP, "expert_ids", expert_ids, stream)?;
    let buffers = PlanBuffers { plan, expert_ids };
    // SAFETY: the lengths were checked above. The guards order the launches after earlier uses of
    // the buffers and outlive them.
    unsafe { plan_fwd_raw(device, stream.cu_stream(), layout, buffers) }
}

/// [`plan_fwd_into`] on addresses; the layout has the offsets of the parts.
///
/// # Safety
/// Each buffer has the size that [`PlanBuffers`] and `layout` give it, in memory of `device`'s
/// context that stays valid until the kernels have run; they do not overlap; `stream` is a stream
/// of that context.
///
/// # Errors
/// [`Error::Alignment`], and any launch error.
pub unsafe fn plan_fwd_raw(
    device: &Device,
    stream: CUstream,
    layout: &PlanLayout,
    buffers: PlanBuffers,
) -> Result<()> {
    let PlanBuffers { plan, expert_ids } = buffers;
    check_aligned(OP, "plan", plan, PLAN_ALIGNMENT)?;
    check_aligned(OP, "expert_ids", expert_ids, 4)?;
    let shape = layout.shape();
    let args = PlanArgs {
        slots: int(OP, "slots", shape.slots())?,
        num_experts: int(OP, "num_experts", shape.num_experts)?,
        top_k: int(OP, "top_k", shape.top_k)?,
        block_m: GEMM_BLOCK_M,
        max_tiles: int(OP, "max_tiles", layout.max_tiles())?,
        num_blocks: int(OP, "num_blocks", layout.num_blocks())?,
        block_slots: int(OP, "block_slots", layout.block_slots())?,
        first_expert: int(OP, "first expert", layout.experts().start)?,
    };
    let at = |part: Range<usize>| plan + part.start as CUdeviceptr;
    let params = PlanParams {
        expert_offsets: at(layout.expert_offsets()),
        row_of_slot: at(layout.row_of_slot()),
        token_of_row: at(layout.token_of_row()),
        tiles: at(layout.tiles()),
        tile_offsets: at(layout.tile_offsets()),
        counts: at(layout.counts()),
        expert_ids,
        args,
    };

    // Each warp of place has a counter for every expert.
    let warps = (PLAN_MAX_COUNTERS / args.num_experts).min(PLAN_THREADS / 32);
    let place = Launch {
        grid: [args.num_blocks as u32, 1, 1],
        threads: 32 * warps as u32,
        shared_bytes: 4 * (warps * args.num_experts) as u32,
    };
    let count =
        Launch { threads: PLAN_THREADS as u32, shared_bytes: 4 * args.num_experts as u32, ..place };
    let scan = Launch { grid: [1, 1, 1], threads: PLAN_SCAN_THREADS as u32, shared_bytes: 0 };

    let enqueue = |kernel: Kernel, launch: Launch| {
        // SAFETY: the parameter is that of kernels/plan.cu; the parts of the plan have the sizes
        // that the layout gives them; the caller guarantees the buffers.
        unsafe { device.launch(stream, kernel, DType::F32, launch, &params) }
    };
    if args.num_blocks == 1 {
        return enqueue(Kernel::PlanFwdSingle, place);
    }
    enqueue(Kernel::PlanFwdCount, count)?;
    enqueue(Kernel::PlanFwdScan, scan)?;
    enqueue(Kernel::PlanFwdPlace, place)
}
