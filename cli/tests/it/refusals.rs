//! Unsupported formats: the message names the format, the missing tensor and the tensors in its
//! place.

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::common::{Folder, Stored, fails};
use crate::model::{Model, zeros};

const GATE: &str = "model.layers.1.mlp.experts.0.gate_proj";

/// OLMoE's layer with replaced expert matrices `[out, in]` and this `quantization_config`.
fn with(config: Option<Value>, store: impl Fn(&str, usize, usize) -> Vec<Stored>) -> Folder {
    let mut model = Model::of("olmoe-tiny", &[(28, 64), (12, 32)]);
    if let Some(config) = config {
        model.config["quantization_config"] = config;
    }
    model.store("experts.", |_, name, shape| {
        store(name.strip_suffix(".weight").unwrap(), shape[0], shape[1])
    });
    model.write()
}

/// The missing tensor, its shape, and the tensors in its place.
fn missing(in_place: &[&str]) -> Vec<String> {
    let mut words = vec![format!("no tensor `{GATE}.weight`, wanted [32, 64]; in its place: ")];
    words.extend(in_place.iter().map(|name| format!("`{GATE}.{name}`")));
    words
}

#[track_caller]
fn refused(folder: &Folder, mut words: Vec<String>, kind: &str) {
    // Checks the end of the format's name as well.
    let end = if words[0].starts_with("no tensor") { ";" } else { ", wanted" };
    words.push(format!(", {kind}{end}"));
    words.push("; supported quantised formats: f8_e4m3 with scales, packed FP4".into());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    fails(folder, &words);
}

#[test]
fn rejects_gptq_and_awq() {
    let store = |index: bool| {
        move |name: &str, n: usize, k: usize| {
            let mut stored = vec![
                zeros(&format!("{name}.qweight"), Dtype::I32, &[k / 8, n]),
                zeros(&format!("{name}.qzeros"), Dtype::I32, &[1, n / 8]),
                zeros(&format!("{name}.scales"), Dtype::F16, &[1, n]),
            ];
            if index {
                stored.push(zeros(&format!("{name}.g_idx"), Dtype::I32, &[k]));
            }
            stored
        }
    };
    let in_place = || missing(&["qweight", "qzeros", "scales"]);
    let config = |method: &str| Some(json!({"quant_method": method, "bits": 4}));
    refused(&with(config("gptq"), store(true)), in_place(), "whose format is GPTQ in 4 bits");
    refused(&with(config("awq"), store(false)), in_place(), "whose format is AWQ in 4 bits");
    refused(
        &with(config("new-method"), store(false)),
        in_place(),
        "whose format is \"new-method\" in 4 bits",
    );
    refused(&with(None, store(true)), in_place(), "whose format is GPTQ");
    refused(&with(None, store(false)), in_place(), "whose format is GPTQ or AWQ");
}

#[test]
fn rejects_compressed_tensors() {
    let config = |format: &str, kind: &str, bits: usize| {
        let weights = json!({"num_bits": bits, "type": kind, "strategy": "group"});
        Some(json!({
            "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}},
        }))
    };
    let packed = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight_packed"), Dtype::I32, &[n, k / 8]),
            zeros(&format!("{name}.weight_scale"), Dtype::BF16, &[n, k / 32]),
            zeros(&format!("{name}.weight_shape"), Dtype::I64, &[2]),
        ]
    };
    let in_place = || missing(&["weight_packed", "weight_scale", "weight_shape"]);
    let folder = with(config("pack-quantized", "int", 4), packed);
    refused(&folder, in_place(), "whose format is compressed-tensors pack-quantized (int, 4 bits)");
    refused(&with(None, packed), in_place(), "whose format is compressed-tensors, packed");

    let nvfp4 = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight_packed"), Dtype::U8, &[n, k / 2]),
            zeros(&format!("{name}.weight_scale"), Dtype::F8_E4M3, &[n, k / 16]),
            zeros(&format!("{name}.weight_global_scale"), Dtype::F32, &[1]),
        ]
    };
    let in_place = || missing(&["weight_packed", "weight_global_scale"]);
    let folder = with(config("nvfp4-pack-quantized", "float", 4), nvfp4);
    refused(
        &folder,
        in_place(),
        "whose format is compressed-tensors nvfp4-pack-quantized (float, 4 bits)",
    );
    refused(&with(None, nvfp4), in_place(), "whose format is NVFP4 of compressed-tensors");

    let int8 = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight"), Dtype::I8, &[n, k]),
            zeros(&format!("{name}.weight_scale"), Dtype::BF16, &[n, 1]),
        ]
    };
    let words = || vec![format!("`{GATE}.weight` is i8 [32, 64]")];
    let folder = with(config("int-quantized", "int", 8), int8);
    refused(&folder, words(), "whose format is compressed-tensors int-quantized (int, 8 bits)");
    refused(&with(None, int8), words(), "whose format is codes with scales");
}

#[test]
fn rejects_bitsandbytes() {
    let four = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight"), Dtype::U8, &[n * k / 2, 1]),
            zeros(&format!("{name}.weight.absmax"), Dtype::U8, &[n * k / 64]),
            zeros(&format!("{name}.weight.quant_map"), Dtype::F32, &[16]),
            zeros(&format!("{name}.weight.quant_state.bitsandbytes__nf4"), Dtype::U8, &[90]),
        ]
    };
    let words = || vec![format!("`{GATE}.weight` is u8 [1024, 1]")];
    let config =
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false});
    refused(&with(Some(config), four), words(), "whose format is bitsandbytes in 4 bits");
    refused(&with(None, four), words(), "whose format is bitsandbytes in 4 bits");

    let eight = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight"), Dtype::I8, &[n, k]),
            zeros(&format!("{name}.SCB"), Dtype::F32, &[n]),
        ]
    };
    let words = || vec![format!("`{GATE}.weight` is i8 [32, 64]")];
    let config =
        json!({"quant_method": "bitsandbytes", "load_in_4bit": false, "load_in_8bit": true});
    refused(&with(Some(config), eight), words(), "whose format is bitsandbytes in 8 bits");
    refused(&with(None, eight), words(), "whose format is bitsandbytes in 8 bits");
}

/// NVFP4 has the shape of packed FP4, and scales of another type for 16 values.
#[test]
fn rejects_nvfp4() {
    let store = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight"), Dtype::U8, &[n, k / 2]),
            zeros(&format!("{name}.weight_scale"), Dtype::F8_E4M3, &[n, k / 16]),
            zeros(&format!("{name}.weight_scale_2"), Dtype::F32, &[]),
        ]
    };
    let words = || vec![format!("`{GATE}.weight` is u8 [32, 32]")];
    let config = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    refused(&with(Some(config), store), words(), "whose format is ModelOpt NVFP4");
    refused(&with(None, store), words(), "whose format is NVFP4");
}

#[test]
fn rejects_mlx() {
    let store = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.weight"), Dtype::U32, &[n, k / 8]),
            zeros(&format!("{name}.scales"), Dtype::BF16, &[n, k / 32]),
            zeros(&format!("{name}.biases"), Dtype::BF16, &[n, k / 32]),
        ]
    };
    refused(
        &with(None, store),
        vec![format!("`{GATE}.weight` is u32 [32, 8]")],
        "whose format is MLX",
    );
    // All experts in one tensor, under another name.
    let mut model = Model::of("olmoe-tiny", &[(28, 64), (12, 32)]);
    model.config["quantization"] = json!({"group_size": 32, "bits": 4});
    model.store("experts.", |_, name, _| match name.split_once("experts.0.") {
        Some((module, matrix)) => {
            let name = format!("{module}switch_mlp.{matrix}");
            let name = name.strip_suffix(".weight").unwrap();
            store(name, 6 * 32, 64)
        }
        None => vec![],
    });
    let words = [
        &format!("no tensor `{GATE}.weight`, wanted [32, 64]; the block has "),
        "`model.layers.1.mlp.switch_mlp.down_proj.biases`",
        "whose format is MLX in 4 bits",
    ];
    fails(&model.write(), &words);
}

#[test]
fn rejects_unmerged_adapter() {
    let store = |name: &str, n: usize, k: usize| {
        vec![
            zeros(&format!("{name}.base_layer.weight"), Dtype::BF16, &[n, k]),
            zeros(&format!("{name}.lora_A.weight"), Dtype::BF16, &[4, k]),
        ]
    };
    let words = missing(&["base_layer.weight", "lora_A.weight"]);
    refused(&with(None, store), words, "of an adapter that is not merged into the weights");
}

/// The codes of other FP8 types have other values.
#[test]
fn rejects_other_fp8_types() {
    for (dtype, name) in [(Dtype::F8_E5M2, "f8_e5m2"), (Dtype::F8_E4M3FNUZ, "f8_e4m3fnuz")] {
        let store = |name: &str, n: usize, k: usize| {
            vec![
                zeros(&format!("{name}.weight"), dtype, &[n, k]),
                zeros(&format!("{name}.weight_scale_inv"), Dtype::F32, &[1, 1]),
            ]
        };
        let config = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        let words = [&format!("`{GATE}.weight` is {name} [32, 64]"), "f8_e4m3 with scales"];
        fails(&with(Some(config), store), &words);
    }
}

/// The message has the shape of the scales.
#[test]
fn rejects_fp8_without_scales() {
    let codes = |name: &str, n: usize, k: usize| {
        vec![zeros(&format!("{name}.weight"), Dtype::F8_E4M3, &[n, k])]
    };
    let others = "[1] or [] or [1, 1] or [32, 1] or [32]";
    let blocks = json!({"quant_method": "fp8", "weight_block_size": [16, 16]});
    for (config, shape) in [(Some(blocks), &format!("[2, 4] or {others}")[..]), (None, others)] {
        let first = format!(
            "no tensor `{GATE}.weight_scale_inv`, wanted {shape}: the scales of `{GATE}.weight`"
        );
        let words = [
            &first[..],
            "which is f8_e4m3",
            &format!("`{GATE}.scale`"),
            &format!("`{GATE}.qscale_weight`"),
        ];
        fails(&with(config, codes), &words);
    }
    // An invalid block size.
    for block in [json!([128]), json!([0, 128]), json!("128"), json!([128, -1])] {
        let words = [
            format!("`quantization_config.weight_block_size` is {block}"),
            "wanted two whole numbers of at least 1".into(),
        ];
        let folder = with(Some(json!({"weight_block_size": block})), codes);
        fails(&folder, &[&words[0], &words[1]]);
    }
}

/// Packed FP4 with scales of the wrong shape, and without scales.
#[test]
fn rejects_fp4_without_valid_scales() {
    let store = |scales: Option<(Dtype, usize)>| {
        move |name: &str, n: usize, k: usize| {
            let mut stored = vec![zeros(&format!("{name}.weight"), Dtype::I8, &[n, k / 2])];
            if let Some((dtype, per_scale)) = scales {
                stored.push(zeros(&format!("{name}.scale"), dtype, &[n, k / per_scale]));
            }
            stored
        }
    };
    let of_scales = format!("`{GATE}.scale` is");
    let of_codes = [&format!("`{GATE}.weight` is i8 [32, 32]")[..], "packed FP4"];
    fails(&with(None, store(None)), &[&format!("`{GATE}.weight` is i8"), "packed FP4"]);
    let folder = with(None, store(Some((Dtype::F8_E8M0, 16))));
    fails(&folder, &[&format!("{of_scales} [32, 4], wanted [32, 2]")]);
    // Scales in a float type are those of 4-bit integers, regardless of config.json.
    let int = json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "weights": {"num_bits": 4, "type": "int"}}}});
    for config in [None, Some(int), Some(json!({"quant_method": "quanto"}))] {
        for dtype in [Dtype::I32, Dtype::F16, Dtype::BF16, Dtype::F32] {
            fails(&with(config.clone(), store(Some((dtype, 32)))), &of_codes);
        }
    }
    let fp8 = || Some(json!({"quant_method": "fp8"}));
    fails(&with(fp8(), store(Some((Dtype::F16, 32)))), &of_codes);
}

#[test]
fn rejects_weights_in_other_file_formats() {
    for (file, format) in [
        ("model-q4_k_m.gguf", "GGUF"),
        ("pytorch_model.bin", "pickled tensors of PyTorch"),
        ("consolidated.00.pth", "pickled tensors of PyTorch"),
        ("adapter_model.safetensors", "an adapter without its model"),
    ] {
        let folder = Folder::of("mixtral-tiny");
        std::fs::rename(folder.path("model.safetensors"), folder.path(file)).unwrap();
        let in_place = format!("in its place: `{file}`, which is {format} and not supported");
        fails(&folder, &["model.safetensors: no such file", &in_place]);
    }
    let folder = Folder::of("mixtral-tiny");
    std::fs::remove_file(folder.path("model.safetensors")).unwrap();
    fails(&folder, &["`recorded.safetensors`, which is another set of names and not supported"]);
}
