//! A recorded output of transformers' own block, stored with its checkpoint. fixtures/README.md
//! describes the files.

use std::path::Path;

use moe_kernels::reference::bound::relative_error;
use moe_kernels::{CapacityConfig, CapacityLimit, DType, Dtype, Priority};
use moe_kernels_hf::{Block, Checkpoint, Folder, TensorFile};

use crate::bundled::FIXTURES;
use crate::device::Place;
use crate::error::{Error, Result, io};
use crate::text::escaped;
use crate::tokens::Outputs;

const RECORDED: &str = "recorded.safetensors";
/// A recording with a lower capacity of experts.
const RECORDED_CAPACITY: &str = "recorded-capacity.safetensors";

/// A recording of one layer.
pub struct Recording {
    pub name: String,
    folder: Folder,
    file: &'static str,
}

/// The difference between an output and the recording.
pub struct Distance {
    /// `|y - recorded| / |recorded|`, in the Euclidean norm.
    pub relative: f64,
    /// The number of tokens with other experts than the recording.
    pub other_experts: usize,
}

impl Recording {
    /// Returns the recordings that are embedded in this binary.
    pub fn bundled() -> Vec<Self> {
        let recording = |fixture: &crate::bundled::Fixture| {
            let name = fixture.name.into();
            Self { name, folder: fixture.folder(), file: RECORDED }
        };
        FIXTURES.iter().map(recording).collect()
    }

    /// Finds the recordings of a folder, or of the folders in it.
    pub fn of_folder(path: &Path) -> Result<Vec<Self>> {
        let mut found = Self::of_checkpoint(path);
        if found.is_empty() {
            let entries = std::fs::read_dir(path).map_err(io("read", path))?;
            let mut folders = Vec::new();
            for entry in entries {
                folders.push(entry.map_err(io("read", path))?.path());
            }
            folders.sort();
            found = folders.iter().flat_map(|folder| Self::of_checkpoint(folder)).collect();
        }
        if found.is_empty() {
            let why = format!("neither {RECORDED} nor a folder with one");
            return Err(Error::File { file: path.display().to_string(), why });
        }
        Ok(found)
    }

    fn of_checkpoint(path: &Path) -> Vec<Self> {
        let name =
            path.file_name().map_or_else(String::new, |name| escaped(&name.to_string_lossy()));
        let files = [(RECORDED, ""), (RECORDED_CAPACITY, " (capacity)")];
        let found = files.iter().filter(|(file, _)| path.join(file).is_file());
        let recording = |(file, what): &(&'static str, &str)| Self {
            name: format!("{name}{what}"),
            folder: Folder::Disk(path.into()),
            file,
        };
        found.map(recording).collect()
    }

    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(self.folder.clone())?)
    }

    pub fn file(&self) -> Result<TensorFile> {
        Ok(self.folder.tensors(self.file)?)
    }

    /// Returns the blocks that were recorded.
    pub fn layers(&self, checkpoint: &Checkpoint, file: &TensorFile) -> Result<Vec<Block>> {
        let number = self.number(file, "layer")?;
        let mut layers = checkpoint.blocks(number)?;
        if self.file == RECORDED_CAPACITY {
            let limit = CapacityLimit::Rows { rows: self.number(file, "expert_capacity")? };
            layers.iter_mut().for_each(|layer| limit_experts(layer, limit));
        }
        Ok(layers)
    }

    fn number(&self, file: &TensorFile, note: &str) -> Result<usize> {
        file.note(note).and_then(|number| number.parse().ok()).ok_or_else(|| {
            let why = format!("{} has no number `{note}` in its metadata", self.file);
            Error::File { file: self.name.clone(), why }
        })
    }

    /// Compares the output of a device with the recording.
    pub fn distance<D: Dtype>(
        &self,
        file: &TensorFile,
        layers: &[Block],
        made: &Outputs<D>,
    ) -> Result<Distance> {
        let wanted = file.tensor("y")?;
        wanted.check(&[made.num_tokens, made.hidden])?;
        let y: Vec<f64> = made.output.y.iter().map(|value| value.to_f64()).collect();
        let relative = relative_error(&y, &wanted.read_f64()?);

        let ids = file.tensor("expert_ids")?;
        let per_token = match *ids.shape() {
            [tokens, per_token] if tokens == made.num_tokens && per_token > 0 => per_token,
            _ => {
                let wanted = format!("[{}, K], the ids of each token's experts", made.num_tokens);
                return Err(ids.error(format!("{:?}", ids.shape()), wanted).into());
            }
        };
        let slots = [made.num_tokens, per_token];
        ids.check_ids(&slots)?;
        let experts = layers.iter().map(|layer| layer.config().router_experts()).max().unwrap_or(0);
        let ids = ids.read_ids(experts, "ids of experts")?;
        // `kept` is 0 for slots beyond the capacity. Experts that every token has are not recorded.
        let kept = file.find("kept").map(|kept| {
            kept.check_ids(&slots)?;
            kept.read_ids(2, "1 for a slot that is kept and 0 for others")
        });
        let kept = kept.transpose()?;
        let sinks = |layer: &Block| layer.config().router.num_sinks;
        let chosen = layers.iter().map(|l| (l.config().router_experts() - sinks(l)) as u32).max();
        let recorded = |token: usize| {
            let slots = token * per_token..(token + 1) * per_token;
            let is_kept = |slot: &usize| kept.as_ref().is_none_or(|kept| kept[*slot] > 0);
            sorted(slots.filter(is_kept).map(|slot| ids[slot]))
        };
        let computed = |token: usize| {
            let ids = &made.output.expert_ids[token * made.top_k..(token + 1) * made.top_k];
            sorted(ids.iter().copied().filter(|id| Some(*id) < chosen))
        };
        let other_experts = (0..made.num_tokens).filter(|&t| recorded(t) != computed(t)).count();
        Ok(Distance { relative, other_experts })
    }
}

/// Sets the recorded limit. Limits in the configuration have no effect on sequences that are
/// shorter.
fn limit_experts(layer: &mut Block, limit: CapacityLimit) {
    let config = layer.config_mut();
    let router = &mut config.router;
    config.capacity = Some(match config.capacity {
        Some(capacity) => CapacityConfig { limit, ..capacity },
        // NLLB normalises the weights of kept slots.
        None => {
            let none = moe_kernels::Normalization::None;
            let normalization = std::mem::replace(&mut router.normalization, none);
            let capacity = CapacityConfig::new(limit, Priority::Choice);
            CapacityConfig { normalization, ..capacity }
        }
    });
}

fn sorted(ids: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = ids.collect();
    ids.sort_unstable();
    ids
}

/// The largest relative distance from the recording that is accepted.
///
/// In f32 it covers a few roundings of each product; the device sums in another order than the CPU.
/// In 16 bits the weights, the input and the values between two operations are each rounded once.
pub fn limit(place: Place, dtype: DType) -> f64 {
    match (dtype, place) {
        (DType::F32, Place::Cpu) => 1e-6,
        (DType::F32, Place::Cuda | Place::Emulator) => 1e-5,
        (DType::F16, _) => 2e-3,
        (DType::BF16, _) => 1e-2,
    }
}

#[cfg(test)]
mod tests;
