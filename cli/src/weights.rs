//! The weights of a block in memory: every array of it, put together from tensors and widened where they are quantised.

use std::ops::Range;

use moe_kernels::format::{FP8_BLOCK, MXFP4_BLOCK, dequantize_fp8_blocks, dequantize_mxfp4};
use moe_kernels::hf::Role;
use moe_kernels::{
    Dtype, ExpertWeights, GateUp, GateUpTensors, LatentWeights, MoeWeights, Owned, RouterWeights,
    SharedWeights, Typed, format,
};
use rayon::prelude::*;

use crate::checkpoint::Layer;
use crate::error::Result;
use crate::progress::Progress;
use crate::tensor_file::Tensor;

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

/// A tensor that has been found, and is of the right shape.
pub enum Source<'a> {
    Plain(Tensor<'a>),
    /// Codes `[.., n, k]`, and scales of their blocks.
    Fp8 {
        codes: Tensor<'a>,
        scales: Tensor<'a>,
        n: usize,
        k: usize,
    },
    /// Blocks `[.., k / 32, 16]`, and their scales.
    Mxfp4 {
        blocks: Tensor<'a>,
        scales: Tensor<'a>,
    },
}

impl<'a> Source<'a> {
    pub fn fp8(codes: Tensor<'a>, scales: Tensor<'a>, shape: &[usize]) -> Result<Self> {
        codes.check_shape(shape)?;
        let (n, k) = match *shape {
            [.., n, k] => (n, k),
            [k] => (1, k),
            [] => (1, 1),
        };
        let mut wanted = shape.to_vec();
        for size in wanted.iter_mut().rev().take(2) {
            *size = size.div_ceil(FP8_BLOCK);
        }
        scales.check(&wanted)?;
        Ok(Source::Fp8 { codes, scales, n, k })
    }

    pub fn mxfp4(blocks: Tensor<'a>, scales: Tensor<'a>, shape: &[usize]) -> Result<Self> {
        let mut wanted = shape.to_vec();
        if let Some(last) = wanted.last_mut() {
            *last = last.div_ceil(MXFP4_BLOCK);
        }
        scales.check_bytes(&wanted)?;
        wanted.push(MXFP4_BLOCK / 2);
        blocks.check_bytes(&wanted)?;
        if shape.last().is_some_and(|last| !last.is_multiple_of(MXFP4_BLOCK)) {
            let wanted = format!("blocks of {MXFP4_BLOCK} that fill {shape:?}");
            return Err(blocks.error("a last block that is not full".into(), wanted));
        }
        Ok(Source::Mxfp4 { blocks, scales })
    }

    /// The type on disk.
    pub fn dtype_name(&self) -> String {
        match self {
            Source::Plain(tensor) => tensor.dtype_name(),
            Source::Fp8 { codes, .. } => codes.dtype_name(),
            Source::Mxfp4 { .. } => "mxfp4".into(),
        }
    }

    /// Elements `first..first + out.len()`, rounded to nearest where `D` is narrower than the values.
    fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        match self {
            Source::Plain(tensor) => tensor.read_into(first, out),
            Source::Fp8 { codes, scales, n, k } => {
                let scales = scales.read::<f32>()?;
                let (matrix, per_matrix) = (n * k, format::fp8_scales(*n, *k)?);
                widen_into(first, out, matrix, codes.len(), |elements, out| {
                    let scales = &scales[elements.start / matrix * per_matrix..][..per_matrix];
                    Ok(dequantize_fp8_blocks(codes.bytes(elements)?, scales, *n, *k, out)?)
                })
            }
            Source::Mxfp4 { blocks, scales } => {
                // Large enough that the loop costs nothing, and small enough for a cache.
                const RUN: usize = MXFP4_BLOCK * 512;
                widen_into(first, out, RUN, scales.len() * MXFP4_BLOCK, |elements, out| {
                    let blocks = blocks.bytes(elements.start / 2..elements.end / 2)?;
                    let range = elements.start / MXFP4_BLOCK..elements.end / MXFP4_BLOCK;
                    Ok(dequantize_mxfp4(blocks, scales.bytes(range)?, out)?)
                })
            }
        }
    }
}

/// Elements `first..first + out.len()` of `total`, which `widen` makes in units of `unit` (the last may be shorter).
fn widen_into<D: Dtype>(
    first: usize,
    out: &mut [D],
    unit: usize,
    total: usize,
    widen: impl Fn(Range<usize>, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let end = first + out.len();
    let mut values = vec![0.0; unit.min(total)];
    let mut at = first;
    while at < end {
        let start = at / unit * unit;
        let whole = start..(start + unit).min(total);
        let values = &mut values[..whole.len()];
        widen(whole.clone(), values)?;
        let next = whole.end.min(end);
        let wanted = &values[at - start..next - start];
        for (out, value) in out[at - first..next - first].iter_mut().zip(wanted) {
            *out = D::from_f32(*value);
        }
        at = next;
    }
    Ok(())
}

impl Array<'_> {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The whole array as `D`.
    pub fn read<D: Dtype>(&self, progress: &Progress) -> Result<Vec<D>> {
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
            let done = piece.source.read_into(piece.elements.start, out);
            progress.advance();
            done
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

    /// The ids of a table.
    fn read_ids(&self) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(self.len());
        for piece in &self.pieces {
            if let Source::Plain(tensor) = &piece.source {
                ids.extend(tensor.read_ids()?);
            }
        }
        Ok(ids)
    }
}

/// Reads and converts all of a layer.
pub fn read_weights<D: Dtype>(layer: &Layer<'_>) -> Result<MoeWeights<Owned, D>> {
    let pieces = layer.arrays().iter().map(|array| array.pieces.len()).sum();
    let progress = Progress::parts("read the weights", pieces);
    Reader { layer, progress: &progress }.weights()
}

struct Reader<'r> {
    layer: &'r Layer<'r>,
    progress: &'r Progress,
}

impl Reader<'_> {
    /// An array that the block may have.
    fn find<D: Dtype>(&self, role: Role) -> Result<Option<Vec<D>>> {
        self.layer.array(role).map(|array| array.read(self.progress)).transpose()
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
                before: self.array(Role::LatentInto)?,
                norm: self.find(Role::LatentNorm)?,
                after: self.array(Role::LatentOut)?,
            })
        };
        let shared = || -> Result<_> {
            Ok(SharedWeights {
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
                table: self.layer.array(Role::Table).map(Array::read_ids).transpose()?,
                ..RouterWeights::default()
            },
            experts: ExpertWeights {
                gate_up: match config.experts.gate_up {
                    GateUp::Separate => GateUpTensors::Separate {
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
    use crate::checkpoint::{Checkpoint, Folder};
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
                let progress = Progress::parts("a test", 1);
                for array in layer.arrays().iter().filter(|array| array.role != Role::Table) {
                    let wide = array.read::<f32>(&progress).unwrap();
                    assert_eq!(wide.len(), array.len(), "{name}: {:?}", array.role);
                    let written = wide.iter().filter(|value| value.is_finite() && **value != 0.0);
                    assert!(written.count() * 4 > 3 * wide.len(), "{name}: {:?}", array.role);
                    let narrow = array.read::<bf16>(&progress).unwrap();
                    let rounded = wide.iter().map(|value| bf16::from_f32(*value));
                    assert!(rounded.eq(narrow), "{name}: {:?} in bf16", array.role);
                }
                let weights = read_weights::<f32>(&layer).unwrap();
                assert_eq!(weights.experts.down.len(), layer.config.down_len(), "{name}");
            }
        }
    }

    /// Any piece of what is widened unit by unit is that piece of the whole.
    #[test]
    fn pieces_of_units() {
        let widen = |elements: Range<usize>, out: &mut [f32]| {
            for (out, element) in out.iter_mut().zip(elements) {
                *out = element as f32;
            }
            Ok(())
        };
        for (first, len) in [(0, 23), (0, 0), (5, 1), (4, 10), (9, 14), (22, 1), (23, 0)] {
            let mut out = vec![f32::NAN; len];
            widen_into(first, &mut out, 5, 23, widen).unwrap();
            let wanted: Vec<f32> = (first..first + len).map(|element| element as f32).collect();
            assert_eq!(out, wanted);
        }
    }
}
