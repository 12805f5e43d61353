//! A checkpoint as the Hub has it: config.json, and tensors in one file or in shards with an index.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use moe_kernels::hf::{self, Block, Layout, Part, Role, Stored};
use moe_kernels::{MoeConfig, WeightOrder};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::folder::{Folder, MOST_CONFIG_BYTES, MOST_INDEX_BYTES};
use crate::source::{Code, Scaling, Source, scale_shapes};
use crate::tensor_file::{Tensor, TensorFile};
use crate::weights::{Array, Piece};

pub const CONFIG: &str = "config.json";
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// An open checkpoint. Shards are mapped when a tensor of theirs is first wanted.
pub struct Checkpoint {
    pub(crate) folder: Folder,
    /// The text of config.json.
    config: String,
    files: BTreeMap<String, OnceCell<TensorFile>>,
    /// The file of each tensor.
    pub(crate) file_of_tensor: BTreeMap<String, String>,
}

impl Checkpoint {
    pub fn open(folder: Folder) -> Result<Self> {
        if let Folder::Disk(path) = &folder
            && !path.is_dir()
        {
            return Err(Error::File {
                file: path.display().to_string(),
                why: "no such folder".into(),
            });
        }
        let bytes = folder.find_text(CONFIG, MOST_CONFIG_BYTES)?.ok_or_else(|| {
            let why = "no such file; a checkpoint folder has a config.json";
            folder.error(CONFIG, why.into())
        })?;
        let config = String::from_utf8_lossy(bytes.as_slice()).into_owned();

        let mut files = BTreeMap::new();
        let mut file_of_tensor = BTreeMap::new();
        if let Some(bytes) = folder.find(SINGLE)? {
            let file = TensorFile::new(folder.name(SINGLE), bytes)?;
            file_of_tensor.extend(file.names().into_iter().map(|name| (name, SINGLE.to_string())));
            files.insert(SINGLE.to_string(), OnceCell::from(file));
        } else if let Some(bytes) = folder.find_text(INDEX, MOST_INDEX_BYTES)? {
            let index: Value = serde_json::from_slice(bytes.as_slice())
                .map_err(|error| folder.error(INDEX, format!("not JSON: {error}")))?;
            let Some(Value::Object(weight_map)) = index.get("weight_map") else {
                return Err(folder.error(INDEX, "no object `weight_map` in it".into()));
            };
            for (tensor, file) in weight_map {
                let file = file.as_str().filter(|file| is_file_name(file)).ok_or_else(|| {
                    let why = format!(
                        "`{tensor}` is said to be in {file}, wanted the name of a file beside it"
                    );
                    folder.error(INDEX, why)
                })?;
                files.entry(file.to_string()).or_insert_with(OnceCell::new);
                file_of_tensor.insert(tensor.clone(), file.to_string());
            }
        } else {
            return Err(crate::refusal::no_weights(&folder));
        }
        Ok(Self { folder, config, files, file_of_tensor })
    }

    /// The names of the files that its tensors are in.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Those of which a tensor has been wanted.
    pub(crate) fn open_files(&self) -> impl Iterator<Item = (&str, &TensorFile)> {
        self.files.iter().filter_map(|(name, file)| Some((&name[..], file.get()?)))
    }

    /// The file that says which tensors there are.
    pub(crate) fn list_of_tensors(&self) -> &'static str {
        if self.files.contains_key(SINGLE) { SINGLE } else { INDEX }
    }

    /// A tensor by its whole name, or nothing where the checkpoint has none of that name.
    fn find(&self, name: &str) -> Result<Option<Tensor<'_>>> {
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

    /// A tensor of numbers as it is, or quantised with its scales beside it; of the right shape in any case.
    fn source(
        &self,
        part: &Part,
        role: Role,
        block: &Block,
        config: &MoeConfig,
    ) -> Result<Source<'_>> {
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
            // Codes of 4 bits are told from other bytes by their scales.
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

    /// Every MoE block of one layer that the checkpoint has, every tensor of it found and of the right shape, and no
    /// tensor left over: models with text and vision experts have two. At least one.
    pub fn layers(&self, layer: usize) -> Result<Vec<Layer<'_>>> {
        let blocks = hf::blocks(&self.config, layer).map_err(|error| {
            let layers = hf::layers(&self.config).unwrap_or_default();
            if layers.is_empty() || layers.contains(&layer) {
                return self.config_error(error);
            }
            let why = format!("{error}; layers that have one: {}", crate::refusal::ranges(&layers));
            self.folder.error(CONFIG, why)
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

    /// A block, if its tensors are there.
    ///
    /// A checkpoint of another kind may have the same names with other shapes: the first kind that fits counts, and
    /// if none fits, the first one says why.
    fn find_block(&self, block: &Block) -> Result<Option<Layer<'_>>> {
        let mut why = None;
        for prefix in block.prefixes() {
            for layout in block.layouts() {
                let arrays = layout.arrays(block, &prefix);
                let arrays = arrays.map_err(|error| self.config_error(error))?;
                if !self.has(&arrays) {
                    continue;
                }
                match self.with_layout(block, layout, &prefix, arrays) {
                    Ok(layer) => return Ok(Some(layer)),
                    Err(error) => why = why.or(Some(error)),
                }
            }
        }
        why.map_or(Ok(None), Err)
    }

    fn config_error(&self, error: moe_kernels::Error) -> Error {
        self.folder.error(CONFIG, error.to_string())
    }

    /// Whether the checkpoint has the first tensors of the router and of the experts.
    fn has(&self, arrays: &[hf::Array]) -> bool {
        first_parts(arrays).all(|part| self.file_of_tensor.contains_key(&name_on_disk(part)))
    }

    fn with_layout(
        &self,
        block: &Block,
        layout: &'static Layout,
        prefix: &str,
        arrays: Vec<hf::Array>,
    ) -> Result<Layer<'_>> {
        let modules = layout.modules(&arrays, prefix);
        let config = layout.config(block);
        let mut may_stay = BTreeSet::new();
        let arrays = arrays.into_iter().map(|array| {
            let pieces = array.parts.iter().map(|part| {
                let source = self.source(part, array.role, block, &config)?;
                if let Source::Scaled(_) = source {
                    may_stay.extend(part.activation_scale_names());
                }
                Ok(Piece { source, elements: part.elements.clone() })
            });
            let pieces = pieces.collect::<Result<Vec<_>>>()?;
            let hf::Array { role, shape, transposed, repeated, .. } = array;
            Ok(Array { role, shape, pieces, transposed, repeated })
        });
        let arrays = arrays.collect::<Result<_>>()?;
        let prefix = prefix.to_string();
        Ok(Layer { config, block: block.clone(), arrays, layout, prefix, modules, may_stay })
    }
}

/// The first tensors of the router and of the experts, without which there is no block.
pub fn first_parts(arrays: &[hf::Array]) -> impl Iterator<Item = &Part> {
    let needed = [Role::RouterGate, Role::Gate, Role::GateUp];
    let needed = arrays.iter().filter(move |array| needed.contains(&array.role));
    needed.filter_map(|array| array.parts.first())
}

/// The name of the tensor that has the numbers or codes of a part.
pub fn name_on_disk(part: &Part) -> String {
    let ending = if part.stored == Stored::Mxfp4 { "_blocks" } else { "" };
    format!("{}{ending}", part.name)
}

/// The MoE block of one layer, still on disk.
pub struct Layer<'a> {
    pub block: Block,
    /// What it computes, with the weights in the order in which this checkpoint has them.
    pub config: MoeConfig,
    arrays: Vec<Array<'a>>,
    layout: &'static Layout,
    /// The beginning of the names of all tensors of the layer.
    pub(crate) prefix: String,
    /// The beginnings of the names of all that belongs to the block.
    pub(crate) modules: Vec<String>,
    /// Names of tensors that the block may have and that are not read.
    may_stay: BTreeSet<String>,
}

impl<'a> Layer<'a> {
    pub fn array(&self, role: Role) -> Option<&Array<'a>> {
        self.arrays.iter().find(|array| array.role == role)
    }

    /// Whether a tensor of the block's modules is one that the checkpoint may have without its being read.
    pub(crate) fn may_stay_unread(&self, name: &str) -> bool {
        self.may_stay.contains(name)
            || name.strip_prefix(&self.prefix).is_some_and(|name| self.layout.may_stay_unread(name))
    }

    /// All that the block has, in the order in which it is used.
    pub fn arrays(&self) -> &[Array<'a>] {
        &self.arrays
    }

    /// The type of the expert weights on disk.
    pub fn dtype_on_disk(&self) -> String {
        let pieces = self.array(Role::Down).map(|array| &array.pieces);
        pieces.and_then(|pieces| pieces.first()).map(|p| p.source.dtype_name()).unwrap_or_default()
    }
}

/// Whether bytes with these scales are packed FP4, and not integers of 4 bits or NVFP4: a scale is an exponent, or, where
/// config.json says FP8 as DeepSeek-V4's does, what transformers makes of one in f32.
fn are_of_fp4(scales: &Tensor<'_>, block: &Block) -> bool {
    let is_fp8 = block.quantization.as_ref().is_some_and(|it| it.method == "fp8");
    scales.is_e8m0() || is_fp8 && scales.dtype() == safetensors::Dtype::F32
}

/// Whether the matrices of a role are `[in, out]`.
fn in_out(role: Role, config: &MoeConfig) -> bool {
    let experts = &config.experts;
    let order = match role {
        Role::GateUp | Role::Gate | Role::Up => experts.gate_up_order,
        Role::Down => experts.down_order,
        _ => WeightOrder::OutIn,
    };
    order == WeightOrder::InOut
}

/// A name without folders: an index must not lead out of its own folder.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_stays_in_its_folder() {
        assert!(is_file_name("model-00001-of-00002.safetensors"));
        for name in ["../model.safetensors", "/etc/passwd", "a/b", "", ".."] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
