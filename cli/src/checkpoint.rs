//! A checkpoint as the Hub has it: config.json, and tensors in one file or in shards with an index.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use moe_kernels::MoeConfig;
use moe_kernels::hf::{self, Block, Layout, Role, Stored};
use serde_json::{Map, Value};

use crate::error::{Error, Result, io};
use crate::tensor_file::{Bytes, Tensor, TensorFile};
use crate::weights::{Array, Piece, Source};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where the files of a checkpoint are.
#[derive(Clone)]
pub enum Folder {
    Disk(PathBuf),
    /// Part of this binary: a name for messages, and the files.
    Bundled(&'static str, &'static [(&'static str, &'static [u8])]),
}

impl Folder {
    /// What messages call a file of the folder.
    fn name(&self, file: &str) -> String {
        match self {
            Folder::Disk(folder) => folder.join(file).display().to_string(),
            Folder::Bundled(name, _) => format!("bundled {name}/{file}"),
        }
    }

    /// The bytes of a file, or nothing where there is no such file.
    pub fn find(&self, file: &str) -> Result<Option<Bytes>> {
        match self {
            Folder::Disk(folder) => {
                let path = folder.join(file);
                match path.try_exists() {
                    Ok(true) => Bytes::map(&path).map(Some),
                    Ok(false) => Ok(None),
                    Err(error) => Err(io("read", path)(error)),
                }
            }
            Folder::Bundled(_, files) => Ok(files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, bytes)| Bytes::Bundled(bytes))),
        }
    }

    pub fn tensors(&self, file: &str) -> Result<TensorFile> {
        let bytes = self.find(file)?.ok_or_else(|| self.missing(file, "no such file"))?;
        TensorFile::new(self.name(file), bytes)
    }

    fn json(&self, file: &str, bytes: &Bytes) -> Result<Map<String, Value>> {
        let text = std::str::from_utf8(bytes.as_slice())
            .map_err(|error| self.missing(file, &format!("not JSON: {error}")))?;
        match serde_json::from_str(&hf::strict_json(text)) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(self.missing(file, "the JSON in it is not an object")),
            Err(error) => Err(self.missing(file, &format!("not JSON: {error}"))),
        }
    }

    fn missing(&self, file: &str, why: &str) -> Error {
        Error::File { file: self.name(file), why: why.into() }
    }
}

/// An open checkpoint. Shards are mapped when a tensor of theirs is first wanted.
pub struct Checkpoint {
    folder: Folder,
    /// The text of config.json.
    config: String,
    /// What config.json says of how weights are quantised.
    quantization: Option<Value>,
    files: BTreeMap<String, OnceCell<TensorFile>>,
    /// The file of each tensor.
    file_of_tensor: BTreeMap<String, String>,
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
        let bytes = folder.find(CONFIG)?.ok_or_else(|| {
            folder.missing(CONFIG, "no such file; a checkpoint folder has a config.json")
        })?;
        let quantization = folder.json(CONFIG, &bytes)?.remove("quantization_config");
        let config = String::from_utf8_lossy(bytes.as_slice()).into_owned();

        let mut files = BTreeMap::new();
        let mut file_of_tensor = BTreeMap::new();
        if let Some(bytes) = folder.find(SINGLE)? {
            let file = TensorFile::new(folder.name(SINGLE), bytes)?;
            file_of_tensor.extend(file.names().into_iter().map(|name| (name, SINGLE.to_string())));
            files.insert(SINGLE.to_string(), OnceCell::from(file));
        } else if let Some(bytes) = folder.find(INDEX)? {
            let index = folder.json(INDEX, &bytes)?;
            let Some(Value::Object(weight_map)) = index.get("weight_map") else {
                return Err(folder.missing(INDEX, "no object `weight_map` in it"));
            };
            for (tensor, file) in weight_map {
                let file = file.as_str().filter(|file| is_file_name(file)).ok_or_else(|| {
                    let why = format!(
                        "`{tensor}` is said to be in {file}, wanted the name of a file beside it"
                    );
                    folder.missing(INDEX, &why)
                })?;
                files.entry(file.to_string()).or_insert_with(OnceCell::new);
                file_of_tensor.insert(tensor.clone(), file.to_string());
            }
        } else {
            return Err(folder.missing(SINGLE, &format!("no such file, and no {INDEX} beside it")));
        }
        Ok(Self { folder, config, quantization, files, file_of_tensor })
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

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        self.find(name)?.ok_or_else(|| {
            let file = if self.files.contains_key(SINGLE) { SINGLE } else { INDEX };
            self.folder.missing(file, &format!("no tensor `{name}`, wanted {shape:?}"))
        })
    }

    /// A tensor of numbers as it is, or quantised with its scales beside it; of the right shape in any case.
    fn source(&self, part: &hf::Part, ids: bool) -> Result<Source<'_>> {
        let (name, shape) = (&part.name, &part.shape[..]);
        if part.stored == Stored::Mxfp4 {
            let (blocks, scales) = (format!("{name}_blocks"), format!("{name}_scales"));
            let blocks = self.tensor(&blocks, shape)?;
            let scales = self.tensor(&scales, shape)?;
            return Source::mxfp4(blocks, scales, shape);
        }
        let tensor = self.tensor(name, shape)?;
        if ids {
            tensor.check_ids(shape)?;
        } else if tensor.is_fp8() {
            self.check_fp8_blocks()?;
            let scales = self.tensor(&format!("{name}_scale_inv"), shape)?;
            return Source::fp8(tensor, scales, shape);
        } else {
            tensor.check(shape)?;
        }
        Ok(Source::Plain(tensor))
    }

    /// The scales of FP8 weights belong to blocks, whose size config.json says.
    fn check_fp8_blocks(&self) -> Result<()> {
        const SIDE: usize = moe_kernels::format::FP8_BLOCK;
        let got = self.quantization.as_ref().and_then(|it| it.get("weight_block_size"));
        if got == Some(&Value::from(vec![SIDE, SIDE])) {
            return Ok(());
        }
        let got = got.map_or("missing".into(), Value::to_string);
        let why = format!(
            "`quantization_config.weight_block_size` is {got}, wanted [{SIDE}, {SIDE}] for FP8 weights"
        );
        Err(self.folder.missing(CONFIG, &why))
    }

    /// Every MoE block of one layer that the checkpoint has, every tensor of it found and of the right shape: models
    /// with text and vision experts have two. At least one.
    pub fn layers(&self, layer: usize) -> Result<Vec<Layer<'_>>> {
        let blocks = hf::blocks(&self.config, layer).map_err(|error| {
            let layers = hf::layers(&self.config).unwrap_or_default();
            if layers.is_empty() || layers.contains(&layer) {
                return self.config_error(error);
            }
            let why = format!("{error}; layers that have one: {}", ranges(&layers));
            self.folder.missing(CONFIG, &why)
        })?;
        let found: Vec<_> = blocks
            .iter()
            .filter_map(|block| self.find_block(block).transpose())
            .collect::<Result<_>>()?;
        if found.is_empty() {
            return Err(self.no_block(layer, &blocks));
        }
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
                match self.with_layout(block, layout, arrays) {
                    Ok(layer) => return Ok(Some(layer)),
                    Err(error) => why = why.or(Some(error)),
                }
            }
        }
        why.map_or(Ok(None), Err)
    }

    fn config_error(&self, error: moe_kernels::Error) -> Error {
        self.folder.missing(CONFIG, &error.to_string())
    }

    /// Whether the checkpoint has the first tensors of the router and of the experts.
    fn has(&self, arrays: &[hf::Array]) -> bool {
        let needed = [Role::RouterGate, Role::Gate, Role::GateUp];
        arrays.iter().filter(|array| needed.contains(&array.role)).all(|array| {
            array.parts.first().is_some_and(|part| {
                let ending = if part.stored == Stored::Mxfp4 { "_blocks" } else { "" };
                self.file_of_tensor.contains_key(&format!("{}{ending}", part.name))
            })
        })
    }

    fn with_layout(
        &self,
        block: &Block,
        layout: &Layout,
        arrays: Vec<hf::Array>,
    ) -> Result<Layer<'_>> {
        let arrays = arrays.into_iter().map(|array| {
            let pieces = array.parts.iter().map(|part| {
                let source = self.source(part, array.role == Role::Table)?;
                Ok(Piece { source, elements: part.elements.clone() })
            });
            let pieces = pieces.collect::<Result<Vec<_>>>()?;
            let hf::Array { role, shape, transposed, repeated, .. } = array;
            Ok(Array { role, shape, pieces, transposed, repeated })
        });
        let arrays = arrays.collect::<Result<_>>()?;
        Ok(Layer { config: layout.config(block), block: block.clone(), arrays })
    }

    /// Says which layers do have a block: a dense layer and a number past the end look alike otherwise.
    fn no_block(&self, layer: usize, blocks: &[Block]) -> Error {
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
        let file = match &self.folder {
            Folder::Disk(path) => path.display().to_string(),
            Folder::Bundled(name, _) => format!("bundled {name}"),
        };
        let model_type = blocks.first().map_or("MoE", |block| block.model_type);
        Error::File {
            file,
            why: format!(
                "layer {layer} has no {model_type} block (no tensor `{wanted}` with experts beside it); {why}"
            ),
        }
    }
}

/// The MoE block of one layer, still on disk.
pub struct Layer<'a> {
    pub block: Block,
    /// What it computes, with the weights in the order in which this checkpoint has them.
    pub config: MoeConfig,
    arrays: Vec<Array<'a>>,
}

impl<'a> Layer<'a> {
    pub fn array(&self, role: Role) -> Option<&Array<'a>> {
        self.arrays.iter().find(|array| array.role == role)
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

/// A name without folders: an index must not lead out of its own folder.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

/// `0-2, 5` for `[0, 1, 2, 5]`.
fn ranges(sorted: &[usize]) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_short() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn an_index_stays_in_its_folder() {
        assert!(is_file_name("model-00001-of-00002.safetensors"));
        for name in ["../model.safetensors", "/etc/passwd", "a/b", "", ".."] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
