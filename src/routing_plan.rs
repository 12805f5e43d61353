//! The plan's data type: the maps between slots and rows of a routing, on a device.

use std::ops::Range;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, DeviceSlice};

use crate::abi::{GEMM_BLOCK_M, GemmTile, PLAN_MAX_BLOCKS, PLAN_MIN_BLOCK_SLOTS};
use crate::buffer::check_context;
use crate::error::{Error, Result};
use crate::shape::RoutingShape;

/// Parts of a plan start at multiples of this, as device allocations do.
const PART_ALIGNMENT: usize = 256;

/// The offsets of a plan's parts in one piece of memory, computed from a shape alone.
///
/// Parts are ranges of bytes from the start of that memory, which [`plan_fwd`](crate::ops::plan)
/// writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanLayout {
    shape: RoutingShape,
    first_expert: usize,
    num_blocks: usize,
    block_slots: usize,
    max_tiles: usize,
    expert_offsets: Range<usize>,
    tile_offsets: Range<usize>,
    tiles: Range<usize>,
    row_of_slot: Range<usize>,
    token_of_row: Range<usize>,
    counts: Range<usize>,
}

impl PlanLayout {
    /// The layout for a shape.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a shape out of range.
    pub fn new(shape: RoutingShape) -> Result<Self> {
        Self::of_experts(shape, 0..shape.num_experts)
    }

    /// The layout of a plan for some of the experts, those whose ids are in `experts`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a shape out of range, or a range that is empty or not within `E`.
    pub fn of_experts(shape: RoutingShape, experts: Range<usize>) -> Result<Self> {
        let shape = shape.of_experts("PlanLayout", experts.start, experts.end)?;
        let (slots, num_experts) = (shape.slots(), shape.num_experts);
        let (min_block_slots, max_blocks) =
            (PLAN_MIN_BLOCK_SLOTS as usize, PLAN_MAX_BLOCKS as usize);
        let block_slots = min_block_slots * slots.div_ceil(min_block_slots * max_blocks).max(1);
        let num_blocks = slots.div_ceil(block_slots).max(1);
        let max_tiles = slots.div_ceil(GEMM_BLOCK_M as usize) + num_experts;

        let mut end = 0usize;
        let mut part = |len: usize, size: usize| {
            let start = end.checked_next_multiple_of(PART_ALIGNMENT);
            let part =
                start.and_then(|start| Some(start..start.checked_add(len.checked_mul(size)?)?));
            let part = part.ok_or_else(|| Error::Unsupported {
                op: "PlanLayout",
                argument: "shape",
                wanted: format!("a plan of at most {} bytes", usize::MAX),
                got: shape.to_string(),
            })?;
            end = part.end;
            Ok::<_, Error>(part)
        };
        Ok(Self {
            shape,
            first_expert: experts.start,
            num_blocks,
            block_slots,
            max_tiles,
            expert_offsets: part(num_experts + 1, size_of::<i32>())?,
            tile_offsets: part(num_experts + 1, size_of::<i32>())?,
            tiles: part(max_tiles, size_of::<GemmTile>())?,
            row_of_slot: part(slots, size_of::<i32>())?,
            token_of_row: part(slots, size_of::<i32>())?,
            counts: part(num_experts * num_blocks, size_of::<i32>())?,
        })
    }

    /// The shape of the plan: `E` is the number of its experts, which may be fewer than the
    /// router's, and fewer than `K`.
    pub fn shape(&self) -> RoutingShape {
        self.shape
    }

    /// The router's ids of the plan's experts: expert `e` of the plan has id `experts().start + e`.
    pub fn experts(&self) -> Range<usize> {
        self.first_expert..self.first_expert + self.shape.num_experts
    }

    /// Bytes of a plan, scratch included.
    pub fn bytes(&self) -> usize {
        self.counts.end
    }

    /// The length of the list of tiles, a bound for every routing: a grid of this many blocks
    /// covers all tiles.
    pub fn max_tiles(&self) -> usize {
        self.max_tiles
    }

    /// `[E + 1]` `i32`: the rows of expert `e` are those from `[e]` to `[e + 1]`.
    pub fn expert_offsets(&self) -> Range<usize> {
        self.expert_offsets.clone()
    }

    /// `[T, K]` `i32`: the row of a slot, -1 for an inactive one.
    pub fn row_of_slot(&self) -> Range<usize> {
        self.row_of_slot.clone()
    }

    /// `[T * K]` `i32`: the token of a row, -1 past the rows in use.
    pub fn token_of_row(&self) -> Range<usize> {
        self.token_of_row.clone()
    }

    /// `[max_tiles, 4]` `i32`: expert, first row, number of rows, 0. All 0 past the tiles in use.
    pub fn tiles(&self) -> Range<usize> {
        self.tiles.clone()
    }

    /// `[1]` `i32`: the number of tiles in use.
    pub fn num_tiles(&self) -> Range<usize> {
        self.tile_offsets.end - size_of::<i32>()..self.tile_offsets.end
    }

    /// `[E + 1]` `i32`: the tiles of expert `e` are those from `[e]` to `[e + 1]`.
    pub(crate) fn tile_offsets(&self) -> Range<usize> {
        self.tile_offsets.clone()
    }

    /// `[E, num_blocks]` `i32`: scratch.
    pub(crate) fn counts(&self) -> Range<usize> {
        self.counts.clone()
    }

    /// Blocks that count and place slots.
    pub(crate) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Slots of each of those blocks.
    pub(crate) fn block_slots(&self) -> usize {
        self.block_slots
    }
}

/// Slots grouped by expert, on a device: the result of [`plan_fwd`](crate::ops::plan::plan_fwd).
///
/// Only that operation creates a plan, and no other operation writes it. Reads are ordered after
/// the operation on the same stream, and on other streams as cudarc orders views.
///
/// A plan that was created during a stream capture is undefined until the graph has run: use it
/// within that capture, or after a replay. Neither this type nor cudarc can check that: a capture
/// may be abandoned, and a replay is ordered on its own stream alone. Kernels therefore compare
/// every index that they read from a plan with the sizes of their launch, instead of with -1. A
/// plan that is used too early gives wrong results, never an access outside a buffer.
pub struct RoutingPlan<'a> {
    layout: PlanLayout,
    memory: PlanMemory<'a>,
}

/// Memory of at least [`PlanLayout::bytes`].
pub(crate) enum PlanMemory<'a> {
    Owned(CudaSlice<u8>),
    Borrowed(CudaView<'a, u8>),
}

impl<'a> RoutingPlan<'a> {
    /// The plan in `memory`.
    ///
    /// # Safety
    /// `memory` has `layout.bytes()` bytes and starts at a multiple of 4. It need not contain a
    /// plan yet: see the type's description.
    pub(crate) unsafe fn new(layout: PlanLayout, memory: PlanMemory<'a>) -> Self {
        Self { layout, memory }
    }

    /// Checks the plan's context against the stream of an operation that reads it.
    pub(crate) fn check_stream(&self, op: &'static str, stream: &CudaStream) -> Result<()> {
        let own = match &self.memory {
            PlanMemory::Owned(memory) => memory.stream(),
            PlanMemory::Borrowed(memory) => memory.stream(),
        };
        check_context(op, "plan", own, stream.context())
    }

    /// The shape of the plan: `E` is the number of its experts, which may be fewer than the
    /// router's, and fewer than `K`. Products with this plan take the weights of these experts.
    pub fn shape(&self) -> RoutingShape {
        self.layout.shape
    }

    /// The router's ids of the plan's experts.
    pub fn experts(&self) -> Range<usize> {
        self.layout.experts()
    }

    /// The offsets of the parts.
    pub fn layout(&self) -> &PlanLayout {
        &self.layout
    }

    /// The length of the list of tiles.
    pub fn max_tiles(&self) -> usize {
        self.layout.max_tiles
    }

    /// `[E + 1]`: the rows of expert `e` are those from `[e]` to `[e + 1]`; `[E]` rows are in use.
    pub fn expert_offsets(&self) -> CudaView<'_, i32> {
        self.part(self.layout.expert_offsets())
    }

    /// `[T, K]`: the row of a slot, -1 for an inactive one.
    pub fn row_of_slot(&self) -> CudaView<'_, i32> {
        self.part(self.layout.row_of_slot())
    }

    /// `[T * K]`: the token of a row, -1 past the rows in use.
    pub fn token_of_row(&self) -> CudaView<'_, i32> {
        self.part(self.layout.token_of_row())
    }

    /// `[max_tiles, 4]`: expert, first row, number of rows, 0. All 0 past the tiles in use.
    pub fn tiles(&self) -> CudaView<'_, i32> {
        self.part(self.layout.tiles())
    }

    /// `[1]`: the number of tiles in use.
    pub fn num_tiles(&self) -> CudaView<'_, i32> {
        self.part(self.layout.num_tiles())
    }

    fn part(&self, bytes: Range<usize>) -> CudaView<'_, i32> {
        let len = bytes.len() / size_of::<i32>();
        let part = match &self.memory {
            PlanMemory::Owned(memory) => memory.slice(bytes),
            PlanMemory::Borrowed(memory) => memory.slice(bytes),
        };
        // SAFETY: every pattern of bytes is an i32; parts start at multiples of 256 in memory whose
        // address was checked; the part has `len` integers.
        unsafe { part.transmute::<i32>(len) }
            .unwrap_or_else(|| unreachable!("a part has its length"))
    }
}

impl std::fmt::Debug for RoutingPlan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RoutingPlan({})", self.layout.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_disjoint() {
        for (t, e, k) in [
            (0, 1, 1),
            (0, 4096, 7),
            (1, 1, 1),
            (333, 7, 3),
            (1024, 1, 1),
            (1025, 1, 1),
            (1 << 20, 4096, 8),
        ] {
            let layout = PlanLayout::new(RoutingShape::new(t, e, k).unwrap()).unwrap();
            let parts = [
                layout.expert_offsets(),
                layout.tile_offsets(),
                layout.tiles(),
                layout.row_of_slot(),
                layout.token_of_row(),
                layout.counts(),
            ];
            assert!(parts.iter().all(|part| part.start % PART_ALIGNMENT == 0), "{layout:?}");
            assert!(parts.windows(2).all(|pair| pair[0].end <= pair[1].start), "{layout:?}");
            assert_eq!(layout.bytes(), parts[5].end);
            assert_eq!(layout.num_tiles().end, layout.tile_offsets().end);
        }
    }

    #[test]
    fn blocks_cover_all_slots() {
        let most = i32::MAX as usize - 4096;
        for slots in [0, 1, 1023, 1024, 1025, 131072, 131073, 1 << 24, most] {
            let layout = PlanLayout::new(RoutingShape::new(slots, 8, 1).unwrap()).unwrap();
            let (blocks, each) = (layout.num_blocks(), layout.block_slots());
            assert!(
                (1..=PLAN_MAX_BLOCKS as usize).contains(&blocks) && blocks * each >= slots,
                "{layout:?}"
            );
            assert!(
                blocks == 1 || (blocks - 1) * each < slots,
                "no block without slots: {layout:?}"
            );
            assert!(i32::try_from(layout.max_tiles()).is_ok());
        }
    }

    #[test]
    fn shapes_out_of_range_are_rejected() {
        assert!(PlanLayout::new(RoutingShape { num_tokens: 1, num_experts: 0, top_k: 1 }).is_err());
        assert!(
            PlanLayout::new(RoutingShape { num_tokens: usize::MAX, num_experts: 2, top_k: 2 })
                .is_err()
        );
    }
}
