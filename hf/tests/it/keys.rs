//! Which keys of config.json count, and which layers have experts: held against a table that transformers made
//! (`fixtures/sweep_keys.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use moe_kernels::{MoeConfig, SharedConfig, hf};
use serde_json::{Map, Value, from_value, json};

use super::KEYS;

/// `fixtures/config-keys.json`.
struct Table {
    /// Keys without which `cases` are read.
    dropped: Vec<String>,
    /// Keys of the number of layers, which is 6 there.
    counts: Vec<String>,
    cases: Vec<Map<String, Value>>,
    families: BTreeMap<String, Family>,
}

struct Family {
    /// The objects that lead to the keys.
    at: Vec<String>,
    part: String,
    /// Changed before all else.
    set: Map<String, Value>,
    /// For each key that counts values, and the number of the outcome or a word.
    keys: BTreeMap<String, Vec<(Value, Value)>>,
    /// Of those the ones that count for the shared expert alone, and for all but it.
    shared_only: Vec<String>,
    routed_only: Vec<String>,
    layers: Vec<String>,
    /// The same of the decoder, where the fixture is of the encoder.
    decoder: Option<Vec<String>>,
}

/// Where this crate's reading is not transformers', and why: the fixture, the key, and the reason.
const OTHERWISE: &[(&str, &str, &str)] = &[
    ("deepseek-v2", "norm_topk_prob", RENORMALISED),
    ("deepseek-ocr2", "norm_topk_prob", RENORMALISED),
    ("unlimited-ocr", "norm_topk_prob", RENORMALISED),
    ("longcat-flash", "router_bias", "transformers makes the bias, and does not add it"),
    ("zaya", "rms_norm_eps", STATE),
    ("zaya", "router_hidden_size", STATE),
];

const RENORMALISED: &str =
    "transformers ignores it; the model's own code renormalises instead of scaling";
const STATE: &str = "it is one of the router's network, whose logits the caller has";

impl Table {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/config-keys.json");
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
    fn open(&self, name: &str) -> (Value, usize) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/{name}-tiny"));
        let config = fs::read_to_string(folder.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        self.keys_of(&mut config).extend(self.set.clone());
        let recorded = super::header(&folder.join("recorded.safetensors"));
        (config, recorded["__metadata__"]["layer"].as_str().unwrap().parse().unwrap())
    }

    /// The object that has the keys.
    fn keys_of<'v>(&self, config: &'v mut Value) -> &'v mut Map<String, Value> {
        let object = self.at.iter().fold(config, |value, name| &mut value[name]);
        object.as_object_mut().unwrap()
    }

    /// The configuration with another value of a key: `name`, `outer.name`, or `name for` another one's.
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

/// What is read of the blocks of one part, or of all.
fn read(config: &Value, layer: usize, part: &str) -> Result<String, String> {
    let blocks = hf::blocks(&config.to_string(), layer).map_err(|error| error.to_string())?;
    let blocks = blocks.iter().filter(|block| part.is_empty() || block.part == part);
    let texts: Vec<_> = blocks
        .map(|b| format!("{:?} {:?} {} {}", b.config, b.logits, b.vocabulary, b.first_expert))
        .collect();
    if texts.is_empty() { Err(format!("no {part} block")) } else { Ok(texts.join("\n")) }
}

/// Values of a key that make different blocks in transformers make different ones here, or are refused; and a key that
/// makes no difference there makes none here.
#[test]
fn every_key_counts_as_in_transformers() {
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
                    // Different values may give the same numbers; but not if none of them makes a difference.
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
        OTHERWISE.iter().any(|(fixture, known, _)| *fixture == name && *known == key)
    };
    let lines: Vec<_> = wrong
        .iter()
        .filter(|(name, key, _)| !known(name, key))
        .map(|(name, key, why)| format!("{name}: {key} {why}"))
        .collect();
    assert!(lines.is_empty(), "{} differ from transformers:\n{}", lines.len(), lines.join("\n"));
    for (name, key, _) in OTHERWISE {
        let found = wrong.iter().any(|(fixture, other, _)| fixture == name && other == key);
        assert!(found, "{name}: {key} does not differ from transformers any more");
    }
}

/// A key that counts for the shared expert alone leaves the others as they are, and the other way round.
#[test]
fn keys_of_the_shared_expert() {
    let parts = |config: &Value, layer, part: &str| -> Option<(MoeConfig, Option<SharedConfig>)> {
        let blocks = hf::blocks(&config.to_string(), layer).ok()?;
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

/// Every fixture is in the table, but for those whose weights alone are other ones.
#[test]
fn every_fixture_has_its_keys() {
    let table = Table::read();
    for folder in super::fixtures() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let name = name.trim_end_matches("-tiny");
        let plain = name.trim_end_matches("-fp8").trim_end_matches("-mxfp4");
        assert!(table.families[plain].keys.len() > 4, "{name}");
    }
}

/// Other values of a key, by the type that it has in the fixture.
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

/// The layers that have experts are transformers'; of the others the error names a key.
#[test]
fn layers_with_experts() {
    let table = Table::read();
    let mut wrong = Vec::new();
    for (name, family) in &table.families {
        let (mut config, _) = family.open(name);
        let keys = family.keys_of(&mut config);
        // transformers leaves out the layers that predict further tokens.
        keys.retain(|key, _| !table.dropped.contains(key) && key != "num_nextn_predict_layers");
        for key in &table.counts {
            keys.entry(key).and_modify(|count| *count = json!(6));
        }
        let decoder = family.decoder.iter().map(|layers| ("decoder", layers));
        let parts = [(family.part.as_str(), &family.layers)].into_iter().chain(decoder);
        for (part, expected) in parts {
            assert_eq!(table.cases.len(), expected.len(), "{name}");
            for (case, expected) in table.cases.iter().zip(expected).filter(|(_, e)| *e != "-") {
                let mut config = config.clone();
                family.keys_of(&mut config).extend(case.clone());
                // The case gave another name of the number of layers another value than the fixture has.
                if read(&config, 0, part).is_err_and(|why| why.contains("under both names")) {
                    continue;
                }
                let has = |layer: &usize| match read(&config, *layer, part) {
                    Ok(_) => true,
                    Err(why) => {
                        let dense = ["a layer with experts", "layers to have layer", "block"];
                        let named = dense.iter().any(|words| why.contains(words));
                        assert!(named, "{name} {case:?}: {why}");
                        false
                    }
                };
                let got: String = (0..8).filter(has).map(|layer| layer.to_string()).collect();
                if got != *expected {
                    let case = Value::Object(case.clone());
                    let why = match read(&config, 0, part) {
                        Ok(_) => String::new(),
                        Err(why) => format!(" (layer 0: {why})"),
                    };
                    wrong.push(format!("{name} {part} {case}: {got}, wanted {expected}{why}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Layers that predict further tokens are no layers of the main model; released checkpoints number them after it.
#[test]
fn layers_that_predict_further_tokens_have_experts() {
    let read = |more: Value, layer| {
        let mut config = json!({ "model_type": "deepseek_v3", "num_hidden_layers": 4 });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        MoeConfig::from_hf(&config.to_string(), layer).is_ok()
    };
    let one = json!({ "num_nextn_predict_layers": 1 });
    assert_eq!([2, 3, 4, 5].map(|layer| read(one.clone(), layer)), [false, true, true, false]);
    for none in [json!({}), json!({ "num_nextn_predict_layers": null })] {
        assert_eq!([3, 4].map(|layer| read(none.clone(), layer)), [true, false]);
    }
}

/// A list by layer that released files have beside the rule: where the two disagree, there is no block to read.
#[test]
fn a_layer_that_the_file_calls_dense_has_no_experts() {
    let read = |layers: Value, layer| {
        let config = json!({ "model_type": "exaone_moe", "is_moe_layer": layers });
        MoeConfig::from_hf(&config.to_string(), layer).map_err(|error| error.to_string())
    };
    let layers = json!([false, true, false]);
    assert!(read(layers.clone(), 1).is_ok() && read(json!([]), 2).is_ok());
    let refused = read(layers.clone(), 2).unwrap_err();
    assert!(refused.contains("`is_moe_layer` is false for layer 2"), "{refused}");
    let refused = read(json!([0, 1]), 1).unwrap_err();
    assert!(refused.contains("wanted true or false for each layer"), "{refused}");
    // Dense by the rule as well, and one layer short.
    assert!(read(layers.clone(), 0).is_err() && read(layers, 3).is_err());
}

/// By default dots3's vision layers have experts from layer 25 on, four more in each.
#[test]
fn the_pyramid_of_dots() {
    let config =
        json!({ "model_type": "dots3_note", "text_config": {}, "vision_config": {} }).to_string();
    let blocks = |layer| {
        let blocks = hf::blocks(&config, layer).unwrap();
        blocks.iter().map(|block| (block.part, block.config.num_experts)).collect::<Vec<_>>()
    };
    assert_eq!(blocks(24), [("text", 256)]);
    assert_eq!(blocks(25), [("text", 256), ("vision", 4)]);
    assert_eq!(blocks(26), [("text", 256), ("vision", 8)]);
}

/// Of two names of one thing, with different values, readers of config.json take different ones.
#[test]
fn names_of_one_thing_have_one_value() {
    let read = |model_type: &str, keys: &Value| {
        let mut config = json!({ "model_type": model_type, "first_k_dense_replace": 0 });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        MoeConfig::from_hf(&config.to_string(), 1).map_err(|error| error.to_string())
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
        // As ever null is no value, and the other name's counts.
        let last = keys.as_object_mut().unwrap().iter_mut().next_back().unwrap().1;
        *last = Value::Null;
        let error = read(model_type, &keys).err().unwrap_or_default();
        assert!(!error.contains("both names"), "{keys}: {error}");
    }
    // Numbers that are equal, lists by layer beside what all layers have, and names that only stand in for others.
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
    let vision = &hf::blocks(&dots.to_string(), 25).unwrap()[1].config;
    assert_eq!((vision.hidden, vision.top_k), (64, 2));
}

/// Kimi's names of DeepSeek's keys are nothing to the classes of others.
#[test]
fn names_are_those_of_the_family() {
    let keys = json!({ "moe_renormalize": false, "num_expert_group": 2, "num_shared_experts": 2, "num_experts": 9 });
    let line = |model_type: &str, keys: &Value| {
        let mut config = json!({ "model_type": model_type, "first_k_dense_replace": 0 });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        MoeConfig::from_hf(&config.to_string(), 3).unwrap().to_string()
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

/// Kimi K2.5's class builds what the nested object says it is; others know what they nest, whatever it says.
#[test]
fn what_is_nested_is_what_is_read() {
    let read = |model_type: &str, nested: Value| {
        let config = json!({ "model_type": model_type, "text_config": nested }).to_string();
        MoeConfig::from_hf(&config, 3).map_err(|error| error.to_string())
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

/// A file of a few kilobytes may not ask for a reading of all of it by each of any number of layers.
#[test]
fn layers_are_bounded() {
    let sizes = r#""hidden_size": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2"#;
    let many = |word: &str, count: usize| vec![word; count].join(",");
    for (model_type, keys, wanted) in [
        (
            "qwen3_moe",
            r#""num_hidden_layers": 1025"#.to_string(),
            "`num_hidden_layers` is 1025, wanted at most 1024 layers",
        ),
        (
            "qwen3_moe",
            format!(r#""mlp_only_layers": [{}]"#, many("1", 1025)),
            "wanted a list of at most 1024 layers' numbers",
        ),
        (
            "ernie4_5_moe",
            format!(r#""moe_layer_start_index": 0, "num_hidden_layers": {}"#, usize::MAX),
            "wanted at most 1024 layers",
        ),
        (
            "nemotron_h",
            format!(r#""hybrid_override_pattern": "{}""#, many("M", 1025).replace(',', "")),
            "wanted at most 1024 layers",
        ),
    ] {
        let json = format!(r#"{{"model_type": "{model_type}", {sizes}, {keys}}}"#);
        for error in [hf::layers(&json).unwrap_err(), MoeConfig::from_hf(&json, 1).unwrap_err()] {
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }
}
