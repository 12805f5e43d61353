//! The weights of a block in memory: every array of it, put together from tensors and widened where they are quantised.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use moe_kernels::hf::Role;
use moe_kernels::{
    Dtype, ExpertWeights, GateUpLayout, GateUpTensors, LatentWeights, MoeWeights, Owned,
    RouterWeights, SharedWeights, Typed,
};
use rayon::prelude::*;

use crate::checkpoint::Layer;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::source::Source;
use crate::text::warn;

/// One array of a block, still on disk.
pub struct Array<'a> {
    pub role: Role,
    /// Its shape in memory.
    pub shape: Vec<usize>,
    /// Its elements, one piece behind the other.
    pub pieces: Vec<Piece<'a>>,
    /// The pieces have the transpose of a matrix of this shape.
    pub transposed: bool,
    /// The pieces have one element, which every element of the array is.
    pub repeated: bool,
}

/// Elements of a tensor.
pub struct Piece<'a> {
    pub source: Source<'a>,
    pub elements: Range<usize>,
}

impl Array<'_> {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The whole array as `D`.
    pub fn read<D: Dtype>(&self, reading: &Reading) -> Result<Vec<D>> {
        let zero = D::from_f32(0.0);
        let mut values = vec![zero; self.pieces.iter().map(|piece| piece.elements.len()).sum()];
        let mut left = &mut values[..];
        let mut work = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let (out, rest) = left.split_at_mut(piece.elements.len());
            work.push((piece, out));
            left = rest;
        }
        work.into_par_iter().try_for_each(|(piece, out)| {
            piece.source.read_into(piece.elements.start, out)?;
            reading.finish(piece, out);
            Ok::<_, Error>(())
        })?;
        if self.repeated {
            values = vec![values.first().copied().unwrap_or(zero); self.len()];
        }
        if let (true, [rows, columns]) = (self.transposed, &self.shape[..]) {
            let on_disk = values;
            let of = |i| on_disk[i % columns * rows + i / columns];
            values = (0..rows * columns).map(of).collect();
        }
        Ok(values)
    }

    /// The ids of a table, which are those of `experts` experts.
    fn read_ids(&self, experts: usize) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(self.len());
        for piece in &self.pieces {
            if let Source::Plain(tensor) = &piece.source {
                ids.extend(tensor.read_ids(experts, "ids of experts")?);
            }
        }
        Ok(ids)
    }
}

/// Reads and converts all of a layer.
pub fn read_weights<D: Dtype>(layer: &Layer<'_>) -> Result<MoeWeights<Owned, D>> {
    let pieces = layer.arrays().iter().map(|array| array.pieces.len()).sum();
    let reading = Reading::new(pieces);
    let weights = Reader { layer, reading: &reading }.weights()?;
    if let Some(text) = reading.not_finite::<D>() {
        drop(reading);
        warn(&text);
    }
    Ok(weights)
}

/// Shows how far it is, and notes tensors with elements that are no finite numbers.
pub struct Reading {
    progress: Progress,
    /// How many there are of each tensor.
    not_finite: Mutex<BTreeMap<String, usize>>,
}

impl Reading {
    pub fn new(pieces: usize) -> Self {
        let progress = Progress::parts("read the weights", pieces);
        Self { progress, not_finite: Mutex::default() }
    }

    /// A piece is there.
    fn finish<D: Dtype>(&self, piece: &Piece<'_>, values: &[D]) {
        // As large as the pieces that numbers are converted in.
        let count: usize = values
            .par_chunks(1 << 16)
            .map(|values| values.iter().filter(|value| !value.to_f32().is_finite()).count())
            .sum();
        if count > 0 {
            let codes = || piece.source.names().first().map(|name| (*name, count));
            let found = piece.source.scales_not_finite().or_else(codes);
            if let (Some((name, count)), Ok(mut all)) = (found, self.not_finite.lock()) {
                *all.entry(name.to_string()).or_default() += count;
            }
        }
        self.progress.advance();
    }

    /// The first such tensor, and how many more there are.
    fn not_finite<D: Dtype>(&self) -> Option<String> {
        let all = self.not_finite.lock().ok()?;
        let (name, count) = all.first_key_value()?;
        let more = match all.len() - 1 {
            0 => String::new(),
            more => format!("; so have {more} more"),
        };
        Some(format!(
            "tensor `{name}` has NaN or infinities, {count} of them in {}{more}",
            D::DTYPE
        ))
    }
}

struct Reader<'r> {
    layer: &'r Layer<'r>,
    reading: &'r Reading,
}

impl Reader<'_> {
    /// An array that the block may have.
    fn find<D: Dtype>(&self, role: Role) -> Result<Option<Vec<D>>> {
        self.layer.array(role).map(|array| array.read(self.reading)).transpose()
    }

    /// An array that every block has whose configuration is this one's.
    fn array<D: Dtype>(&self, role: Role) -> Result<Vec<D>> {
        Ok(self.find(role)?.unwrap_or_default())
    }

    /// A parameter of the router's product: f32 where the product is computed in f32 whatever the model's type is.
    fn typed<D: Dtype>(&self, role: Role) -> Result<Option<Typed<Owned, D>>> {
        Ok(match self.layer.config.projection.f32_logits {
            true => self.find(role)?.map(Typed::F32),
            false => self.find(role)?.map(Typed::Element),
        })
    }

    fn weights<D: Dtype>(&self) -> Result<MoeWeights<Owned, D>> {
        let config = &self.layer.config;
        let latent = || -> Result<_> {
            Ok(LatentWeights {
                proj_in: self.array(Role::LatentIn)?,
                norm: self.find(Role::LatentNorm)?,
                proj_out: self.array(Role::LatentOut)?,
            })
        };
        let shared = || -> Result<_> {
            Ok(SharedWeights {
                gate_up_bias: self.find(Role::SharedGateUpBias)?,
                down_bias: self.find(Role::SharedDownBias)?,
                sigmoid_gate: self.find(Role::SharedSigmoidGate)?,
                ..SharedWeights::new(self.array(Role::SharedGateUp)?, self.array(Role::SharedDown)?)
            })
        };
        Ok(MoeWeights {
            router: RouterWeights {
                gate: self.typed(Role::RouterGate)?,
                bias: self.typed(Role::RouterBias)?,
                norm: self.find(Role::RouterNorm)?,
                selection_bias: self.find(Role::SelectionBias)?,
                expert_scale: self.find(Role::ExpertScale)?,
                table: self
                    .layer
                    .array(Role::Table)
                    .map(|table| table.read_ids(config.router_experts()))
                    .transpose()?,
                ..RouterWeights::default()
            },
            experts: ExpertWeights {
                gate_up: match config.experts.gate_up {
                    GateUpLayout::Separate => GateUpTensors::Separate {
                        gate: self.array(Role::Gate)?,
                        up: self.array(Role::Up)?,
                    },
                    _ => GateUpTensors::Fused(self.array(Role::GateUp)?),
                },
                gate_up_bias: self.find(Role::GateUpBias)?,
                down: self.array(Role::Down)?,
                down_bias: self.find(Role::DownBias)?,
                output_bias: self.find(Role::OutputBias)?,
                post_norm: self.find(Role::PostNorm)?,
            },
            latent: config.latent.map(|_| latent()).transpose()?,
            shared: config.shared.map(|_| shared()).transpose()?,
            output_norm: self.find(Role::OutputNorm)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use half::bf16;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::folder::Folder;
    use crate::tensor_file::TensorFile;

    /// Every checkpoint of fixtures/ opens, and its arrays are as long as their shapes, of numbers that are written.
    #[test]
    fn every_fixture() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
        let folders = std::fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path());
        for folder in folders.filter(|path| path.join("config.json").is_file()) {
            let name = folder.display().to_string();
            let recorded = TensorFile::open(&folder.join("recorded.safetensors")).unwrap();
            let number = recorded.note("layer").unwrap().parse().unwrap();
            let checkpoint = Checkpoint::open(Folder::Disk(folder)).unwrap();
            for layer in checkpoint.layers(number).unwrap() {
                let reading = Reading::new(1);
                for array in layer.arrays().iter().filter(|array| array.role != Role::Table) {
                    let wide = array.read::<f32>(&reading).unwrap();
                    assert_eq!(wide.len(), array.len(), "{name}: {:?}", array.role);
                    let written = wide.iter().filter(|value| value.is_finite() && **value != 0.0);
                    assert!(written.count() * 4 > 3 * wide.len(), "{name}: {:?}", array.role);
                    let narrow = array.read::<bf16>(&reading).unwrap();
                    let rounded = wide.iter().map(|value| bf16::from_f32(*value));
                    assert!(rounded.eq(narrow), "{name}: {:?} in bf16", array.role);
                }
                let weights = read_weights::<f32>(&layer).unwrap();
                assert_eq!(weights.experts.down.len(), layer.config.down_len(), "{name}");
            }
        }
    }
}
