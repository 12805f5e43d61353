//! Quantised checkpoints, with the names and types of published files. The output has the bits of
//! the same weights in f32.

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::common::{Done, Folder, Stored, find, run};
use crate::model::{Model, bytes};

/// Decodes a float of a sign, an exponent with a bias, and a fraction, in f64.
fn defined(code: u8, exponent_bits: u32, bias: i32, fraction_bits: u32) -> f64 {
    let fraction = u32::from(code) & ((1 << fraction_bits) - 1);
    let exponent = (u32::from(code) >> fraction_bits) & ((1 << exponent_bits) - 1);
    let part = f64::from(fraction) / f64::from(1u32 << fraction_bits);
    let magnitude = match exponent {
        0 => part * 2f64.powi(1 - bias),
        _ => (1.0 + part) * 2f64.powi(exponent as i32 - bias),
    };
    let sign = code >> (exponent_bits + fraction_bits) & 1;
    if sign == 1 { -magnitude } else { magnitude }
}

/// The type of a scale on disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    F32,
    Bf16,
    E8m0,
    /// The same, as bytes.
    U8,
}

/// A scheme for storing a matrix, or a stack of matrices.
#[derive(Clone, Copy, Debug)]
struct Scheme {
    /// The suffix of the scales' name. With a dot it follows the module's name, otherwise `weight`.
    name: &'static str,
    fp4: bool,
    scale: Scale,
    /// The rows and columns that share a scale; `usize::MAX` for all.
    block: [usize; 2],
    /// The number of dimensions of the scales, without that of the stack.
    dimensions: usize,
}

const BLOCKS: Scheme =
    Scheme { name: "_scale_inv", fp4: false, scale: Scale::F32, block: [128, 128], dimensions: 2 };
const FP4: Scheme =
    Scheme { name: ".scale", fp4: true, scale: Scale::E8m0, block: [1, 32], dimensions: 2 };
const ALL: usize = usize::MAX;

/// Random codes and scales, and the values that they represent.
fn quantise(
    model: &mut Model,
    name: &str,
    shape: &[usize],
    scheme: Scheme,
) -> ([Stored; 2], Stored) {
    let (stack, [n, k]) = match shape {
        [stack @ .., n, k] => (stack, [*n, *k]),
        _ => panic!("{name} is no matrix"),
    };
    let matrices: usize = stack.iter().product();
    let [rows, columns] = [scheme.block[0].min(n), scheme.block[1].min(k)];
    let grid = [n.div_ceil(rows), k.div_ceil(columns)];
    let scales: Vec<u8> = model.bytes(matrices * grid[0] * grid[1]);
    // Powers of two around 2^-7; numbers that are none where the type has them.
    let (mut values, mut data) = (Vec::new(), Vec::new());
    for code in scales {
        let exponent = 118 + code % 5;
        let power = 2f64.powi(i32::from(exponent) - 127);
        let odd = (power * (1.0 + f64::from(code) / 256.0)) as f32;
        let value = match scheme.scale {
            Scale::E8m0 | Scale::U8 => {
                data.push(exponent);
                power as f32
            }
            Scale::F32 => {
                data.extend(odd.to_le_bytes());
                odd
            }
            Scale::Bf16 => {
                let odd = half::bf16::from_f32(odd);
                data.extend(odd.to_le_bytes());
                odd.to_f32()
            }
        };
        values.push(value);
    }
    let per_byte = if scheme.fp4 { 2 } else { 1 };
    let mut codes = model.bytes(matrices * n * k / per_byte);
    if !scheme.fp4 {
        // NaN is another test.
        codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code ^= 1);
    }
    let wide: Vec<f32> = (0..matrices * n * k)
        .map(|i| {
            let (matrix, row, column) = (i / (n * k), i / k % n, i % k);
            let scale = values[(matrix * grid[0] + row / rows) * grid[1] + column / columns];
            let value = match scheme.fp4 {
                true => defined(codes[i / 2] >> (4 * (i % 2)) & 15, 2, 1, 1),
                false => defined(codes[i], 4, 7, 3),
            };
            // One rounding: the product of 24 and 4 bits is exact in f64.
            (value * f64::from(scale)) as f32
        })
        .collect();
    let of_scales = match scheme.name.strip_prefix('.') {
        Some(_) => format!("{}{}", name.strip_suffix(".weight").unwrap(), scheme.name),
        None => format!("{name}{}", scheme.name),
    };
    let scale_shape = [stack, &grid[..scheme.dimensions]].concat();
    let scale_type = match scheme.scale {
        Scale::F32 => Dtype::F32,
        Scale::Bf16 => Dtype::BF16,
        Scale::E8m0 => Dtype::F8_E8M0,
        Scale::U8 => Dtype::U8,
    };
    let (code_type, code_shape) = match scheme.fp4 {
        true => (Dtype::I8, [stack, &[n, k / 2]].concat()),
        false => (Dtype::F8_E4M3, shape.to_vec()),
    };
    let stored = [
        bytes(name, code_type, &code_shape, codes),
        bytes(&of_scales, scale_type, &scale_shape, data),
    ];
    (stored, Stored::f32(name, shape, &wide))
}

fn y(folder: &Folder, layer: usize) -> (Done, Vec<u8>) {
    let done = run(folder, layer, &["--device", "cpu"]);
    assert_eq!(done.status, Some(0), "{done:?}");
    let output = folder.tensors("y.safetensors");
    assert!(find(&output, "y").values().iter().all(|value| value.is_finite() && *value != 0.0));
    (done, find(&output, "y").data.clone())
}

/// Runs a model with quantised tensors, and the same model in f32. A tensor uses the first scheme
/// whose text is part of its name.
#[track_caller]
fn same_as_wide(model: &Model, layer: usize, schemes: &[(&str, Scheme)]) -> Done {
    let (mut quantised, mut wide) = (model.clone(), model.clone());
    (quantised.tensors, wide.tensors) = (vec![], vec![]);
    for tensor in &model.tensors {
        match schemes.iter().find(|(part, _)| tensor.name.contains(part)) {
            Some((_, scheme)) => {
                let (stored, numbers) =
                    quantise(&mut quantised, &tensor.name, &tensor.shape, *scheme);
                quantised.tensors.extend(stored);
                wide.tensors.push(numbers);
            }
            None => {
                quantised.tensors.push(tensor.clone());
                wide.tensors.push(tensor.clone());
            }
        }
    }
    assert_ne!(quantised.tensors.len(), wide.tensors.len(), "nothing is quantised");
    let (done, got) = y(&quantised.write(), layer);
    let (_, wanted) = y(&wide.write(), layer);
    assert!(got == wanted, "{schemes:?}: other numbers");
    done
}

fn fp8_config(block: &[usize]) -> Value {
    json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block})
}

/// OLMoE's layer. The last blocks of its matrices are partial.
fn olmoe(quantization: Option<Value>) -> Model {
    let mut model = Model::of("olmoe-tiny", &[(28, 160), (12, 136)]);
    if let Some(quantization) = quantization {
        model.config["quantization_config"] = quantization;
    }
    model
}

#[test]
fn reads_fp8_with_block_scales() {
    for (block, scale, name) in [
        ([128, 128], Scale::F32, "_scale_inv"),
        ([128, 128], Scale::E8m0, "_scale_inv"),
        ([128, 128], Scale::Bf16, "_scale"),
        ([128, 128], Scale::E8m0, ".scale"),
        ([128, 128], Scale::F32, ".qscale_weight"),
        ([64, 32], Scale::F32, "_scale_inv"),
        ([1, 32], Scale::U8, "_scale"),
    ] {
        let scheme = Scheme { name, scale, block, ..BLOCKS };
        let model = olmoe(Some(fp8_config(&block)));
        let done = same_as_wide(&model, 1, &[("experts", scheme)]);
        assert!(done.stdout.contains("weights on disk in f8_e4m3"), "{}", done.stdout);
    }
    // compressed-tensors has the block in its groups.
    let weights =
        json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 128]});
    let groups = json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}});
    let scheme = Scheme { name: "_scale", block: [64, 128], ..BLOCKS };
    same_as_wide(&olmoe(Some(groups)), 1, &[("experts", scheme)]);
}

/// A scale for a matrix and a scale for each row, as in compressed-tensors, ModelOpt and FBGEMM.
#[test]
fn reads_fp8_with_matrix_and_row_scales() {
    let weights = |strategy: &str| json!({"num_bits": 8, "type": "float", "strategy": strategy});
    let config = |strategy: &str| {
        let groups = json!({"group_0": {"weights": weights(strategy)}});
        json!({"quant_method": "compressed-tensors", "config_groups": groups})
    };
    for (block, dimensions, strategy) in [
        ([ALL, ALL], 0, "tensor"),
        ([ALL, ALL], 1, "tensor"),
        ([ALL, ALL], 2, "tensor"),
        ([1, ALL], 1, "channel"),
        ([1, ALL], 2, "channel"),
    ] {
        for scale in [Scale::F32, Scale::Bf16] {
            let scheme = Scheme { name: "_scale", scale, block, dimensions, ..BLOCKS };
            same_as_wide(&olmoe(Some(config(strategy))), 1, &[("experts", scheme)]);
            same_as_wide(&olmoe(None), 1, &[("experts", scheme)]);
        }
        // All experts in one tensor.
        let model = Model::of("mistral4-tiny", &[(20, 160), (12, 72), (24, 144)]);
        let scheme = Scheme { name: "_scale", block, dimensions, ..BLOCKS };
        same_as_wide(&model, 1, &[("experts.gate_up_proj", scheme), ("experts.down_proj", scheme)]);
    }
}

/// `quantization_config` may be in the configuration of the text model.
#[test]
fn reads_nested_quantization_config() {
    for at in [&["text_config"][..], &[]] {
        let mut model = Model::of("qwen3-5-moe-tiny", &[(20, 160), (12, 136), (10, 136)]);
        let object = at.iter().fold(&mut model.config, |value, key| &mut value[*key]);
        object["quantization_config"] = fp8_config(&[128, 128]);
        same_as_wide(&model, 1, &[("experts.", BLOCKS), ("shared_expert.", BLOCKS)]);
    }
}

/// Experts in packed FP4 with E8M0 scales, the shared expert in FP8 with E8M0 scales; and experts
/// in FP8.
#[test]
fn reads_published_deepseek_v4() {
    let mut model = Model::of("deepseek-v4-tiny", &[(22, 160), (12, 192)]);
    model.config["quantization_config"] = json!({
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    });
    let fp8 = Scheme { name: ".scale", scale: Scale::E8m0, ..BLOCKS };
    let done = same_as_wide(&model, 1, &[("ffn.experts", FP4), ("shared_experts", fp8)]);
    assert!(done.stdout.contains("weights on disk in fp4"), "{}", done.stdout);
    same_as_wide(&model, 1, &[("experts", fp8)]);
    // Scales as numbers, as transformers has them without `ue8m0`.
    let floats = Scheme { scale: Scale::F32, name: "_scale_inv", ..FP4 };
    same_as_wide(&model, 1, &[("ffn.experts", floats), ("shared_experts", BLOCKS)]);
}

/// FP8 with a scale for each output feature and a tensor for each expert. The matrices are square,
/// so that the shape of the scales fits both orders.
#[test]
fn reads_published_llama_4_in_fp8() {
    let mut model = Model::of("llama4-tiny", &[(24, 40), (14, 40), (28, 80)]);
    let [tokens, inner] = [40, 40];
    model.store("experts.gate_up_proj", |model, name, _| {
        let of = |expert: usize, part: &str| {
            let start = name.strip_suffix("gate_up_proj").unwrap();
            format!("{start}{expert}.{part}.weight")
        };
        let mut stored = Vec::new();
        for expert in 0..5 {
            for (part, shape) in [
                ("gate_proj", [inner, tokens]),
                ("up_proj", [inner, tokens]),
                ("down_proj", [tokens, inner]),
            ] {
                let values = model.numbers(tokens * inner, 0.5);
                stored.push(Stored::f32(&of(expert, part), &shape, &values));
            }
        }
        stored
    });
    model.store("experts.down_proj", |_, _, _| Vec::new());
    let scheme = Scheme { name: "_scale", scale: Scale::Bf16, block: [1, ALL], ..BLOCKS };
    same_as_wide(&model, 1, &[("experts.", scheme)]);
}

#[test]
fn reads_published_mistral_large_4() {
    let mut model = Model::of("mistral-large4-tiny", &[(26, 160), (10, 136)]);
    model.config["quantization_config"] = fp8_config(&[128, 128]);
    same_as_wide(&model, 1, &[("experts", Scheme { name: ".qscale_weight", ..BLOCKS })]);
    model.config.as_object_mut().unwrap().remove("quantization_config");
    let scheme = Scheme { name: ".qscale_weight", block: [ALL, ALL], dimensions: 0, ..BLOCKS };
    same_as_wide(&model, 1, &[("experts", scheme)]);
}

/// FP8 with an E8M0 scale for 32 values; gate and up are interleaved.
#[test]
fn reads_published_inkling_2() {
    let mut model = Model::of("inkling2-tiny", &[(24, 96), (12, 48)]);
    let config = json!({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]});
    model.config["text_config"]["quantization_config"] = config;
    let scheme = Scheme { name: "_scale", scale: Scale::U8, block: [1, 32], ..BLOCKS };
    same_as_wide(&model, 1, &[("w13_weight", scheme), ("w2_weight", scheme)]);
}

/// Scales that a quantised model applies to its inputs are ignored.
#[test]
fn input_scales_are_ignored() {
    let mut model = olmoe(Some(fp8_config(&[128, 128])));
    let mut tensors = vec![];
    for tensor in model.tensors.clone() {
        if tensor.name.contains("experts") {
            let name = tensor.name.replace(".weight", ".input_scale");
            let (stored, _) = quantise(&mut model, &tensor.name, &tensor.shape, BLOCKS);
            tensors.extend(stored);
            tensors.push(Stored::f32(&name, &[1], &[3.0]));
        } else {
            tensors.push(tensor);
        }
    }
    model.tensors = tensors;
    y(&model.write(), 1);
}
