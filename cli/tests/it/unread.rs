//! Tensors of a block that the configuration does not use are an error that names them. Modules
//! outside of the block are checked only if their name refers to experts.

use crate::common::{Folder, Stored, fails, run};

const FILE: &str = "model.safetensors";

/// A fixture with additional tensors in its file.
fn with(fixture: &str, names: &[&str]) -> Folder {
    let folder = Folder::of(fixture);
    folder.change(FILE, |tensors| {
        for name in names {
            assert!(!tensors.iter().any(|tensor| tensor.name == *name), "{name}");
            tensors.push(Stored::f32(name, &[1], &[1.0]));
        }
    });
    folder
}

/// Additional tensors for families of each naming scheme.
const UNREAD: &[(&str, &str)] = &[
    ("deepseek-v3-tiny", "model.layers.1.mlp.experts.0.gate_proj.weight_scale_inv"),
    ("deepseek-v3-tiny", "model.layers.1.mlp.experts.8.gate_proj.weight"),
    ("deepseek-v3-tiny", "model.layers.1.mlp.shared_expert_gate.weight"),
    ("deepseek-v3-tiny", "model.layers.1.mlp.shared_experts.up_proj.bias"),
    ("deepseek-v3-fp8-tiny", "model.layers.1.mlp.experts.0.gate_proj.weight_scale"),
    ("deepseek-v3-fp8-tiny", "model.layers.1.mlp.experts.0.gate_proj.weight_zero_point"),
    ("deepseek-v4-hash-tiny", "layers.1.ffn.gate.bias"),
    ("deepseek-v4-tiny", "layers.1.ffn.gate.tid2eid"),
    ("mixtral-tiny", "model.layers.1.block_sparse_moe.experts.4.w1.bias"),
    ("mixtral-tiny", "model.layers.1.block_sparse_moe.gate.bias"),
    ("olmoe-tiny", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ("olmoe-tiny", "model.layers.1.mlp.shared_experts.gate_proj.weight"),
    ("qwen3-5-moe-tiny", "model.language_model.layers.1.mlp.experts.gate_up_proj"),
    ("granitemoe-tiny", "model.layers.1.block_sparse_moe.input_linear.bias"),
    ("granitemoeshared-tiny", "model.layers.1.shared_mlp.input_linear.bias"),
    ("gpt-oss-tiny", "model.layers.1.mlp.experts.gate_up_proj_blocks"),
    ("gpt-oss-mxfp4-tiny", "model.layers.1.mlp.experts.gate_up_proj"),
    ("gemma4-tiny", "model.language_model.layers.1.experts.gate_up_proj_bias"),
    ("mistral-large4-tiny", "layers.1.experts.0.w1.bias"),
    ("nemotron-h-tiny", "backbone.layers.1.mixer.experts.0.gate_proj.weight"),
    ("nllb-moe-tiny", "model.encoder.layers.1.ffn.experts.expert_0.fc3.weight"),
    ("switch-transformers-tiny", "encoder.block.1.layer.1.mlp.experts.expert_0.wi_1.weight"),
    ("ernie4-5-vl-moe-tiny", "model.layers.1.mlp.experts.99.gate_proj.weight"),
    ("step3p7-tiny", "model.layers.1.share_expert.gate_proj.bias"),
    ("kolibri1-tiny", "model.layers.1.moe.router.weight"),
    ("lfm2-moe-tiny", "model.layers.1.feed_forward.experts.0.w1.bias"),
    ("zaya-tiny", "model.layers.1.mlp.experts.down_proj_bias"),
    ("zaya-tiny", "model.layers.1.mlp.gate.balancing_biases_scale_inv"),
    ("zaya-tiny", "model.layers.1.mlp.gate.router_mlp.fc3.weight"),
    ("dbrx-tiny", "transformer.blocks.1.ffn.experts.mlp.bias"),
    // Modules outside of the block.
    ("olmoe-tiny", "model.layers.1.shared_experts.gate_proj.weight"),
    ("deepseek-v3-tiny", "model.layers.1.shared_mlp.input_linear.weight"),
    ("mixtral-tiny", "model.layers.1.residual_mlp.w1.weight"),
    ("olmoe-tiny", "model.layers.1.feed_forward.shared_expert.up_proj.weight"),
    ("qwen3-5-moe-tiny", "model.language_model.layers.1.moe.gate.weight"),
];

#[test]
fn rejects_unused_tensors_of_a_block() {
    for (fixture, name) in UNREAD {
        let folder = with(fixture, &[name]);
        fails(&folder, &[FILE, &format!("unused: `{name}`; "), "a block without it"]);
    }
    let two = [UNREAD[1].1, UNREAD[2].1];
    let words = [&format!("`{}`", two[0]), &format!("`{}`", two[1])[..], "a block without them"];
    fails(&with(UNREAD[1].0, &two), &words);
}

#[test]
fn rejects_shared_expert_without_configured_width() {
    let folder = Folder::of("granitemoeshared-tiny");
    folder.edit("config.json", "\"granitemoeshared\"", "\"granitemoe\"");
    fails(&folder, &["shared_mlp.input_linear.weight`", "unused: "]);
    let folder = Folder::of("deepseek-v3-tiny");
    folder.edit("config.json", "\"n_shared_experts\": 1", "\"n_shared_experts\": 0");
    fails(&folder, &["mlp.shared_experts.", "unused: "]);
}

#[test]
fn rejects_index_with_unused_tensors_of_a_block() {
    let folder = Folder::of("qwen3-moe-tiny");
    let stray = "model.layers.1.mlp.shared_expert_gate.weight";
    let file = "model-00001-of-00004.safetensors";
    folder.edit(
        "model.safetensors.index.json",
        "\"weight_map\": {",
        &format!("\"weight_map\": {{ \"{stray}\": \"{file}\","),
    );
    fails(&folder, &["model.safetensors.index.json", &format!("unused: `{stray}`; ")]);
}

/// transformers reads every tensor of a file that the index names.
#[test]
fn rejects_tensor_missing_from_index() {
    let (stray, file) = ("experts.0.gate_proj.bias", "model-00003-of-00004.safetensors");
    let folder = Folder::of("qwen3-moe-tiny");
    let with = |name: &str| {
        folder.change(file, |tensors| tensors.push(Stored::f32(name, &[1], &[1.0])));
    };
    with("model.layers.1.self_attn.stray.weight");
    assert_eq!(run(&folder, 1, &["--device", "cpu"]).status, Some(0));
    with(&format!("model.layers.1.mlp.{stray}"));
    fails(&folder, &[file, &format!("mlp.{stray}`; not listed in"), "index.json"]);
}

/// Norms, attention, dense branches, other layers, and known tensors that the block does not need.
#[test]
fn accepts_tensors_outside_of_the_block() {
    for (fixture, names) in [
        (
            "deepseek-v3-tiny",
            &[
                "model.layers.1.input_layernorm.weight",
                "model.layers.1.self_attn.rotary_emb.inv_freq",
                "model.layers.1.mlp_norm.weight",
                "model.layers.1.pre_moe_layernorm.weight",
                "model.layers.10.mlp.experts.0.gate_proj.bias",
                "model.layers.2.mlp.gate.bias",
                "model.mtp.layers.1.mlp.gate.bias",
                "language_model.model.layers.1.mlp.gate.bias",
            ][..],
        ),
        (
            "gemma4-tiny",
            &[
                "model.language_model.layers.1.mlp.gate_proj.weight",
                "model.language_model.layers.1.mlp.down_proj.weight",
            ],
        ),
        ("mistral-large4-tiny", &["layers.1.attention.wkv_b.weight", "layers.1.ffn_norm.weight"]),
        (
            "longcat-flash-tiny",
            &["model.layers.1.mlp.router.classifier.bias", "model.layers.1.mlps.0.up_proj.weight"],
        ),
        ("deepseek-v3-fp8-tiny", &["model.layers.1.mlp.experts.0.gate_proj.input_scale"]),
        ("granitemoe-tiny", &["model.layers.1.block_sparse_moe_norm.weight"]),
    ] {
        let done = run(&with(fixture, names), 1, &["--device", "cpu"]);
        assert_eq!(done.status, Some(0), "{fixture}: {done:?}");
        assert_eq!(done.stderr, "", "{fixture}");
    }
}

/// Weight files that the checkpoint does not use are a warning.
#[test]
fn additional_weight_files_are_a_warning() {
    for (fixture, beside, words) in [
        ("mixtral-tiny", "adapter_config.json", "an adapter, which is not applied"),
        ("mixtral-tiny", "adapter_model.safetensors", "an adapter, which is not applied"),
        ("mixtral-tiny", "consolidated.safetensors", "model.safetensors is loaded; ignored: "),
        ("mixtral-tiny", "model.safetensors.index.json", "model.safetensors is loaded; ignored: "),
        (
            "mixtral-tiny",
            "pytorch_model-00001-of-00002.bin",
            "model.safetensors is loaded; ignored: ",
        ),
        ("mixtral-tiny", "mixtral.Q4_K_M.gguf", "model.safetensors is loaded; ignored: "),
        ("qwen3-moe-tiny", "consolidated-00001.safetensors", "index.json is loaded; ignored: "),
        ("qwen3-moe-tiny", "model-00001-of-00002.safetensors", "index.json is loaded; ignored: "),
        ("qwen3-moe-tiny", "original", "index.json is loaded; ignored: "),
    ] {
        let folder = Folder::of(fixture);
        match beside {
            "original" => std::fs::create_dir(folder.path(beside)).unwrap(),
            _ => std::fs::write(folder.path(beside), "{}").unwrap(),
        }
        let done = run(&folder, 1, &["--device", "cpu"]);
        assert_eq!(done.status, Some(0), "{beside}: {done:?}");
        let lines: Vec<&str> = done.stderr.lines().collect();
        assert_eq!(lines.len(), 1, "{beside}: {}", done.stderr);
        for word in ["warning: ", beside, words] {
            assert!(lines[0].contains(word), "no '{word}' in: {}", lines[0]);
        }
    }
}
