//! A checkpoint of the Hub: config.json, and safetensors in one file or in shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use std::sync::OnceLock;

use moe_kernels::{MoeConfig, WeightOrder};
use serde_json::Value;

use crate::block::Block;
use crate::block_info::BlockInfo;
use crate::config::{blocks_from_config, layers_from_config};
use crate::error::{Error, Result};
use crate::folder::{CONFIG, Folder, INDEX, MAX_CONFIG_BYTES, MAX_INDEX_BYTES, SINGLE};
use crate::names::{Array, Layout, Part, Role, Stored};
use crate::source::{Code, Scaling, Source, scale_shapes};
use crate::tensor_file::{Tensor, TensorFile};

/// An open checkpoint. A shard is mapped when one of its tensors is first needed.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) folder: Folder,
    /// The text of config.json.
    config: String,
    files: BTreeMap<String, OnceLock<TensorFile>>,
    /// The file of each tensor.
    pub(crate) file_of_tensor: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder with config.json, and model.safetensors or model.safetensors.index.json.
    ///
    /// # Errors
    /// [`Error::File`] for a missing or invalid file: other weights in the folder are named.
    /// [`Error::Io`] if a file cannot be read.
    pub fn open(folder: impl Into<Folder>) -> Result<Self> {
        let folder = folder.into();
        if let Folder::Disk(path) = &folder
            && !path.is_dir()
        {
            return Err(Error::File {
                file: path.display().to_string(),
                why: "no such folder".into(),
            });
        }
        let bytes = folder.find_text(CONFIG, MAX_CONFIG_BYTES)?.ok_or_else(|| {
            let why = "no such file; a checkpoint folder has a config.json";
            folder.error(CONFIG, why.into())
        })?;
        let config = String::from_utf8_lossy(bytes.as_slice()).into_owned();

        let mut files = BTreeMap::new();
        let mut file_of_tensor = BTreeMap::new();
        if let Some(bytes) = folder.find(SINGLE)? {
            let file = TensorFile::new(folder.name(SINGLE), bytes)?;
            file_of_tensor.extend(file.names().into_iter().map(|name| (name, SINGLE.to_string())));
            files.insert(SINGLE.to_string(), OnceLock::from(file));
        } else if let Some(bytes) = folder.find_text(INDEX, MAX_INDEX_BYTES)? {
            let index: Value = serde_json::from_slice(bytes.as_slice())
                .map_err(|error| folder.error(INDEX, format!("not JSON: {error}")))?;
            let Some(Value::Object(weight_map)) = index.get("weight_map") else {
                return Err(folder.error(INDEX, "no object `weight_map`".into()));
            };
            for (tensor, file) in weight_map {
                let file = file.as_str().filter(|file| is_file_name(file)).ok_or_else(|| {
                    let why = format!(
                        "the file of `{tensor}` is {file}, wanted the name of a file in the same folder"
                    );
                    folder.error(INDEX, why)
                })?;
                files.entry(file.to_string()).or_insert_with(OnceLock::new);
                file_of_tensor.insert(tensor.clone(), file.to_string());
            }
        } else {
            return Err(crate::messages::no_weights(&folder));
        }
        Ok(Self { folder, config, files, file_of_tensor })
    }

    /// The text of config.json.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// The numbers of the layers with MoE blocks, from config.json.
    ///
    /// # Errors
    /// [`Error::File`] with the message of [`Error::Config`].
    pub fn layers(&self) -> Result<Vec<usize>> {
        layers_from_config(&self.config).map_err(|error| self.config_error(error))
    }

    /// The names of the files of its tensors.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The files that have been mapped.
    pub(crate) fn open_files(&self) -> impl Iterator<Item = (&str, &TensorFile)> {
        self.files.iter().filter_map(|(name, file)| Some((&name[..], file.get()?)))
    }

    /// The file with the list of all tensors.
    pub(crate) fn list_of_tensors(&self) -> &'static str {
        if self.files.contains_key(SINGLE) { SINGLE } else { INDEX }
    }

    /// A tensor by its whole name; `None` if the checkpoint has no such tensor.
    fn find(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(file_name) = self.file_of_tensor.get(name) else { return Ok(None) };
        let Some(cell) = self.files.get(file_name) else { return Ok(None) };
        let file = match cell.get() {
            Some(file) => file,
            None => {
                let file = self.folder.tensors(file_name)?;
                cell.get_or_init(|| file)
            }
        };
        file.tensor(name).map(Some)
    }

    /// The tensors of a part: plain, or codes with scales. Their shapes are checked.
    fn source(
        &self,
        part: &Part,
        role: Role,
        block: &BlockInfo,
        config: &MoeConfig,
    ) -> Result<Source> {
        let (name, shape) = (&part.name, &part.shape[..]);
        let tensor = |name: &str| {
            let shape = format!("{shape:?}");
            self.find(name)?.ok_or_else(|| self.missing(name, &shape, block))
        };
        if part.stored == Stored::Mxfp4 {
            let blocks = tensor(&format!("{name}_blocks"))?;
            let scales = tensor(&format!("{name}_scales"))?;
            return Source::mxfp4(blocks, scales, shape);
        }
        let tensor = tensor(name)?;
        if role == Role::Table {
            tensor.check_ids(shape)?;
            return Ok(Source::Plain(tensor));
        }
        let Some(code) = Code::of(&tensor, shape) else {
            if tensor.is_float() {
                tensor.check(shape)?;
                return Ok(Source::Plain(tensor));
            }
            return Err(self.unreadable(&tensor, block));
        };
        let scaling = Scaling {
            block: block.quantization.as_ref().and_then(|it| it.block),
            in_out: in_out(role, config),
        };
        let names = part.scale_names();
        let Some(scale) = names.iter().find(|name| self.file_of_tensor.contains_key(*name)) else {
            // Without scales, bytes are not known to be codes of 4 bits.
            return Err(match code {
                Code::Fp8 => self.no_scales(&tensor, &names, &scale_shapes(code, shape, scaling)),
                Code::Fp4 => self.unreadable(&tensor, block),
            });
        };
        let Some(scales) = self.find(scale)? else {
            return Err(self.no_scales(&tensor, &names, &scale_shapes(code, shape, scaling)));
        };
        if code == Code::Fp4 && !are_of_fp4(&scales, block) {
            return Err(self.unreadable(&tensor, block));
        }
        Source::scaled(code, tensor, scales, shape, scaling)
    }

    /// All MoE blocks of one layer: at least one, and two in models with text and vision experts.
    /// Every tensor of a block is found and its shape and element type are checked; nothing is
    /// read.
    ///
    /// # Errors
    /// - [`Error::File`] for a layer without a block, for a missing tensor, and for tensors in the
    ///   block's modules that the block does not need: config.json would then describe another
    ///   block.
    /// - [`Error::Tensor`] for another shape, an unsupported element type or an unsupported format.
    pub fn blocks(&self, layer: usize) -> Result<Vec<Block>> {
        let blocks = blocks_from_config(&self.config, layer).map_err(|error| {
            let layers = layers_from_config(&self.config).unwrap_or_default();
            if layers.is_empty() || layers.contains(&layer) {
                return self.config_error(error);
            }
            let layers = crate::messages::ranges(&layers);
            self.folder.error(CONFIG, format!("{error}; layers with MoE blocks: {layers}"))
        })?;
        let found: Vec<_> = blocks
            .iter()
            .filter_map(|block| self.find_block(block).transpose())
            .collect::<Result<_>>()?;
        if found.is_empty() {
            return Err(self.no_block(layer, &blocks));
        }
        self.check_all_read(&found)?;
        Ok(found)
    }

    /// A block; `None` if the checkpoint has no first tensors of it.
    ///
    /// A checkpoint of another layout may have the same names with other shapes: the first layout
    /// that fits is used. If none fits, the error is that of the first one.
    fn find_block(&self, block: &BlockInfo) -> Result<Option<Block>> {
        let mut why = None;
        for prefix in block.prefixes() {
            for layout in block.layouts() {
                let arrays = layout.arrays(block, &prefix);
                let arrays = arrays.map_err(|error| self.config_error(error))?;
                if !self.has(&arrays) {
                    continue;
                }
                match self.with_layout(block, layout, &prefix, arrays) {
                    Ok(block) => return Ok(Some(block)),
                    Err(error) => why = why.or(Some(error)),
                }
            }
        }
        why.map_or(Ok(None), Err)
    }

    fn config_error(&self, error: Error) -> Error {
        self.folder.error(CONFIG, error.to_string())
    }

    /// Returns whether the checkpoint has the first tensors of the router and of the experts.
    fn has(&self, arrays: &[Array]) -> bool {
        first_parts(arrays).all(|part| self.file_of_tensor.contains_key(&name_on_disk(part)))
    }

    fn with_layout(
        &self,
        info: &BlockInfo,
        layout: &'static Layout,
        prefix: &str,
        arrays: Vec<Array>,
    ) -> Result<Block> {
        let modules = layout.modules(&arrays, prefix);
        let config = layout.config(info);
        let mut may_stay = BTreeSet::new();
        let arrays = arrays.into_iter().map(|array| {
            let sources = array.parts.iter().map(|part| {
                let source = self.source(part, array.role, info, &config)?;
                if let Source::Scaled(_) = source {
                    may_stay.extend(part.activation_scale_names());
                }
                Ok(source)
            });
            let sources = sources.collect::<Result<Vec<_>>>()?;
            Ok((array, sources))
        });
        let arrays = arrays.collect::<Result<_>>()?;
        let (info, prefix) = (info.clone(), prefix.to_string());
        Ok(Block { info, config, arrays, layout, prefix, modules, may_stay })
    }
}

/// The first tensors of the router and of the experts, which every block has.
pub(crate) fn first_parts(arrays: &[Array]) -> impl Iterator<Item = &Part> {
    let needed = [Role::RouterGate, Role::Gate, Role::GateUp];
    let needed = arrays.iter().filter(move |array| needed.contains(&array.role));
    needed.filter_map(|array| array.parts.first())
}

/// The name of the tensor with the numbers or codes of a part.
pub(crate) fn name_on_disk(part: &Part) -> String {
    let ending = if part.stored == Stored::Mxfp4 { "_blocks" } else { "" };
    format!("{}{ending}", part.name)
}

/// Returns whether bytes with these scales are packed FP4, and not integers of 4 bits or NVFP4:
/// scales are E8M0 exponents, or f32 if config.json says FP8 (DeepSeek-V4's does, and transformers
/// converts the exponents to f32).
fn are_of_fp4(scales: &Tensor, block: &BlockInfo) -> bool {
    let is_fp8 = block.quantization.as_ref().is_some_and(|it| it.method == "fp8");
    scales.is_e8m0() || is_fp8 && scales.dtype() == safetensors::Dtype::F32
}

/// Returns whether the matrices of a role are `[in, out]`.
fn in_out(role: Role, config: &MoeConfig) -> bool {
    let experts = &config.experts;
    let order = match role {
        Role::GateUp | Role::Gate | Role::Up => experts.gate_up_order,
        Role::Down => experts.down_order,
        _ => WeightOrder::OutIn,
    };
    order == WeightOrder::InOut
}

/// Returns whether a name has no folders: an index must not refer to files outside of its own
/// folder.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_file_names_with_folders() {
        assert!(is_file_name("model-00001-of-00002.safetensors"));
        for name in ["../model.safetensors", "/etc/passwd", "a/b", "", ".."] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
