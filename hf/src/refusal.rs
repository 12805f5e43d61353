//! Errors of checkpoints that cannot be loaded: the missing tensor, the tensors in its place, and
//! their format.

use std::collections::{BTreeSet, HashSet};

use crate::block::Block;
use crate::block_info::BlockInfo;
use crate::checkpoint::{Checkpoint, first_parts, name_on_disk};
use crate::error::{Error, Result};
use crate::folder::INDEX;
use crate::messages::{is_adapter, is_of_a_model, list, ranges};
use crate::source::describe;
use crate::tensor_file::{FLOATS, Tensor};

/// The supported quantised formats.
const SUPPORTED: &str = "supported quantised formats: f8_e4m3 with scales, packed FP4 with a scale for 32 numbers, MXFP4";

impl Checkpoint {
    /// The error of a missing tensor, with the tensors in its place.
    pub(crate) fn missing(&self, name: &str, wanted: &str, block: &BlockInfo) -> Error {
        let in_place = self.in_place_of(name);
        let mut why = format!("no tensor `{name}`, wanted {wanted}");
        if !in_place.is_empty() {
            let kind = kind_of(&in_place, block).unwrap_or("whose format is unknown".into());
            why.push_str(&format!("; in its place: {}, {kind}; {SUPPORTED}", list(&in_place)));
        } else if let Some(quantization) = &block.quantization {
            why.push_str(&format!(
                "; the model is quantised as {}; {SUPPORTED}",
                quantization.format
            ));
        }
        self.folder.error(self.list_of_tensors(), why)
    }

    /// Other tensors of the module of a missing tensor: `x.qweight` for `x.weight`.
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

    /// The error of a tensor with an unsupported element type or format.
    pub(crate) fn unreadable(&self, tensor: &Tensor, block: &BlockInfo) -> Error {
        let mut got = tensor.dtype_name();
        if let Some(kind) = kind_of(&self.in_place_of(tensor.name()), block) {
            got = format!("{got} {:?}, {kind}", tensor.shape());
        }
        tensor.error(got, format!("{FLOATS}; {SUPPORTED}"))
    }

    /// The error of codes without scales.
    pub(crate) fn no_scales(
        &self,
        codes: &Tensor,
        names: &[String],
        shapes: &[(Vec<usize>, [usize; 2])],
    ) -> Error {
        let (first, others) = names.split_first().map_or(("", names), |(a, b)| (a, b));
        let why = format!(
            "no tensor `{first}`, wanted {}: the scales of `{}`, which is {}; other names of such scales: {}",
            describe(shapes),
            codes.name(),
            codes.dtype_name(),
            list(&others.iter().map(String::as_str).collect::<Vec<_>>()),
        );
        self.folder.error(self.list_of_tensors(), why)
    }

    /// Checks that the blocks need every tensor in their modules, and every tensor of the layer in
    /// a module named after experts: otherwise config.json describes another block than the
    /// checkpoint has.
    pub(crate) fn check_all_read(&self, blocks: &[Block]) -> Result<()> {
        let sources =
            blocks.iter().flat_map(|block| &block.arrays).flat_map(|(_, sources)| sources);
        let read: HashSet<&str> = sources.flat_map(|source| source.names()).collect();
        let modules: BTreeSet<&String> = blocks.iter().flat_map(|block| &block.modules).collect();
        let own = modules.into_iter().flat_map(|module| self.beginning_with(module));
        let others = blocks.iter().flat_map(|block| {
            let of_layer = self.beginning_with(&block.prefix);
            of_layer.filter(|name| is_named_after_experts(&name[block.prefix.len()..]))
        });
        let tensors: BTreeSet<&str> = own.chain(others).collect();
        let unread: Vec<&str> = tensors
            .into_iter()
            .filter(|name| !read.contains(name))
            .filter(|name| !blocks.iter().any(|block| block.may_stay_unread(name)))
            .collect();
        if unread.is_empty() {
            return self.check_unlisted(blocks);
        }
        let without = if unread.len() == 1 { "it" } else { "them" };
        let list = list(&unread);
        let why = format!("unused: {list}; config.json describes a block without {without}");
        Err(self.folder.error(self.list_of_tensors(), why))
    }

    /// Checks that the index lists every tensor in the blocks' modules of the shards that are
    /// mapped.
    fn check_unlisted(&self, blocks: &[Block]) -> Result<()> {
        for (file, tensors) in self.open_files() {
            let names = tensors.names();
            let unlisted: Vec<&str> = names
                .iter()
                .map(String::as_str)
                .filter(|name| !self.file_of_tensor.contains_key(*name))
                .filter(|name| {
                    let mut modules = blocks.iter().flat_map(|block| &block.modules);
                    modules.any(|module| name.starts_with(module.as_str()))
                })
                .filter(|name| !blocks.iter().any(|block| block.may_stay_unread(name)))
                .collect();
            if !unlisted.is_empty() {
                let why = format!("unused: {}; not listed in {INDEX}", list(&unlisted));
                return Err(self.folder.error(file, why));
            }
        }
        Ok(())
    }

    /// The error of a layer without a block: the missing tensor if a part of the block exists, else
    /// the layers that have a block, so that a dense layer and a number past the last layer can be
    /// told apart.
    pub(crate) fn no_block(&self, layer: usize, blocks: &[BlockInfo]) -> Error {
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
            "no other layer has one".into()
        } else {
            format!("layers with MoE blocks: {}", ranges(&layers))
        };
        let model_type = blocks.first().map_or("MoE", |block| block.model_type);
        Error::File {
            file: self.folder.describe(),
            why: format!(
                "layer {layer} has no {model_type} block (no tensor `{wanted}`, or no experts); {why}"
            ),
        }
    }

    /// The error of a layer with a part of a block: with other tensors in the place of a missing
    /// one, or else with the router's weights alone.
    fn part_of_a_block(&self, blocks: &[BlockInfo]) -> Option<Error> {
        let mut only_the_router = None;
        for block in blocks {
            for prefix in block.prefixes() {
                for layout in block.layouts() {
                    let Ok(arrays) = layout.arrays(block, &prefix) else { continue };
                    let exists = |part| self.file_of_tensor.contains_key(&name_on_disk(part));
                    let Some(part) = first_parts(&arrays).find(|part| !exists(part)) else {
                        continue;
                    };
                    let wanted = format!("{:?}", part.shape);
                    if !self.in_place_of(&part.name).is_empty() {
                        return Some(self.missing(&name_on_disk(part), &wanted, block));
                    }
                    if only_the_router.is_none() && first_parts(&arrays).any(exists) {
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
            why.push_str(&format!(", {kind}; {SUPPORTED}"));
        }
        Some(self.folder.error(self.list_of_tensors(), why))
    }

    /// A message that names weights in the folder that are not loaded: an adapter, and other sets
    /// of weights.
    pub fn warning(&self) -> Option<String> {
        let mut read: HashSet<&str> = self.files().collect();
        read.insert(self.list_of_tensors());
        let ignored: Vec<String> = self
            .folder
            .list()
            .into_iter()
            .filter(|name| !read.contains(name.as_str()) && is_of_a_model(name))
            .map(|name| match is_adapter(&name) {
                true => format!("{name} (an adapter, which is not applied)"),
                false => name,
            })
            .collect();
        let read = self.folder.name(self.list_of_tensors());
        let list = ignored.join(", ");
        (!ignored.is_empty()).then(|| format!("only {read} is loaded; ignored: {list}"))
    }
}

/// The format of tensors, from config.json or from their names, as the end of a sentence about
/// them.
fn kind_of(names: &[&str], block: &BlockInfo) -> Option<String> {
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

/// Returns whether a layer's tensor is in a module such as `shared_experts`, `residual_mlp`, `moe`
/// or `router`, or in `mlp.experts`. Norms of the layer have such names too, and attention may have
/// experts of its own: both are excluded.
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
    fn finds_modules_named_after_experts() {
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
    fn joins_consecutive_layers() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn long_lists_are_counted() {
        assert_eq!(list(&["a"]), "`a`");
        assert_eq!(list(&["e.0.w", "e.1.w", "e.0.b"]), "`e.0.b`, `e.0.w` and 1 more");
        assert_eq!(list(&["a", "b", "c", "d", "e"]), "`a`, `b`, `c`, `d` and 1 more");
    }
}
