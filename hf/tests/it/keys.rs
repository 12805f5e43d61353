//! The keys of config.json that make a difference, checked against a table from transformers
//! (`fixtures/sweep_keys.py`).

use std::collections::BTreeMap;
use std::fs;

use moe_kernels::{MoeConfig, SharedConfig};
use moe_kernels_hf::{blocks_from_config, from_config};
use serde_json::{Map, Value, from_value, json};

use crate::fixtures::{fixture, fixtures, header};
use crate::random::KEYS;

/// `fixtures/config-keys.json`.
pub struct Table {
    /// Keys that are removed before `cases` are read.
    pub dropped: Vec<String>,
    /// Keys of the number of layers, which is 6 there.
    pub counts: Vec<String>,
    pub cases: Vec<Map<String, Value>>,
    pub families: BTreeMap<String, Family>,
}

pub struct Family {
    /// The path of the object with the keys.
    at: Vec<String>,
    pub part: String,
    /// Changed before anything else.
    set: Map<String, Value>,
    /// For each key that makes a difference: values, and the number of the outcome or a word.
    keys: BTreeMap<String, Vec<(Value, Value)>>,
    /// The keys that make a difference to the shared expert alone, and to all but it.
    shared_only: Vec<String>,
    routed_only: Vec<String>,
    pub layers: Vec<String>,
    /// The layers of the decoder, if the fixture is of the encoder.
    pub decoder: Option<Vec<String>>,
}

/// Deliberate differences from transformers: the fixture, the key, and the reason.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("deepseek-v2", "norm_topk_prob", RENORMALISED),
    ("deepseek-ocr2", "norm_topk_prob", RENORMALISED),
    ("unlimited-ocr", "norm_topk_prob", RENORMALISED),
    ("longcat-flash", "router_bias", "transformers makes the bias, and does not add it"),
    ("zaya", "rms_norm_eps", STATE),
    ("zaya", "router_hidden_size", STATE),
];

const RENORMALISED: &str =
    "transformers ignores it; the model's own code renormalises instead of scaling";
const STATE: &str = "a key of the router's network, whose logits the caller computes";

impl Table {
    pub fn read() -> Self {
        let path = fixture("config-keys.json");
        let table: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        let families: BTreeMap<String, Value> = from_value(table["families"].clone()).unwrap();
        Self {
            dropped: from_value(table["dropped"].clone()).unwrap(),
            counts: from_value(table["counts"].clone()).unwrap(),
            cases: from_value(table["cases"].clone()).unwrap(),
            families: families.iter().map(|(name, it)| (name.clone(), Family::new(it))).collect(),
        }
    }
}

impl Family {
    fn new(it: &Value) -> Self {
        Self {
            at: from_value(it["at"].clone()).unwrap(),
            part: from_value(it["part"].clone()).unwrap(),
            set: from_value(it.get("set").cloned().unwrap_or(json!({}))).unwrap(),
            keys: from_value(it["keys"].clone()).unwrap(),
            shared_only: from_value(it.get("shared_only").cloned().unwrap_or(json!([]))).unwrap(),
            routed_only: from_value(it.get("routed_only").cloned().unwrap_or(json!([]))).unwrap(),
            layers: from_value(it["layers"].clone()).unwrap(),
            decoder: it.get("decoder").map(|layers| from_value(layers.clone()).unwrap()),
        }
    }

    /// config.json of the fixture, and the number of the recorded layer.
    pub fn open(&self, name: &str) -> (Value, usize) {
        let folder = fixture(&format!("{name}-tiny"));
        let config = fs::read_to_string(folder.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        self.keys_of(&mut config).extend(self.set.clone());
        let recorded = header(&folder.join("recorded.safetensors"));
        (config, recorded["__metadata__"]["layer"].as_str().unwrap().parse().unwrap())
    }

    /// The object with the keys.
    pub fn keys_of<'v>(&self, config: &'v mut Value) -> &'v mut Map<String, Value> {
        let object = self.at.iter().fold(config, |value, name| &mut value[name]);
        object.as_object_mut().unwrap()
    }

    /// The configuration with another value of a key: `name`, `outer.name`, or `name for` another
    /// one's.
    fn changed(&self, config: &Value, key: &str, value: &Value) -> Value {
        let mut config = config.clone();
        let mut object = self.keys_of(&mut config);
        let (key, instead_of) = key.split_once(" for ").unwrap_or((key, ""));
        object.remove(instead_of);
        let (path, name) = key.rsplit_once('.').unwrap_or(("", key));
        for outer in path.split('.').filter(|outer| !outer.is_empty()) {
            object = object.entry(outer).or_insert(json!({})).as_object_mut().unwrap();
        }
        object.insert(name.to_string(), value.clone());
        config
    }
}

/// The blocks of one part, or of all, as text.
pub fn read(config: &Value, layer: usize, part: &str) -> Result<String, String> {
    let blocks =
        blocks_from_config(&config.to_string(), layer).map_err(|error| error.to_string())?;
    let blocks = blocks.iter().filter(|block| part.is_empty() || block.part == part);
    let texts: Vec<_> = blocks
        .map(|b| format!("{:?} {:?} {} {}", b.config, b.logits, b.vocabulary, b.first_expert))
        .collect();
    if texts.is_empty() { Err(format!("no {part} block")) } else { Ok(texts.join("\n")) }
}

/// Values of a key with different blocks in transformers have different blocks here or are errors.
/// A key without effect there has none here.
#[test]
fn keys_have_the_effect_of_transformers() {
    let mut wrong = Vec::new();
    for (name, family) in Table::read().families {
        let (config, layer) = family.open(&name);
        let same = read(&config, layer, &family.part).unwrap();
        let mut outcomes = BTreeMap::from([(same.clone(), json!(0))]);
        for (key, values) in &family.keys {
            let counts = values.iter().any(|(_, outcome)| outcome.as_u64() > Some(0));
            for (value, outcome) in values.iter().filter(|(_, outcome)| outcome.is_u64()) {
                let read = read(&family.changed(&config, key, value), layer, &family.part);
                let Ok(text) = read else { continue };
                let why = if *outcome == json!(0) {
                    // Different values may have the same outcome, unless no value of the key makes
                    // a difference.
                    if text == same || (counts && !key.contains(" for ")) {
                        continue;
                    }
                    "makes a difference here alone".to_string()
                } else {
                    let known = outcomes.entry(text).or_insert_with(|| outcome.clone());
                    if known == outcome {
                        continue;
                    }
                    format!("is the same as outcome {known} here, and not in transformers")
                };
                wrong.push((name.clone(), key.clone(), format!("{value} {why}")));
            }
        }
        let listed = |key: &str| {
            family
                .keys
                .keys()
                .any(|known| known.split_once(" for ").map_or(known.as_str(), |k| k.0) == key)
        };
        for key in KEYS.iter().filter(|key| !listed(key)) {
            for value in others(family.keys_of(&mut config.clone()).get(*key)) {
                let read = read(&family.changed(&config, key, &value), layer, &family.part);
                if read.is_ok_and(|text| text != same) {
                    let why =
                        format!("{value} makes a difference, which transformers does not read");
                    wrong.push((name.clone(), key.to_string(), why));
                }
            }
        }
    }
    let known = |name: &str, key: &str| {
        DIFFERENCES.iter().any(|(fixture, known, _)| *fixture == name && *known == key)
    };
    let lines: Vec<_> = wrong
        .iter()
        .filter(|(name, key, _)| !known(name, key))
        .map(|(name, key, why)| format!("{name}: {key} {why}"))
        .collect();
    assert!(lines.is_empty(), "{} differ from transformers:\n{}", lines.len(), lines.join("\n"));
    for (name, key, _) in DIFFERENCES {
        let found = wrong.iter().any(|(fixture, other, _)| fixture == name && other == key);
        assert!(found, "{name}: {key} does not differ from transformers any more");
    }
}

/// A key of the shared expert alone leaves the routed experts unchanged, and the reverse.
#[test]
fn keys_of_the_shared_expert_are_its_own() {
    let parts = |config: &Value, layer, part: &str| -> Option<(MoeConfig, Option<SharedConfig>)> {
        let blocks = blocks_from_config(&config.to_string(), layer).ok()?;
        let block = blocks.iter().find(|block| part.is_empty() || block.part == part)?;
        Some((MoeConfig { shared: None, ..block.config }, block.config.shared))
    };
    let (mut wrong, mut checked) = (Vec::new(), 0);
    for (name, family) in Table::read().families {
        let (config, layer) = family.open(&name);
        let (routed, Some(shared)) = parts(&config, layer, &family.part).unwrap() else { continue };
        for (key, values) in &family.keys {
            for (value, _) in values.iter().filter(|(_, outcome)| outcome.is_u64()) {
                let changed = family.changed(&config, key, value);
                let Some(found) = parts(&changed, layer, &family.part) else { continue };
                checked += 1;
                if family.shared_only.contains(key) && found.0 != routed {
                    wrong.push(format!(
                        "{name}: {key} {value} is not the shared expert's alone here"
                    ));
                }
                if family.routed_only.contains(key) && found.1 != Some(shared) {
                    wrong.push(format!("{name}: {key} {value} is the shared expert's here, too"));
                }
            }
        }
    }
    assert!(checked > 500, "{checked}");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Every fixture is in the table, except those that differ in the format of the weights alone.
#[test]
fn every_fixture_has_its_keys() {
    let table = Table::read();
    for folder in fixtures() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let name = name.trim_end_matches("-tiny");
        let plain = name.trim_end_matches("-fp8").trim_end_matches("-mxfp4");
        assert!(table.families[plain].keys.len() > 4, "{name}");
    }
}

/// Other values of a key, of the type that it has in the fixture.
fn others(value: Option<&Value>) -> Vec<Value> {
    match value {
        None => vec![json!(true), json!(false), json!(2), json!(0.5), json!("gelu")],
        Some(Value::Bool(value)) => vec![json!(!value)],
        Some(Value::Number(number)) if number.is_u64() => {
            let value = number.as_u64().unwrap();
            vec![json!(value + 1), json!(2 * value), json!(1)]
        }
        Some(Value::Number(number)) => vec![json!(1.5 * number.as_f64().unwrap() + 0.5)],
        Some(_) => vec![],
    }
}

/// Two names of one key must have one value: of different values, readers of config.json take
/// different ones.
#[test]
fn rejects_different_values_of_one_key() {
    let read = |model_type: &str, keys: &Value| {
        let mut config = json!({ "model_type": model_type, "first_k_dense_replace": 0 });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        from_config(&config.to_string(), 1).map_err(|error| error.to_string())
    };
    let cases = [
        ("hunyuan_v1_moe", json!({ "moe_topk": 1, "num_experts_per_tok": 1.5 })),
        ("hunyuan_v1_moe", json!({ "moe_topk": [1, 1], "num_experts_per_tok": 2 })),
        ("longcat_flash", json!({ "moe_topk": 2, "num_experts_per_tok": 1 })),
        ("ernie4_5_moe", json!({ "moe_k": 2, "num_experts_per_tok": 1 })),
        ("step3p7", json!({ "moe_layers_enum": [1], "num_experts_per_tok": 2, "moe_top_k": 1 })),
        ("inkling2", json!({ "route_scale": 2.5, "routed_scaling_factor": 1.0 })),
        ("kimi_linear", json!({ "moe_renormalize": true, "norm_topk_prob": false })),
        ("kimi_linear", json!({ "num_expert_group": 1, "n_group": 8 })),
        ("bailing_hybrid", json!({ "moe_renormalize": false, "norm_topk_prob": true })),
        ("nemotron_h", json!({ "layers_block_type": ["moe", "moe"], "layer_types": ["moe"] })),
        ("dbrx", json!({ "num_hidden_layers": 4, "n_layers": 5 })),
    ];
    for (model_type, mut keys) in cases {
        let error = read(model_type, &keys).unwrap_err();
        assert!(error.contains("wanted the same value under both names"), "{keys}: {error}");
        for (name, value) in
            keys.as_object().unwrap().iter().filter(|(k, _)| *k != "moe_layers_enum")
        {
            assert!(error.contains(&format!("`{name}` is {value}")), "{keys}: {error}");
        }
        // null is no value: the other name's value is read.
        let last = keys.as_object_mut().unwrap().iter_mut().next_back().unwrap().1;
        *last = Value::Null;
        let error = read(model_type, &keys).err().unwrap_or_default();
        assert!(!error.contains("both names"), "{keys}: {error}");
    }
    // Accepted: equal numbers, a list by layer and a number for all layers, and names with another
    // meaning of their own.
    let same = [
        (
            "hunyuan_v1_moe",
            json!({ "num_experts": 4, "moe_topk": [1, 2], "num_experts_per_tok": 2.0 }),
        ),
        ("inkling2", json!({ "route_scale": 2, "routed_scaling_factor": 2.0 })),
        ("mixtral", json!({ "num_local_experts": 4, "num_experts": 4 })),
    ];
    for (model_type, keys) in same {
        read(model_type, &keys).unwrap_or_else(|error| panic!("{keys}: {error}"));
    }
    let dots = json!({
        "model_type": "dots3_note",
        "vision_config": { "embed_dim": 64, "hidden_size": 96, "num_experts_per_tok": 2, "capacity_factor": 1.25 },
    });
    let vision = &blocks_from_config(&dots.to_string(), 25).unwrap()[1].config;
    assert_eq!((vision.hidden, vision.top_k), (64, 2));
}

/// Other families ignore Kimi's names of DeepSeek's keys.
#[test]
fn names_of_keys_belong_to_a_family() {
    let keys = json!({ "moe_renormalize": false, "num_expert_group": 2, "num_shared_experts": 2, "num_experts": 9 });
    let line = |model_type: &str, keys: &Value| {
        let mut config = json!({ "model_type": model_type, "first_k_dense_replace": 0 });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        from_config(&config.to_string(), 3).unwrap().to_string()
    };
    for model_type in ["deepseek_v3", "dots3_note", "glm4_moe", "glm_moe_dsa", "mimo_v2_flash"] {
        assert_eq!(line(model_type, &keys), line(model_type, &json!({})));
    }
    let with = |keys: Value| line("kimi_linear", &keys);
    let own = json!({ "moe_renormalize": false, "num_expert_group": 2, "num_shared_experts": 2 });
    let others = json!({ "norm_topk_prob": false, "n_group": 2, "n_shared_experts": 2 });
    assert_eq!(with(own.clone()), with(others));
    assert_ne!(with(own), with(json!({})));
}

/// Kimi K2.5's class builds the `model_type` of the nested object; other classes ignore it.
#[test]
fn kimi_k25_checks_the_nested_model_type() {
    let read = |model_type: &str, nested: Value| {
        let config = json!({ "model_type": model_type, "text_config": nested }).to_string();
        from_config(&config, 3).map_err(|error| error.to_string())
    };
    let kimi = |name: Value| read("kimi_k25", json!({ "model_type": name }));
    for name in [json!("deepseek_v3"), json!("kimi_k2"), json!(null)] {
        assert!(kimi(name).is_ok());
    }
    assert!(read("kimi_k25", json!({})).is_ok() && read("kimi_k25", json!(null)).is_ok());
    for name in ["glm4_moe", "deepseek_v32", "kimi_k25"] {
        let error = kimi(json!(name)).unwrap_err();
        let known = "wanted one of \"deepseek_v3\", \"kimi_k2\"";
        assert!(error.contains(&format!("`text_config.model_type` is \"{name}\"")), "{error}");
        assert!(error.contains(known), "{error}");
    }
    assert!(read("glm4v_moe", json!({ "model_type": "glm4v_text" })).is_ok());
}
