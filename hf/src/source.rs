//! A tensor that has been found, and how its numbers are stored: as they are, or as codes with scales.

use std::ops::Range;

use moe_kernels::Dtype;
use moe_kernels::format::{
    MXFP4_BLOCK, dequantize_fp4, dequantize_fp8, dequantize_mxfp4, num_scales,
};
use safetensors::Dtype as DiskDtype;

use crate::error::Result;
use crate::tensor_file::Tensor;

/// A tensor, or several that are one, of the shape that the layer needs.
pub enum Source<'a> {
    Plain(Tensor<'a>),
    /// Codes of matrices `[.., n, k]`, and the scales of their blocks.
    Scaled(Scaled<'a>),
    /// Blocks `[.., k / 32, 16]`, and their scales.
    Mxfp4 {
        blocks: Tensor<'a>,
        scales: Tensor<'a>,
    },
}

/// Quantised matrices.
pub struct Scaled<'a> {
    codes: Tensor<'a>,
    scales: Tensor<'a>,
    code: Code,
    /// The shape of each matrix.
    matrix: [usize; 2],
    /// The rows and columns that share a scale.
    block: [usize; 2],
}

/// The codes of quantised matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// E4M3, one in a byte.
    Fp8,
    /// E2M1, two in a byte along the rows, the low one first: as DeepSeek-V4 has its experts.
    Fp4,
}

impl Code {
    /// The kind of codes that a tensor of logical `shape` holds; `None` for a tensor without supported codes.
    pub fn of(tensor: &Tensor<'_>, shape: &[usize]) -> Option<Self> {
        match tensor.dtype() {
            DiskDtype::F8_E4M3 => Some(Code::Fp8),
            DiskDtype::I8 | DiskDtype::U8 if packed(shape).as_deref() == Some(tensor.shape()) => {
                Some(Code::Fp4)
            }
            _ => None,
        }
    }
}

/// The shape of packed FP4 codes; none for rows that do not end with a full block.
fn packed(shape: &[usize]) -> Option<Vec<usize>> {
    let (last, before) = shape.split_last()?;
    last.is_multiple_of(MXFP4_BLOCK).then(|| [before, &[last / 2]].concat())
}

/// The rows and columns of the last two dimensions, and those before them.
fn matrices(shape: &[usize]) -> (&[usize], [usize; 2]) {
    match shape {
        [before @ .., n, k] => (before, [*n, *k]),
        [k] => (&[], [1, *k]),
        [] => (&[], [1, 1]),
    }
}

/// How the matrices of a tensor are quantised, as far as config.json and the layer say.
#[derive(Clone, Copy)]
pub struct Scaling {
    /// The rows and columns that share a scale.
    pub block: Option<[usize; 2]>,
    /// Matrices are `[in, out]`: the scale of an output feature belongs to a column. Otherwise it belongs to a row.
    pub in_out: bool,
}

/// The shapes that the scales of matrices may have, with the block that each means: blocks as config.json says, one
/// scale for each matrix, or one for each output feature.
pub fn scale_shapes(
    code: Code,
    shape: &[usize],
    scaling: Scaling,
) -> Vec<(Vec<usize>, [usize; 2])> {
    let (before, matrix @ [n, k]) = matrices(shape);
    let with = |last: &[usize]| [before, last].concat();
    if code == Code::Fp4 {
        return vec![(with(&[n, k.div_ceil(MXFP4_BLOCK)]), [1, MXFP4_BLOCK])];
    }
    let blocks = scaling
        .block
        .map(|block @ [rows, columns]| (with(&[n.div_ceil(rows), k.div_ceil(columns)]), block));
    let whole = [vec![1], vec![], vec![1, 1]].map(|last| (with(&last), matrix));
    let features = match scaling.in_out {
        false => [vec![n, 1], vec![n]].map(|last| (with(&last), [1, k])).to_vec(),
        true => [vec![1, k], vec![k], vec![k, 1]].map(|last| (with(&last), [n, 1])).to_vec(),
    };
    blocks.into_iter().chain(whole).chain(features).collect()
}

impl<'a> Source<'a> {
    /// Quantised matrices of `shape`.
    pub fn scaled(
        code: Code,
        codes: Tensor<'a>,
        scales: Tensor<'a>,
        shape: &[usize],
        scaling: Scaling,
    ) -> Result<Self> {
        if code == Code::Fp8 {
            codes.check_shape(shape)?;
        }
        let known = scale_shapes(code, shape, scaling);
        let found = known.iter().find(|(shape, _)| shape == scales.shape());
        let Some((_, block)) = found else {
            return Err(scales.error(format!("{:?}", scales.shape()), describe(&known)));
        };
        scales.check_scales()?;
        let ([n, k], block) = (matrices(shape).1, *block);
        let block = block.map(|size| size.max(1));
        Ok(Source::Scaled(Scaled { codes, scales, code, matrix: [n, k], block }))
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

    /// The names of its tensors, that of the numbers or codes first.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Source::Plain(tensor) => vec![tensor.name()],
            Source::Scaled(Scaled { codes, scales, .. }) => vec![codes.name(), scales.name()],
            Source::Mxfp4 { blocks, scales } => vec![blocks.name(), scales.name()],
        }
    }

    /// The scales with numbers that are infinite or NaN, which make all numbers of their blocks so, and how many of them.
    pub fn scales_not_finite(&self) -> Option<(&str, usize)> {
        let scales = match self {
            Source::Plain(_) => return None,
            Source::Scaled(scaled) => &scaled.scales,
            Source::Mxfp4 { scales, .. } => scales,
        };
        let values = scales.read_scales().ok()?;
        let count = values.iter().filter(|scale| !scale.is_finite()).count();
        (count > 0).then(|| (scales.name(), count))
    }

    /// The type on disk.
    pub fn dtype_name(&self) -> String {
        match self {
            Source::Plain(tensor) => tensor.dtype_name(),
            Source::Scaled(Scaled { code: Code::Fp4, .. }) => "fp4".into(),
            Source::Scaled(Scaled { codes, .. }) => codes.dtype_name(),
            Source::Mxfp4 { .. } => "mxfp4".into(),
        }
    }

    /// Elements `first..first + out.len()`, rounded to nearest where `D` is narrower than the values.
    pub fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        match self {
            Source::Plain(tensor) => tensor.read_into(first, out),
            Source::Scaled(scaled) => scaled.read_into(first, out),
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

impl Scaled<'_> {
    fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        let ([n, k], block) = (self.matrix, self.block);
        let scales = self.scales.read_scales()?;
        let (matrix, per_matrix) = (n * k, num_scales(n, k, block)?);
        let per_byte = if self.code == Code::Fp4 { 2 } else { 1 };
        widen_into(first, out, matrix, self.codes.len() * per_byte, |elements, out| {
            let scales = &scales[elements.start / matrix * per_matrix..][..per_matrix];
            let codes = self.codes.bytes(elements.start / per_byte..elements.end / per_byte)?;
            match self.code {
                Code::Fp8 => dequantize_fp8(codes, scales, n, k, block, out)?,
                Code::Fp4 => dequantize_fp4(codes, scales, n, k, block, out)?,
            }
            Ok(())
        })
    }
}

/// Shapes as a message has them.
pub fn describe(shapes: &[(Vec<usize>, [usize; 2])]) -> String {
    let shapes: Vec<String> = shapes.iter().map(|(shape, _)| format!("{shape:?}")).collect();
    shapes.join(" or ")
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

#[cfg(test)]
mod tests {
    use super::*;

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
