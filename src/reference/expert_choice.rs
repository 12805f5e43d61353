//! Experts choose tokens: each takes those of its largest scores.

use crate::dtype::Dtype;
use crate::error::{Result, check_len};
use crate::shape::RoutingShape;

/// Selects for every expert `e` the `capacity` tokens whose `scores[t, e]` are largest, ties to the
/// lower token. Returns the expert ids `[T, E]` and the weights `[T, E]`.
///
/// -0 counts as 0 and NaN as minus infinity; a `capacity` above `T` selects all tokens. At
/// `(t, e)`, the id is `e` if expert `e` has selected token `t`, else `u32::MAX`, and the weight is
/// the score, else 0.
///
/// # Errors
/// A dimension out of range, or a length that is not `T * E`.
pub fn expert_choice_fwd<D: Dtype>(
    num_tokens: usize,
    num_experts: usize,
    capacity: usize,
    scores: &[D],
) -> Result<(Vec<u32>, Vec<f32>)> {
    const OP: &str = "expert_choice_fwd";
    let shape = RoutingShape { num_tokens, num_experts, top_k: num_experts };
    shape.check(OP)?;
    check_len(OP, "scores", scores.len(), shape.slots())?;
    let mut expert_ids = vec![u32::MAX; shape.slots()];
    let mut routing_weights = vec![0.0; shape.slots()];
    for expert in 0..num_experts {
        let score = |token: usize| scores[token * num_experts + expert].to_f32();
        let mut tokens: Vec<usize> = (0..num_tokens).collect();
        // Stable: equal scores stay in the order of tokens.
        tokens.sort_by(|&a, &b| super::capacity::compare(score(b), score(a)));
        for token in tokens.into_iter().take(capacity) {
            expert_ids[token * num_experts + expert] = expert as u32;
            routing_weights[token * num_experts + expert] = score(token);
        }
    }
    Ok((expert_ids, routing_weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: u32 = u32::MAX;

    #[test]
    fn hand_computed_choices() {
        #[rustfmt::skip]
        let scores = [
            0.5f32, -0.0, f32::NAN,
            0.25,    0.0, f32::NEG_INFINITY,
            0.5,    -1.0, -5.0,
            0.75,    0.0, f32::NAN,
        ];
        let (ids, routing_weights) = expert_choice_fwd(4, 3, 2, &scores).unwrap();
        // Expert 0 takes tokens 3 and 0, not 2, which ties with 0. Zeros tie. NaN comes last.
        assert_eq!(ids, [0, 1, 2, NONE, 1, NONE, NONE, NONE, 2, 0, NONE, NONE]);
        assert_eq!(routing_weights[..2], [0.5, -0.0]);
        assert!(routing_weights[2].is_nan());
        assert_eq!(routing_weights[3..], [0.0, 0.0, 0.0, 0.0, 0.0, -5.0, 0.75, 0.0, 0.0]);

        let (ids, _) = expert_choice_fwd(4, 3, 9, &scores).unwrap();
        assert_eq!(ids, [0, 1, 2].repeat(4));
        let (ids, routing_weights) = expert_choice_fwd(4, 3, 0, &scores).unwrap();
        assert!(
            ids.iter().all(|&id| id == NONE) && routing_weights.iter().all(|&weight| weight == 0.0)
        );
        assert_eq!(expert_choice_fwd::<f32>(0, 3, 1, &[]).unwrap(), (vec![], vec![]));
        assert!(expert_choice_fwd(4, 3, 2, &scores[1..]).is_err());
        assert!(expert_choice_fwd(4, 0, 2, &scores[..0]).is_err());
    }
}
