//! The quantisation of a model's weights, from config.json.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::keys::Keys;

/// The quantisation of a model's weights, from `quantization_config`.
///
/// The names, shapes and types of tensors determine how they are read. This type has the other
/// properties, and the name of the format for messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Quantization {
    /// The format's usual name, with its bits if the configuration has them: `GPTQ in 4 bits`.
    pub format: String,
    /// `quant_method` in lower case; empty if the configuration has none.
    pub method: String,
    /// The rows and columns of the blocks that share a scale: `weight_block_size`, or the
    /// `block_structure` of compressed-tensors.
    pub block: Option<[usize; 2]>,
}

/// The keys of the quantisation: that of transformers, an older one of compressed-tensors, and
/// MLX's.
const KEYS: [&str; 3] = ["quantization_config", "compression_config", "quantization"];

/// Usual names, by `quant_method`.
const METHODS: &[(&str, &str)] = &[
    ("gptq", "GPTQ"),
    ("awq", "AWQ"),
    ("auto-round", "AutoRound"),
    ("bitsandbytes", "bitsandbytes"),
    ("fp8", "FP8"),
    ("fbgemm_fp8", "FBGEMM FP8"),
    ("mxfp4", "MXFP4"),
    ("nvfp4", "NVFP4"),
    ("modelopt", "ModelOpt"),
    ("hqq", "HQQ"),
    ("quanto", "Quanto"),
    ("aqlm", "AQLM"),
    ("vptq", "VPTQ"),
    ("eetq", "EETQ"),
    ("gguf", "GGUF"),
    ("mlx", "MLX"),
];

impl Quantization {
    /// Reads the innermost object with one: models with several parts have it at the top or in a
    /// part's own configuration.
    ///
    /// # Errors
    /// [`Error::Config`] for a block that is not two sizes.
    pub(super) fn read(keys: &Keys<'_>) -> Result<Option<Self>> {
        let Some((key, value)) = keys.around(&KEYS) else { return Ok(None) };
        if !value.is_object() {
            let (got, wanted) = (value.to_string(), "an object".into());
            return Err(Error::Config { key, got, wanted });
        }
        let groups = || value.get("config_groups").and_then(Value::as_object);
        // Groups of compressed-tensors apply to different modules.
        let weights: Vec<&Value> = groups()
            .into_iter()
            .flat_map(|groups| groups.values())
            .filter_map(|group| group.get("weights"))
            .collect();
        let mut blocks = vec![("weight_block_size", value.get("weight_block_size"))];
        blocks.extend(
            weights.iter().map(|weights| ("block_structure", weights.get("block_structure"))),
        );
        let mut block = None;
        for (name, value) in blocks {
            let Some(value) = value.filter(|value| !value.is_null()) else { continue };
            let sizes: Option<Vec<usize>> = value.as_array().and_then(|sizes| {
                sizes
                    .iter()
                    .map(|size| size.as_u64().and_then(|size| size.try_into().ok()))
                    .collect()
            });
            match sizes.as_deref() {
                Some(&[rows, columns]) if rows > 0 && columns > 0 => {
                    block = block.or(Some([rows, columns]));
                }
                _ => {
                    return Err(Error::Config {
                        key: format!("{key}.{name}"),
                        got: value.to_string(),
                        wanted: "two whole numbers of at least 1".into(),
                    });
                }
            }
        }
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or_default();
        let method = method.to_lowercase();
        Ok(Some(Self { format: format(&key, &method, value, &weights), method, block }))
    }
}

/// The format in words.
fn format(key: &str, method: &str, value: &Value, weights: &[&Value]) -> String {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64);
    let known = METHODS.iter().find(|(name, _)| *name == method).map(|(_, name)| name.to_string());
    let mut format = match method {
        "compressed-tensors" => "compressed-tensors".into(),
        "" if key.ends_with("quantization") => "MLX".into(),
        "" if key.ends_with("compression_config") => "compressed-tensors".into(),
        "" => "a format without a name".into(),
        _ => known.unwrap_or_else(|| format!("{method:?}")),
    };
    for more in ["quant_algo", "format"].into_iter().filter_map(text) {
        format = format!("{format} {more}");
    }
    let first = weights.first();
    let bits = number(value, "bits")
        .or_else(|| number(value, "w_bit"))
        .or_else(|| first.and_then(|weights| number(weights, "num_bits")));
    let switched = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
    let bits = bits
        .or_else(|| switched("load_in_4bit").then_some(4))
        .or_else(|| switched("load_in_8bit").then_some(8));
    let kind = first.and_then(|weights| weights.get("type")).and_then(Value::as_str);
    match (kind, bits) {
        (Some(kind), Some(bits)) => format!("{format} ({kind}, {bits} bits)"),
        (None, Some(bits)) => format!("{format} in {bits} bits"),
        _ => format,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::blocks_from_config;

    /// Reads a configuration with these keys.
    fn read(top: &str, nested: &str) -> Result<Option<Quantization>> {
        let text = r#""hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2"#;
        let json =
            format!(r#"{{"model_type": "qwen3_5_moe", "text_config": {{{text}{nested}}}{top}}}"#);
        Ok(blocks_from_config(&json, 0)?.remove(0).quantization)
    }

    #[test]
    fn innermost_object_is_read() {
        let key = |sizes: &str| {
            format!(
                r#", "quantization_config": {{"quant_method": "fp8", "weight_block_size": {sizes}}}"#
            )
        };
        let block = |top: &str, nested: &str| read(top, nested).unwrap().unwrap().block;
        assert_eq!(read("", "").unwrap(), None);
        assert_eq!(read(r#", "quantization_config": null"#, "").unwrap(), None);
        assert_eq!(block(&key("[128, 64]"), ""), Some([128, 64]));
        assert_eq!(block("", &key("[1, 32]")), Some([1, 32]));
        assert_eq!(block(&key("[128, 128]"), &key("[1, 32]")), Some([1, 32]));
        assert_eq!(block(&key("null"), ""), None);
        let error = read(r#", "quantization_config": "fp8""#, "").unwrap_err().to_string();
        assert!(error.starts_with("`quantization_config` is \"fp8\", wanted an object"), "{error}");
        for (top, nested, path) in [("[0, 1]", "", ""), ("[1, 1]", "[1]", "text_config.")] {
            let nested = if nested.is_empty() { String::new() } else { key(nested) };
            let error = read(&key(top), &nested).unwrap_err().to_string();
            let name = format!("`{path}quantization_config.weight_block_size` is [");
            assert!(error.starts_with(&name), "{error}");
        }
    }

    #[test]
    fn formats_have_names() {
        for (keys, name) in [
            (r#""quantization_config": {"quant_method": "gptq", "bits": 4}"#, "GPTQ in 4 bits"),
            (r#""quantization_config": {"quant_method": "AWQ", "w_bit": 4}"#, "AWQ in 4 bits"),
            (r#""quantization_config": {"quant_method": "fp8"}"#, "FP8"),
            (r#""quantization_config": {"quant_method": "odd"}"#, "\"odd\""),
            (r#""quantization_config": {"bits": 3}"#, "a format without a name in 3 bits"),
            (
                r#""quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}"#,
                "bitsandbytes in 8 bits",
            ),
            (
                r#""quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}"#,
                "ModelOpt NVFP4",
            ),
            (r#""quantization": {"group_size": 64, "bits": 4}"#, "MLX in 4 bits"),
            (
                r#""compression_config": {"format": "pack-quantized"}"#,
                "compressed-tensors pack-quantized",
            ),
        ] {
            let read = read(&format!(", {keys}"), "").unwrap().unwrap();
            assert_eq!((read.format.as_str(), read.block), (name, None));
        }
        let weights =
            r#""weights": {"num_bits": 8, "type": "float", "block_structure": [128, 64]}"#;
        let keys = format!(
            r#", "quantization_config": {{"quant_method": "compressed-tensors",
                "config_groups": {{"group_0": {{{weights}}}}}}}"#
        );
        let read = read(&keys, "").unwrap().unwrap();
        assert_eq!(read.format, "compressed-tensors (float, 8 bits)");
        assert_eq!(read.block, Some([128, 64]));
    }
}
