//! The layers of a model that have experts. The others are dense; past the last layer of the main
//! model only those that predict further tokens have experts.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::keys::{Keys, MAX_LAYERS, Names};

/// The layers of a family's models, from keys that the family's own code reads.
#[derive(Clone, Copy)]
pub(super) struct Schedule {
    /// The keys of the number of layers, and the default.
    pub count: (Names, usize),
    /// The key is at the top of config.json.
    pub at_top: bool,
    /// The list `mlp_layer_types` by layer overrides the rule, if it exists.
    pub types: bool,
    pub dense: Dense,
}

/// The rule for dense layers.
#[derive(Clone, Copy)]
pub(super) enum Dense {
    None,
    /// None. `num_hidden_layers` counts two for each layer, `num_layers` one; the former takes
    /// precedence.
    Pairs,
    /// The first ones: their number is the value of a key, or the default.
    First(Names, usize),
    /// The first `first_k_dense_replace` (1 by default), and those whose number is no multiple of
    /// `moe_layer_freq`, or whose element in the list of that name is 0.
    FirstAndFrequency,
    /// Those whose element in the list `moe_layer_freq` is 0.
    Frequency,
    /// Those that `mlp_only_layers` names (or the default), and all but every
    /// `decoder_sparse_step`th.
    Steps(&'static [usize]),
    /// All but every `expert_layer_period`th (2 by default) from `expert_layer_offset` (1) on; all
    /// if there is one expert.
    Period,
    /// All but those that `moe_layers` names; without it all but every
    /// `interleave_moe_layer_step`th.
    Listed,
    /// All but those that `moe_layers_enum` names; without it the first 3.
    Enumerated,
    /// Those outside `moe_layer_start_index..=moe_layer_end_index`, and all but every
    /// `moe_layer_interval`th.
    Range,
    /// All whose element in `layers_block_type` is not "moe", or whose letter in
    /// `hybrid_override_pattern` is not `E`.
    Pattern,
    /// Those whose number in `pyramid_num_routed` is not positive; without it those of
    /// `mlp_layer_types`.
    Pyramid,
    /// All but every nth, where n is the value of the key (4 by default).
    Every(Names),
    /// All but the second of each group of consecutive layers. The keys of the number of layers (12
    /// by default), of the number of groups (3), and of the length of a group, which overrides
    /// both.
    Spread(Names, Names, Names),
}

/// `default` layers, all with experts.
pub(super) const fn layers(default: usize) -> Schedule {
    Schedule {
        count: (&["num_hidden_layers"], default),
        at_top: false,
        types: false,
        dense: Dense::None,
    }
}

/// The first `first_k_dense_replace` are dense.
pub(super) const fn first_k(default: usize) -> Dense {
    Dense::First(&["first_k_dense_replace"], default)
}

const SPARSE: &str = "a layer with experts";
const TYPES: &str = "mlp_layer_types";
const FREQUENCY: Names = &["moe_layer_freq"];
const BLOCK_TYPES: Names = &["layers_block_type", "layer_types"];
const LETTERS: Names = &["hybrid_override_pattern"];
const PREDICT: Names = &["num_nextn_predict_layers"];
const PYRAMID: Names = &["pyramid_num_routed"];
/// A list of booleans by layer in released files, which transformers ignores.
const RELEASED: &str = "is_moe_layer";

/// The key that makes a layer dense, and its default.
type Reason = Option<(Names, String)>;

impl Schedule {
    pub const fn dense(self, dense: Dense) -> Self {
        Self { dense, ..self }
    }

    /// With a list `mlp_layer_types` that overrides the rule.
    pub const fn typed(self, dense: Dense) -> Self {
        Self { types: true, dense, ..self }
    }

    pub const fn counted_by(self, keys: Names) -> Self {
        Self { count: (keys, self.count.1), ..self }
    }

    pub const fn counted_at_top(self, keys: Names) -> Self {
        Self { at_top: true, ..self.counted_by(keys) }
    }

    /// The reason why the layer has no experts: it is dense, or there is no such layer. `None` if
    /// it has experts.
    ///
    /// # Errors
    /// [`Error::Config`] for a key of the wrong type.
    pub fn without_experts(&self, keys: &Keys<'_>) -> Result<Option<Error>> {
        let (layer, total) = (keys.layer, self.total(keys)?);
        // Layers that predict further tokens follow the last one and have experts, if config.json
        // counts them.
        if layer >= total && layer - total < keys.count(PREDICT, 0)? {
            return Ok(None);
        }
        if layer >= total {
            let wanted = format!("more than {layer} layers to have layer {layer}");
            return Ok(Some(self.error_of_total(keys, wanted)));
        }
        if self.types
            && let Some(kind) = keys.by_layer(TYPES)?
        {
            let dense = Some(keys.error_text(TYPES, format!("{kind} for layer {layer}"), SPARSE));
            return match kind.as_str() {
                Some("sparse") => released(keys),
                Some("dense") => Ok(dense),
                _ => Err(keys.error(TYPES, kind, "\"sparse\" or \"dense\" for each layer")),
            };
        }
        if let Some((names, default)) = self.reason(keys)? {
            let (name, got) = keys.shown(names, &default);
            let got = format!("{got}, which makes layer {layer} dense");
            return Ok(Some(keys.error_text(name, got, SPARSE)));
        }
        released(keys)
    }

    /// The number of layers.
    pub fn total(&self, keys: &Keys<'_>) -> Result<usize> {
        let (names, default) = self.count;
        let total = match self.dense {
            Dense::Pattern => kinds(keys)?.len(),
            Dense::Pairs if keys.has("num_hidden_layers") => keys.size(names, default)? / 2,
            Dense::Pairs => keys.size(&["num_layers"], default)?,
            _ if self.at_top => keys.top().size(names, default)?,
            _ => keys.size(names, default)?,
        };
        if total > MAX_LAYERS {
            return Err(self.error_of_total(keys, format!("at most {MAX_LAYERS} layers")));
        }
        Ok(total)
    }

    fn error_of_total(&self, keys: &Keys<'_>, wanted: String) -> Error {
        let keys = if self.at_top { &keys.top() } else { keys };
        let (names, default) = self.count;
        let (name, got) = match self.dense {
            Dense::Pattern => keys.shown(&[BLOCK_TYPES, LETTERS].concat(), "4 layers"),
            Dense::Pairs => keys.shown(&["num_hidden_layers", "num_layers"], "28 pairs"),
            _ => keys.shown(names, &default.to_string()),
        };
        keys.error_text(name, got, wanted)
    }

    fn reason(&self, keys: &Keys<'_>) -> Result<Reason> {
        let layer = keys.layer;
        Ok(match self.dense {
            Dense::None | Dense::Pairs => None,
            Dense::First(names, default) => {
                let first = keys.count(names, default)?;
                let names = if names.is_empty() { &[TYPES] } else { names };
                unless(layer >= first, names, format!("{default} dense layers"))
            }
            Dense::FirstAndFrequency => {
                let names: Names = &["first_k_dense_replace"];
                let first = unless(layer >= keys.count(names, 1)?, names, 1);
                first.or(unless(in_frequency(keys)?, FREQUENCY, 1))
            }
            Dense::Frequency => unless(in_frequency(keys)?, FREQUENCY, 1),
            Dense::Steps(default) => {
                let only = keys.layer_numbers("mlp_only_layers")?;
                let listed = only.as_deref().unwrap_or(default).contains(&layer);
                let names: Names = &["decoder_sparse_step"];
                let step = keys.size(names, 1)?;
                unless(!listed, &["mlp_only_layers"], format!("{default:?}")).or(unless(
                    (layer + 1).is_multiple_of(step),
                    names,
                    1,
                ))
            }
            Dense::Period => {
                let (period, offset): (Names, Names) =
                    (&["expert_layer_period"], &["expert_layer_offset"]);
                let sparse = layer % keys.size(period, 2)? == keys.count(offset, 1)?;
                unless(sparse, period, "2, with `expert_layer_offset` 1").or(unless(
                    keys.count(&["num_experts"], 16)? > 1,
                    &["num_experts"],
                    16,
                ))
            }
            Dense::Listed => match keys.layer_numbers("moe_layers")? {
                Some(listed) => unless(listed.contains(&layer), &["moe_layers"], ""),
                None => {
                    let names: Names = &["interleave_moe_layer_step"];
                    unless((layer + 1).is_multiple_of(keys.size(names, 1)?), names, 1)
                }
            },
            Dense::Enumerated => {
                let listed = keys.layer_numbers("moe_layers_enum")?;
                let sparse = listed.map_or(layer >= 3, |listed| listed.contains(&layer));
                unless(sparse, &["moe_layers_enum"], "all but the first 3")
            }
            Dense::Range => {
                let (interval, start): (Names, Names) =
                    (&["moe_layer_interval"], &["moe_layer_start_index"]);
                let end: Names = &["moe_layer_end_index"];
                let last = keys.number(end, None)?.unwrap_or(-1.0);
                unless((layer + 1).is_multiple_of(keys.size(interval, 1)?), interval, 1)
                    .or(unless(layer >= keys.count(start, 1)?, start, 1))
                    .or(unless(last == -1.0 || layer as f64 <= last, end, -1))
            }
            Dense::Pattern => {
                let sparse = kinds(keys)?.get(layer).is_some_and(|kind| *kind == "moe");
                let names = if keys.has_any(BLOCK_TYPES) { BLOCK_TYPES } else { LETTERS };
                unless(sparse, names, "\"ME*-\"")
            }
            Dense::Pyramid => match (keys.by_layer("pyramid_num_routed")?, keys.by_layer(TYPES)?) {
                (Some(count), _) => {
                    unless(count.as_f64().is_some_and(|count| count > 0.0), PYRAMID, "")
                }
                (None, Some(kind)) => unless(kind == "sparse", &[TYPES], ""),
                (None, None) => unless(layer >= 25, PYRAMID, "25 dense layers"),
            },
            Dense::Every(names) => {
                let step = keys.count(names, 4)?;
                unless(step > 0 && (layer + 1).is_multiple_of(step), names, 4)
            }
            Dense::Spread(layers, groups, length) => {
                let (layers, count) = (keys.size(layers, 12)?, keys.count(groups, 3)?);
                let group = keys.count(length, layers.checked_div(count).unwrap_or(layers))?;
                let sparse = group == 1 || layer.checked_rem(group) == Some(1);
                let names = if keys.has_any(length) { length } else { groups };
                unless(sparse, names, 3)
            }
        })
    }
}

/// The reason why a layer with experts by the family's rule has none by its released file.
fn released(keys: &Keys<'_>) -> Result<Option<Error>> {
    match keys.by_layer(RELEASED)? {
        None | Some(Value::Bool(true)) => Ok(None),
        Some(Value::Bool(false)) => {
            let got = format!("false for layer {}", keys.layer);
            Ok(Some(keys.error_text(RELEASED, got, SPARSE)))
        }
        Some(other) => Err(keys.error(RELEASED, other, "true or false for each layer")),
    }
}

fn unless(sparse: bool, names: Names, default: impl ToString) -> Reason {
    (!sparse).then(|| (names, default.to_string()))
}

/// Returns whether a layer has experts by `moe_layer_freq`, a number or a list by layer.
fn in_frequency(keys: &Keys<'_>) -> Result<bool> {
    match keys.list("moe_layer_freq") {
        None => Ok(keys.layer.is_multiple_of(keys.size(FREQUENCY, 1)?)),
        Some(_) => Ok(keys.by_layer("moe_layer_freq")?.is_none_or(|value| match value {
            Value::Bool(value) => *value,
            value => value.as_f64() != Some(0.0),
        })),
    }
}

/// The kind of each layer of a Nemotron-H.
fn kinds<'a>(keys: &Keys<'a>) -> Result<Vec<&'a str>> {
    if let Some((_, Value::Array(kinds))) = keys.agreed(BLOCK_TYPES)? {
        return Ok(kinds.iter().map(|kind| kind.as_str().unwrap_or_default()).collect());
    }
    let letters = keys.text(LETTERS, "ME*-")?;
    Ok(letters.chars().map(|letter| if letter == 'E' { "moe" } else { "" }).collect())
}
