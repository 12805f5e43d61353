//! Every misreading of a block is detected: with one property misread, the output differs from the
//! recording.

use std::collections::BTreeSet;
use std::path::Path;

use moe_kernels::{
    ActivationFunction, GateUpLayout, GateUpTensors, Limit, MoeConfig, MoeInputs, MoeWeights,
    Normalization, Owned, Scoring, Selection, Typed, WeightOrder, WeightPosition, ZeroOutput,
    reference,
};
use moe_kernels_hf::Block;

use crate::backend::{Output, forward_cpu};
use crate::load::load_weights;
use crate::progress::Steps;
use crate::recording::Recording;
use crate::tokens;

type Weights = MoeWeights<Owned, f32>;

/// Misreads one property and changes the weights to those that such a reader would load. Returns
/// whether the block has the property.
type Misread = fn(&mut MoeConfig, &mut Weights) -> bool;

/// A larger distance is detected: the limit of every device in f32.
const LIMIT: f64 = 1e-5;

const MISREADINGS: &[(&str, Misread)] = &[
    ("renormalised or not", |config, _| {
        let router = &mut config.router;
        router.normalization = match router.normalization {
            // The sum is 1.
            Normalization::None if router.scoring == Scoring::SoftmaxSelected => return false,
            Normalization::None => Normalization::Sum { epsilon: 0.0 },
            _ => Normalization::None,
        };
        true
    }),
    ("normalised before slots are dropped", |config, _| {
        let Some(capacity) = &mut config.capacity else { return false };
        let by = std::mem::replace(&mut capacity.normalization, Normalization::None);
        config.router.normalization = by;
        by != Normalization::None
    }),
    ("softmax over all or over the selected", |config, _| {
        let router = &mut config.router;
        // A softmax over the selected requires a selection by logit.
        let alike = router.selects_by_logit() && router.normalization == Normalization::None;
        router.scoring = match router.scoring {
            Scoring::SoftmaxSelected => Scoring::Softmax,
            Scoring::Softmax if alike => Scoring::SoftmaxSelected,
            _ => return false,
        };
        router.selection = Selection::Logit;
        true
    }),
    ("another scoring function", |config, _| {
        let router = &mut config.router;
        router.scoring = match router.scoring {
            Scoring::Softmax | Scoring::SoftmaxSelected => Scoring::Sigmoid,
            Scoring::Sigmoid => Scoring::SqrtSoftplus,
            _ => Scoring::Softmax,
        };
        true
    }),
    ("a bias left out of the selection", |config, weights| {
        config.router.selection_bias = false;
        weights.router.selection_bias.take().is_some()
    }),
    ("every group open", |config, _| config.router.groups.take().is_some()),
    ("weights not scaled", |config, _| std::mem::replace(&mut config.router.scale, 1.0) != 1.0),
    ("experts not scaled", |config, weights| {
        config.router.expert_scale = false;
        weights.router.expert_scale.take().is_some()
    }),
    ("logits not multiplied", |config, _| {
        std::mem::replace(&mut config.router.logit_multiplier, 1.0) != 1.0
    }),
    ("logits not capped", |config, _| config.router.logit_softcap.take().is_some()),
    ("a router without its bias", |config, weights| {
        config.projection.bias = false;
        weights.router.bias.take().is_some()
    }),
    ("a router without its norm", |config, weights| {
        config.projection.norm = None;
        weights.router.norm.take().is_some()
    }),
    ("gate and up swapped", |config, weights| {
        let experts = &mut weights.experts;
        match &mut experts.gate_up {
            _ if !config.experts.gated => return false,
            GateUpTensors::Separate { gate, up } => std::mem::swap(gate, up),
            GateUpTensors::Fused(gate_up) => swap_features(config, gate_up),
        }
        if let Some(bias) = &mut experts.gate_up_bias {
            let flat = MoeConfig { hidden: 1, latent: None, ..*config };
            swap_features(&flat, bias);
        }
        true
    }),
    ("gate and up transposed", |config, _| {
        config.experts.gate_up_order = other_order(config.experts.gate_up_order);
        true
    }),
    ("down transposed", |config, _| {
        config.experts.down_order = other_order(config.experts.down_order);
        true
    }),
    ("gate and up in another order", |config, _| {
        let experts = &mut config.experts;
        experts.gate_up = match experts.gate_up {
            GateUpLayout::Concatenated if experts.gated => GateUpLayout::Interleaved,
            GateUpLayout::Interleaved => GateUpLayout::Concatenated,
            _ => return false,
        };
        true
    }),
    ("another activation", |config, _| {
        let activation = &mut config.experts.activation;
        activation.function = match activation.function {
            ActivationFunction::Silu => ActivationFunction::Relu,
            _ => ActivationFunction::Silu,
        };
        if matches!(activation.limit, Limit::SoftCap { .. }) {
            activation.limit = Limit::None;
        }
        activation.alpha = 1.0;
        true
    }),
    ("the other GELU", |config, _| {
        let function = &mut config.experts.activation.function;
        *function = match function {
            ActivationFunction::Gelu => ActivationFunction::GeluTanh,
            ActivationFunction::GeluTanh => ActivationFunction::Gelu,
            _ => return false,
        };
        true
    }),
    ("no limit", |config, _| {
        let limit = &mut config.experts.activation.limit;
        std::mem::replace(limit, Limit::None) != Limit::None
    }),
    ("a limit at the other end", |config, _| {
        let limit = &mut config.experts.activation.limit;
        *limit = match *limit {
            Limit::Before { limit } => Limit::After { limit },
            Limit::After { limit } => Limit::Before { limit },
            _ => return false,
        };
        true
    }),
    ("no slope", |config, _| std::mem::replace(&mut config.experts.activation.alpha, 1.0) != 1.0),
    ("nothing added to up", |config, _| {
        std::mem::replace(&mut config.experts.activation.up_offset, 0.0) != 0.0
    }),
    ("no biases of gate and up", |config, weights| {
        config.experts.gate_up_bias = false;
        weights.experts.gate_up_bias.take().is_some()
    }),
    ("no bias of down", |config, weights| {
        config.experts.down_bias = false;
        weights.experts.down_bias.take().is_some()
    }),
    ("no bias of the output", |config, weights| {
        config.experts.output_bias = false;
        weights.experts.output_bias.take().is_some()
    }),
    ("outputs of experts not normed", |config, weights| {
        config.experts.post_norm = None;
        weights.experts.post_norm.take().is_some()
    }),
    ("weights applied elsewhere", |config, _| {
        let position = &mut config.experts.weight_position;
        *position = match position {
            WeightPosition::Output => WeightPosition::Input,
            WeightPosition::Input | WeightPosition::Inside => WeightPosition::Output,
        };
        true
    }),
    ("no shared expert", |config, weights| {
        config.shared = None;
        weights.shared.take().is_some()
    }),
    ("a shared expert without its gate", |config, weights| {
        let (Some(shared), Some(weights)) = (&mut config.shared, &mut weights.shared) else {
            return false;
        };
        shared.sigmoid_gate = false;
        weights.sigmoid_gate.take().is_some()
    }),
    ("summed or averaged", |config, _| {
        config.shared.as_mut().is_some_and(|shared| {
            shared.average = !shared.average;
            true
        })
    }),
    ("a shared expert without its limit", |config, _| {
        config.shared.as_mut().is_some_and(|shared| {
            std::mem::replace(&mut shared.activation.limit, Limit::None) != Limit::None
        })
    }),
    ("a latent width not normed", |config, weights| {
        let (Some(latent), Some(weights)) = (&mut config.latent, &mut weights.latent) else {
            return false;
        };
        latent.norm = None;
        weights.norm.take().is_some()
    }),
    ("the output not normed", |config, weights| {
        config.output_norm = None;
        weights.output_norm.take().is_some()
    }),
    ("the other kind of experts without weights", |config, _| {
        config.zero_experts.as_mut().is_some_and(|zero| {
            zero.output = match zero.output {
                ZeroOutput::Identity => ZeroOutput::Zero,
                ZeroOutput::Zero => ZeroOutput::Identity,
            };
            true
        })
    }),
    ("chosen by score, not by a table", |config, weights| {
        config.router.selection = Selection::Score;
        weights.router.table.take().is_some()
    }),
    ("no capacity", |config, _| config.capacity.take().is_some()),
];

fn other_order(order: WeightOrder) -> WeightOrder {
    match order {
        WeightOrder::OutIn => WeightOrder::InOut,
        WeightOrder::InOut => WeightOrder::OutIn,
    }
}

/// Exchanges the features of gate and up.
fn swap_features(config: &MoeConfig, gate_up: &mut [f32]) {
    let (intermediate, inner) = (config.intermediate, config.expert_hidden());
    let (features, before) = (2 * intermediate, gate_up.to_vec());
    for (index, element) in gate_up.iter_mut().enumerate() {
        let stride = match config.experts.gate_up_order {
            WeightOrder::OutIn => inner,
            WeightOrder::InOut => 1,
        };
        let feature = index / stride % features;
        let other = match config.experts.gate_up {
            GateUpLayout::Interleaved => feature ^ 1,
            _ => (feature + intermediate) % features,
        };
        *element = before[index - feature * stride + other * stride];
    }
}

/// The output with the selection's bias added to the scores that become weights.
fn bias_in_weights(
    config: &MoeConfig,
    inputs: &MoeInputs<Owned, f32>,
    weights: &Weights,
) -> Output<f32> {
    let (host, held) = (inputs.as_host(), weights.as_host());
    let router = &config.router;
    let logits = reference::router_logits::<f64, f32>(config, &host, &held).unwrap();
    let (Typed::F32(logits) | Typed::Element(logits)) = logits;
    let routing = reference::moe_layer_route_fwd::<f32, f32>(config, &host, &held).unwrap();
    let (experts, bias) =
        (config.router_experts(), weights.router.selection_bias.as_ref().unwrap());
    let mut routing_weights = Vec::new();
    for (logits, ids) in logits.chunks(experts).zip(routing.expert_ids.chunks(config.top_k)) {
        let z: Vec<f64> = logits.iter().map(|z| f64::from(z * router.logit_multiplier)).collect();
        let most = z.iter().copied().fold(f64::MIN, f64::max);
        let all: f64 = z.iter().map(|z| (z - most).exp()).sum();
        let score = |id: &u32| {
            let z = z[*id as usize];
            let score = match router.scoring {
                Scoring::Sigmoid => 1.0 / (1.0 + (-z).exp()),
                Scoring::SqrtSoftplus => z.exp().ln_1p().sqrt(),
                _ => (z - most).exp() / all,
            };
            // Sinks have no bias.
            score + bias.get(*id as usize).map_or(0.0, |bias| f64::from(*bias))
        };
        let scores: Vec<f64> = ids.iter().map(score).collect();
        let by = match router.normalization {
            Normalization::None => 1.0,
            _ => scores.iter().sum(),
        };
        routing_weights.extend(scores.iter().map(|score| (score / by) as f32 * router.scale));
    }
    let (x, ids) = (host.x, &routing.expert_ids);
    let y = reference::moe_layer_experts_fwd::<f32, f32>(config, x, ids, &routing_weights, &held)
        .unwrap();
    let logits = vec![0.0; x.len() / config.hidden * config.router_experts()];
    Output { logits, y, expert_ids: routing.expert_ids, weights: routing_weights }
}

/// Returns whether the block has the misread property, and the output.
type Reader<'r> = &'r dyn Fn(MoeConfig, MoeInputs<Owned, f32>, Weights) -> (bool, Output<f32>);

/// Runs a block with this configuration and these weights.
fn run(config: &MoeConfig, mut inputs: MoeInputs<Owned, f32>, weights: &Weights) -> Output<f32> {
    if config.router.selection != Selection::Given {
        inputs.token_ids = None;
    }
    if config.check().is_err() {
        // An invalid configuration is detected before the block runs.
        let tokens = inputs.x.len() / config.hidden;
        let (slots, logits) = (tokens * config.top_k, vec![0.0; tokens * config.router_experts()]);
        let (expert_ids, routing_weights) = (vec![u32::MAX; slots], vec![f32::NAN; slots]);
        let y = vec![f32::NAN; inputs.x.len()];
        return Output { logits, y, expert_ids, weights: routing_weights };
    }
    forward_cpu(config, &inputs, weights, &mut Steps::default()).unwrap()
}

/// Returns whether the output of this reader differs from the recording; `None` if no block has the
/// misread property.
fn is_detected(recording: &Recording, reader: Reader<'_>) -> Option<bool> {
    let checkpoint = recording.checkpoint().unwrap();
    let file = recording.file().unwrap();
    let layers = recording.layers(&checkpoint, &file).unwrap();
    let mut applies = false;
    let by = |block: &Block, inputs: MoeInputs<Owned, f32>, _: &mut Steps| {
        let (misread, output) = reader(*block.config(), inputs, load_weights(block)?);
        applies |= misread;
        Ok(output)
    };
    let made = tokens::forward(&layers, &file, &mut Steps::default(), by).unwrap();
    let far = recording.distance(&file, &layers, &made).unwrap();
    // A distance that is NaN is not near.
    let near = far.relative <= LIMIT && far.other_experts == 0;
    applies.then_some(!near)
}

/// Misreadings without effect: the recording, the misreading, and the reason.
const WITHOUT_EFFECT: &[(&str, &str, &str)] = &[
    ("axk1-tiny", "summed or averaged", "a norm of the output takes a factor out"),
    ("nllb-moe-tiny (capacity)", "renormalised or not", "capacity normalises what it keeps"),
    ("nllb-moe-tiny (capacity)", "softmax over all or over the selected", "as above"),
    (
        "switch-transformers-tiny",
        "weights applied elsewhere",
        "ReLU without biases passes factors on",
    ),
    ("switch-transformers-tiny (capacity)", "weights applied elsewhere", "as above"),
    (
        "switch-transformers-tiny",
        "no capacity",
        "no expert is full; the other recording has full experts",
    ),
];

#[test]
fn every_misreading_is_detected() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let mut missed = Vec::new();
    let mut seen = BTreeSet::new();
    for recording in Recording::of_folder(&fixtures).unwrap() {
        let mut check = |name: &'static str, detected: Option<bool>| {
            let no_effect =
                WITHOUT_EFFECT.iter().any(|(of, what, _)| *of == recording.name && *what == name);
            match detected {
                Some(true) => drop(seen.insert(name)),
                Some(false) if !no_effect => missed.push(format!("{}: {name}", recording.name)),
                _ => {}
            }
            assert!(
                !no_effect || detected == Some(false),
                "{}: {name} is detected",
                recording.name
            );
        };
        let right = is_detected(&recording, &|config, inputs, weights| {
            (true, run(&config, inputs, &weights))
        });
        assert_eq!(right, Some(false), "{}", recording.name);
        for &(name, misread) in MISREADINGS {
            let reader =
                |mut config: MoeConfig, inputs: MoeInputs<Owned, f32>, mut weights: Weights| {
                    let misreads = misread(&mut config, &mut weights);
                    (misreads, run(&config, inputs, &weights))
                };
            check(name, is_detected(&recording, &reader));
        }
        let reader =
            |config: MoeConfig, inputs: MoeInputs<Owned, f32>, weights: Weights| match weights
                .router
                .selection_bias
                .is_some()
                && weights.router.router_gate.is_some()
            {
                true => (true, bias_in_weights(&config, &inputs, &weights)),
                false => (false, run(&config, inputs, &weights)),
            };
        check("a bias in the weights", is_detected(&recording, &reader));
    }
    assert!(missed.is_empty(), "not detected:\n{}", missed.join("\n"));
    // Each misreading applies to some family.
    for (name, _) in MISREADINGS {
        assert!(seen.contains(name), "{name}");
    }
}
