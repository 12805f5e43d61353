//! From config.json to the configuration: defaults, keys by layer, and errors.

use moe_kernels_hf::{Error, LogitsFrom, Role, blocks_from_config, from_config};
use serde_json::{Value, json};

/// Absent keys have the defaults of transformers' classes; nested objects may be absent too.
#[test]
fn absent_keys_have_defaults() {
    let line = |json: Value, layer| from_config(&json.to_string(), layer).unwrap().to_string();
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
        from_config(infinite, 0).unwrap().to_string(),
        line(json!({ "model_type": "qwen3_moe" }), 0)
    );
    let omni = json!({
        "model_type": "qwen3_omni_moe",
        "thinker_config": { "text_config": { "num_experts": 16 } },
    });
    assert_eq!(line(omni, 0), "H2048 I768 E16 K8, softmax, top-k, renormalised");
}

/// Keys may be lists by layer, and layers may have exceptions.
#[test]
fn keys_differ_by_layer() {
    let hunyuan =
        json!({ "model_type": "hunyuan_v1_moe", "num_experts": [4, 8], "moe_topk": [1, 2] });
    let hunyuan = hunyuan.to_string();
    for (layer, sizes) in [(0, (4, 1)), (1, (8, 2))] {
        let config = from_config(&hunyuan, layer).unwrap();
        assert_eq!((config.num_experts, config.top_k), sizes);
    }
    assert!(from_config(&hunyuan, 2).is_err());

    let step = json!({
        "model_type": "step3p7",
        "text_config": {
            "moe_layers_enum": "0, 1, 2",
            "swiglu_limits": [0.0, null, 7.0], "swiglu_limits_shared": [16.0, 0, null]
        },
    });
    for (layer, limits) in [(0, ["", "16"]), (1, ["", ""]), (2, ["7", ""])] {
        let config = from_config(&step.to_string(), layer).unwrap();
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
    let blocks = [0, 1].map(|layer| blocks_from_config(&v4, layer).unwrap().remove(0));
    assert_eq!([blocks[0].vocabulary, blocks[1].vocabulary], [99, 0]);
    assert!(blocks[0].config.to_string().contains("given ids"));
    assert!(blocks[1].config.router.selection_bias && !blocks[0].config.router.selection_bias);

    let dots = json!({
        "model_type": "dots3_note",
        "text_config": {},
        "vision_config": { "pyramid_num_routed": [-1, 4, 8], "per_layer_config": { "2": { "hidden_size": 48 } } },
    });
    let blocks = blocks_from_config(&dots.to_string(), 2).unwrap();
    let parts: Vec<_> =
        blocks.iter().map(|b| (b.part, b.config.hidden, b.config.num_experts)).collect();
    // Exceptions by layer override the list.
    assert_eq!(parts, [("text", 5120, 256), ("vision", 48, 64)]);
    let dots = json!({
        "model_type": "dots3_note", "text_config": {}, "vision_config": { "pyramid_num_routed": [-1, 4, 1] },
    });
    let blocks = blocks_from_config(&dots.to_string(), 2).unwrap();
    let sizes: Vec<_> = blocks.iter().map(|b| (b.config.num_experts, b.config.top_k)).collect();
    assert_eq!(sizes, [(256, 8), (1, 1)]);
}

#[test]
fn blocks_have_their_source_of_logits() {
    let zaya = blocks_from_config(r#"{"model_type": "zaya"}"#, 0).unwrap().remove(0);
    assert_eq!(zaya.logits, LogitsFrom::Caller);
    let arrays = zaya.layouts()[0].arrays(&zaya, "").unwrap();
    assert!(arrays.iter().all(|array| array.role != Role::RouterGate));
    let gemma = json!({
        "model_type": "gemma4",
        "text_config": {
            "enable_moe_block": true, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16
        },
    });
    let gemma = blocks_from_config(&gemma.to_string(), 0).unwrap().remove(0);
    assert_eq!(gemma.logits, LogitsFrom::ProjectionOfResidual);
}

/// An error names the key, its value and the accepted values.
#[test]
fn errors_name_the_key() {
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
        let error = from_config(&json.to_string(), 0).unwrap_err();
        assert!(matches!(error, Error::Config { .. } | Error::Library(_)), "{error:?}");
        for word in *words {
            assert!(error.to_string().contains(word), "no '{word}' in: {error}");
        }
    }
    for text in ["", "{", "{\"hidden_size\": nan}", "{NaN: 1}", "null"] {
        let error = from_config(text, 0).unwrap_err().to_string();
        assert!(error.contains("`config.json` is not JSON"), "{error}");
    }
}
