//! Models as Hugging Face's Hub has them: from config.json to a [`MoeConfig`], and from a layer to the names of its
//! tensors.
//!
//! A family is a row of a table (`families/`): keys and their defaults, the rule of its router, what is peculiar, and
//! the names under which checkpoints have its tensors. Rows follow transformers 5.23 and the released models; where
//! transformers' own code departs from the model, the row follows the model and says so. What a family's *layer* does
//! around its block (residuals, their scales, a dense MLP in parallel) is not part of the block.
//!
//! ```
//! use moe_kernels::{MoeConfig, hf};
//!
//! # fn main() -> moe_kernels::Result<()> {
//! let json = r#"{ "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 48 }"#;
//! let config = MoeConfig::from_hf(json, 0)?;
//! assert_eq!(config.to_string(), "H64 I48 E8 K2, softmax, top-k, renormalised");
//!
//! let blocks = hf::blocks(json, 0)?;
//! let arrays = blocks[0].layouts()[0].arrays(&blocks[0], "model.layers.0.")?;
//! assert_eq!(arrays[0].role, hf::Role::RouterGate);
//! assert_eq!(arrays[0].parts[0].name, "model.layers.0.block_sparse_moe.gate.weight");
//! # Ok(())
//! # }
//! ```

mod families;
mod family;
mod json;
mod keys;
mod names;
mod quantization;
mod schedule;

pub use json::strict_json;
pub use names::{Array, Layout, Part, Role, Stored};
pub use quantization::Quantization;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::config::MoeConfig;
use crate::error::{Error, Result};
use families::{FAMILIES, NOT_COVERED};
use family::{Family, Found};

/// The MoE block of one layer of a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Block {
    /// The family, as `model_type` in config.json names it.
    pub model_type: &'static str,
    /// Which of the model's blocks it is ("text", "vision", "encoder" ...) where there are several; else empty.
    pub part: &'static str,
    /// The number of the layer.
    pub layer: usize,
    /// What it computes. Weights lie as the first of [`layouts`](Self::layouts) has them; [`Layout::config`] says how
    /// another one has them.
    pub config: MoeConfig,
    /// Where its logits come from.
    pub logits: LogitsFrom,
    /// `V`, the rows of the table of expert ids by token id; 0 where there is no such table.
    pub vocabulary: usize,
    /// The number that the first expert has in the names of tensors.
    pub first_expert: usize,
    /// How config.json says that weights are quantised; none where it does not.
    pub quantization: Option<Quantization>,
    prefixes: &'static [&'static str],
    layouts: &'static [Layout],
}

/// Where a block's logits come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LogitsFrom {
    /// The product of the tokens that the experts read and the router's weights.
    Projection,
    /// That of other vectors than the experts read: the layer's residual, where a norm stands before the experts alone
    /// (Gemma 4).
    ProjectionOfResidual,
    /// The caller: the router is a network of its own, with a state that goes from layer to layer (Zaya).
    Caller,
}

impl Block {
    /// What may stand before the names of this layer's tensors, the most frequent first.
    pub fn prefixes(&self) -> Vec<String> {
        let number = self.layer.to_string();
        self.prefixes.iter().map(|prefix| prefix.replace(LAYER, &number)).collect()
    }

    /// The kinds of checkpoints that there are of this family, the most frequent first.
    pub fn layouts(&self) -> &'static [Layout] {
        self.layouts
    }

    /// The number of the layer in the name of a tensor that begins like this block's.
    pub fn layer_of(&self, tensor: &str) -> Option<usize> {
        self.prefixes.iter().find_map(|prefix| {
            let (before, after) = prefix.split_once(LAYER)?;
            let rest = tensor.strip_prefix(before)?;
            let digits = rest.find(|c: char| !c.is_ascii_digit())?;
            let (number, rest) = rest.split_at(digits);
            rest.starts_with(after).then(|| number.parse().ok())?
        })
    }
}

const LAYER: &str = "{layer}";

impl MoeConfig {
    /// The block of layer `layer` of the model that `json`, the text of a config.json, describes: the first one where
    /// the model has several.
    ///
    /// # Errors
    /// [`Error::Json`](crate::Error::Json), which names the key, its value and what is known; for families whose block
    /// is none of this crate's it says why, and for a dense layer, or one past the last, the key that makes it so.
    /// Names of one thing (`moe_topk`, `num_experts_per_tok`) with different values are an error, too.
    /// [`Error::Unsupported`](crate::Error::Unsupported) for sizes out of range.
    pub fn from_hf(json: &str, layer: usize) -> Result<Self> {
        let blocks = blocks(json, layer)?;
        blocks.first().map(|block| block.config).ok_or_else(|| not_json("without a block".into()))
    }
}

/// Every MoE block that layer `layer` of a model has: one of each of its parts (text and vision, encoder and
/// decoder) that have such a layer.
///
/// # Errors
/// Those of [`MoeConfig::from_hf`].
pub fn blocks(json: &str, layer: usize) -> Result<Vec<Block>> {
    let object = object(json)?;
    let mut blocks = Vec::new();
    let mut dense = None;
    for family in families_of(&object)? {
        match family.block(&object, layer)? {
            Found::Block(block) => blocks.push(*block),
            Found::Dense(why) => dense = dense.or(Some(why)),
            Found::Absent => {}
        }
    }
    match dense {
        Some(why) if blocks.is_empty() => Err(why),
        _ => Ok(blocks),
    }
}

/// The numbers of the layers that have MoE blocks, in any part of the model.
///
/// # Errors
/// Those of [`MoeConfig::from_hf`].
pub fn layers(json: &str) -> Result<Vec<usize>> {
    let object = object(json)?;
    let mut layers = BTreeSet::new();
    for family in families_of(&object)? {
        layers.extend(family.layers(&object)?);
    }
    Ok(layers.into_iter().collect())
}

fn object(json: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(&strict_json(json)) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(not_json("it is not an object".into())),
        Err(error) => Err(not_json(error.to_string())),
    }
}

/// The rows of a model's family: at least one.
fn families_of(object: &Map<String, Value>) -> Result<Vec<&'static Family>> {
    let model_type = object.get("model_type");
    let name = model_type.and_then(Value::as_str).unwrap_or_default();
    let rows = FAMILIES.iter().flat_map(|families| families.iter());
    let rows: Vec<_> = rows.filter(|family| family.model_types.contains(&name)).collect();
    if rows.is_empty() { Err(unknown(model_type)) } else { Ok(rows) }
}

/// Every `model_type` that is covered, in alphabetical order.
pub fn model_types() -> Vec<&'static str> {
    let rows = FAMILIES.iter().flat_map(|families| families.iter());
    let mut types: Vec<_> = rows.flat_map(|family| family.model_types).copied().collect();
    types.sort_unstable();
    types.dedup();
    types
}

fn not_json(why: String) -> Error {
    let wanted = "a JSON object that describes a model".into();
    Error::Json { key: "config.json".into(), got: format!("not JSON: {why}"), wanted }
}

fn unknown(model_type: Option<&Value>) -> Error {
    let got = model_type.map_or("missing".into(), Value::to_string);
    let why = model_type
        .and_then(Value::as_str)
        .and_then(|name| NOT_COVERED.iter().find(|(known, _)| *known == name))
        .map_or_else(String::new, |(_, why)| format!(" ({why})"));
    let wanted =
        format!("one of the families that are supported{why}: {}", model_types().join(", "));
    Error::Json { key: "model_type".into(), got, wanted }
}
