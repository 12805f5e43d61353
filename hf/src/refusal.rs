//! Errors for checkpoints that cannot be read: the missing tensor, the one in its place, and its format.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use moe_kernels::hf::Block;

use crate::checkpoint::{Checkpoint, INDEX, Layer, SINGLE, first_parts, name_on_disk};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::source::describe;
use crate::tensor_file::{FLOATS, Tensor};

/// The quantised formats that are read.
const READ: &str = "quantised weights are read as f8_e4m3 with scales, packed FP4 with a scale for 32 numbers, and MXFP4";

/// More names than this are counted.
const MOST_NAMES: usize = 4;

impl Checkpoint {
    /// Says which tensor is not there, and what has its place.
    pub(crate) fn missing(&self, name: &str, wanted: &str, block: &Block) -> Error {
        let in_place = self.in_place_of(name);
        let mut why = format!("no tensor `{name}`, wanted {wanted}");
        if !in_place.is_empty() {
            let kind = kind_of(&in_place, block).unwrap_or("whose format is unknown".into());
            why.push_str(&format!("; in its place: {}, {kind}; {READ}", list(&in_place)));
        } else if let Some(quantization) = &block.quantization {
            why.push_str(&format!("; the model is quantised as {}; {READ}", quantization.format));
        }
        self.folder.error(self.list_of_tensors(), why)
    }

    /// Tensors of the module that a tensor is missing in: `x.qweight` for `x.weight`.
    fn in_place_of<'c>(&'c self, name: &'c str) -> Vec<&'c str> {
        let (stem, ends): (&str, &[char]) = match name.strip_suffix(".weight") {
            Some(stem) => (stem, &['.']),
            None => (name, &['.', '_']),
        };
        let found = self.beginning_with(stem).filter(|other| *other != name);
        found.filter(|other| other[stem.len()..].starts_with(ends)).collect()
    }

    fn beginning_with<'c>(&'c self, start: &'c str) -> impl Iterator<Item = &'c str> {
        let from = self.file_of_tensor.range(start.to_string()..);
        from.map(|(name, _)| name.as_str()).take_while(move |name| name.starts_with(start))
    }

    /// Says that a tensor is of a type or a format that is not read.
    pub(crate) fn unreadable(&self, tensor: &Tensor<'_>, block: &Block) -> Error {
        let mut got = tensor.dtype_name();
        if let Some(kind) = kind_of(&self.in_place_of(tensor.name()), block) {
            got = format!("{got} {:?}, {kind}", tensor.shape());
        }
        tensor.error(got, format!("{FLOATS}; {READ}"))
    }

    /// Says that codes have no scales beside them.
    pub(crate) fn no_scales(
        &self,
        codes: &Tensor<'_>,
        names: &[String],
        shapes: &[(Vec<usize>, [usize; 2])],
    ) -> Error {
        let (first, others) = names.split_first().map_or(("", names), |(a, b)| (a, b));
        let why = format!(
            "no tensor `{first}`, wanted {}: the scales of `{}`, which is {}, and none under the other names of such \
             scales: {}",
            describe(shapes),
            codes.name(),
            codes.dtype_name(),
            list(&others.iter().map(String::as_str).collect::<Vec<_>>()),
        );
        self.folder.error(self.list_of_tensors(), why)
    }

    /// Fails if a tensor in the modules of these blocks, or in one beside them that is named after experts, is none of
    /// theirs: config.json would then describe another block than the one that is there.
    pub(crate) fn check_all_read(&self, layers: &[Layer<'_>]) -> Result<()> {
        let pieces = layers.iter().flat_map(Layer::arrays).flat_map(|array| &array.pieces);
        let read: HashSet<&str> = pieces.flat_map(|piece| piece.source.names()).collect();
        let modules: BTreeSet<&String> = layers.iter().flat_map(|layer| &layer.modules).collect();
        let own = modules.into_iter().flat_map(|module| self.beginning_with(module));
        let beside = layers.iter().flat_map(|layer| {
            let of_layer = self.beginning_with(&layer.prefix);
            of_layer.filter(|name| is_named_after_experts(&name[layer.prefix.len()..]))
        });
        let tensors: BTreeSet<&str> = own.chain(beside).collect();
        let unread: Vec<&str> = tensors
            .into_iter()
            .filter(|name| !read.contains(name))
            .filter(|name| !layers.iter().any(|layer| layer.may_stay_unread(name)))
            .collect();
        if unread.is_empty() {
            return self.check_unlisted(layers);
        }
        let why = format!(
            "{} would stay unread: config.json describes a block without {}",
            list(&unread),
            if unread.len() == 1 { "it" } else { "them" },
        );
        Err(self.folder.error(self.list_of_tensors(), why))
    }

    /// Fails if a shard that was opened has a tensor in the modules of these blocks that the index does not list.
    fn check_unlisted(&self, layers: &[Layer<'_>]) -> Result<()> {
        for (file, tensors) in self.open_files() {
            let names = tensors.names();
            let unlisted: Vec<&str> = names
                .iter()
                .map(String::as_str)
                .filter(|name| !self.file_of_tensor.contains_key(*name))
                .filter(|name| {
                    let mut modules = layers.iter().flat_map(|layer| &layer.modules);
                    modules.any(|module| name.starts_with(module.as_str()))
                })
                .filter(|name| !layers.iter().any(|layer| layer.may_stay_unread(name)))
                .collect();
            if !unlisted.is_empty() {
                let why =
                    format!("{} would stay unread: {INDEX} has no such name", list(&unlisted));
                return Err(self.folder.error(file, why));
            }
        }
        Ok(())
    }

    /// Says what a block lacks that is there in part; or which layers do have one: a dense layer and a number past the
    /// end look alike otherwise.
    pub(crate) fn no_block(&self, layer: usize, blocks: &[Block]) -> Error {
        if let Some(error) = self.part_of_a_block(blocks) {
            return error;
        }
        let mut layers = BTreeSet::new();
        let mut wanted = String::new();
        for block in blocks {
            for prefix in block.prefixes() {
                for layout in block.layouts() {
                    let Ok(arrays) = layout.arrays(block, &prefix) else { continue };
                    let first = arrays.first().and_then(|array| array.parts.first());
                    let Some(name) = first.map(|part| &part.name) else { continue };
                    if wanted.is_empty() {
                        wanted.clone_from(name);
                    }
                    let Some(ending) = name.strip_prefix(&prefix) else { continue };
                    let tensors = self.file_of_tensor.keys();
                    let named = tensors.filter(|tensor| tensor.ends_with(ending));
                    layers.extend(named.filter_map(|tensor| block.layer_of(tensor)));
                }
            }
        }
        let layers: Vec<usize> = layers.into_iter().collect();
        let why = if layers.is_empty() {
            "and no other layer of it has one".into()
        } else {
            format!("layers that have one: {}", ranges(&layers))
        };
        let model_type = blocks.first().map_or("MoE", |block| block.model_type);
        Error::File {
            file: self.folder.describe(),
            why: format!(
                "layer {layer} has no {model_type} block (no tensor `{wanted}` with experts beside it); {why}"
            ),
        }
    }

    /// The kind of checkpoint of which the layer has the router's weights, or something in the place of the first
    /// tensor that is missing: the latter says more.
    fn part_of_a_block(&self, blocks: &[Block]) -> Option<Error> {
        let mut only_the_router = None;
        for block in blocks {
            for prefix in block.prefixes() {
                for layout in block.layouts() {
                    let Ok(arrays) = layout.arrays(block, &prefix) else { continue };
                    let there = |part| self.file_of_tensor.contains_key(&name_on_disk(part));
                    let Some(part) = first_parts(&arrays).find(|part| !there(part)) else {
                        continue;
                    };
                    let wanted = format!("{:?}", part.shape);
                    if !self.in_place_of(&part.name).is_empty() {
                        return Some(self.missing(&name_on_disk(part), &wanted, block));
                    }
                    if only_the_router.is_none() && first_parts(&arrays).any(there) {
                        let mut names = Vec::new();
                        for module in layout.modules(&arrays, &prefix) {
                            names.extend(self.beginning_with(&module).map(str::to_string));
                        }
                        only_the_router = Some((name_on_disk(part), wanted, block, names));
                    }
                }
            }
        }
        let (name, wanted, block, names) = only_the_router?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut why =
            format!("no tensor `{name}`, wanted {wanted}; the block has {}", list(&names));
        if let Some(kind) = kind_of(&names, block) {
            why.push_str(&format!(", {kind}; {READ}"));
        }
        Some(self.folder.error(self.list_of_tensors(), why))
    }

    /// Weights in the folder that are not the checkpoint's: an adapter, and other sets of weights.
    pub fn beside(&self) -> Option<String> {
        let mut read: HashSet<&str> = self.files().collect();
        read.insert(self.list_of_tensors());
        let list: Vec<String> = self
            .folder
            .list()
            .into_iter()
            .filter(|name| !read.contains(name.as_str()) && is_of_a_model(name))
            .map(|name| match is_adapter(&name) {
                true => format!("{name} (an adapter, which is not applied)"),
                false => name,
            })
            .collect();
        let read = self.list_of_tensors();
        (!list.is_empty()).then(|| {
            format!("{} is read alone, without {}", self.folder.name(read), list.join(", "))
        })
    }
}

/// Whether a file or folder of this name has weights of a model, in the place of which a checkpoint has others.
fn is_of_a_model(name: &str) -> bool {
    let starts = |starts: &[&str]| starts.iter().any(|start| name.starts_with(start));
    let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    is_adapter(name)
        || name == "original"
        || name == INDEX
        || ends(&[".gguf"])
        || starts(&["model", "consolidated"]) && ends(&[".safetensors"])
        || starts(&["pytorch_model", "consolidated"]) && ends(&[".bin", ".pth", ".pt"])
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn is_adapter(name: &str) -> bool {
    matches!(name, "adapter_config.json" | "adapter_model.safetensors" | "adapter_model.bin")
}

/// Says that a folder has no weights in safetensors, and which it has.
pub fn no_weights(folder: &Folder) -> Error {
    let mut why = format!("no such file, and no {INDEX} beside it");
    let files = folder.list();
    let of = |is: fn(&str) -> bool| files.iter().map(String::as_str).filter(move |name| is(name));
    let mut others: Vec<&str> = of(is_of_a_model).collect();
    if others.is_empty() {
        others.extend(of(is_safetensors));
    }
    if let Some(&first) = others.first() {
        let format = match () {
            () if first.ends_with(".gguf") => "GGUF",
            () if is_adapter(first) => "an adapter without its model",
            () if is_safetensors(first) => "another set of names",
            () if first == "original" => "a format of its own",
            () => "pickled tensors of PyTorch",
        };
        why.push_str(&format!("; in its place: {}, which is {format} and not read", list(&others)));
    }
    folder.error(SINGLE, why)
}

/// The format of tensors by what config.json says or by their names, as the end of a sentence about them.
fn kind_of(names: &[&str], block: &Block) -> Option<String> {
    let ends = |ending: &str| names.iter().any(|name| name.ends_with(ending));
    let has = |part: &str| names.iter().any(|name| name.contains(part));
    if has(".lora_") || has(".base_layer.") {
        return Some("of an adapter that is not merged into the weights".into());
    }
    if let Some(quantization) = &block.quantization {
        return Some(format!("whose format is {}", quantization.format));
    }
    let format = match () {
        () if ends(".qweight") && ends(".g_idx") => "GPTQ",
        () if ends(".qweight") => "GPTQ or AWQ",
        () if ends("_packed") && ends("_global_scale") => "NVFP4 of compressed-tensors",
        () if ends("_packed") => "compressed-tensors, packed",
        () if has(".quant_state.") || ends(".absmax") => "bitsandbytes in 4 bits",
        () if ends(".SCB") => "bitsandbytes in 8 bits",
        () if ends("_scale_2") => "NVFP4",
        () if ends(".scales") && ends(".biases") => "MLX",
        () if ends("_scale") || ends(".scale") => "codes with scales",
        () => return None,
    };
    Some(format!("whose format is {format}"))
}

/// Names as a message has them.
fn list(names: &[&str]) -> String {
    // Of experts that have the same, the first is enough.
    let mut short: BTreeMap<String, &str> = BTreeMap::new();
    for name in names {
        let without_numbers: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
        short.entry(without_numbers).or_insert(name);
    }
    let mut shown: Vec<&str> = short.into_values().collect();
    shown.truncate(MOST_NAMES);
    let text = shown.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names.len() - shown.len() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// `0-2, 5` for `[0, 1, 2, 5]`.
pub(crate) fn ranges(sorted: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &value in sorted {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == value => *last = value,
            _ => parts.push((value, value)),
        }
    }
    let part =
        |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    parts.into_iter().map(part).collect::<Vec<_>>().join(", ")
}

/// Whether a layer's tensor is in a module such as `shared_experts`, `residual_mlp`, `moe` or `router`, or in `mlp.experts`.
/// Norms beside a block have such names too, and attention may have experts of its own.
fn is_named_after_experts(name: &str) -> bool {
    let mut modules = name.split('.');
    let module = modules.next().unwrap_or_default();
    let inner = modules.next().unwrap_or_default();
    let has = |words: &[&str]| words.iter().any(|word| module.contains(word));
    let is_feed_forward = has(&["mlp", "feed_forward", "ffn"]);
    !has(&["norm"])
        && (has(&["expert", "moe", "shared_mlp", "mlp_shared", "residual_mlp"])
            || ["router", "gate"].contains(&module)
            || is_feed_forward && inner.contains("expert"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_with_names_of_experts() {
        for name in [
            "shared_experts.up_proj.weight",
            "shared_mlp.input_linear.weight",
            "mlp_shared.up_proj.weight",
            "residual_mlp.w1.weight",
            "moe.gate.weight",
            "router.weight",
            "gate.weight",
            "feed_forward.shared_expert.up_proj.weight",
        ] {
            assert!(is_named_after_experts(name), "{name}");
        }
        for name in [
            "mlp.gate_proj.weight",
            "mlps.0.up_proj.weight",
            "mlp_norm.weight",
            "pre_moe_layernorm.weight",
            "self_attn.experts.router.weight",
            "shared_head.head.weight",
            "attn_gate.weight",
        ] {
            assert!(!is_named_after_experts(name), "{name}");
        }
    }

    #[test]
    fn ranges_are_short() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn lists_are_short() {
        assert_eq!(list(&["a"]), "`a`");
        assert_eq!(list(&["e.0.w", "e.1.w", "e.0.b"]), "`e.0.b`, `e.0.w` and 1 more");
        assert_eq!(list(&["a", "b", "c", "d", "e"]), "`a`, `b`, `c`, `d` and 1 more");
    }
}
