//! The layer: the operations one after the other, without rounding in between.

use super::accum::{Accum, Element};
use super::combine::{CombineInputs, combine_fwd};
use super::expert_weights::{GateUpWeights, LinearWeights};
use super::grouped_gemm::{grouped_gemm_fwd, grouped_gemm_gate_up_fwd};
use super::plan::{Plan, plan_fwd};
use super::route::{RouteInputs, Routing, route_fwd};
use crate::config::MoeConfig;
use crate::dtype::Dtype;
use crate::error::{Result, check_len, product};

/// A whole layer from the logits on: `x` `[T, H]`, `logits` `[T, E]`, `gate_up` `[E, 2I, H]`,
/// `down` `[E, H, I]` to `y` `[T, H]`. `T` follows from the length of `x`.
///
/// Nothing is rounded to `D` on the way: this is the layer as mathematics, in the precision of `A`.
///
/// # Errors
/// A configuration out of range, or a length that is not the shape's.
pub fn moe_layer_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    x: &[D],
    logits: &[D],
    gate_up: &[D],
    down: &[D],
) -> Result<Vec<A>> {
    let (routing, plan) = route_and_plan::<A, D>(config, x, logits)?;
    let shape = config.routing(x.len() / config.hidden);
    let (hidden, intermediate) = (config.hidden, config.intermediate);
    let (gate_up, down) = (
        GateUpWeights::fused(gate_up),
        LinearWeights { w: down, bias: None, order: config.experts.down_order },
    );
    let act = grouped_gemm_gate_up_fwd::<A, D>(
        &plan,
        &config.experts,
        intermediate,
        hidden,
        x,
        gate_up,
        None::<&[A]>,
        true,
    )?;
    let yp = grouped_gemm_fwd::<A, D>(&plan, hidden, intermediate, &act, down, false)?;
    combine_fwd(&shape, &plan, hidden, &CombineInputs::new(&yp, &routing.weights))
}

/// A whole layer with its router projection: `gate` `[E, H]`, the rest as in [`moe_layer_fwd`].
///
/// The logits are rounded to `D` before the router reads them, as a model computes them in its own
/// element type and as [`moe_layer_fwd`] takes them.
///
/// # Errors
/// A configuration out of range, or a length that is not the shape's.
pub fn moe_layer_with_gate_fwd<A: Accum, D: Dtype>(
    config: &MoeConfig,
    x: &[D],
    gate: &[D],
    gate_up: &[D],
    down: &[D],
) -> Result<Vec<A>> {
    let logits: Vec<D> = round(&router_logits::<A, D>(config, x, gate)?);
    moe_layer_fwd(config, x, &logits, gate_up, down)
}

/// The router projection: `logits` `[T, E]` = `x` `[T, H]` times the transpose of `gate` `[E, H]`.
///
/// # Errors
/// A configuration out of range, or a length that is not the shape's.
pub fn router_logits<A: Accum, D: Dtype>(
    config: &MoeConfig,
    x: &[D],
    gate: &[D],
) -> Result<Vec<A>> {
    const OP: &str = "router_logits";
    config.check_layer()?;
    let num_tokens = num_tokens(OP, config, x.len())?;
    check_len(OP, "gate", gate.len(), product(OP, "E * H", config.num_experts, config.hidden)?)?;
    // A dense product is a grouped one with a single expert.
    let plan = Plan {
        expert_offsets: vec![0, num_tokens as i32],
        row_of_slot: (0..num_tokens as i32).collect(),
        token_of_row: (0..num_tokens as i32).collect(),
        tiles: Vec::new(),
    };
    let gate = LinearWeights::new(gate);
    grouped_gemm_fwd::<A, D>(&plan, config.num_experts, config.hidden, x, gate, false)
}

/// Each number as the nearest element, ties to even.
pub fn round<A: Accum, D: Dtype>(values: &[A]) -> Vec<D> {
    values.iter().map(|value| value.round()).collect()
}

/// Checks what a layer reads besides its weights, and routes it.
pub(super) fn route_and_plan<A: Accum, D: Dtype>(
    config: &MoeConfig,
    x: &[impl Element<A>],
    logits: &[D],
) -> Result<(Routing<A>, Plan)> {
    config.check_layer()?;
    let shape = config.routing(num_tokens("moe_layer_fwd", config, x.len())?);
    let routing = route_fwd(&shape, &config.router, &RouteInputs::new(logits))?;
    // Tiles are for kernels; the products of this module cut rows on their own.
    let plan = plan_fwd(&shape, shape.slots().max(1), &routing.expert_ids)?;
    Ok((routing, plan))
}

/// `T`, of which the whole rows of `x` tell.
fn num_tokens(op: &'static str, config: &MoeConfig, x_len: usize) -> Result<usize> {
    let num_tokens = x_len / config.hidden;
    check_len(op, "x", x_len, num_tokens * config.hidden)?;
    config.routing(num_tokens).check(op)?;
    Ok(num_tokens)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::sample::Sampler;
    use super::*;
    use crate::config::RouterConfig;

    fn config(num_experts: usize, top_k: usize) -> MoeConfig {
        let router = RouterConfig::softmax_top_k(true);
        MoeConfig { router, ..MoeConfig::new(7, 5, num_experts, top_k) }
    }

    /// The layer without plan, rows or blocks: each token asks its experts.
    fn token_by_token(
        config: &MoeConfig,
        x: &[f32],
        logits: &[f32],
        gate_up: &[f32],
        down: &[f32],
    ) -> Vec<f64> {
        let (h, i, e) = (config.hidden, config.intermediate, config.num_experts);
        let dot =
            |a: &[f64], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum() };
        let mut y = Vec::new();
        for (x, logits) in x.chunks(h).zip(logits.chunks(e)) {
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let mut sum = vec![0.0; h];
            let shape = config.routing(1);
            let routing =
                route_fwd::<f64, f32>(&shape, &config.router, &RouteInputs::new(logits)).unwrap();
            for (id, weight) in routing.expert_ids.into_iter().zip(routing.weights) {
                let gate_up = &gate_up[id as usize * 2 * i * h..][..2 * i * h];
                let down = &down[id as usize * h * i..][..h * i];
                let sums: Vec<f64> = gate_up.chunks(h).map(|w| dot(&x, w)).collect();
                let act = |j: usize| sums[j] / (1.0 + (-sums[j]).exp()) * sums[i + j];
                let act: Vec<f64> = (0..i).map(act).collect();
                for (sum, w) in sum.iter_mut().zip(down.chunks(i)) {
                    *sum += weight * dot(&act, w);
                }
            }
            y.extend(sum);
        }
        y
    }

    #[test]
    fn agrees_with_token_by_token() {
        for (num_tokens, num_experts, top_k) in [(9, 4, 2), (1, 1, 1), (5, 3, 3), (0, 4, 2)] {
            let config = config(num_experts, top_k);
            let mut sampler = Sampler::new(2);
            let x = sampler.elements(num_tokens * config.hidden);
            let logits = sampler.elements(num_tokens * num_experts);
            let gate_up = sampler.elements(config.gate_up_len());
            let down = sampler.elements(config.down_len());
            let want = token_by_token(&config, &x, &logits, &gate_up, &down);
            let got = moe_layer_fwd::<f64, f32>(&config, &x, &logits, &gate_up, &down).unwrap();
            assert_eq!(got.len(), want.len());
            assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-12));
        }
    }

    #[test]
    fn gate_gives_the_logits_in_the_element_type() {
        let config = config(4, 2);
        let mut sampler = Sampler::new(4);
        let x: Vec<bf16> = sampler.elements(6 * config.hidden);
        let gate: Vec<bf16> = sampler.elements(config.num_experts * config.hidden);
        let gate_up = sampler.elements(config.gate_up_len());
        let down = sampler.elements(config.down_len());
        let logits = router_logits::<f64, bf16>(&config, &x, &gate).unwrap();
        for (i, logit) in logits.iter().enumerate() {
            let (token, expert) = (i / config.num_experts, i % config.num_experts);
            let x = &x[token * config.hidden..][..config.hidden];
            let gate = &gate[expert * config.hidden..][..config.hidden];
            let want: f64 = x.iter().zip(gate).map(|(x, w)| x.to_f64() * w.to_f64()).sum();
            assert!((logit - want).abs() < 1e-14);
        }
        let rounded: Vec<bf16> = round(&logits);
        assert_eq!(
            moe_layer_with_gate_fwd::<f64, bf16>(&config, &x, &gate, &gate_up, &down).unwrap(),
            moe_layer_fwd::<f64, bf16>(&config, &x, &rounded, &gate_up, &down).unwrap(),
        );
        assert!(router_logits::<f32, bf16>(&config, &[], &gate).unwrap().is_empty());
    }

    #[test]
    fn wrong_lengths() {
        let config = config(4, 2);
        let run = |x: usize, logits: usize, gate_up: usize, down: usize| {
            let zeros = |len| vec![0.0f32; len];
            let (x, logits, gate_up, down) = (zeros(x), zeros(logits), zeros(gate_up), zeros(down));
            moe_layer_fwd::<f32, f32>(&config, &x, &logits, &gate_up, &down).is_ok()
        };
        let (gate_up, down) = (config.gate_up_len(), config.down_len());
        assert!(run(14, 8, gate_up, down));
        assert!(!run(13, 8, gate_up, down) && !run(14, 4, gate_up, down));
        assert!(!run(14, 8, gate_up + 1, down) && !run(14, 8, gate_up, down - 1));
        assert!(router_logits::<f32, f32>(&config, &[0.0; 7], &[0.0; 27]).is_err());
        let broken = MoeConfig { hidden: 0, ..config };
        assert!(moe_layer_fwd::<f32, f32>(&broken, &[], &[], &[], &[]).is_err());
        assert!(router_logits::<f32, f32>(&broken, &[], &[]).is_err());
    }
}
