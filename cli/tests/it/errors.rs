//! Errors: exit status 2, a message that names the cause, and no output file.

use safetensors::Dtype;

use crate::common::{
    Folder, Stored, check_failure, fails, program, program_in, run, write, write_with,
};

const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.3.w2.weight";

#[test]
fn rejects_invalid_config_values() {
    let cases: [(&str, &str, &[&str]); 11] = [
        (
            "\"mixtral\"",
            "\"llama\"",
            &["config.json", "`model_type` is \"llama\"", "mixtral", "qwen3_moe"],
        ),
        ("\"hidden_size\": 40", "\"hidden_size\": nan", &["config.json", "not JSON", "line"]),
        ("\"hidden_size\": 40", "\"hidden_size\": NaN", &["config.json", "`hidden_size` is NaN"]),
        (
            "\"hidden_size\": 40",
            "\"hidden_size\": 0",
            &["`hidden_size` is 0", "a whole number of at least 1"],
        ),
        ("\"hidden_size\": 40", "\"hidden_size\": -40", &["`hidden_size` is -40"]),
        ("\"hidden_size\": 40", "\"hidden_size\": 40.5", &["`hidden_size` is 40.5"]),
        // An absent key has the default of transformers' class.
        (
            "\"hidden_size\"",
            "\"other_size\"",
            &["model.layers.1.block_sparse_moe.gate.weight", "is [5, 40], wanted [5, 4096]"],
        ),
        (
            "\"intermediate_size\": 20",
            "\"intermediate_size\": \"20\"",
            &["`intermediate_size` is \"20\""],
        ),
        (
            "\"num_experts_per_tok\": 2",
            "\"num_experts_per_tok\": 6",
            &["config.json", "`top_k` is 6", "5"],
        ),
        (
            "\"num_local_experts\": 5",
            "\"num_local_experts\": 5000",
            &["`num_experts` is 5000", "4096"],
        ),
        ("\"silu\"", "\"mish\"", &["`hidden_act` is \"mish\"", "silu"]),
    ];
    for (from, to, words) in cases {
        let folder = Folder::of("mixtral-tiny");
        folder.edit("config.json", from, to);
        fails(&folder, words);
    }
    let folder = Folder::of("qwen3-moe-tiny");
    folder.edit("config.json", "\"norm_topk_prob\": true", "\"norm_topk_prob\": \"yes\"");
    fails(&folder, &["`norm_topk_prob` is \"yes\", wanted true or false"]);
}

#[test]
fn missing_files_are_errors() {
    let folder = Folder::of("mixtral-tiny");
    std::fs::remove_file(folder.path("model.safetensors")).unwrap();
    fails(&folder, &["model.safetensors: no such file", "model.safetensors.index.json"]);
    std::fs::remove_file(folder.path("config.json")).unwrap();
    fails(&folder, &["config.json: no such file"]);

    let folder = Folder::of("qwen3-moe-tiny");
    std::fs::remove_file(folder.path("model-00003-of-00004.safetensors")).unwrap();
    fails(&folder, &["model-00003-of-00004.safetensors: no such file"]);

    let folder = Folder::of("mixtral-tiny");
    std::fs::remove_file(folder.path("recorded.safetensors")).unwrap();
    fails(&folder, &["cannot open", "recorded.safetensors"]);

    let missing = folder.path("missing").display().to_string();
    check_failure(
        &program(&[
            "run",
            "--checkpoint",
            &missing,
            "--layer",
            "0",
            "--input",
            "x",
            "--output",
            "y",
        ]),
        &[&missing, "no such folder"],
    );
}

#[test]
fn truncated_files_are_errors() {
    for (file, bytes) in
        [("model.safetensors", 100_000), ("model.safetensors", 100), ("model.safetensors", 3)]
    {
        let folder = Folder::of("mixtral-tiny");
        folder.cut(file, bytes);
        fails(&folder, &[file, "not a complete safetensors file", &format!("{bytes} bytes")]);
    }
    let folder = Folder::of("mixtral-tiny");
    folder.cut("recorded.safetensors", 0);
    fails(&folder, &["recorded.safetensors", "0 bytes"]);
    let folder = Folder::of("qwen3-moe-tiny");
    folder.cut("model-00002-of-00004.safetensors", 20_000);
    fails(&folder, &["model-00002-of-00004.safetensors", "20000 bytes"]);
}

#[test]
fn layers_without_moe_block_are_errors() {
    let folder = Folder::of("qwen3-moe-tiny");
    let whys = [
        "`mlp_only_layers` is [0], which makes layer 0 dense",
        "`num_hidden_layers` is 2, wanted more than 2 layers to have layer 2",
    ];
    for (layer, why) in [0, 2].into_iter().zip(whys) {
        let done = run(&folder, layer, &["--device", "cpu"]);
        check_failure(&done, &["config.json", why, "layers with MoE blocks: 1"]);
    }
    folder.edit("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    let done = run(&folder, 2, &["--device", "cpu"]);
    check_failure(&done, &["layer 2 has no qwen3_moe block", "layers with MoE blocks: 1"]);
    let folder = Folder::of("mixtral-tiny");
    check_failure(&run(&folder, 9, &["--device", "cpu"]), &["layers with MoE blocks: 0-1"]);
}

/// Python writes Infinity and NaN, which are no JSON. They are accepted in keys that the block
/// ignores.
#[test]
fn infinity_in_unused_config_key_is_accepted() {
    let folder = Folder::of("mixtral-tiny");
    let more = "\"hidden_size\": 40, \"limits\": [-Infinity, Infinity, NaN, \"NaN\"]";
    folder.edit("config.json", "\"hidden_size\": 40", more);
    let done = run(&folder, 1, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
}

/// A copy of the Mixtral checkpoint with one changed tensor.
fn with_tensor(change: impl Fn(&mut Stored)) -> Folder {
    let folder = Folder::of("mixtral-tiny");
    let mut tensors = folder.tensors("model.safetensors");
    let tensor = tensors.iter_mut().find(|tensor| tensor.name == EXPERT).unwrap();
    change(tensor);
    write(&folder.path("model.safetensors"), &tensors);
    folder
}

#[test]
fn rejects_weights_of_wrong_shape_type_or_name() {
    let folder = with_tensor(|tensor| tensor.shape.reverse());
    fails(&folder, &["model.safetensors", EXPERT, "is [20, 40], wanted [40, 20]"]);
    let folder = with_tensor(|tensor| tensor.dtype = Dtype::I32);
    fails(&folder, &["model.safetensors", EXPERT, "is i32, wanted f64, f32, bf16 or f16"]);
    let folder = with_tensor(|tensor| tensor.name = "model.lost".into());
    fails(&folder, &["model.safetensors", &format!("no tensor `{EXPERT}`, wanted [40, 20]")]);
}

/// FP8 weights need scales, for blocks of the size in config.json.
#[test]
fn rejects_fp8_weights_without_valid_scales() {
    let quantised = || {
        with_tensor(|tensor| {
            tensor.dtype = Dtype::F8_E4M3;
            tensor.data.truncate(tensor.shape.iter().product());
        })
    };
    let blocks = |side: usize| {
        format!(
            "\"quantization_config\": {{\"weight_block_size\": [{side}, {side}]}}, \"hidden_size\""
        )
    };
    let folder = quantised();
    folder.edit("config.json", "\"hidden_size\"", &blocks(128));
    let scales = format!("{EXPERT}_scale_inv");
    fails(&folder, &["model.safetensors", &format!("no tensor `{scales}`, wanted [1, 1]")]);
    let mut tensors = folder.tensors("model.safetensors");
    tensors.push(Stored::f32(&scales, &[1, 2], &[1.0, 1.0]));
    write(&folder.path("model.safetensors"), &tensors);
    fails(&folder, &[&scales, "is [1, 2], wanted [1, 1]"]);
}

#[test]
fn rejects_index_outside_folder() {
    let name = "model.layers.1.mlp.experts.0.up_proj.weight";
    let line = |file: &str| format!("\"{name}\": \"{file}\"");
    let index = "model.safetensors.index.json";
    let right = line("model-00004-of-00004.safetensors");

    let folder = Folder::of("qwen3-moe-tiny");
    folder.edit(index, &right, &line("model-00001-of-00004.safetensors"));
    fails(&folder, &["model-00001-of-00004.safetensors", &format!("no tensor `{name}`")]);

    let folder = Folder::of("qwen3-moe-tiny");
    folder.edit(index, &right, &line("../model-00004-of-00004.safetensors"));
    fails(&folder, &[index, name, "wanted the name of a file in the same folder"]);

    let folder = Folder::of("qwen3-moe-tiny");
    folder.edit(index, "\"weight_map\"", "\"weights\"");
    fails(&folder, &[index, "weight_map"]);
}

#[test]
fn rejects_inputs_of_wrong_shape_type_or_name() {
    let x = |shape: &[usize]| Stored::f32("x", shape, &vec![0.5; shape.iter().product()]);
    let integers = Stored { dtype: Dtype::I32, ..x(&[4, 40]) };
    let renamed = Stored { name: "hidden_states".into(), ..x(&[4, 40]) };
    let cases: [(Stored, &[&str]); 5] = [
        (x(&[4, 39]), &["recorded.safetensors", "`x` is [4, 39]", "40"]),
        (x(&[1, 4, 40]), &["`x` is [1, 4, 40]"]),
        (x(&[0, 40]), &["`x` is [0, 40]", "at least one token"]),
        (integers, &["`x` is i32, wanted f64, f32, bf16 or f16"]),
        (renamed, &["no tensor `x`", "`hidden_states`"]),
    ];
    for (tensor, words) in cases {
        let folder = Folder::of("mixtral-tiny");
        write(&folder.path("recorded.safetensors"), &[tensor]);
        fails(&folder, words);
    }
}

/// Some blocks read more than `x`.
#[test]
fn missing_router_inputs_are_errors() {
    for (fixture, tensor) in [
        ("gemma4-tiny", "router_input"),
        ("zaya-tiny", "logits"),
        ("deepseek-v4-hash-tiny", "token_ids"),
        ("ernie4-5-vl-moe-tiny", "token_types"),
    ] {
        let folder = Folder::of(fixture);
        let mut tensors = folder.tensors("recorded.safetensors");
        tensors.retain(|stored| stored.name != tensor);
        write(&folder.path("recorded.safetensors"), &tensors);
        fails(&folder, &["recorded.safetensors", &format!("no tensor `{tensor}`")]);
    }
}

#[test]
fn rejects_recordings_of_wrong_shape() {
    let folder = Folder::of("switch-transformers-tiny");
    let right = folder.tensors("recorded.safetensors");
    type Case = (&'static str, fn(&mut Stored), &'static str);
    let cases: [Case; 3] = [
        ("kept", |kept| kept.shape = vec![1, 12], "`kept` is [1, 12], wanted [12, 1]"),
        (
            "expert_ids",
            |ids| ids.shape = vec![1, 12],
            "`expert_ids` is [1, 12], wanted [12, K], the ids",
        ),
        ("y", |y| y.shape.reverse(), "`y` is [20, 12], wanted [12, 20]"),
    ];
    for (name, damage, words) in cases {
        let mut tensors = right.clone();
        damage(tensors.iter_mut().find(|stored| stored.name == name).unwrap());
        let notes = std::collections::HashMap::from([("layer".to_string(), "1".to_string())]);
        write_with(&folder.path("recorded.safetensors"), &tensors, Some(notes));
        let of = folder.dir().to_str().unwrap();
        let done = program(&["run", "--recorded", of, "--device", "cpu", "--dtype", "f32"]);
        check_failure(&done, &[words]);
    }
    let empty = Folder::new();
    let done = program(&["run", "--recorded", empty.dir().to_str().unwrap(), "--device", "cpu"]);
    check_failure(&done, &["neither recorded.safetensors nor a folder with one"]);
}

#[test]
fn rejects_output_paths_that_are_no_files() {
    let folder = Folder::of("mixtral-tiny");
    let output = folder.path("no/such/y.safetensors").display().to_string();
    check_failure(
        &run(&folder, 1, &["--device", "cpu", "--output", &output]),
        &["cannot be used multiple times"],
    );
    let input = folder.path("recorded.safetensors").display().to_string();
    let dir = folder.dir().display().to_string();
    let arguments = ["run", "--checkpoint", &dir, "--layer", "1", "--input", &input, "--output"];
    check_failure(
        &program(&[&arguments[..], &[&output, "--device", "cpu"]].concat()),
        &["--output", "no/such"],
    );
    // The output is a folder.
    check_failure(
        &program(&[&arguments[..], &[&dir, "--device", "cpu"]].concat()),
        &["--output", &dir],
    );
    // The output would overwrite the input.
    check_failure(
        &program(&[&arguments[..], &[&input, "--device", "cpu"]].concat()),
        &["--output", "is the input file"],
    );
    #[cfg(unix)]
    {
        // A path that is not a regular file is not replaced.
        use std::os::unix::fs::FileTypeExt;
        let fifo = folder.path("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let name = fifo.display().to_string();
        check_failure(
            &program(&[&arguments[..], &[&name, "--device", "cpu"]].concat()),
            &["--output", "wanted a file"],
        );
        assert!(std::fs::metadata(&fifo).unwrap().file_type().is_fifo());
    }
}

#[test]
fn missing_gpu_is_an_error() {
    // Hides GPUs from the driver, if there is one.
    let hidden = [("CUDA_VISIBLE_DEVICES", "")];
    check_failure(&program_in(&hidden, &["run", "--device", "cuda"]), &["device cuda: "]);
}

#[test]
fn run_finds_a_gpu_exactly_if_info_does() {
    let info = program(&["info"]).stdout;
    let line = info.lines().find(|line| line.starts_with("cuda ")).unwrap();
    let done = program(&["run", "--device", "cuda"]);
    match line.contains("compute capability") {
        true => assert_eq!(done.status, Some(0), "{line}: {done:?}"),
        false => check_failure(&done, &["device cuda: "]),
    }
}

#[test]
fn invalid_options_are_errors() {
    for arguments in [
        &["run", "--layer", "0"][..],
        &["run", "--checkpoint", "."],
        &["run", "--dtype", "f64"],
        &["run", "--device", "tpu"],
        &["walk"],
        &[],
    ] {
        assert_eq!(program(arguments).status, Some(2), "{arguments:?}");
    }
}
