//! The router's logits: `logits[t, e] = sum over h of x[t, h] * router_gate[e, h]  (+ bias[e])`.

use super::accum::{Accum, Element, widened};
use super::matmul::matmul_transposed;
use super::parallel::for_each;
use crate::error::{Error, Result, check_len, product, width};
use crate::shape::MAX_EXPERTS;

/// The operands of [`router_gemm_fwd`]. The gate and its bias have a type of their own.
#[derive(Debug, Clone)]
pub struct RouterGemmInputs<'a, X, G = X> {
    /// `[T, H]`
    pub x: &'a [X],
    /// `[E, H]`
    pub router_gate: &'a [G],
    /// `[E]`
    pub bias: Option<&'a [G]>,
}

/// Rows of `x` per task.
const BLOCK_ROWS: usize = 64;

/// The product of each token and each row of the gate, plus the bias, `[T, E]`.
///
/// # Errors
/// `E` or `H` out of range, or a length that is not the shape's.
pub fn router_gemm_fwd<A: Accum>(
    num_experts: usize,
    hidden: usize,
    inputs: &RouterGemmInputs<'_, impl Element<A>, impl Element<A>>,
) -> Result<Vec<A>> {
    const OP: &str = "router_gemm_fwd";
    let RouterGemmInputs { x, router_gate, bias } = *inputs;
    if !(1..=MAX_EXPERTS).contains(&num_experts) {
        let (wanted, got) = (format!("1 to {MAX_EXPERTS}"), num_experts.to_string());
        return Err(Error::Unsupported { op: OP, argument: "num_experts", wanted, got });
    }
    width(OP, "hidden", hidden)?;
    check_len(OP, "x", x.len(), x.len() / hidden * hidden)?;
    check_len(
        OP,
        "router_gate",
        router_gate.len(),
        product(OP, "num_experts * hidden", num_experts, hidden)?,
    )?;
    if let Some(bias) = bias {
        check_len(OP, "bias", bias.len(), num_experts)?;
    }
    let mut buffer = Vec::new();
    let router_gate = widened::<A, _>(router_gate, &mut buffer);
    let mut logits = vec![A::ZERO; x.len() / hidden * num_experts];
    let blocks = x.chunks(BLOCK_ROWS * hidden);
    for_each(blocks.zip(logits.chunks_mut(BLOCK_ROWS * num_experts)), |(x, logits)| {
        let mut buffer = Vec::new();
        let x = widened::<A, _>(x, &mut buffer);
        matmul_transposed([x.len() / hidden, num_experts, hidden], x, router_gate, logits)?;
        if let Some(bias) = bias {
            for (logit, bias) in logits.iter_mut().zip(bias.iter().cycle()) {
                *logit += bias.widen();
            }
        }
        Ok(())
    })?;
    Ok(logits)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::sample::Sampler;
    use super::*;

    #[test]
    fn sums_products_over_columns() {
        let (num_tokens, num_experts, hidden) = (130, 5, 7);
        let mut sampler = Sampler::new(8);
        let x: Vec<bf16> = sampler.elements(num_tokens * hidden);
        let gate: Vec<f32> = sampler.elements(num_experts * hidden);
        let bias: Vec<f32> = sampler.elements(num_experts);
        let inputs = RouterGemmInputs { x: &x, router_gate: &gate, bias: Some(&bias) };
        let logits = router_gemm_fwd::<f64>(num_experts, hidden, &inputs).unwrap();
        assert_eq!(logits.len(), num_tokens * num_experts);
        for (i, logit) in logits.iter().enumerate() {
            let x = &x[i / num_experts * hidden..][..hidden];
            let gate = &gate[i % num_experts * hidden..][..hidden];
            let sum: f64 = x.iter().zip(gate).map(|(x, g)| x.to_f64() * f64::from(*g)).sum();
            assert!((logit - sum - f64::from(bias[i % num_experts])).abs() < 1e-14);
        }
        let none = RouterGemmInputs { x: &[] as &[bf16], bias: None, ..inputs };
        assert!(router_gemm_fwd::<f64>(num_experts, hidden, &none).unwrap().is_empty());
    }

    #[test]
    fn rejects_wrong_lengths() {
        let run = |num_experts, hidden, lens: [usize; 3]| {
            let [x, gate, bias] = lens.map(|len| vec![0f32; len]);
            let inputs = RouterGemmInputs { x: &x, router_gate: &gate, bias: Some(&bias) };
            router_gemm_fwd::<f32>(num_experts, hidden, &inputs).is_ok()
        };
        assert!(run(3, 2, [4, 6, 3]));
        assert!(!run(3, 2, [5, 6, 3]) && !run(3, 2, [4, 5, 3]) && !run(3, 2, [4, 6, 2]));
        assert!(!run(0, 2, [4, 0, 0]) && !run(3, 0, [0, 0, 3]) && !run(4097, 1, [1, 4097, 4097]));
    }
}
