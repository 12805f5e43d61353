//! Tests of configurations as text: every type and every variant is read back as it was written,
//! and unknown fields are errors.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_str, from_value, json, to_string, to_value};

use super::*;
use crate::dtype::DType;

/// All variants of an enum. The match has no wildcard, so a missing variant does not compile.
macro_rules! every {
    ($Enum:ident { $($pattern:pat => $value:expr,)* }) => {{
        let _complete = |it: $Enum| match it { $($pattern => (),)* };
        vec![$($value,)*]
    }};
}

trait Text: Serialize + DeserializeOwned + PartialEq + Debug {}
impl<T: Serialize + DeserializeOwned + PartialEq + Debug> Text for T {}

/// Checks that a value is read back as it was written.
fn check_round_trip<T: Text>(value: &T) {
    let text = to_string(value).unwrap();
    assert_eq!(from_str::<T>(&text).unwrap(), *value, "{text}");
}

/// Copies of `value`, each with an unknown field in one of its objects.
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

fn check_values<T: Text>(values: Vec<T>) {
    for value in &values {
        check_round_trip(value);
        for unknown in with_unknown_fields(&to_value(value).unwrap()) {
            let error = from_value::<T>(unknown.clone()).unwrap_err().to_string();
            // A variant with fields is an object whose only key is the name of the variant.
            let words = ["no_such_field", "map with a single key"];
            assert!(words.iter().any(|word| error.contains(word)), "{unknown}: {error}");
        }
    }
    // The texts of different values differ.
    let texts: std::collections::BTreeSet<String> =
        values.iter().map(|value| to_string(value).unwrap()).collect();
    assert_eq!(texts.len(), values.len(), "{texts:?}");
}

fn check_variants<T: Text>(values: Vec<T>) {
    check_values(values);
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
fn every_variant_is_read_back() {
    check_variants(limits());
    check_variants(functions());
    check_variants(scorings());
    let trained = r#"{"sparsemixer": {"jitter": 0.02, "training": true}}"#;
    let trained: Scoring = from_str(trained).unwrap();
    assert_eq!(trained, Scoring::Sparsemixer { jitter: 0.02, training: true });
    check_variants(normalizations());
    check_variants(capacity_limits());
    check_variants(priorities());
    check_variants(every!(RouterStep {
        RouterStep::NoisyLogits => RouterStep::NoisyLogits,
        RouterStep::Logits => RouterStep::Logits,
        RouterStep::Scores => RouterStep::Scores,
    }));
    check_variants(every!(Selection {
        Selection::Score => Selection::Score,
        Selection::Logit => Selection::Logit,
        Selection::Given => Selection::Given,
    }));
    check_variants(every!(GroupScore {
        GroupScore::Max => GroupScore::Max,
        GroupScore::TopTwoSum => GroupScore::TopTwoSum,
    }));
    check_variants(every!(Masked {
        Masked::NegativeInfinity => Masked::NegativeInfinity,
        Masked::Zero => Masked::Zero,
    }));
    check_variants(every!(GateUpLayout {
        GateUpLayout::Concatenated => GateUpLayout::Concatenated,
        GateUpLayout::Interleaved => GateUpLayout::Interleaved,
        GateUpLayout::Separate => GateUpLayout::Separate,
    }));
    check_variants(every!(WeightOrder {
        WeightOrder::OutIn => WeightOrder::OutIn,
        WeightOrder::InOut => WeightOrder::InOut,
    }));
    check_variants(every!(WeightPosition {
        WeightPosition::Output => WeightPosition::Output,
        WeightPosition::Input => WeightPosition::Input,
        WeightPosition::Inside => WeightPosition::Inside,
    }));
    check_variants(every!(ZeroOutput {
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
    check_variants(all);
    check_variants(DType::ALL.to_vec());
}

const NORM: RmsNorm = RmsNorm { epsilon: 1e-6, offset: 1.0, scale_first: true };

fn shared() -> SharedConfig {
    let text = r#"{"intermediate": 7, "gated": true, "sigmoid_gate": true, "average": true}"#;
    let shared: SharedConfig = from_str(text).unwrap();
    let activation = Activation { limit: limits()[3], ..Activation::default() };
    SharedConfig { activation, ..shared }
}

/// A configuration with every optional part.
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
fn every_struct_is_read_back() {
    let full = full();
    let MoeConfig { projection, router, experts, zero_experts, capacity, latent, .. } = full;
    check_values(vec![full, MoeConfig::new(64, 48, 8, 2)]);
    check_values(vec![projection, RouterProjection::default()]);
    check_values(vec![router, RouterConfig::default(), RouterConfig::top_k_softmax()]);
    check_values(vec![experts, ExpertConfig::default()]);
    check_values(vec![experts.activation, Activation::default()]);
    check_values(vec![zero_experts.unwrap()]);
    check_values(vec![capacity.unwrap()]);
    check_values(vec![latent.unwrap(), LatentConfig { hidden: 1, norm: None }]);
    check_values(vec![shared()]);
    check_values(vec![NORM]);
    check_values(vec![router.groups.unwrap()]);
    check_values(vec![RoutingShape { num_tokens: 3, num_experts: 2, top_k: 1 }]);
    for limit in limits() {
        check_values(vec![Activation { limit, ..experts.activation }]);
    }
    for scoring in scorings() {
        check_values(vec![RouterConfig { scoring, ..router }]);
    }
    for normalization in normalizations() {
        check_values(vec![RouterConfig { normalization, ..router }]);
    }
    for limit in capacity_limits() {
        for priority in priorities() {
            check_values(vec![CapacityConfig::new(limit, priority)]);
        }
    }
}

/// The words of the text must not change, since users' files contain them.
#[test]
fn text_of_a_configuration_is_stable() {
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
fn missing_sizes_are_errors() {
    let whole = to_value(MoeConfig::new(64, 48, 8, 2)).unwrap();
    for field in ["hidden", "intermediate", "num_experts", "top_k"] {
        let mut less = whole.clone();
        less.as_object_mut().unwrap().remove(field);
        let error = from_value::<MoeConfig>(less).unwrap_err().to_string();
        assert!(error.contains(&format!("missing field `{field}`")), "{error}");
    }
}

/// The tests above cover every serialisable type of the crate.
#[test]
fn every_serialisable_type_is_tested() {
    let here = include_str!("serialized.rs");
    let mut pending = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut types = Vec::new();
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
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
        assert!(uses.iter().any(|used| here.contains(used)), "{name} is not tested above");
    }
}
