//! Copies token rows into expert order: `xp[row_of_slot[t*K + k], :] = x[t, :]`.

use bytemuck::Pod;

use super::plan::Plan;
use crate::error::{Result, check_len, product};
use crate::shape::RoutingShape;

/// Copies each token's row to the rows of its slots: `x` `[T, H]` to `[R, H]`. Unused rows (from
/// `expert_offsets[E]` on) are zero.
///
/// # Errors
/// A length that is not the shape's, or a plan of another shape.
pub fn permute_fwd<D: Pod>(
    shape: &RoutingShape,
    plan: &Plan,
    hidden: usize,
    x: &[D],
) -> Result<Vec<D>> {
    const OP: &str = "permute_fwd";
    shape.check(OP)?;
    plan.check(OP)?;
    check_len(OP, "plan.row_of_slot", plan.row_of_slot.len(), shape.slots())?;
    check_len(OP, "plan.token_of_row", plan.rows(), shape.slots())?;
    check_len(OP, "x", x.len(), product(OP, "num_tokens * hidden", shape.num_tokens, hidden)?)?;
    let mut xp =
        vec![D::zeroed(); product(OP, "num_tokens * top_k * hidden", shape.slots(), hidden)?];
    for (slot, &row) in plan.row_of_slot.iter().enumerate().filter(|&(_, &row)| row >= 0) {
        let (token, row) = (slot / shape.top_k, row as usize);
        xp[row * hidden..][..hidden].copy_from_slice(&x[token * hidden..][..hidden]);
    }
    Ok(xp)
}

#[cfg(test)]
mod tests {
    use super::super::plan::plan_fwd;
    use super::*;

    #[test]
    fn copies_rows_into_expert_order() {
        let shape = RoutingShape { num_tokens: 3, num_experts: 2, top_k: 2 };
        let plan = plan_fwd(&shape, &[1, 0, 9, 1, 0, 9]).unwrap();
        let xp = permute_fwd(&shape, &plan, 2, &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        assert_eq!(xp, [1.0, 2.0, 5.0, 6.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn rejects_wrong_lengths() {
        let shape = RoutingShape { num_tokens: 1, num_experts: 2, top_k: 1 };
        let plan = plan_fwd(&shape, &[1]).unwrap();
        assert!(permute_fwd(&shape, &plan, 2, &[1.0f32]).is_err());
        let other = RoutingShape { num_tokens: 2, ..shape };
        assert!(permute_fwd(&other, &plan, 2, &[1.0f32; 4]).is_err());
        let none = RoutingShape { num_tokens: 0, ..shape };
        let plan = plan_fwd(&none, &[]).unwrap();
        assert!(permute_fwd::<f32>(&none, &plan, 2, &[]).unwrap().is_empty());
    }
}
