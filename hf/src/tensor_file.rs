//! One safetensors file, mapped or in memory. Its tensors are converted when they are read.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use moe_kernels::{DType, Dtype};
use rayon::prelude::*;
use safetensors::tensor::Metadata;
use safetensors::{Dtype as DiskDtype, SafeTensors};

use crate::bytes::Bytes;
use crate::error::{Error, Result};

/// A safetensors file whose header has been read and checked against the file's length. A clone is
/// the same file.
#[derive(Clone)]
pub struct TensorFile(Arc<Inner>);

struct Inner {
    name: String,
    bytes: Bytes,
    /// The offset of the first tensor's bytes.
    data: usize,
    metadata: Metadata,
}

impl fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TensorFile").field(&self.0.name).finish()
    }
}

impl TensorFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened or mapped, [`Error::File`] if it is not a regular
    /// file, or not a complete safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(path.display().to_string(), Bytes::map(path)?)
    }

    /// `name` is the name of the file in messages.
    pub(crate) fn new(name: String, bytes: Bytes) -> Result<Self> {
        let length = bytes.as_slice().len();
        let (header, metadata) = SafeTensors::read_metadata(bytes.as_slice()).map_err(|error| {
            let why = format!(
                "not a complete safetensors file ({error}); it has {length} bytes and may be \
                 truncated or a Git LFS pointer"
            );
            Error::File { file: name.clone(), why }
        })?;
        // The header follows its own length, which takes 8 bytes; the tensors follow the header.
        Ok(Self(Arc::new(Inner { name, bytes, data: 8 + header, metadata })))
    }

    /// The names of its tensors, in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.0.metadata.offset_keys()
    }

    /// A value of the header's free-form table `__metadata__`.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.0.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// A tensor; `None` if the file has no tensor of this name.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        let info = self.0.metadata.info(name)?;
        let (begin, end) = info.data_offsets;
        let range = self.0.data + begin..self.0.data + end;
        self.0.bytes.as_slice().get(range.clone())?;
        let (dtype, shape) = (info.dtype, info.shape.clone());
        Some(Tensor { file: self.clone(), name: name.into(), dtype, shape, range })
    }

    /// A required tensor.
    ///
    /// # Errors
    /// [`Error::File`] names the tensors that the file has instead.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.find(name).ok_or_else(|| {
            let names = self.names();
            let list = match names.len() {
                0 => "no tensors".into(),
                1..=8 => format!("`{}`", names.join("`, `")),
                many => format!("`{}` and {} more", names[..8].join("`, `"), many - 8),
            };
            Error::File {
                file: self.0.name.clone(),
                why: format!("no tensor `{name}`; it has {list}"),
            }
        })
    }
}

/// The element types that need no scales.
pub(crate) const FLOATS: &str = "f64, f32, bf16 or f16";

/// One tensor of a file. It keeps the file mapped.
#[derive(Debug, Clone)]
pub struct Tensor {
    file: TensorFile,
    name: String,
    dtype: DiskDtype,
    shape: Vec<usize>,
    /// The bytes in the file.
    range: Range<usize>,
}

impl Tensor {
    fn data(&self) -> &[u8] {
        self.file.0.bytes.as_slice().get(self.range.clone()).unwrap_or_default()
    }

    /// The element type on disk, in lower case.
    pub fn dtype_name(&self) -> String {
        format!("{:?}", self.dtype).to_lowercase()
    }

    /// An [`Error::Tensor`] about this tensor.
    pub fn error(&self, got: String, wanted: String) -> Error {
        Error::Tensor { file: self.file.0.name.clone(), tensor: self.name.clone(), got, wanted }
    }

    /// Checks that the elements are floating-point numbers without scales and that the shape is
    /// `wanted`.
    ///
    /// # Errors
    /// [`Error::Tensor`] otherwise.
    pub fn check(&self, wanted: &[usize]) -> Result<()> {
        self.check_float()?;
        self.check_shape(wanted)
    }

    pub(crate) fn check_shape(&self, wanted: &[usize]) -> Result<()> {
        if self.shape == wanted {
            return Ok(());
        }
        Err(self.error(format!("{:?}", self.shape), format!("{wanted:?}")))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn dtype(&self) -> DiskDtype {
        self.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns whether the elements are floating-point numbers without scales.
    pub(crate) fn is_float(&self) -> bool {
        self.check_float().is_ok()
    }

    /// Returns whether the elements are E8M0 exponents, which some files call bytes.
    pub(crate) fn is_e8m0(&self) -> bool {
        matches!(self.dtype, DiskDtype::F8_E8M0 | DiskDtype::U8)
    }

    /// Checks that the elements are scales: floating-point numbers or E8M0 exponents.
    pub(crate) fn check_scales(&self) -> Result<()> {
        match self.is_e8m0() || self.is_float() {
            true => Ok(()),
            false => Err(self.error(self.dtype_name(), format!("{FLOATS}, or f8_e8m0"))),
        }
    }

    pub(crate) fn check_bytes(&self, wanted: &[usize]) -> Result<()> {
        if self.dtype != DiskDtype::U8 {
            return Err(self.error(self.dtype_name(), "u8".into()));
        }
        self.check_shape(wanted)
    }

    /// Checks that the elements are i32 or i64 and that the shape is `wanted`.
    ///
    /// # Errors
    /// [`Error::Tensor`] otherwise.
    pub fn check_ids(&self, wanted: &[usize]) -> Result<()> {
        match self.dtype {
            DiskDtype::I32 | DiskDtype::I64 => self.check_shape(wanted),
            _ => Err(self.error(self.dtype_name(), "i32 or i64".into())),
        }
    }

    /// The number of elements.
    pub(crate) fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of a tensor of bytes.
    pub(crate) fn bytes(&self, range: Range<usize>) -> Result<&[u8]> {
        let wanted = || format!("at least {} bytes", range.end);
        let bytes = self.data().get(range.clone());
        bytes.ok_or_else(|| self.error(format!("{:?}", self.shape), wanted()))
    }

    /// Reads the whole tensor, of i32 or i64, as ids in `0..end`. `wanted` describes the ids in
    /// messages.
    ///
    /// # Errors
    /// [`Error::Tensor`] for an id out of range, with its position.
    pub fn read_ids(&self, end: usize, wanted: &str) -> Result<Vec<u32>> {
        let id = |(at, value): (usize, i64)| {
            u32::try_from(value).ok().filter(|id| (*id as usize) < end).ok_or_else(|| {
                let got = format!("{value} at {:?}", self.position(at));
                self.error(got, format!("{wanted}, from 0 and below {end}"))
            })
        };
        if self.dtype == DiskDtype::I64 {
            let (values, _) = self.data().as_chunks::<8>();
            return values
                .iter()
                .map(|bytes| i64::from_le_bytes(*bytes))
                .enumerate()
                .map(id)
                .collect();
        }
        let (values, _) = self.data().as_chunks::<4>();
        values.iter().map(|bytes| i32::from_le_bytes(*bytes).into()).enumerate().map(id).collect()
    }

    /// The indices of an element.
    fn position(&self, mut element: usize) -> Vec<usize> {
        let mut position: Vec<usize> = self
            .shape
            .iter()
            .rev()
            .map(|size| {
                let index = element % size.max(&1);
                element /= size.max(&1);
                index
            })
            .collect();
        position.reverse();
        position
    }

    /// Checks that the tensor is `[T, width]` of floating-point numbers with at least one token,
    /// and returns `T`.
    ///
    /// # Errors
    /// [`Error::Tensor`] otherwise.
    pub fn rows_of(&self, width: usize) -> Result<usize> {
        self.check_float()?;
        match self.shape[..] {
            [rows @ (1..), columns] if columns == width => Ok(rows),
            _ => {
                let wanted = format!("[T, {width}] with at least one token");
                Err(self.error(format!("{:?}", self.shape), wanted))
            }
        }
    }

    fn check_float(&self) -> Result<()> {
        match self.dtype {
            DiskDtype::F64 | DiskDtype::F32 | DiskDtype::F16 | DiskDtype::BF16 => Ok(()),
            _ => Err(self.error(self.dtype_name(), FLOATS.into())),
        }
    }

    /// Reads the whole tensor, of floating-point numbers without scales, rounded to nearest if `D`
    /// is narrower.
    ///
    /// # Errors
    /// [`Error::Tensor`] for elements of another kind.
    pub fn read<D: Dtype>(&self) -> Result<Vec<D>> {
        let mut out = vec![D::from_f32(0.0); self.num_elements()];
        self.read_into(0, &mut out)?;
        Ok(out)
    }

    /// Reads elements `first..first + out.len()`, rounded to nearest if `D` is narrower.
    pub(crate) fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        self.check_float()?;
        let size = self.dtype.bitsize() / 8;
        let range = first * size..(first + out.len()) * size;
        let Some(data) = self.data().get(range) else {
            let wanted = format!("at least {} elements", first + out.len());
            return Err(self.error(format!("{:?}", self.shape), wanted));
        };
        match self.dtype {
            DiskDtype::F32 => convert(data, out, DType::F32, f32::from_le_bytes, D::from_f32),
            DiskDtype::F16 => {
                convert(data, out, DType::F16, |b| f16::from_le_bytes(b).to_f32(), D::from_f32)
            }
            DiskDtype::BF16 => {
                convert(data, out, DType::BF16, |b| bf16::from_le_bytes(b).to_f32(), D::from_f32)
            }
            _ => convert_parallel(data, out, f64::from_le_bytes, D::from_f64),
        }
        Ok(())
    }

    /// Reads the whole tensor as scales.
    pub(crate) fn read_scales(&self) -> Result<Vec<f32>> {
        match self.dtype {
            DiskDtype::F8_E8M0 | DiskDtype::U8 => {
                Ok(self.data().iter().map(|code| crate::format::e8m0_to_f32(*code)).collect())
            }
            _ => self.read(),
        }
    }

    /// Reads the whole tensor as f64, which is exact for every supported element type.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    pub fn read_f64(&self) -> Result<Vec<f64>> {
        if self.dtype == DiskDtype::F64 {
            let (values, _) = self.data().as_chunks::<8>();
            return Ok(values.iter().map(|b| f64::from_le_bytes(*b)).collect());
        }
        Ok(self.read::<f32>()?.into_iter().map(f64::from).collect())
    }
}

/// Converts elements, or copies them if the file has the element type `D`.
fn convert<D: Dtype, const SIZE: usize>(
    data: &[u8],
    out: &mut [D],
    on_disk: DType,
    widen: impl Fn([u8; SIZE]) -> f32 + Sync,
    narrow: impl Fn(f32) -> D + Sync,
) {
    if on_disk == D::DTYPE && cfg!(target_endian = "little") {
        bytemuck::cast_slice_mut::<D, u8>(out).copy_from_slice(data);
    } else {
        convert_parallel(data, out, widen, narrow);
    }
}

fn convert_parallel<D: Dtype, F: Copy, const SIZE: usize>(
    data: &[u8],
    out: &mut [D],
    widen: impl Fn([u8; SIZE]) -> F + Sync,
    narrow: impl Fn(F) -> D + Sync,
) {
    // Large enough to amortise the cost of passing a chunk to another thread.
    const CHUNK: usize = 1 << 16;
    out.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK * SIZE)).for_each(|(out, data)| {
        let (values, _) = data.as_chunks::<SIZE>();
        for (out, value) in out.iter_mut().zip(values) {
            *out = narrow(widen(*value));
        }
    });
}
