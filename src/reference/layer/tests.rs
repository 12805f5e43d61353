use half::bf16;

use super::*;
use crate::config::{CapacityConfig, CapacityLimit, LatentConfig, Priority, SharedConfig};
use crate::config::{RouterConfig, ZeroExperts};
use crate::reference::route::RouteInputs;
use crate::reference::sample::Sampler;
use crate::tensors::{LatentWeights, SharedWeights};

fn config(num_experts: usize, top_k: usize) -> MoeConfig {
    let router = RouterConfig::softmax_top_k(true);
    MoeConfig { router, ..MoeConfig::new(7, 5, num_experts, top_k) }
}

fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// `down(silu(gate(x)) * up(x))`, feature by feature.
fn swiglu(x: &[f64], gate_up: &[f32], down: &[f32]) -> Vec<f64> {
    let intermediate = gate_up.len() / x.len() / 2;
    let sums: Vec<f64> = gate_up.chunks(x.len()).map(|w| dot(x, w)).collect();
    let act = |j: usize| sums[j] / (1.0 + (-sums[j]).exp()) * sums[intermediate + j];
    let act: Vec<f64> = (0..intermediate).map(act).collect();
    down.chunks(intermediate).map(|w| dot(&act, w)).collect()
}

/// The routed experts token by token, without plan, rows or blocks.
fn token_by_token(
    config: &MoeConfig,
    x: &[f32],
    logits: &[f32],
    gate_up: &[f32],
    down: &[f32],
) -> Vec<f64> {
    let (h, i, e) = (config.hidden, config.intermediate, config.num_experts);
    let mut y = Vec::new();
    for (x, logits) in x.chunks(h).zip(logits.chunks(e)) {
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let mut sum = vec![0.0; h];
        let shape = config.routing(1);
        let routing =
            route_fwd::<f64, f32>(&shape, &config.router, &RouteInputs::new(logits)).unwrap();
        for (id, weight) in routing.expert_ids.into_iter().zip(routing.routing_weights) {
            let gate_up = &gate_up[id as usize * 2 * i * h..][..2 * i * h];
            let down = &down[id as usize * h * i..][..h * i];
            let yp = swiglu(&x, gate_up, down);
            sum.iter_mut().zip(yp).for_each(|(sum, y)| *sum += weight * y);
        }
        y.extend(sum);
    }
    y
}

fn assert_near(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-12));
}

/// The tensors of a plain layer.
struct Case {
    config: MoeConfig,
    x: Vec<f32>,
    logits: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

impl Case {
    fn new(config: MoeConfig, num_tokens: usize) -> Self {
        let mut sampler = Sampler::new(2);
        Self {
            config,
            x: sampler.elements(num_tokens * config.hidden),
            logits: sampler.elements(num_tokens * config.router_experts()),
            gate_up: sampler.elements(config.gate_up_len()),
            down: sampler.elements(config.down_len()),
        }
    }

    fn inputs(&self) -> MoeInputs<Host<'_>, f32> {
        MoeInputs::with_logits(&self.x[..], &self.logits[..])
    }

    fn weights(&self) -> MoeWeights<Host<'_>, f32> {
        MoeWeights::plain(&self.gate_up[..], &self.down[..])
    }

    fn forward(&self) -> Vec<f64> {
        moe_layer_fwd(&self.config, &self.inputs(), &self.weights()).unwrap()
    }

    fn routed(&self) -> Vec<f64> {
        token_by_token(&self.config, &self.x, &self.logits, &self.gate_up, &self.down)
    }
}

#[test]
fn agrees_with_token_by_token() {
    for (num_tokens, num_experts, top_k) in [(9, 4, 2), (1, 1, 1), (5, 3, 3), (0, 4, 2)] {
        let case = Case::new(config(num_experts, top_k), num_tokens);
        assert_near(&case.forward(), &case.routed());
    }
}

#[test]
fn logits_are_rounded_to_their_type() {
    let mut config = config(4, 2);
    let mut sampler = Sampler::new(4);
    let x: Vec<bf16> = sampler.elements(6 * config.hidden);
    let gate: Vec<bf16> = sampler.elements(config.num_experts * config.hidden);
    let gate_up: Vec<bf16> = sampler.elements(config.gate_up_len());
    let down: Vec<bf16> = sampler.elements(config.down_len());
    let inputs = MoeInputs::<Host<'_>, bf16>::new(&x);
    let weights = || MoeWeights::<Host<'_>, bf16>::plain(&gate_up, &down).with_router_gate(&gate);
    let want = |at: usize| -> f64 {
        let (token, expert) = (at / config.num_experts, at % config.num_experts);
        let x = &x[token * config.hidden..][..config.hidden];
        let gate = &gate[expert * config.hidden..][..config.hidden];
        x.iter().zip(gate).map(|(x, w)| x.to_f64() * w.to_f64()).sum()
    };
    let narrow: Vec<bf16> = (0..24).map(|at| bf16::from_f64(want(at))).collect();
    let logits = router_logits::<f64, bf16>(&config, &inputs, &weights()).unwrap();
    assert_eq!(logits.element(), Some(&narrow));
    let given = MoeInputs::<Host<'_>, bf16>::with_logits(&x, &narrow);
    assert_eq!(
        moe_layer_fwd::<f64, bf16>(&config, &inputs, &weights()).unwrap(),
        moe_layer_fwd::<f64, bf16>(&config, &given, &weights()).unwrap(),
    );
    config.projection.f32_logits = true;
    let wide: Vec<f32> = (0..24).map(|at| want(at) as f32).collect();
    let logits = router_logits::<f64, bf16>(&config, &inputs, &weights()).unwrap();
    assert_eq!(logits.f32(), Some(&wide));
}

#[test]
fn shared_and_identity_experts_are_added() {
    let mut sampler = Sampler::new(9);
    let (gate_up, down): (Vec<f32>, Vec<f32>) =
        (sampler.elements(2 * 3 * 7), sampler.elements(7 * 3));
    let gate: Vec<f32> = sampler.elements(7);
    let (gate_up_bias, down_bias): (Vec<f32>, Vec<f32>) =
        (sampler.elements(2 * 3), sampler.elements(7));
    for (sigmoid_gate, average, biased) in
        [(false, false, false), (true, false, true), (true, true, false), (false, true, true)]
    {
        let shared = SharedConfig {
            gate_up_bias: biased,
            down_bias: biased,
            sigmoid_gate,
            average,
            ..SharedConfig::new(3)
        };
        let case = Case::new(MoeConfig { shared: Some(shared), ..config(4, 2) }, 5);
        let mut weights = case.weights();
        weights.shared = Some(SharedWeights {
            gate_up: &gate_up,
            gate_up_bias: biased.then_some(&gate_up_bias),
            down: &down,
            down_bias: biased.then_some(&down_bias),
            sigmoid_gate: sigmoid_gate.then_some(&gate),
        });
        let got = moe_layer_fwd::<f64, f32>(&case.config, &case.inputs(), &weights).unwrap();
        let mut want = case.routed();
        for (y, x) in want.chunks_mut(7).zip(case.x.chunks(7)) {
            let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let part = if sigmoid_gate { 1.0 / (1.0 + (-dot(&x, &gate)).exp()) } else { 1.0 };
            let half = if average { 0.5 } else { 1.0 };
            let shared = match biased {
                // A bias equals the weight of a feature that is always 1.
                true => {
                    let with = |w: &[f32], bias: &[f32], in_features: usize| -> Vec<f32> {
                        let rows = w.chunks(in_features).zip(bias);
                        rows.flat_map(|(w, b)| [w, &[*b]].concat()).collect()
                    };
                    let x = [&x[..], &[1.0]].concat();
                    let no_down: Vec<f32> =
                        (0..9).map(|at| f32::from(u8::from(at % 4 == 0))).collect();
                    let act = swiglu(&x, &with(&gate_up, &gate_up_bias, 7), &no_down);
                    let act = [&act[..], &[1.0]].concat();
                    with(&down, &down_bias, 3).chunks(4).map(|w| dot(&act, w)).collect()
                }
                false => swiglu(&x, &gate_up, &down),
            };
            y.iter_mut().zip(shared).for_each(|(y, s)| *y = half * (*y + part * s));
        }
        assert_near(&got, &want);
    }
    // The presence and the length of biases are checked.
    let biased = SharedConfig { gate_up_bias: true, down_bias: true, ..SharedConfig::new(3) };
    let case = Case::new(MoeConfig { shared: Some(biased), ..config(4, 2) }, 5);
    let (good_gate_up, good_down) = (Some(&gate_up_bias[..]), Some(&down_bias[..]));
    for (gate_up_bias, down_bias, name) in [
        (None, good_down, "shared.gate_up_bias"),
        (good_gate_up, None, "shared.down_bias"),
        (Some(&gate_up_bias[1..]), good_down, "shared.gate_up_bias"),
        (good_gate_up, Some(&down_bias[1..]), "shared.down_bias"),
    ] {
        let mut weights = case.weights();
        let shared = SharedWeights::new(&gate_up[..], &down[..]);
        weights.shared = Some(SharedWeights { gate_up_bias, down_bias, ..shared });
        let error = moe_layer_fwd::<f64, f32>(&case.config, &case.inputs(), &weights);
        assert!(error.unwrap_err().to_string().contains(name));
    }
    // All tokens select the zero expert, with a weight of 1.
    let zero = |output| Some(ZeroExperts { count: 1, output });
    for (output, part) in [(ZeroOutput::Identity, 1.0), (ZeroOutput::Zero, 0.0)] {
        let config = MoeConfig { zero_experts: zero(output), ..config(2, 1) };
        let mut case = Case::new(config, 4);
        case.logits = [0.0, 0.0, 9.0].repeat(4);
        let want: Vec<f64> = case.x.iter().map(|x| part * f64::from(*x)).collect();
        assert_near(&case.forward(), &want);
    }
}

/// A projection that doubles the tokens has no effect if the weights of gate and up are halved.
#[test]
fn latent_width_projects_tokens_in_and_out() {
    let mut case = Case::new(config(3, 2), 5);
    let want: Vec<f64> = case.routed().iter().map(|y| 4.0 * y).collect();
    case.config.latent = Some(LatentConfig { hidden: 7, norm: None });
    case.gate_up.iter_mut().for_each(|w| *w *= 0.5);
    let times = |factor: f32| -> Vec<f32> {
        (0..49).map(|i| if i / 7 == i % 7 { factor } else { 0.0 }).collect()
    };
    let (proj_in, proj_out) = (times(2.0), times(4.0));
    let mut weights = case.weights();
    weights.latent = Some(LatentWeights { proj_in: &proj_in, norm: None, proj_out: &proj_out });
    let got = moe_layer_fwd::<f64, f32>(&case.config, &case.inputs(), &weights).unwrap();
    assert_near(&got, &want);
}

/// Of three tokens that select one expert the first is kept; its normalised weight is 1.
#[test]
fn capacity_drops_and_normalises() {
    let mut case = Case::new(config(2, 1), 3);
    case.config.router = RouterConfig::softmax_top_k(false);
    case.logits = [0.0, 1.0].repeat(3);
    let (all, limit) = (case.forward(), CapacityLimit::Rows { rows: 1 });
    let keep_first = CapacityConfig::new(limit, Priority::Token);
    case.config.capacity = Some(keep_first);
    assert_eq!(case.forward(), [&all[..7], &[0.0; 14]].concat());
    let normalization = Normalization::Sum { epsilon: 0.0 };
    case.config.capacity = Some(CapacityConfig { normalization, ..keep_first });
    let whole: Vec<f64> = all.iter().map(|y| y * (1.0 + (-1f64).exp())).collect();
    assert_near(&case.forward(), &[&whole[..7], &[0.0; 14]].concat());
    let inputs = MoeInputs { sequence_tokens: Some(1), ..case.inputs() };
    let got = moe_layer_fwd::<f64, f32>(&case.config, &inputs, &case.weights()).unwrap();
    assert_near(&got, &whole);
}

#[test]
fn errors_name_the_tensor() {
    let case = Case::new(config(4, 2), 2);
    let forward = |inputs: &MoeInputs<Host<'_>, f32>, weights: &MoeWeights<Host<'_>, f32>| {
        moe_layer_fwd::<f32, f32>(&case.config, inputs, weights).map(|y| y.len())
    };
    assert_eq!(forward(&case.inputs(), &case.weights()), Ok(14));
    let message = |result: Result<usize>| result.unwrap_err().to_string();
    let short = MoeInputs::with_logits(&case.x[1..], &case.logits[..]);
    assert!(message(forward(&short, &case.weights())).contains("`x`"));
    let short = MoeInputs::with_logits(&case.x[..], &case.logits[4..]);
    assert!(message(forward(&short, &case.weights())).contains("`logits`"));
    let short = MoeWeights::plain(&case.gate_up[1..], &case.down[..]);
    assert!(message(forward(&case.inputs(), &short)).contains("`experts.gate_up`"));
    let short = MoeWeights::plain(&case.gate_up[..], &case.down[1..]);
    assert!(message(forward(&case.inputs(), &short)).contains("`experts.down`"));
    let short = case.weights().with_router_gate(&case.x[..8]);
    assert!(message(forward(&case.inputs(), &short)).contains("`router.router_gate`"));
    let without = MoeInputs::new(&case.x[..]);
    assert!(message(forward(&without, &case.weights())).contains("`router.router_gate`"));
    let mut unneeded = case.weights();
    unneeded.output_norm = Some(&case.x[..7]);
    assert!(message(forward(&case.inputs(), &unneeded)).contains("`output_norm`"));
    let broken = MoeConfig { hidden: 0, ..case.config };
    assert!(moe_layer_fwd::<f32, f32>(&broken, &case.inputs(), &case.weights()).is_err());
}
