//! The plan: slots grouped by expert.
//!
//! A slot `s = t*K + k` whose id is less than `E`, or in the plan's range of experts, is active and
//! has a row. Rows are ordered by (expert, slot), so those of an expert are contiguous and in slot
//! order. A slot with any other id (of another device's expert, or padding) is inactive and has no
//! row.

use std::ops::Range;

use crate::abi::GEMM_BLOCK_M;
use crate::error::{Error, Result, check_len};
use crate::shape::RoutingShape;

/// Consecutive rows of one expert, as one block of a grouped GEMM handles them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tile {
    /// The expert.
    pub expert: i32,
    /// The first row.
    pub first_row: i32,
    /// The number of rows, at least 1.
    pub num_rows: i32,
}

/// The maps between slots and rows. There are `R = T*K` rows, of which the first
/// `expert_offsets[E]` are in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The routing's ids of the plan's experts; all of them unless the plan is of a range.
    pub experts: Range<usize>,
    /// `[E + 1]`: the rows of expert `e` are `expert_offsets[e]..expert_offsets[e + 1]`.
    pub expert_offsets: Vec<i32>,
    /// `[T * K]`: the row of a slot, -1 for an inactive one.
    pub row_of_slot: Vec<i32>,
    /// `[R]`: the token of a row, -1 past the rows in use.
    pub token_of_row: Vec<i32>,
    /// The tiles of each expert's rows, in the order of rows. An expert without rows has none.
    pub tiles: Vec<Tile>,
}

impl Plan {
    /// `E`
    pub fn num_experts(&self) -> usize {
        self.expert_offsets.len().saturating_sub(1)
    }

    /// `R`, the bound on rows.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// The number of rows in use, which is that of active slots.
    pub fn rows_in_use(&self) -> usize {
        self.expert_offsets.last().map_or(0, |&end| end as usize)
    }

    /// The plan of a dense product: a grouped one with a single expert that has every token.
    pub(super) fn dense(num_tokens: usize) -> Self {
        let all: Vec<i32> = (0..num_tokens as i32).collect();
        Self {
            experts: 0..1,
            expert_offsets: vec![0, num_tokens as i32],
            row_of_slot: all.clone(),
            token_of_row: all,
            tiles: Vec::new(),
        }
    }

    /// The rows of an expert.
    pub(super) fn rows_of(&self, expert: usize) -> Range<usize> {
        self.expert_offsets[expert] as usize..self.expert_offsets[expert + 1] as usize
    }

    /// Checks that the parts are consistent: the fields are public and may have been changed.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        let fails =
            |why: &str| Err(Error::Mismatch { op, why: format!("the plan is broken: {why}") });
        let rows = self.rows() as i64;
        if self.expert_offsets.len() < 2 || self.expert_offsets[0] != 0 {
            return fails("`expert_offsets` does not have E + 1 elements that begin with 0");
        }
        if self.expert_offsets.windows(2).any(|pair| pair[0] > pair[1]) {
            return fails("`expert_offsets` decreases");
        }
        if self.rows_in_use() as i64 > rows {
            return fails("`expert_offsets` goes past the end of `token_of_row`");
        }
        let in_use = self.rows_in_use() as i64;
        if self.row_of_slot.iter().any(|&row| row < -1 || i64::from(row) >= in_use) {
            return fails("`row_of_slot` names a row that is not in use");
        }
        if self.token_of_row[..self.rows_in_use()].iter().any(|&token| token < 0) {
            return fails("`token_of_row` has no token for a row in use");
        }
        Ok(())
    }
}

/// Groups the slots by expert: `expert_ids` `[T, K]`. Tiles have at most 128 rows.
///
/// # Errors
/// A shape out of range, or a length that is not the shape's.
pub fn plan_fwd(shape: &RoutingShape, expert_ids: &[u32]) -> Result<Plan> {
    plan_range_fwd(shape, 0..shape.num_experts, expert_ids)
}

/// [`plan_fwd`] for the experts whose ids are in `experts`: expert `e` of the plan is the router's
/// `experts.start + e`, and slots of other experts are inactive.
///
/// # Errors
/// Those of [`plan_fwd`], or a range that is empty or not within `E`.
pub fn plan_range_fwd(
    shape: &RoutingShape,
    experts: Range<usize>,
    expert_ids: &[u32],
) -> Result<Plan> {
    grouped(shape, experts, GEMM_BLOCK_M as usize, expert_ids)
}

/// [`plan_range_fwd`] with tiles of at most `block_m` rows, which is 1 or more.
fn grouped(
    shape: &RoutingShape,
    experts: Range<usize>,
    block_m: usize,
    expert_ids: &[u32],
) -> Result<Plan> {
    const OP: &str = "plan_fwd";
    let shape = &shape.of_experts(OP, experts.start, experts.end)?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    // The plan's expert of an id, `None` for an inactive slot.
    let expert_of = |id: u32| experts.contains(&(id as usize)).then(|| id as usize - experts.start);

    let mut expert_offsets = vec![0i32; shape.num_experts + 1];
    for expert in expert_ids.iter().filter_map(|&id| expert_of(id)) {
        expert_offsets[expert + 1] += 1;
    }
    for expert in 0..shape.num_experts {
        expert_offsets[expert + 1] += expert_offsets[expert];
    }

    let mut next_row = expert_offsets.clone();
    let mut row_of_slot = vec![-1; shape.slots()];
    let mut token_of_row = vec![-1; shape.slots()];
    for (slot, &id) in expert_ids.iter().enumerate() {
        let Some(expert) = expert_of(id) else { continue };
        let row = next_row[expert];
        next_row[expert] += 1;
        row_of_slot[slot] = row;
        token_of_row[row as usize] = (slot / shape.top_k) as i32;
    }

    let block_m = block_m as i32;
    let mut tiles = Vec::new();
    for (expert, offsets) in expert_offsets.windows(2).enumerate() {
        for first_row in (offsets[0]..offsets[1]).step_by(block_m as usize) {
            let num_rows = block_m.min(offsets[1] - first_row);
            tiles.push(Tile { expert: expert as i32, first_row, num_rows });
        }
    }
    Ok(Plan { experts, expert_offsets, row_of_slot, token_of_row, tiles })
}

#[cfg(test)]
mod tests {
    use super::super::sample::Sampler;
    use super::*;

    const NONE: u32 = u32::MAX;

    #[test]
    fn hand_computed_plan() {
        let shape = RoutingShape { num_tokens: 3, num_experts: 4, top_k: 2 };
        // Expert 1 has no slot, and slot 3 is inactive.
        let plan = grouped(&shape, 0..4, 2, &[2, 0, 2, NONE, 3, 2]).unwrap();
        assert_eq!(plan.expert_offsets, [0, 1, 1, 4, 5]);
        assert_eq!(plan.row_of_slot, [1, 0, 2, -1, 4, 3]);
        assert_eq!(plan.token_of_row, [0, 0, 1, 2, 2, -1]);
        let tile = |expert, first_row, num_rows| Tile { expert, first_row, num_rows };
        assert_eq!(plan.tiles, [tile(0, 0, 1), tile(2, 1, 2), tile(2, 3, 1), tile(3, 4, 1)]);
        assert_eq!((plan.num_experts(), plan.rows(), plan.rows_in_use()), (4, 6, 5));
        assert!(plan.check("test").is_ok());
    }

    #[test]
    fn no_tokens_and_no_active_slots() {
        let shape = RoutingShape { num_tokens: 0, num_experts: 2, top_k: 2 };
        let plan = plan_fwd(&shape, &[]).unwrap();
        assert_eq!((plan.expert_offsets, plan.tiles), (vec![0, 0, 0], vec![]));

        let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
        let unowned = plan_fwd(&shape, &[2, NONE]).unwrap();
        assert_eq!((unowned.rows_in_use(), unowned.row_of_slot), (0, vec![-1, -1]));
        assert!(plan_fwd(&shape, &[0]).is_err());
    }

    #[test]
    fn plan_of_some_experts() {
        let shape = RoutingShape { num_tokens: 3, num_experts: 4, top_k: 2 };
        let ids = [2, 0, 2, NONE, 3, 2];
        let plan = plan_range_fwd(&shape, 1..3, &ids).unwrap();
        assert_eq!((plan.experts, plan.expert_offsets), (1..3, vec![0, 0, 3]));
        assert_eq!(plan.row_of_slot, [0, -1, 1, -1, -1, 2]);
        assert_eq!(plan.token_of_row, [0, 1, 2, -1, -1, -1]);
        assert_eq!(plan.tiles, [Tile { expert: 1, first_row: 0, num_rows: 3 }]);
        // Fewer experts than a token chooses.
        let plan = plan_range_fwd(&shape, 3..4, &ids).unwrap();
        assert_eq!((plan.num_experts(), plan.rows_in_use()), (1, 1));
        assert_eq!(plan_range_fwd(&shape, 0..4, &ids), plan_fwd(&shape, &ids));
        assert!(plan_range_fwd(&shape, 2..2, &ids).is_err());
        assert!(plan_range_fwd(&shape, 2..5, &ids).is_err());
    }

    #[test]
    fn rows_are_the_active_slots_in_order() {
        let mut sampler = Sampler::new(1);
        for _ in 0..200 {
            let num_experts = 1 + sampler.below(9);
            let top_k = 1 + sampler.below(num_experts);
            let shape = RoutingShape { num_tokens: sampler.below(30), num_experts, top_k };
            let ids = sampler.expert_ids(&shape);
            let block_m = 1 + sampler.below(5);
            let plan = grouped(&shape, 0..num_experts, block_m, &ids).unwrap();
            plan.check("test").unwrap();

            let mut slots: Vec<usize> = (0..shape.slots()).collect();
            slots.retain(|&slot| (ids[slot] as usize) < num_experts);
            slots.sort_by_key(|&slot| ids[slot]); // stable
            assert_eq!(plan.rows_in_use(), slots.len());
            for (row, &slot) in slots.iter().enumerate() {
                assert_eq!(plan.row_of_slot[slot], row as i32);
                assert_eq!(plan.token_of_row[row], (slot / top_k) as i32);
                assert!(plan.rows_of(ids[slot] as usize).contains(&row));
            }
            assert_eq!(plan.row_of_slot.iter().filter(|&&row| row >= 0).count(), slots.len());
            assert!(plan.token_of_row[slots.len()..].iter().all(|&token| token == -1));

            let mut covered = 0;
            for tile in &plan.tiles {
                assert_eq!(tile.first_row, covered);
                assert!(tile.num_rows >= 1 && tile.num_rows <= block_m as i32);
                covered += tile.num_rows;
                let rows = plan.rows_of(tile.expert as usize);
                assert!(rows.start <= tile.first_row as usize && covered as usize <= rows.end);
            }
            assert_eq!(covered as usize, slots.len());
            assert!(plan.tiles.len() <= plan.rows().div_ceil(block_m) + num_experts);
        }
    }

    #[test]
    fn tiles_have_at_most_128_rows() {
        let shape = RoutingShape { num_tokens: 300, num_experts: 2, top_k: 1 };
        let plan = plan_fwd(&shape, &[1; 300]).unwrap();
        let rows: Vec<i32> = plan.tiles.iter().map(|tile| tile.num_rows).collect();
        assert_eq!((plan.experts, rows), (0..2, vec![128, 128, 44]));
    }

    #[test]
    fn check_rejects_broken_plans() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
        let plan = plan_fwd(&shape, &[1, 0]).unwrap();
        let breaks: [fn(&mut Plan); 7] = [
            |plan| plan.expert_offsets.clear(),
            |plan| plan.expert_offsets[0] = 1,
            |plan| plan.expert_offsets[1] = 3,
            |plan| plan.expert_offsets[2] = 3,
            |plan| plan.row_of_slot[0] = 2,
            |plan| plan.row_of_slot[0] = -2,
            |plan| plan.token_of_row[1] = -1,
        ];
        for (i, apply) in breaks.iter().enumerate() {
            let mut broken = plan.clone();
            apply(&mut broken);
            assert!(broken.check("test").is_err(), "number {i}");
        }
    }
}
