//! A checkpoint as the Hub has it: config.json, and tensors in one file or in shards with an index.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use moe_kernels::{Dtype, MoeConfig, RouterConfig};
use serde_json::{Map, Value};

use crate::error::{Error, Result, io};
use crate::family::{
    ACTIVATION_KEYS, ACTIVATIONS, ExpertNames, Family, PREFIXES, Router, expert_name, layer_name,
    layer_of,
};
use crate::tensor_file::{Bytes, Tensor, TensorFile};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where the files of a checkpoint are.
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
        match serde_json::from_slice(bytes.as_slice()) {
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
    pub family: &'static Family,
    pub config: MoeConfig,
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
        let object = folder.json(CONFIG, &bytes)?;
        let reader = ConfigReader { file: folder.name(CONFIG), object: &object };
        let (family, config) = reader.read()?;

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
        Ok(Self { folder, family, config, files, file_of_tensor })
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
        let tensor = self.find(name)?.ok_or_else(|| {
            let file = if self.files.contains_key(SINGLE) { SINGLE } else { INDEX };
            self.folder.missing(file, &format!("no tensor `{name}`, wanted {shape:?}"))
        })?;
        tensor.check(shape)?;
        Ok(tensor)
    }

    /// The MoE block of one layer, every tensor of it found and of the right shape.
    pub fn layer(&self, layer: usize) -> Result<Layer<'_>> {
        let MoeConfig { hidden, intermediate, num_experts, .. } = self.config;
        for prefix in PREFIXES {
            for layout in self.family.layouts {
                let full = |name: &str| layer_name(prefix, layer, name);
                let has = |name: &str| self.file_of_tensor.contains_key(&full(name));
                if !has(layout.router) || !has(&layout.experts.first()) {
                    continue;
                }
                let gate = [intermediate, hidden];
                let down_shape = [hidden, intermediate];
                let experts = match layout.experts {
                    ExpertNames::Each { gate: gate_name, up, down } => Experts::Each(
                        (0..num_experts)
                            .map(|e| {
                                Ok(Expert {
                                    gate: self.tensor(&full(&expert_name(gate_name, e)), &gate)?,
                                    up: self.tensor(&full(&expert_name(up, e)), &gate)?,
                                    down: self.tensor(&full(&expert_name(down, e)), &down_shape)?,
                                })
                            })
                            .collect::<Result<_>>()?,
                    ),
                    ExpertNames::Fused { gate_up, down } => Experts::Fused {
                        gate_up: self
                            .tensor(&full(gate_up), &[num_experts, 2 * intermediate, hidden])?,
                        down: self.tensor(&full(down), &[num_experts, hidden, intermediate])?,
                    },
                };
                let router = self.tensor(&full(layout.router), &[num_experts, hidden])?;
                return Ok(Layer { config: self.config, router, experts });
            }
        }
        Err(self.no_block(layer))
    }

    /// Says which layers do have a block: a dense layer and a number past the end look alike otherwise.
    fn no_block(&self, layer: usize) -> Error {
        let layers: Vec<usize> = PREFIXES
            .iter()
            .flat_map(|prefix| self.family.layouts.iter().map(move |layout| (prefix, layout)))
            .flat_map(|(prefix, layout)| {
                self.file_of_tensor.keys().filter_map(|name| layer_of(name, prefix, layout.router))
            })
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect();
        let wanted = layer_name(PREFIXES[0], layer, self.family.layouts[0].router);
        let why = if layers.is_empty() {
            "and no other layer of it has one".into()
        } else {
            format!("layers that have one: {}", ranges(&layers))
        };
        let file = match &self.folder {
            Folder::Disk(path) => path.display().to_string(),
            Folder::Bundled(name, _) => format!("bundled {name}"),
        };
        Error::File {
            file,
            why: format!(
                "layer {layer} has no {} block (no tensor `{wanted}` with experts beside it); {why}",
                self.family.model_type
            ),
        }
    }
}

/// Reads config.json; every message names the file and the key.
struct ConfigReader<'a> {
    file: String,
    object: &'a Map<String, Value>,
}

impl ConfigReader<'_> {
    fn read(&self) -> Result<(&'static Family, MoeConfig)> {
        let known = || format!("one of the families that are supported: {}", Family::known());
        let model_type = self.object.get("model_type").unwrap_or(&Value::Null);
        let family = model_type
            .as_str()
            .and_then(Family::find)
            .ok_or_else(|| self.error("model_type", model_type, known()))?;
        for key in ACTIVATION_KEYS {
            let Some(value) = self.object.get(*key) else { continue };
            if !value.as_str().is_some_and(|name| ACTIVATIONS.contains(&name)) {
                return Err(self.error(key, value, format!("one of {ACTIVATIONS:?}")));
            }
        }
        let renormalize = match family.router {
            Router::SoftmaxTopKRenormalized => true,
            Router::SoftmaxTopK { renormalize: key, default } => match self.object.get(key) {
                None | Some(Value::Null) => default,
                Some(Value::Bool(value)) => *value,
                Some(value) => return Err(self.error(key, value, "true or false".into())),
            },
        };
        let plain = MoeConfig::new(
            self.integer(family.hidden)?,
            self.integer(family.intermediate)?,
            self.integer(family.num_experts)?,
            self.integer(family.top_k)?,
        );
        let config = MoeConfig { router: RouterConfig::softmax_top_k(renormalize), ..plain };
        config
            .check()
            .map_err(|error| Error::File { file: self.file.clone(), why: error.to_string() })?;
        Ok((family, config))
    }

    fn integer(&self, keys: &'static [&'static str]) -> Result<usize> {
        let (key, value) = keys
            .iter()
            .find_map(|key| Some((*key, self.object.get(*key)?)))
            .unwrap_or((keys[0], &Value::Null));
        let integer = value.as_u64().and_then(|value| usize::try_from(value).ok());
        integer
            .filter(|value| *value > 0)
            .ok_or_else(|| self.error(key, value, "a whole number of at least 1".into()))
    }

    fn error(&self, key: &'static str, got: &Value, wanted: String) -> Error {
        let got = if got.is_null() { "missing".into() } else { got.to_string() };
        Error::Config { file: self.file.clone(), key, got, wanted }
    }
}

/// The MoE block of one layer, still on disk.
pub struct Layer<'a> {
    pub config: MoeConfig,
    router: Tensor<'a>,
    experts: Experts<'a>,
}

enum Experts<'a> {
    Each(Vec<Expert<'a>>),
    Fused { gate_up: Tensor<'a>, down: Tensor<'a> },
}

struct Expert<'a> {
    gate: Tensor<'a>,
    up: Tensor<'a>,
    down: Tensor<'a>,
}

impl Layer<'_> {
    /// The type of the expert weights on disk.
    pub fn dtype_on_disk(&self) -> String {
        match &self.experts {
            Experts::Each(experts) => {
                experts.first().map(|e| e.gate.dtype_name()).unwrap_or_default()
            }
            Experts::Fused { gate_up, .. } => gate_up.dtype_name(),
        }
    }

    /// The router's weights [E, H].
    pub fn router<D: Dtype>(&self) -> Result<Vec<D>> {
        self.router.read()
    }

    /// One expert's gate rows and then its up rows, [2I, H], into `out`.
    pub fn gate_up_into<D: Dtype>(&self, expert: usize, out: &mut [D]) -> Result<()> {
        match &self.experts {
            Experts::Each(experts) => {
                let (gate, up) = out.split_at_mut(self.config.intermediate * self.config.hidden);
                experts[expert].gate.read_into(0, gate)?;
                experts[expert].up.read_into(0, up)
            }
            Experts::Fused { gate_up, .. } => gate_up.read_into(expert * out.len(), out),
        }
    }

    /// One expert's down projection [H, I] into `out`.
    pub fn down_into<D: Dtype>(&self, expert: usize, out: &mut [D]) -> Result<()> {
        match &self.experts {
            Experts::Each(experts) => experts[expert].down.read_into(0, out),
            Experts::Fused { down, .. } => down.read_into(expert * out.len(), out),
        }
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
