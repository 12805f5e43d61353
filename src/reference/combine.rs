//! The weighted sum of each token's experts: `y[t, :] = sum over k of weights[t, k] * yp[row, :]`
//! with `row = row_of_slot[t*K + k]`, in the order `k = 0..K`. An inactive slot contributes
//! nothing, not even `0 * yp`.

use super::accum::{Accum, Element};
use super::plan::Plan;
use crate::error::{Result, check_len, product};
use crate::shape::RoutingShape;

/// Adds up the rows of each token: `yp` `[R, H]` and `weights` `[T, K]` to `[T, H]`.
///
/// # Errors
/// A length that is not the shape's, or a plan of another shape.
pub fn combine_fwd<A: Accum>(
    shape: &RoutingShape,
    plan: &Plan,
    hidden: usize,
    yp: &[impl Element<A>],
    weights: &[impl Element<A>],
) -> Result<Vec<A>> {
    const OP: &str = "combine_fwd";
    shape.check(OP)?;
    plan.check(OP)?;
    check_len(OP, "plan.row_of_slot", plan.row_of_slot.len(), shape.slots())?;
    check_len(OP, "plan.token_of_row", plan.rows(), shape.slots())?;
    check_len(
        OP,
        "yp",
        yp.len(),
        product(OP, "num_tokens * top_k * hidden", shape.slots(), hidden)?,
    )?;
    check_len(OP, "weights", weights.len(), shape.slots())?;
    let mut y = vec![A::ZERO; shape.num_tokens * hidden];
    for (slot, &row) in plan.row_of_slot.iter().enumerate().filter(|&(_, &row)| row >= 0) {
        let (token, row, weight) = (slot / shape.top_k, row as usize, weights[slot].widen());
        let y = &mut y[token * hidden..][..hidden];
        for (y, yp) in y.iter_mut().zip(&yp[row * hidden..][..hidden]) {
            *y += weight * yp.widen();
        }
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::plan::plan_fwd;
    use super::*;

    #[test]
    fn by_hand() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 3, top_k: 2 };
        // Token 0 goes to experts 2 and 0, token 1 to expert 1 and to nobody.
        let plan = plan_fwd(&shape, 64, &[2, 0, 1, 7]).unwrap();
        let inf = f32::INFINITY;
        let yp = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, inf, inf].map(bf16::from_f32);
        let y = combine_fwd::<f64>(&shape, &plan, 2, &yp, &[0.5f32, 0.25, 2.0, 0.0]).unwrap();
        assert_eq!(y, [0.5 * 5.0 + 0.25, 0.5 * 6.0 + 0.25 * 2.0, 6.0, 8.0]);
        assert!(combine_fwd::<f64>(&shape, &plan, 2, &yp, &[0.5f32; 3]).is_err());
        assert!(combine_fwd::<f64>(&shape, &plan, 3, &yp, &[0.5f32; 4]).is_err());
    }

    /// In f32 `(1e8 + 1) - 1e8` is 0: the order of slots shows.
    #[test]
    fn order_is_that_of_slots() {
        let shape = RoutingShape { num_tokens: 1, num_experts: 3, top_k: 3 };
        let plan = plan_fwd(&shape, 64, &[2, 0, 1]).unwrap();
        // Rows are in the order of experts 0, 1, 2, slots in the order 2, 0, 1.
        let y = combine_fwd::<f32>(&shape, &plan, 1, &[1.0f32, -1e8, 1e8], &[1.0f32; 3]).unwrap();
        assert_eq!(y, [0.0]);
        let y = combine_fwd::<f64>(&shape, &plan, 1, &[1.0f32, -1e8, 1e8], &[1.0f32; 3]).unwrap();
        assert_eq!(y, [1.0]);
    }
}
