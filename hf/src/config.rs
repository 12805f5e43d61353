//! From config.json to the MoE blocks of a layer.
//!
//! A family is a row of a table (`families/`): keys and their defaults, the rule of its router, its
//! peculiarities, and the names of its tensors. Rows follow transformers 5.23 and the released
//! models. If transformers departs from the model, the row follows the model and says so. The
//! *layer* around the block (residuals, their scales, a dense MLP in parallel) is not part of the
//! block.

use std::collections::BTreeSet;

use moe_kernels::MoeConfig;
use serde_json::{Map, Value};

use crate::block_info::BlockInfo;
use crate::error::{Error, Result};
use crate::families::{FAMILIES, NOT_COVERED};
use crate::family::{Family, Found};
use crate::json::strict_json;

/// The block of layer `layer` of the model that `json`, the text of a config.json, describes: the
/// first one of a layer with several.
///
/// # Errors
/// [`Error::Config`] names the key, its value and the accepted values. It is returned
/// - for a family whose block is not supported, with the reason,
/// - for a dense layer, or one past the last, with the key that decides so,
/// - for different values of two names of one key (`moe_topk`, `num_experts_per_tok`).
///
/// [`Error::Library`] for sizes that moe-kernels rejects.
pub fn from_config(json: &str, layer: usize) -> Result<MoeConfig> {
    let blocks = blocks_from_config(json, layer)?;
    blocks.first().map(|block| block.config).ok_or_else(|| not_json("without a block".into()))
}

/// All MoE blocks of layer `layer` of a model: one for each of its parts (text and vision, encoder
/// and decoder) that has such a layer.
///
/// # Errors
/// Those of [`from_config`].
pub fn blocks_from_config(json: &str, layer: usize) -> Result<Vec<BlockInfo>> {
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

/// The numbers of the layers with MoE blocks, in any part of the model.
///
/// # Errors
/// Those of [`from_config`].
pub fn layers_from_config(json: &str) -> Result<Vec<usize>> {
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

/// The supported values of `model_type`, in alphabetical order.
pub fn model_types() -> Vec<&'static str> {
    let rows = FAMILIES.iter().flat_map(|families| families.iter());
    let mut types: Vec<_> = rows.flat_map(|family| family.model_types).copied().collect();
    types.sort_unstable();
    types.dedup();
    types
}

fn not_json(why: String) -> Error {
    let wanted = "a JSON object that describes a model".into();
    Error::Config { key: "config.json".into(), got: format!("not JSON: {why}"), wanted }
}

fn unknown(model_type: Option<&Value>) -> Error {
    let got = model_type.map_or("missing".into(), Value::to_string);
    let why = model_type
        .and_then(Value::as_str)
        .and_then(|name| NOT_COVERED.iter().find(|(known, _)| *known == name))
        .map_or_else(String::new, |(_, why)| format!(" ({why})"));
    let wanted = format!("one of the supported families{why}: {}", model_types().join(", "));
    Error::Config { key: "model_type".into(), got, wanted }
}
