//! Each token's output: the weighted sum of its experts' rows, an output bias and a shared expert's
//! row.
//!
//! `y[t, :] = sum over k of routing_weights[t, k] * yp[row, :]` with `row = row_of_slot[t*K + k]`,
//! in the order `k = 0..K`, plus `output_bias`, plus the shared expert's row, gated by a sigmoid if
//! there is a gate; halved if the two parts are averaged. A slot without a row whose id is an
//! identity expert's adds `routing_weights[t, k] * x[t, :]`. Any other slot without a row is
//! skipped: it does not add `0 * yp`.

use std::ops::Range;

use super::accum::{Accum, Element};
use super::plan::Plan;
use crate::error::{Error, Result, check_len, product};
use crate::shape::RoutingShape;

/// The terms of [`combine_fwd`]. Rows may be unrounded results (`Y`); tokens and biases are of the
/// caller's or the checkpoint's type (`D`).
#[derive(Debug, Clone)]
pub struct CombineInputs<'a, Y, W = f32, D = Y> {
    /// `[R, H]`, the experts' outputs.
    pub yp: &'a [Y],
    /// `[T, K]`; without them each weight is 1.
    pub routing_weights: Option<&'a [W]>,
    /// Experts that return the token itself.
    pub identity: Option<Identity<'a, D, W>>,
    /// `[H]`, added without a weight.
    pub output_bias: Option<&'a [D]>,
    /// The shared expert's output, added to every token.
    pub shared: Option<Shared<'a, Y, W>>,
}

/// Experts without weights that return the token.
#[derive(Debug, Clone)]
pub struct Identity<'a, D, W = f32> {
    /// The ids of the identity experts.
    pub experts: Range<u32>,
    /// `[T, K]`
    pub expert_ids: &'a [u32],
    /// `[T, H]`
    pub x: &'a [D],
    /// `[T, K]`: the weights of identity experts, for rows that are already weighted.
    pub routing_weights: Option<&'a [W]>,
}

impl<'a, D, W> Identity<'a, D, W> {
    /// The same experts with the given weights of their own.
    pub(super) fn with_weights<V>(&self, routing_weights: Option<&'a [V]>) -> Identity<'a, D, V> {
        let Self { experts, expert_ids, x, .. } = self;
        Identity { experts: experts.clone(), expert_ids, x, routing_weights }
    }
}

/// The output of a shared expert.
#[derive(Debug, Clone)]
pub struct Shared<'a, Y, W = f32> {
    /// `[T, H]`
    pub y: &'a [Y],
    /// `[T]`: `y` is multiplied by the sigmoid of these.
    pub gate: Option<&'a [W]>,
    /// The result is the mean of the routed and the shared part, not their sum.
    pub average: bool,
}

impl<'a, Y, W> CombineInputs<'a, Y, W> {
    /// Rows and weights only.
    pub fn new(yp: &'a [Y], routing_weights: &'a [W]) -> Self {
        Self {
            yp,
            routing_weights: Some(routing_weights),
            identity: None,
            output_bias: None,
            shared: None,
        }
    }
}

/// The output of each token, `[T, H]`.
///
/// # Errors
/// A length that is not the shape's, or a plan of another shape.
pub fn combine_fwd<A: Accum>(
    shape: &RoutingShape,
    plan: &Plan,
    hidden: usize,
    inputs: &CombineInputs<'_, impl Element<A>, impl Element<A>, impl Element<A>>,
) -> Result<Vec<A>> {
    let tokens = check(shape, plan, hidden, inputs)?;
    let mut y = vec![A::ZERO; tokens];
    for (token, y) in y.chunks_exact_mut(hidden.max(1)).enumerate() {
        let columns = |row: usize| row * hidden..(row + 1) * hidden;
        for slot in token * shape.top_k..(token + 1) * shape.top_k {
            let weight = inputs
                .routing_weights
                .map_or(A::ONE, |routing_weights| routing_weights[slot].widen());
            if let Ok(row) = usize::try_from(plan.row_of_slot[slot]) {
                add(y, weight, &inputs.yp[columns(row)]);
            } else if let Some(Identity { experts, expert_ids, x, routing_weights }) =
                &inputs.identity
                && experts.contains(&expert_ids[slot])
            {
                let weight =
                    routing_weights.map_or(weight, |routing_weights| routing_weights[slot].widen());
                add(y, weight, &x[columns(token)]);
            }
        }
        if let Some(bias) = inputs.output_bias {
            add(y, A::ONE, bias);
        }
        if let Some(shared) = &inputs.shared {
            let gate = shared.gate.map_or(A::ONE, |gate| sigmoid(gate[token].widen()));
            add(y, gate, &shared.y[columns(token)]);
            if shared.average {
                y.iter_mut().for_each(|y| *y = *y / (A::ONE + A::ONE));
            }
        }
    }
    Ok(y)
}

/// `y += weight * row`
fn add<A: Accum>(y: &mut [A], weight: A, row: &[impl Element<A>]) {
    for (y, value) in y.iter_mut().zip(row) {
        *y += weight * value.widen();
    }
}

/// `1 / (1 + exp(-z))`
pub(super) fn sigmoid<A: Accum>(z: A) -> A {
    A::ONE / (A::ONE + (-z).exp())
}

/// Checks every length against the shape; returns `T * H`.
fn check<Y, W, D>(
    shape: &RoutingShape,
    plan: &Plan,
    hidden: usize,
    inputs: &CombineInputs<'_, Y, W, D>,
) -> Result<usize> {
    const OP: &str = "combine_fwd";
    shape.check(OP)?;
    plan.check(OP)?;
    let slots = shape.slots();
    check_len(OP, "plan.row_of_slot", plan.row_of_slot.len(), slots)?;
    check_len(OP, "plan.token_of_row", plan.rows(), slots)?;
    let rows = product(OP, "num_tokens * top_k * hidden", slots, hidden)?;
    let tokens = shape.num_tokens * hidden;
    check_len(OP, "yp", inputs.yp.len(), rows)?;
    if let Some(routing_weights) = inputs.routing_weights {
        check_len(OP, "routing_weights", routing_weights.len(), slots)?;
    }
    if let Some(identity) = &inputs.identity {
        check_len(OP, "expert_ids", identity.expert_ids.len(), slots)?;
        check_len(OP, "x", identity.x.len(), tokens)?;
        if let Some(routing_weights) = identity.routing_weights {
            check_len(OP, "identity.routing_weights", routing_weights.len(), slots)?;
            if inputs.routing_weights.is_some() {
                let why = "`identity.routing_weights` are given together with `routing_weights`";
                return Err(Error::Mismatch { op: OP, why: why.into() });
            }
        }
    }
    if let Some(bias) = inputs.output_bias {
        check_len(OP, "output_bias", bias.len(), hidden)?;
    }
    if let Some(shared) = &inputs.shared {
        check_len(OP, "shared.y", shared.y.len(), tokens)?;
        if let Some(gate) = shared.gate {
            check_len(OP, "shared.gate", gate.len(), shape.num_tokens)?;
        }
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::plan::plan_fwd;
    use super::*;

    #[test]
    fn sums_weighted_rows() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 3, top_k: 2 };
        // Token 0 goes to experts 2 and 0, token 1 to expert 1; its other slot is inactive.
        let plan = plan_fwd(&shape, &[2, 0, 1, 7]).unwrap();
        let inf = f32::INFINITY;
        let yp = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, inf, inf].map(bf16::from_f32);
        let run = |hidden, routing_weights: &[f32]| {
            combine_fwd::<f64>(&shape, &plan, hidden, &CombineInputs::new(&yp, routing_weights))
        };
        let y = run(2, &[0.5, 0.25, 2.0, 0.0]).unwrap();
        assert_eq!(y, [0.5 * 5.0 + 0.25, 0.5 * 6.0 + 0.25 * 2.0, 6.0, 8.0]);
        assert!(run(2, &[0.5; 3]).is_err());
        assert!(run(3, &[0.5; 4]).is_err());
    }

    #[test]
    fn sums_all_terms() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 3, top_k: 2 };
        // Token 0 goes to expert 2 and identity expert 4, token 1 to expert 1; id 5 is inactive.
        let ids = [2, 4, 1, 5];
        let plan = plan_fwd(&shape, &ids).unwrap();
        let inputs = CombineInputs {
            yp: &[1.0f64, 2.0, f64::NAN, f64::NAN],
            routing_weights: Some(&[3.0f64, 0.5, -1.0, f64::NAN]),
            identity: Some(Identity {
                experts: 3..5,
                expert_ids: &ids,
                x: &[8.0f64, 16.0],
                routing_weights: None,
            }),
            output_bias: Some(&[100.0f64]),
            shared: Some(Shared { y: &[40.0, 20.0], gate: Some(&[0.0, 0.0]), average: true }),
        };
        let inputs = CombineInputs { yp: &inputs.yp[..4], ..inputs };
        let y = combine_fwd::<f64>(&shape, &plan, 1, &inputs).unwrap();
        assert_eq!(y, [(2.0 * 3.0 + 4.0 + 100.0 + 20.0) / 2.0, (-1.0 + 100.0 + 10.0) / 2.0]);
        let unweighted = CombineInputs { routing_weights: None, shared: None, ..inputs };
        let y = combine_fwd::<f64>(&shape, &plan, 1, &unweighted).unwrap();
        assert_eq!(y, [2.0 + 8.0 + 100.0, 1.0 + 100.0]);
        // Rows that are already weighted, and identity experts with weights of their own.
        let mut rows_weighted = unweighted.clone();
        if let Some(identity) = &mut rows_weighted.identity {
            identity.routing_weights = Some(&[f64::NAN, 0.5, f64::NAN, f64::NAN]);
        }
        let y = combine_fwd::<f64>(&shape, &plan, 1, &rows_weighted).unwrap();
        assert_eq!(y, [2.0 + 4.0 + 100.0, 1.0 + 100.0]);
        let twice = CombineInputs { routing_weights: Some(&[1.0; 4]), ..rows_weighted };
        assert!(combine_fwd::<f64>(&shape, &plan, 1, &twice).is_err());
    }

    /// In f32 `(1e8 + 1) - 1e8` is 0, so the result depends on the order of slots.
    #[test]
    fn sums_in_the_order_of_slots() {
        let shape = RoutingShape { num_tokens: 1, num_experts: 3, top_k: 3 };
        let plan = plan_fwd(&shape, &[2, 0, 1]).unwrap();
        // Rows are in the order of experts 0, 1, 2, slots in the order 2, 0, 1.
        let inputs = CombineInputs::new(&[1.0f32, -1e8, 1e8], &[1.0f32; 3]);
        assert_eq!(combine_fwd::<f32>(&shape, &plan, 1, &inputs).unwrap(), [0.0]);
        assert_eq!(combine_fwd::<f64>(&shape, &plan, 1, &inputs).unwrap(), [1.0]);
    }
}
