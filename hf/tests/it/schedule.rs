//! The layers that have experts, checked against a table from transformers
//! (`fixtures/sweep_keys.py`).

use moe_kernels_hf::{blocks_from_config, from_config, layers_from_config};
use serde_json::{Value, json};

use crate::keys::{Table, read};

/// The layers with experts are those of transformers; for the others the error names a key.
#[test]
fn layers_with_experts_are_those_of_transformers() {
    let table = Table::read();
    let mut wrong = Vec::new();
    for (name, family) in &table.families {
        let (mut config, _) = family.open(name);
        let keys = family.keys_of(&mut config);
        // transformers omits the layers that predict further tokens.
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
                // The case sets another name of the number of layers to another value than the
                // fixture's.
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

/// Layers that predict further tokens are numbered after those of the main model in released
/// checkpoints.
#[test]
fn layers_that_predict_further_tokens_have_experts() {
    let read = |more: Value, layer| {
        let mut config = json!({ "model_type": "deepseek_v3", "num_hidden_layers": 4 });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        from_config(&config.to_string(), layer).is_ok()
    };
    let one = json!({ "num_nextn_predict_layers": 1 });
    assert_eq!([2, 3, 4, 5].map(|layer| read(one.clone(), layer)), [false, true, true, false]);
    for none in [json!({}), json!({ "num_nextn_predict_layers": null })] {
        assert_eq!([3, 4].map(|layer| read(none.clone(), layer)), [true, false]);
    }
}

/// Released files have a list by layer in addition to the rule: a layer has experts if both say so.
#[test]
fn is_moe_layer_overrides_the_rule() {
    let read = |layers: Value, layer| {
        let config = json!({ "model_type": "exaone_moe", "is_moe_layer": layers });
        from_config(&config.to_string(), layer).map_err(|error| error.to_string())
    };
    let layers = json!([false, true, false]);
    assert!(read(layers.clone(), 1).is_ok() && read(json!([]), 2).is_ok());
    let refused = read(layers.clone(), 2).unwrap_err();
    assert!(refused.contains("`is_moe_layer` is false for layer 2"), "{refused}");
    let refused = read(json!([0, 1]), 1).unwrap_err();
    assert!(refused.contains("wanted true or false for each layer"), "{refused}");
    // Dense by the rule; past the end of the list.
    assert!(read(layers.clone(), 0).is_err() && read(layers, 3).is_err());
}

/// By default dots3's vision layers have experts from layer 25 on, four more in each.
#[test]
fn dots_vision_experts_grow_by_layer() {
    let config =
        json!({ "model_type": "dots3_note", "text_config": {}, "vision_config": {} }).to_string();
    let blocks = |layer| {
        let blocks = blocks_from_config(&config, layer).unwrap();
        blocks.iter().map(|block| (block.part, block.config.num_experts)).collect::<Vec<_>>()
    };
    assert_eq!(blocks(24), [("text", 256)]);
    assert_eq!(blocks(25), [("text", 256), ("vision", 4)]);
    assert_eq!(blocks(26), [("text", 256), ("vision", 8)]);
}

/// The number of layers is bounded: each of them reads the whole file.
#[test]
fn rejects_more_than_1024_layers() {
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
        for error in [layers_from_config(&json).unwrap_err(), from_config(&json, 1).unwrap_err()] {
            assert!(error.to_string().contains(wanted), "{error}");
        }
    }
}
