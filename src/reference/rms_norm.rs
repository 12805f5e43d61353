//! The RMS norm of each row: `x / sqrt(mean(x^2) + epsilon) * (offset + weight)`, or, with
//! `scale_first`, the norm of `x * (offset + weight)`.

use super::accum::{Accum, Element};
use super::plan::Plan;
use crate::config::RmsNorm;
use crate::error::{Result, check_len, product};

/// The operands of [`rms_norm_fwd`].
#[derive(Debug, Clone)]
pub struct RmsNormInputs<'a, X, D = X> {
    /// `[R, H]`
    pub x: &'a [X],
    /// `[H]`; without it rows are multiplied neither by a weight nor by the offset.
    pub weight: Option<&'a [D]>,
    /// If given, rows are those of this plan, and its unused rows are zeroed.
    pub plan: Option<&'a Plan>,
}

/// Normalizes each row of `x` `[R, H]`.
///
/// # Errors
/// A length that is not a whole number of rows, or a plan with another number of rows.
pub fn rms_norm_fwd<A: Accum>(
    norm: &RmsNorm,
    hidden: usize,
    inputs: &RmsNormInputs<'_, impl Element<A>, impl Element<A>>,
) -> Result<Vec<A>> {
    let rows = check(norm, hidden, inputs)?;
    let mut y = vec![A::ZERO; inputs.x.len()];
    let used = inputs.plan.map_or(rows, Plan::rows_in_use);
    for (x, y) in inputs.x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)).take(used) {
        rms_norm_row(norm, x, inputs.weight, y);
    }
    Ok(y)
}

fn rms_norm_row<A: Accum>(
    norm: &RmsNorm,
    x: &[impl Element<A>],
    weight: Option<&[impl Element<A>]>,
    y: &mut [A],
) {
    let factor = |h: usize| match weight {
        Some(weight) => A::from_dtype(norm.offset) + weight[h].widen(),
        None => A::ONE,
    };
    let (before, after) = if norm.scale_first { (true, false) } else { (false, true) };
    for (h, (y, x)) in y.iter_mut().zip(x).enumerate() {
        *y = if before { x.widen() * factor(h) } else { x.widen() };
    }
    let square_sum: A = y.iter().map(|&v| v * v).sum();
    let mean = square_sum / A::from_dtype(y.len() as f32);
    let inverse = A::ONE / (mean + A::from_dtype(norm.epsilon)).sqrt();
    for (h, y) in y.iter_mut().enumerate() {
        *y = *y * inverse * if after { factor(h) } else { A::ONE };
    }
}

/// Checks every length; returns `R`.
fn check<X, D>(norm: &RmsNorm, hidden: usize, inputs: &RmsNormInputs<'_, X, D>) -> Result<usize> {
    const OP: &str = "rms_norm_fwd";
    norm.check(OP, "norm")?;
    crate::error::width(OP, "hidden", hidden)?;
    let mut rows = inputs.x.len() / hidden;
    if let Some(plan) = inputs.plan {
        plan.check(OP)?;
        rows = plan.rows();
    }
    check_len(OP, "x", inputs.x.len(), product(OP, "rows * hidden", rows, hidden)?)?;
    if let Some(weight) = inputs.weight {
        check_len(OP, "weight", weight.len(), hidden)?;
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::super::plan::plan_fwd;
    use super::*;
    use crate::shape::RoutingShape;

    const PLAIN: RmsNorm = RmsNorm { epsilon: 0.0, offset: 0.0, scale_first: false };

    #[test]
    fn divides_by_the_root_mean_square() {
        // The mean squares are 10 and 1.
        let x = [2.0f32, -4.0, 1.0, 1.0];
        let run = |norm: RmsNorm, weight: Option<&[f32]>| {
            rms_norm_fwd::<f64>(&norm, 2, &RmsNormInputs { x: &x, weight, plan: None }).unwrap()
        };
        let plus = |epsilon| RmsNorm { epsilon, ..PLAIN };
        assert_eq!(run(plus(6.0), None)[..2], [0.5, -1.0]);
        assert_eq!(run(PLAIN, None)[2..], [1.0, 1.0]);
        assert_eq!(run(plus(3.0), None)[2..], [0.5, 0.5]);
        let weight = [4.0f32, 9.0];
        let centred = RmsNorm { offset: 1.0, ..plus(6.0) };
        assert_eq!(run(centred, Some(&weight))[..2], [2.5, -10.0]);
        // Without weights the offset is ignored.
        assert_eq!(run(centred, None), run(plus(6.0), None));
    }

    #[test]
    fn scale_first_multiplies_before_the_norm() {
        let x = [2.0f32, 1.0];
        let norm = RmsNorm { scale_first: true, offset: 1.0, epsilon: 39.0 };
        let inputs = RmsNormInputs { x: &x, weight: Some(&[-0.5f32, 6.0]), plan: None };
        // The scaled row is 1 and 7, whose mean square is 25 without epsilon.
        assert_eq!(rms_norm_fwd::<f64>(&norm, 2, &inputs).unwrap(), [0.125, 0.875]);
    }

    #[test]
    fn unused_rows_are_zero() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
        let plan = plan_fwd(&shape, &[7, 1]).unwrap();
        let inputs =
            RmsNormInputs { x: &[3.0f32, f32::NAN], weight: None::<&[f32]>, plan: Some(&plan) };
        assert_eq!(rms_norm_fwd::<f64>(&PLAIN, 1, &inputs).unwrap(), [1.0, 0.0]);
    }

    #[test]
    fn rejects_wrong_lengths() {
        let run = |hidden, x: &[f32], weight: &[f32]| {
            let inputs = RmsNormInputs { x, weight: Some(weight), plan: None };
            rms_norm_fwd::<f32>(&PLAIN, hidden, &inputs).is_ok()
        };
        assert!(run(2, &[1.0; 4], &[1.0; 2]) && run(2, &[], &[1.0; 2]));
        assert!(!run(2, &[1.0; 3], &[1.0; 2]) && !run(2, &[1.0; 4], &[1.0; 3]));
        assert!(!run(0, &[], &[]));
    }
}
