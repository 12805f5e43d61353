//! The stored form of a part of an array: plain numbers, or codes with scales.

use std::ops::Range;

use moe_kernels::Dtype;
use safetensors::Dtype as DiskDtype;

use crate::error::Result;
use crate::format::{MXFP4_BLOCK, dequantize_fp4, dequantize_fp8, dequantize_mxfp4, num_scales};
use crate::tensor_file::Tensor;

/// The tensors of a part, checked to have the part's shape.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Plain(Tensor),
    /// Codes of matrices `[.., rows, columns]` with the scales of their blocks.
    Scaled(Scaled),
    /// Blocks `[.., columns / 32, 16]` with their scales.
    Mxfp4 {
        blocks: Tensor,
        scales: Tensor,
    },
}

/// Quantised matrices.
#[derive(Debug, Clone)]
pub(crate) struct Scaled {
    codes: Tensor,
    scales: Tensor,
    code: Code,
    /// The shape of each matrix.
    matrix: [usize; 2],
    /// The rows and columns that share a scale.
    block: [usize; 2],
}

/// The codes of quantised matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// E4M3, one per byte.
    Fp8,
    /// E2M1, two per byte along the rows, the low one first (DeepSeek-V4's experts).
    Fp4,
}

impl Code {
    /// The codes of a tensor of logical `shape`; `None` for a tensor without supported codes.
    pub(crate) fn of(tensor: &Tensor, shape: &[usize]) -> Option<Self> {
        match tensor.dtype() {
            DiskDtype::F8_E4M3 => Some(Code::Fp8),
            DiskDtype::I8 | DiskDtype::U8 if packed(shape).as_deref() == Some(tensor.shape()) => {
                Some(Code::Fp4)
            }
            _ => None,
        }
    }
}

/// The shape of packed FP4 codes; `None` if the last block of a row is not full.
fn packed(shape: &[usize]) -> Option<Vec<usize>> {
    let (last, before) = shape.split_last()?;
    last.is_multiple_of(MXFP4_BLOCK).then(|| [before, &[last / 2]].concat())
}

/// The leading dimensions, and the rows and columns of the last two.
fn matrices(shape: &[usize]) -> (&[usize], [usize; 2]) {
    match shape {
        [leading @ .., rows, columns] => (leading, [*rows, *columns]),
        [columns] => (&[], [1, *columns]),
        [] => (&[], [1, 1]),
    }
}

/// The quantisation of a tensor's matrices, from config.json and the layout.
#[derive(Clone, Copy)]
pub(crate) struct Scaling {
    /// The rows and columns that share a scale, if config.json has them.
    pub(crate) block: Option<[usize; 2]>,
    /// Matrices are `[in, out]`: a scale of an output feature is that of a column. Otherwise it is
    /// that of a row.
    pub(crate) in_out: bool,
}

/// The possible shapes of the scales, each with its block: the blocks of config.json, one scale for
/// each matrix, or one for each output feature.
pub(crate) fn scale_shapes(
    code: Code,
    shape: &[usize],
    scaling: Scaling,
) -> Vec<(Vec<usize>, [usize; 2])> {
    let (leading, matrix @ [rows, columns]) = matrices(shape);
    let with = |last: &[usize]| [leading, last].concat();
    if code == Code::Fp4 {
        return vec![(with(&[rows, columns.div_ceil(MXFP4_BLOCK)]), [1, MXFP4_BLOCK])];
    }
    let blocks = scaling.block.map(|block @ [height, width]| {
        (with(&[rows.div_ceil(height), columns.div_ceil(width)]), block)
    });
    let whole = [vec![1], vec![], vec![1, 1]].map(|last| (with(&last), matrix));
    let features = match scaling.in_out {
        false => [vec![rows, 1], vec![rows]].map(|last| (with(&last), [1, columns])).to_vec(),
        true => [vec![1, columns], vec![columns], vec![columns, 1]]
            .map(|last| (with(&last), [rows, 1]))
            .to_vec(),
    };
    blocks.into_iter().chain(whole).chain(features).collect()
}

impl Source {
    /// Quantised matrices of `shape`.
    pub(crate) fn scaled(
        code: Code,
        codes: Tensor,
        scales: Tensor,
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
        let (matrix, block) = (matrices(shape).1, block.map(|size| size.max(1)));
        Ok(Source::Scaled(Scaled { codes, scales, code, matrix, block }))
    }

    pub(crate) fn mxfp4(blocks: Tensor, scales: Tensor, shape: &[usize]) -> Result<Self> {
        let mut wanted = shape.to_vec();
        if let Some(last) = wanted.last_mut() {
            *last = last.div_ceil(MXFP4_BLOCK);
        }
        scales.check_bytes(&wanted)?;
        wanted.push(MXFP4_BLOCK / 2);
        blocks.check_bytes(&wanted)?;
        if shape.last().is_some_and(|last| !last.is_multiple_of(MXFP4_BLOCK)) {
            let wanted = format!("full blocks of {MXFP4_BLOCK} for {shape:?}");
            return Err(blocks.error("without a full last block".into(), wanted));
        }
        Ok(Source::Mxfp4 { blocks, scales })
    }

    /// The names of its tensors, that of the numbers or codes first.
    pub(crate) fn names(&self) -> Vec<&str> {
        match self {
            Source::Plain(tensor) => vec![tensor.name()],
            Source::Scaled(Scaled { codes, scales, .. }) => vec![codes.name(), scales.name()],
            Source::Mxfp4 { blocks, scales } => vec![blocks.name(), scales.name()],
        }
    }

    /// The name of the scales and the number of infinities and NaN among them, which propagate to
    /// their whole blocks; `None` if all are finite.
    pub(crate) fn scales_not_finite(&self) -> Option<(&str, usize)> {
        let scales = match self {
            Source::Plain(_) => return None,
            Source::Scaled(scaled) => &scaled.scales,
            Source::Mxfp4 { scales, .. } => scales,
        };
        let values = scales.read_scales().ok()?;
        let count = values.iter().filter(|scale| !scale.is_finite()).count();
        (count > 0).then(|| (scales.name(), count))
    }

    /// The element type on disk.
    pub(crate) fn dtype_name(&self) -> String {
        match self {
            Source::Plain(tensor) => tensor.dtype_name(),
            Source::Scaled(Scaled { code: Code::Fp4, .. }) => "fp4".into(),
            Source::Scaled(Scaled { codes, .. }) => codes.dtype_name(),
            Source::Mxfp4 { .. } => "mxfp4".into(),
        }
    }

    /// Reads elements `first..first + out.len()`, rounded to nearest if `D` is narrower.
    pub(crate) fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        match self {
            Source::Plain(tensor) => tensor.read_into(first, out),
            Source::Scaled(scaled) => scaled.read_into(first, out),
            Source::Mxfp4 { blocks, scales } => {
                // Large enough to amortise the loop, small enough for a cache.
                const UNIT: usize = MXFP4_BLOCK * 512;
                let total = scales.num_elements() * MXFP4_BLOCK;
                widen_into(first, out, UNIT, total, |elements, out| {
                    let blocks = blocks.bytes(elements.start / 2..elements.end / 2)?;
                    let range = elements.start / MXFP4_BLOCK..elements.end / MXFP4_BLOCK;
                    dequantize_mxfp4(blocks, scales.bytes(range)?, out)
                })
            }
        }
    }
}

impl Scaled {
    fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        let (shape, block) = (self.matrix, self.block);
        let scales = self.scales.read_scales()?;
        let (matrix, per_matrix) = (shape[0] * shape[1], num_scales(shape, block)?);
        let per_byte = if self.code == Code::Fp4 { 2 } else { 1 };
        let total = self.codes.num_elements() * per_byte;
        widen_into(first, out, matrix, total, |elements, out| {
            let scales = &scales[elements.start / matrix * per_matrix..][..per_matrix];
            let codes = self.codes.bytes(elements.start / per_byte..elements.end / per_byte)?;
            match self.code {
                Code::Fp8 => dequantize_fp8(codes, scales, shape, block, out),
                Code::Fp4 => dequantize_fp4(codes, scales, shape, block, out),
            }
        })
    }
}

/// Shapes in a message.
pub(crate) fn describe(shapes: &[(Vec<usize>, [usize; 2])]) -> String {
    let shapes: Vec<String> = shapes.iter().map(|(shape, _)| format!("{shape:?}")).collect();
    shapes.join(" or ")
}

/// Writes elements `first..first + out.len()` of `total`. `widen` computes units of `unit`
/// elements, the last of which may be shorter.
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

    /// Any range of elements that is widened unit by unit is that range of the whole.
    #[test]
    fn widens_any_range() {
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
