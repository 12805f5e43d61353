//! Models as the Hub has them: from config.json to the layer, and to the names and shapes of its tensors.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moe_kernels::hf::{self, Array, Block, LogitsFrom, Role, Stored};
use moe_kernels::{Error, MoeConfig};
use proptest::prelude::*;
use serde_json::{Value, json};

mod keys;
mod lines;
mod nllb;

/// The shapes of a checkpoint's tensors.
type Shapes = BTreeMap<String, Vec<usize>>;

fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut found: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.join("config.json").is_file());
    found.sort();
    found
}

/// The header of a safetensors file: its length in 8 bytes, then JSON.
fn header(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    serde_json::from_slice(&rest[..u64::from_le_bytes(*length) as usize]).unwrap()
}

fn shapes(folder: &Path) -> Shapes {
    let mut shapes = Shapes::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        for (tensor, info) in header(&path).as_object().unwrap() {
            if tensor != "__metadata__" {
                let shape = serde_json::from_value(info["shape"].clone()).unwrap();
                shapes.insert(tensor.clone(), shape);
            }
        }
    }
    shapes
}

/// The tensors that an array is made of, with their shapes.
fn tensors(arrays: &[Array]) -> Shapes {
    let mut found = Shapes::new();
    for part in arrays.iter().flat_map(|array| &array.parts) {
        if part.stored == Stored::Mxfp4 {
            let (last, rest) = part.shape.split_last().unwrap();
            found.insert(format!("{}_blocks", part.name), [rest, &[last / 32, 16]].concat());
            found.insert(format!("{}_scales", part.name), [rest, &[last / 32]].concat());
        } else {
            found.insert(part.name.clone(), part.shape.clone());
        }
    }
    found
}

/// The blocks whose tensors a checkpoint has, with their arrays.
fn find<'b>(blocks: &'b [Block], has: &Shapes) -> Vec<(&'b Block, MoeConfig, Vec<Array>)> {
    let fits = |block: &'b Block| {
        for prefix in block.prefixes() {
            for layout in block.layouts() {
                let arrays = layout.arrays(block, &prefix).unwrap();
                if tensors(&arrays).iter().all(|(name, shape)| has.get(name) == Some(shape)) {
                    return Some((block, layout.config(block), arrays));
                }
            }
        }
        None
    };
    blocks.iter().filter_map(fits).collect()
}

/// Every fixture is the layer that its line says, and all of its tensors are found, with none left over.
#[test]
fn every_fixture() {
    let mut wrong = Vec::new();
    for folder in fixtures() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let config = fs::read_to_string(folder.join("config.json")).unwrap();
        let recorded = header(&folder.join("recorded.safetensors"));
        let layer: usize = recorded["__metadata__"]["layer"].as_str().unwrap().parse().unwrap();
        let has = shapes(&folder);
        let blocks = hf::blocks(&config, layer).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = find(&blocks, &has);
        if found.is_empty() {
            let block = &blocks[0];
            let wanted = block.layouts()[0].arrays(block, &block.prefixes()[0]).unwrap();
            panic!("{name} has {has:#?}, wanted {:#?}", tensors(&wanted));
        }
        let parts = found.iter().map(|(block, config, _)| match block.part {
            "" => config.to_string(),
            part => format!("{part}: {config}"),
        });
        let line = parts.collect::<Vec<_>>().join(" | ");
        if !lines::LINES.contains(&(name.as_str(), line.as_str())) {
            wrong.push(format!("    (\"{name}\", \"{line}\"),"));
        }
        let used: Shapes = found.iter().flat_map(|(.., arrays)| tensors(arrays)).collect();
        let here = |tensor: &&String| found.iter().any(|(b, ..)| b.layer_of(tensor) == Some(layer));
        for tensor in has.keys().filter(here) {
            let scales = tensor.strip_suffix("_scale_inv").is_some_and(|of| used.contains_key(of));
            let other = lines::OTHER_TENSORS
                .iter()
                .any(|(fixture, part)| *fixture == name && tensor.contains(part));
            assert!(used.contains_key(tensor) || scales || other, "{name}: {tensor} is not used");
        }
    }
    assert!(wrong.is_empty(), "other than expected:\n{}", wrong.join("\n"));
}

/// Absent keys are the defaults of transformers' classes; nested objects may be absent too.
#[test]
fn defaults() {
    let line =
        |json: Value, layer| MoeConfig::from_hf(&json.to_string(), layer).unwrap().to_string();
    assert_eq!(
        line(json!({ "model_type": "deepseek_v3" }), 3),
        "H7168 I2048 E256 K8, f32 logits, sigmoid + bias, 4 of 8 groups by top-2 sum, top-k, renormalised + 1e-20, \
         * 2.5; shared I2048 gated SiLU"
    );
    let null = json!({
        "model_type": "qwen3_moe", "hidden_size": null, "norm_topk_prob": null, "hidden_act": null,
        "mlp_only_layers": null, "num_hidden_layers": null, "text_config": null, "per_layer_config": null,
    });
    assert_eq!(line(null, 0), line(json!({ "model_type": "qwen3_moe" }), 0));
    assert_eq!(line(json!({ "model_type": "qwen3_moe" }), 0), "H2048 I768 E128 K8, softmax, top-k");
    let infinite = r#"{"model_type": "qwen3_moe", "time_step_limit": [0.0, Infinity], "x": NaN}"#;
    assert_eq!(
        MoeConfig::from_hf(infinite, 0).unwrap().to_string(),
        line(json!({ "model_type": "qwen3_moe" }), 0)
    );
    let omni = json!({
        "model_type": "qwen3_omni_moe",
        "thinker_config": { "text_config": { "num_experts": 16 } },
    });
    assert_eq!(line(omni, 0), "H2048 I768 E16 K8, softmax, top-k, renormalised");
}

/// Some keys are lists by layer, and some layers have exceptions.
#[test]
fn layers_that_differ() {
    let hunyuan =
        json!({ "model_type": "hunyuan_v1_moe", "num_experts": [4, 8], "moe_topk": [1, 2] });
    let hunyuan = hunyuan.to_string();
    for (layer, sizes) in [(0, (4, 1)), (1, (8, 2))] {
        let config = MoeConfig::from_hf(&hunyuan, layer).unwrap();
        assert_eq!((config.num_experts, config.top_k), sizes);
    }
    assert!(MoeConfig::from_hf(&hunyuan, 2).is_err());

    let step = json!({
        "model_type": "step3p7",
        "text_config": {
            "moe_layers_enum": "0, 1, 2",
            "swiglu_limits": [0.0, null, 7.0], "swiglu_limits_shared": [16.0, 0, null]
        },
    });
    for (layer, limits) in [(0, ["", "16"]), (1, ["", ""]), (2, ["7", ""])] {
        let config = MoeConfig::from_hf(&step.to_string(), layer).unwrap();
        let shared = config.shared.unwrap();
        for (activation, limit) in [config.experts.activation, shared.activation].iter().zip(limits)
        {
            let text = activation.to_string();
            assert_eq!(
                text.contains(&format!("clamped at {limit} after")),
                !limit.is_empty(),
                "{text}"
            );
        }
    }

    let v4 =
        json!({ "model_type": "deepseek_v4", "num_hash_layers": 1, "vocab_size": 99 }).to_string();
    let blocks = [0, 1].map(|layer| hf::blocks(&v4, layer).unwrap().remove(0));
    assert_eq!([blocks[0].vocabulary, blocks[1].vocabulary], [99, 0]);
    assert!(blocks[0].config.to_string().contains("given ids"));
    assert!(blocks[1].config.router.selection_bias && !blocks[0].config.router.selection_bias);

    let dots = json!({
        "model_type": "dots3_note",
        "text_config": {},
        "vision_config": { "pyramid_num_routed": [-1, 4, 8], "per_layer_config": { "2": { "hidden_size": 48 } } },
    });
    let blocks = hf::blocks(&dots.to_string(), 2).unwrap();
    let parts: Vec<_> =
        blocks.iter().map(|b| (b.part, b.config.hidden, b.config.num_experts)).collect();
    // Exceptions by layer take the place of those that the list makes.
    assert_eq!(parts, [("text", 5120, 256), ("vision", 48, 64)]);
    let dots = json!({
        "model_type": "dots3_note", "text_config": {}, "vision_config": { "pyramid_num_routed": [-1, 4, 1] },
    });
    let blocks = hf::blocks(&dots.to_string(), 2).unwrap();
    let sizes: Vec<_> = blocks.iter().map(|b| (b.config.num_experts, b.config.top_k)).collect();
    assert_eq!(sizes, [(256, 8), (1, 1)]);
}

/// Where logits come from is part of what a block is.
#[test]
fn logits() {
    let zaya = hf::blocks(r#"{"model_type": "zaya"}"#, 0).unwrap().remove(0);
    assert_eq!(zaya.logits, LogitsFrom::Caller);
    let arrays = zaya.layouts()[0].arrays(&zaya, "").unwrap();
    assert!(arrays.iter().all(|array| array.role != Role::RouterGate));
    let gemma = json!({
        "model_type": "gemma4",
        "text_config": {
            "enable_moe_block": true, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16
        },
    });
    let gemma = hf::blocks(&gemma.to_string(), 0).unwrap().remove(0);
    assert_eq!(gemma.logits, LogitsFrom::ProjectionOfResidual);
}

/// An error names the key, its value, and what is known.
#[test]
fn errors() {
    let cases: &[(Value, &[&str])] = &[
        (json!({}), &["`model_type` is missing", "mixtral", "zaya"]),
        (json!({ "model_type": "llama" }), &["`model_type` is \"llama\"", "mixtral"]),
        (json!({ "model_type": 7 }), &["`model_type` is 7"]),
        (json!({ "model_type": "doge" }), &["`model_type` is \"doge\"", "product keys"]),
        (json!({ "model_type": "vitpose_backbone" }), &["without a router"]),
        (
            json!({ "model_type": "mixtral", "hidden_act": "mish" }),
            &["`hidden_act` is \"mish\"", "one of \"silu\"", "\"relu2\""],
        ),
        (json!({ "model_type": "mixtral", "hidden_size": "64" }), &["`hidden_size` is \"64\""]),
        (json!({ "model_type": "mixtral", "hidden_size": 0 }), &["`hidden_size` is 0"]),
        (json!({ "model_type": "mixtral", "num_experts_per_tok": 9 }), &["`top_k` is 9", "8"]),
        (json!({ "model_type": "deepseek_v2" }), &["`num_experts_per_tok` is missing"]),
        (
            json!({ "model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "noaux_tc" }),
            &["`topk_method` is \"noaux_tc\"", "group_limited_greedy"],
        ),
        (
            json!({ "model_type": "deepseek_v3", "first_k_dense_replace": 0, "scoring_func": "softmax" }),
            &["`scoring_func` is \"softmax\"", "one of \"sigmoid\""],
        ),
        (
            json!({ "model_type": "deepseek_v3", "first_k_dense_replace": 0, "n_group": 3 }),
            &["`router.groups.num_groups` is 3"],
        ),
        (
            json!({
                "model_type": "glm4v_moe",
                "text_config": { "norm_topk_prob": 1, "first_k_dense_replace": 0 },
            }),
            &["`text_config.norm_topk_prob` is 1, wanted true or false"],
        ),
        (
            json!({ "model_type": "glm4v_moe", "text_config": [] }),
            &["`text_config` is []", "object"],
        ),
        (
            json!({ "model_type": "mellum", "mlp_layer_types": ["dense"] }),
            &["`mlp_layer_types` is \"dense\" for layer 0"],
        ),
        (
            json!({ "model_type": "deepseek_v4", "mlp_layer_types": ["sparse"] }),
            &["`mlp_layer_types` is \"sparse\"", "hash_moe"],
        ),
        (json!({ "model_type": "gemma4" }), &["missing"]),
        (
            json!({ "model_type": "granitemoehybrid", "num_local_experts": 0 }),
            &["`num_local_experts` is 0", "at least 1"],
        ),
        (
            json!({
                "model_type": "nllb-moe", "encoder_sparse_step": 1, "second_expert_policy": "random"
            }),
            &["`second_expert_policy` is \"random\"", "\"all\""],
        ),
        (
            json!({
                "model_type": "nemotron_h", "layers_block_type": ["moe"], "mlp_bias": true, "moe_latent_size": 8
            }),
            &["`mlp_bias` is true"],
        ),
        (json!({ "model_type": "deepseek_v4", "scoring_func": "softmax" }), &["sqrtsoftplus"]),
        (json!([1]), &["`config.json` is not JSON"]),
    ];
    for (json, words) in cases {
        let error = MoeConfig::from_hf(&json.to_string(), 0).unwrap_err();
        assert!(matches!(error, Error::Json { .. } | Error::Unsupported { .. }), "{error:?}");
        for word in *words {
            assert!(error.to_string().contains(word), "no '{word}' in: {error}");
        }
    }
    for text in ["", "{", "{\"hidden_size\": nan}", "{NaN: 1}", "null"] {
        let error = MoeConfig::from_hf(text, 0).unwrap_err().to_string();
        assert!(error.contains("`config.json` is not JSON"), "{error}");
    }
}

/// Keys that some family reads.
const KEYS: &[&str] = &[
    "activation_function",
    "batch_prioritized_routing",
    "capacity_factor",
    "d_ff",
    "d_model",
    "decoder_ffn_dim",
    "decoder_layers",
    "decoder_sparse_step",
    "dense_act_fn",
    "dense_intermediate_size",
    "dense_mlp_idx",
    "embed_dim",
    "enable_moe_block",
    "encoder_ffn_dim",
    "encoder_layers",
    "encoder_sparse_step",
    "expert_capacity",
    "expert_ffn_hidden_size",
    "expert_layer_offset",
    "expert_layer_period",
    "expert_selection_fn",
    "ffn_act_fn",
    "ffn_config",
    "ffn_hidden_size",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "hybrid_override_pattern",
    "interleave_moe_layer_step",
    "intermediate_size",
    "language_config",
    "layer_types",
    "layers_block_type",
    "mlp_bias",
    "mlp_gate_softcap",
    "mlp_hidden_act",
    "mlp_layer_types",
    "mlp_only_layers",
    "mlp_up_softcap",
    "moe_apply_router_weight_on_input",
    "moe_eval_capacity_token_fraction",
    "moe_hidden_size",
    "moe_intermediate_size",
    "moe_k",
    "moe_latent_size",
    "moe_layer_end_index",
    "moe_layer_freq",
    "moe_layer_interval",
    "moe_layer_start_index",
    "moe_layers",
    "moe_layers_enum",
    "moe_norm_min",
    "moe_normalize_expert_weights",
    "moe_num_experts",
    "moe_num_shared_experts",
    "moe_renormalize",
    "moe_routed_scaling_factor",
    "moe_router_logit_softcapping",
    "moe_router_scaling_factor",
    "moe_shared_expert_intermediate_size",
    "moe_token_dropout",
    "moe_top_k",
    "moe_topk",
    "n_group",
    "n_layers",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "normalize_router_prob_before_dropping",
    "num_decoder_layers",
    "num_dense_layers",
    "num_expert_group",
    "num_experts",
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_hash_layers",
    "num_hidden_layers",
    "num_layers",
    "num_local_experts",
    "num_shared_experts",
    "num_sparse_decoder_layers",
    "num_sparse_encoder_layers",
    "output_multiplier",
    "per_layer_config",
    "post_norm_eps",
    "pyramid_num_routed",
    "rms_norm_eps",
    "route_scale",
    "routed_scaling_factor",
    "router_bias",
    "router_dtype",
    "router_jitter_noise",
    "router_scale",
    "router_scaling_factor",
    "score_func",
    "scoring_func",
    "second_expert_policy",
    "share_expert_dim",
    "share_expert_dims",
    "shared_expert_combination_strategy",
    "shared_expert_intermediate_size",
    "shared_expert_sink",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
    "swiglu_alpha",
    "swiglu_limit",
    "swiglu_limits",
    "swiglu_limits_shared",
    "talker_config",
    "text_config",
    "thinker_config",
    "top_k_experts",
    "topk_group",
    "topk_method",
    "use_bias",
    "use_expert_bias",
    "vision_config",
    "vocab_size",
    "zero_expert_num",
    "zero_expert_type",
];

const WORDS: &[&str] = &[
    "",
    "silu",
    "relu2",
    "greedy",
    "group_limited_greedy",
    "sigmoid",
    "softmax",
    "sqrtsoftplus",
    "dense",
    "hash_moe",
    "moe",
    "average",
    "float32",
    "all",
    "identity",
    "text_config",
];

/// Any value, the ones that mean something among them.
fn value() -> BoxedStrategy<Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0u64..9).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(WORDS).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            object(inner),
        ]
    })
    .boxed()
}

fn object(values: impl Strategy<Value = Value> + 'static) -> BoxedStrategy<Value> {
    let keys = prop_oneof![prop::sample::select(KEYS), prop::sample::select(&["0", "1"][..])];
    prop::collection::vec((keys, values), 0..6)
        .prop_map(|pairs| {
            Value::Object(pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
        })
        .boxed()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    /// No JSON panics, and what is read is a layer whose tensors have names.
    #[test]
    fn no_json_panics(
        model_type in prop::sample::select(hf::model_types()),
        mut json in object(value()),
        layer in prop_oneof![0usize..3, any::<usize>()],
    ) {
        json["model_type"] = model_type.into();
        if let Ok(blocks) = hf::blocks(&json.to_string(), layer) {
            for block in blocks {
                block.config.check().unwrap();
                for layout in block.layouts() {
                    let arrays = layout.arrays(&block, &block.prefixes()[0]).unwrap();
                    prop_assert!(arrays.iter().all(|array| !array.parts.is_empty()));
                }
            }
        }
    }

    #[test]
    fn no_text_panics(text in ".{0,64}", layer in any::<usize>()) {
        let _ = MoeConfig::from_hf(&text, layer);
    }
}
