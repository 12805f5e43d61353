//! Configurations as text: what is written is read again, for every type and every variant, and what is unknown is refused.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_str, from_value, json, to_string, to_value};

use super::*;
use crate::dtype::DType;

/// All variants of an enum. The match has no wildcard: it does not compile with a variant left out.
macro_rules! every {
    ($Enum:ident { $($pattern:pat => $value:expr,)* }) => {{
        let _complete = |it: $Enum| match it { $($pattern => (),)* };
        vec![$($value,)*]
    }};
}

trait Text: Serialize + DeserializeOwned + PartialEq + Debug {}
impl<T: Serialize + DeserializeOwned + PartialEq + Debug> Text for T {}

/// A value that is written and read again is the same.
fn comes_back<T: Text>(value: &T) {
    let text = to_string(value).unwrap();
    assert_eq!(from_str::<T>(&text).unwrap(), *value, "{text}");
}

/// Objects within `value`, itself among them, each with one field more than it has.
fn with_unknown_fields(value: &Value) -> Vec<Value> {
    let mut found = Vec::new();
    let Value::Object(object) = value else { return found };
    let mut more = object.clone();
    more.insert("no_such_field".into(), json!(1));
    found.push(Value::Object(more));
    for (key, inner) in object {
        for changed in with_unknown_fields(inner) {
            let mut whole = object.clone();
            whole.insert(key.clone(), changed);
            found.push(Value::Object(whole));
        }
    }
    found
}

fn holds<T: Text>(values: Vec<T>) {
    for value in &values {
        comes_back(value);
        for unknown in with_unknown_fields(&to_value(value).unwrap()) {
            let error = from_value::<T>(unknown.clone()).unwrap_err().to_string();
            // A variant with fields is an object with its name as the only key.
            let words = ["no_such_field", "map with a single key"];
            assert!(words.iter().any(|word| error.contains(word)), "{unknown}: {error}");
        }
    }
    // Variants differ in their text as well.
    let texts: std::collections::BTreeSet<String> =
        values.iter().map(|value| to_string(value).unwrap()).collect();
    assert_eq!(texts.len(), values.len(), "{texts:?}");
}

fn holds_variants<T: Text>(values: Vec<T>) {
    holds(values);
    for unknown in [json!("no_such_variant"), json!({ "no_such_variant": { "limit": 1.0 } })] {
        let error = from_value::<T>(unknown.clone()).unwrap_err().to_string();
        assert!(error.contains("no_such_variant"), "{unknown}: {error}");
    }
}

fn limits() -> Vec<Limit> {
    every!(Limit {
        Limit::None => Limit::None,
        Limit::Before { .. } => Limit::Before { limit: 7.0 },
        Limit::After { .. } => Limit::After { limit: 0.1 },
        Limit::SoftCap { .. } => Limit::SoftCap { gate: 1e-3, up: 2.5 },
    })
}

fn functions() -> Vec<ActivationFunction> {
    every!(ActivationFunction {
        ActivationFunction::Silu => ActivationFunction::Silu,
        ActivationFunction::Gelu => ActivationFunction::Gelu,
        ActivationFunction::GeluTanh => ActivationFunction::GeluTanh,
        ActivationFunction::Relu => ActivationFunction::Relu,
        ActivationFunction::ReluSquared => ActivationFunction::ReluSquared,
    })
}

fn scorings() -> Vec<Scoring> {
    every!(Scoring {
        Scoring::Softmax => Scoring::Softmax,
        Scoring::SoftmaxSelected => Scoring::SoftmaxSelected,
        Scoring::Sigmoid => Scoring::Sigmoid,
        Scoring::SqrtSoftplus => Scoring::SqrtSoftplus,
        Scoring::Logit => Scoring::Logit,
        Scoring::Sparsemixer { .. } => Scoring::Sparsemixer { jitter: 0.01, training: true },
    })
}

fn normalizations() -> Vec<Normalization> {
    every!(Normalization {
        Normalization::None => Normalization::None,
        Normalization::Sum { .. } => Normalization::Sum { epsilon: 1e-20 },
        Normalization::SumAtLeast { .. } => Normalization::SumAtLeast { min: 1.1920929e-7 },
        Normalization::PNorm { .. } => Normalization::PNorm { p: 2.0 },
    })
}

fn capacity_limits() -> Vec<CapacityLimit> {
    every!(CapacityLimit {
        CapacityLimit::Factor { .. } => CapacityLimit::Factor { factor: 1.1 },
        CapacityLimit::TokenFraction { .. } => CapacityLimit::TokenFraction { fraction: 0.15 },
        CapacityLimit::Rows { .. } => CapacityLimit::Rows { rows: 3 },
    })
}

fn priorities() -> Vec<Priority> {
    every!(Priority {
        Priority::Token => Priority::Token,
        Priority::Choice => Priority::Choice,
        Priority::Weight => Priority::Weight,
        Priority::ChoiceByTopWeight => Priority::ChoiceByTopWeight,
    })
}

#[test]
fn every_variant() {
    holds_variants(limits());
    holds_variants(functions());
    holds_variants(scorings());
    let trained = r#"{"sparsemixer": {"jitter": 0.02, "training": true}}"#;
    let trained: Scoring = from_str(trained).unwrap();
    assert_eq!(trained, Scoring::Sparsemixer { jitter: 0.02, training: true });
    holds_variants(normalizations());
    holds_variants(capacity_limits());
    holds_variants(priorities());
    holds_variants(every!(RouterStep {
        RouterStep::NoisyLogits => RouterStep::NoisyLogits,
        RouterStep::Logits => RouterStep::Logits,
        RouterStep::Scores => RouterStep::Scores,
    }));
    holds_variants(every!(Selection {
        Selection::Score => Selection::Score,
        Selection::Logit => Selection::Logit,
        Selection::Given => Selection::Given,
    }));
    holds_variants(every!(GroupScore {
        GroupScore::Max => GroupScore::Max,
        GroupScore::TopTwoSum => GroupScore::TopTwoSum,
    }));
    holds_variants(every!(Masked {
        Masked::NegativeInfinity => Masked::NegativeInfinity,
        Masked::Zero => Masked::Zero,
    }));
    holds_variants(every!(GateUpLayout {
        GateUpLayout::Concatenated => GateUpLayout::Concatenated,
        GateUpLayout::Interleaved => GateUpLayout::Interleaved,
        GateUpLayout::Separate => GateUpLayout::Separate,
    }));
    holds_variants(every!(WeightOrder {
        WeightOrder::OutIn => WeightOrder::OutIn,
        WeightOrder::InOut => WeightOrder::InOut,
    }));
    holds_variants(every!(WeightPosition {
        WeightPosition::Output => WeightPosition::Output,
        WeightPosition::Input => WeightPosition::Input,
        WeightPosition::Inside => WeightPosition::Inside,
    }));
    holds_variants(every!(ZeroOutput {
        ZeroOutput::Identity => ZeroOutput::Identity,
        ZeroOutput::Zero => ZeroOutput::Zero,
    }));
    let all = NoiseDistribution::ALL.to_vec();
    assert_eq!(
        all,
        every!(NoiseDistribution {
            NoiseDistribution::Uniform => NoiseDistribution::Uniform,
            NoiseDistribution::Normal => NoiseDistribution::Normal,
            NoiseDistribution::Gumbel => NoiseDistribution::Gumbel,
        })
    );
    holds_variants(all);
    holds_variants(DType::ALL.to_vec());
}

const NORM: RmsNorm = RmsNorm { epsilon: 1e-6, offset: 1.0, scale_first: true };

fn shared() -> SharedConfig {
    let text = r#"{"intermediate": 7, "gated": true, "sigmoid_gate": true, "average": true}"#;
    let shared: SharedConfig = from_str(text).unwrap();
    let activation = Activation { limit: limits()[3], ..Activation::default() };
    SharedConfig { activation, ..shared }
}

/// Every optional part is there.
fn full() -> MoeConfig {
    let groups =
        Groups { num_groups: 4, top_groups: 2, score: GroupScore::Max, masked: Masked::Zero };
    let mut capacity = CapacityConfig::new(CapacityLimit::Rows { rows: 5 }, Priority::Weight);
    capacity.overflow = 2;
    capacity.normalization = Normalization::Sum { epsilon: 0.5 };
    MoeConfig {
        projection: RouterProjection {
            f32_logits: true,
            bias: true,
            norm: Some(NORM),
            noise_gate: true,
        },
        router: RouterConfig {
            logit_multiplier: 0.1,
            logit_softcap: Some(30.0),
            scoring: Scoring::Sparsemixer { jitter: 0.02, training: false },
            selection: Selection::Given,
            selection_bias: true,
            groups: Some(groups),
            normalization: Normalization::PNorm { p: 3.0 },
            scale: 2.446,
            expert_scale: true,
            num_sinks: 2,
            noise_deviation: 0.5,
        },
        zero_experts: Some(ZeroExperts { count: 3, output: ZeroOutput::Identity }),
        capacity: Some(capacity),
        experts: ExpertConfig {
            activation: Activation {
                function: ActivationFunction::ReluSquared,
                alpha: 1.702,
                limit: Limit::Before { limit: 7.0 },
                up_offset: 1.0,
            },
            gated: true,
            gate_up_bias: true,
            down_bias: true,
            output_bias: true,
            gate_up: GateUpLayout::Interleaved,
            gate_up_order: WeightOrder::InOut,
            down_order: WeightOrder::InOut,
            weight_position: WeightPosition::Inside,
            post_norm: Some(NORM),
        },
        latent: Some(LatentConfig { hidden: 9, norm: Some(NORM) }),
        shared: Some(shared()),
        output_norm: Some(NORM),
        ..MoeConfig::new(64, 48, 8, 2)
    }
}

#[test]
fn every_struct() {
    let full = full();
    let MoeConfig { projection, router, experts, zero_experts, capacity, latent, .. } = full;
    holds(vec![full, MoeConfig::new(64, 48, 8, 2)]);
    holds(vec![projection, RouterProjection::default()]);
    holds(vec![router, RouterConfig::default(), RouterConfig::top_k_softmax()]);
    holds(vec![experts, ExpertConfig::default()]);
    holds(vec![experts.activation, Activation::default()]);
    holds(vec![zero_experts.unwrap()]);
    holds(vec![capacity.unwrap()]);
    holds(vec![latent.unwrap(), LatentConfig { hidden: 1, norm: None }]);
    holds(vec![shared()]);
    holds(vec![NORM]);
    holds(vec![router.groups.unwrap()]);
    holds(vec![RoutingShape { num_tokens: 3, num_experts: 2, top_k: 1 }]);
    for limit in limits() {
        holds(vec![Activation { limit, ..experts.activation }]);
    }
    for scoring in scorings() {
        holds(vec![RouterConfig { scoring, ..router }]);
    }
    for normalization in normalizations() {
        holds(vec![RouterConfig { normalization, ..router }]);
    }
    for limit in capacity_limits() {
        for priority in priorities() {
            holds(vec![CapacityConfig::new(limit, priority)]);
        }
    }
}

/// The words of the text stay: files that users have written depend on them.
#[test]
fn the_text_of_a_configuration() {
    let text = r#"{
        "hidden": 64, "intermediate": 48, "num_experts": 8, "top_k": 2,
        "router": {
            "scoring": {"sparsemixer": {"jitter": 0.02}}, "selection": "logit",
            "normalization": {"sum_at_least": {"min": 0.25}}, "scale": 2.5,
            "groups": {"num_groups": 4, "top_groups": 2, "score": "top_two_sum", "masked": "negative_infinity"}
        },
        "capacity": {"limit": {"factor": {"factor": 1.25}}, "priority": "choice_by_top_weight"},
        "experts": {
            "activation": {"function": "gelu_tanh", "limit": {"soft_cap": {"gate": 4.0, "up": 7.0}}},
            "gate_up": "interleaved", "gate_up_order": "in_out", "weight_position": "inside"
        },
        "zero_experts": {"count": 1, "output": "identity"},
        "shared": {"intermediate": 7, "gated": false},
        "output_norm": {"epsilon": 1e-6, "offset": 0.0}
    }"#;
    let router = RouterConfig {
        scoring: Scoring::Sparsemixer { jitter: 0.02, training: false },
        selection: Selection::Logit,
        normalization: Normalization::SumAtLeast { min: 0.25 },
        scale: 2.5,
        groups: Some(Groups {
            num_groups: 4,
            top_groups: 2,
            score: GroupScore::TopTwoSum,
            masked: Masked::NegativeInfinity,
        }),
        ..RouterConfig::default()
    };
    let limit = CapacityLimit::Factor { factor: 1.25 };
    let experts = ExpertConfig {
        activation: Activation {
            function: ActivationFunction::GeluTanh,
            limit: Limit::SoftCap { gate: 4.0, up: 7.0 },
            ..Activation::default()
        },
        gate_up: GateUpLayout::Interleaved,
        gate_up_order: WeightOrder::InOut,
        weight_position: WeightPosition::Inside,
        ..ExpertConfig::default()
    };
    let got: MoeConfig = from_str(text).unwrap();
    let wanted = MoeConfig {
        router,
        experts,
        capacity: Some(CapacityConfig::new(limit, Priority::ChoiceByTopWeight)),
        zero_experts: Some(ZeroExperts { count: 1, output: ZeroOutput::Identity }),
        shared: got.shared,
        output_norm: Some(RmsNorm { epsilon: 1e-6, offset: 0.0, scale_first: false }),
        ..MoeConfig::new(64, 48, 8, 2)
    };
    assert_eq!(got, wanted);
    let shared = got.shared.unwrap();
    assert_eq!((shared.intermediate, shared.gated, shared.average), (7, false, false));
    assert_eq!(shared.activation, Activation::default());
    for (dtype, text) in DType::ALL.iter().zip(["\"f32\"", "\"f16\"", "\"bf16\""]) {
        assert_eq!(to_string(dtype).unwrap(), text);
    }
}

#[test]
fn sizes_are_never_left_out() {
    let whole = to_value(MoeConfig::new(64, 48, 8, 2)).unwrap();
    for field in ["hidden", "intermediate", "num_experts", "top_k"] {
        let mut less = whole.clone();
        less.as_object_mut().unwrap().remove(field);
        let error = from_value::<MoeConfig>(less).unwrap_err().to_string();
        assert!(error.contains(&format!("missing field `{field}`")), "{error}");
    }
}

/// Every type of the crate that can be written is one of those above.
#[test]
fn no_type_is_left_out() {
    let here = include_str!("serialized.rs");
    let mut left = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut types = Vec::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        if path.ends_with("config/serialized.rs") {
            continue;
        }
        let text = std::fs::read_to_string(path).unwrap();
        for part in text.split("derive(serde::Serialize").skip(1) {
            let line = part.lines().find(|line| line.starts_with("pub ")).unwrap();
            types.push(line.split_whitespace().nth(2).unwrap().to_owned());
        }
    }
    assert!(types.len() > 20, "{types:?}");
    for name in types {
        let uses = [format!("{name} {{"), format!("{name}::")];
        assert!(uses.iter().any(|used| here.contains(used)), "{name} is not written above");
    }
}
