//! Random configurations: no panic, and every configuration that is read has tensors with names.

use moe_kernels_hf::{blocks_from_config, from_config, model_types};
use proptest::prelude::*;
use serde_json::Value;

/// All keys that a family reads. `fixtures/sweep_cases.py` reads this list.
pub const KEYS: &[&str] = &[
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

/// Any value; valid ones are frequent.
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

    #[test]
    fn no_json_panics(
        model_type in prop::sample::select(model_types()),
        mut json in object(value()),
        layer in prop_oneof![0usize..3, any::<usize>()],
    ) {
        json["model_type"] = model_type.into();
        if let Ok(blocks) = blocks_from_config(&json.to_string(), layer) {
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
        let _ = from_config(&text, layer);
    }
}
