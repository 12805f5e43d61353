//! One safetensors file: mapped into memory or part of this binary, its tensors converted on reading.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use moe_kernels::{DType, Dtype};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype as DiskDtype, SafeTensors};

use crate::error::{Error, Result, io};

/// The bytes of a file.
pub enum Bytes {
    Mapped(Mmap),
    Bundled(&'static [u8]),
}

impl Bytes {
    /// Maps a file; an empty one, which cannot be mapped, becomes no bytes.
    pub fn map(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io("open", path))?;
        if file.metadata().map_err(io("read", path))?.len() == 0 {
            return Ok(Bytes::Bundled(&[]));
        }
        // SAFETY: the mapping is read-only and private to this process. Another process that shortens
        // the file while it is being read ends this one with SIGBUS, which no program that maps
        // checkpoints can rule out; nothing here writes to a file in place.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
        Ok(Bytes::Mapped(map))
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Bundled(bytes) => bytes,
        }
    }
}

/// A safetensors file whose header has been read and held against the file's length.
pub struct TensorFile {
    name: String,
    bytes: Bytes,
    data: usize,
    metadata: Metadata,
}

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(path.display().to_string(), Bytes::map(path)?)
    }

    /// `name` is what messages call the file.
    pub fn new(name: String, bytes: Bytes) -> Result<Self> {
        let length = bytes.as_slice().len();
        let (header, metadata) = SafeTensors::read_metadata(bytes.as_slice()).map_err(|error| {
            let why = format!(
                "not a whole safetensors file ({error}); it has {length} bytes, \
                 perhaps it was cut short or is a Git LFS pointer"
            );
            Error::File { file: name.clone(), why }
        })?;
        // The header follows its own length, which takes 8 bytes; the tensors follow the header.
        Ok(Self { name, bytes, data: 8 + header, metadata })
    }

    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// A value of the header's free-form table.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    pub fn find(&self, name: &str) -> Option<Tensor<'_>> {
        let info = self.metadata.info(name)?;
        let (begin, end) = info.data_offsets;
        let data = self.bytes.as_slice().get(self.data + begin..self.data + end)?;
        Some(Tensor {
            file: &self.name,
            name: name.into(),
            dtype: info.dtype,
            shape: &info.shape,
            data,
        })
    }

    /// A tensor that has to be there.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find(name).ok_or_else(|| {
            let names = self.names();
            let list = match names.len() {
                0 => "no tensor at all".into(),
                1..=8 => format!("`{}`", names.join("`, `")),
                many => format!("`{}` and {} more", names[..8].join("`, `"), many - 8),
            };
            Error::File {
                file: self.name.clone(),
                why: format!("no tensor `{name}`; it has {list}"),
            }
        })
    }
}

/// One tensor of a file.
pub struct Tensor<'a> {
    file: &'a str,
    name: String,
    dtype: DiskDtype,
    shape: &'a [usize],
    data: &'a [u8],
}

impl Tensor<'_> {
    /// The type on disk, as this program writes types.
    pub fn dtype_name(&self) -> String {
        format!("{:?}", self.dtype).to_lowercase()
    }

    pub fn error(&self, got: String, wanted: String) -> Error {
        Error::Tensor { file: self.file.into(), tensor: self.name.clone(), got, wanted }
    }

    /// Fails unless the tensor holds floating-point numbers of this shape.
    pub fn check(&self, wanted: &[usize]) -> Result<()> {
        self.check_float()?;
        self.check_shape(wanted)
    }

    /// Fails unless the tensor is of this shape.
    pub fn check_shape(&self, wanted: &[usize]) -> Result<()> {
        if self.shape == wanted {
            return Ok(());
        }
        Err(self.error(format!("{:?}", self.shape), format!("{wanted:?}")))
    }

    /// Fails unless the tensor holds bytes of this shape.
    pub fn check_bytes(&self, wanted: &[usize]) -> Result<()> {
        if self.dtype != DiskDtype::U8 {
            return Err(self.error(self.dtype_name(), "u8".into()));
        }
        self.check_shape(wanted)
    }

    /// Fails unless the tensor holds whole numbers of this shape.
    pub fn check_ids(&self, wanted: &[usize]) -> Result<()> {
        match self.dtype {
            DiskDtype::I32 | DiskDtype::I64 => self.check_shape(wanted),
            _ => Err(self.error(self.dtype_name(), "i32 or i64".into())),
        }
    }

    /// Whether the tensor holds FP8 codes of kind E4M3.
    pub fn is_fp8(&self) -> bool {
        self.dtype == DiskDtype::F8_E4M3
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of a tensor whose elements are bytes.
    pub fn bytes(&self, range: Range<usize>) -> Result<&[u8]> {
        let wanted = || format!("at least {} bytes", range.end);
        let bytes = self.data.get(range.clone());
        bytes.ok_or_else(|| self.error(format!("{:?}", self.shape), wanted()))
    }

    /// The whole tensor as ids, each of them below `end`; an error says which element is not, and that it should be
    /// `one_of`.
    pub fn read_ids(&self, end: usize, one_of: &str) -> Result<Vec<u32>> {
        let id = |(at, value): (usize, i64)| {
            u32::try_from(value).ok().filter(|id| (*id as usize) < end).ok_or_else(|| {
                let got = format!("{value} at {:?}", self.position(at));
                self.error(got, format!("{one_of}, from 0 and below {end}"))
            })
        };
        if self.dtype == DiskDtype::I64 {
            let (values, _) = self.data.as_chunks::<8>();
            return values
                .iter()
                .map(|bytes| i64::from_le_bytes(*bytes))
                .enumerate()
                .map(id)
                .collect();
        }
        let (values, _) = self.data.as_chunks::<4>();
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

    /// Fails unless the tensor holds floating-point numbers in rows of `width`; gives their number.
    pub fn rows_of(&self, width: usize) -> Result<usize> {
        self.check_float()?;
        match *self.shape {
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
            _ => {
                let wanted = "f32, bf16 or f16, or f8_e4m3 where there are scales beside it";
                Err(self.error(self.dtype_name(), wanted.into()))
            }
        }
    }

    /// The whole tensor as `D`.
    pub fn read<D: Dtype>(&self) -> Result<Vec<D>> {
        let mut out = vec![D::from_f32(0.0); self.shape.iter().product()];
        self.read_into(0, &mut out)?;
        Ok(out)
    }

    /// Elements `first..first + out.len()` as `D`, rounded to nearest where `D` is the narrower type.
    pub fn read_into<D: Dtype>(&self, first: usize, out: &mut [D]) -> Result<()> {
        self.check_float()?;
        let size = self.dtype.bitsize() / 8;
        let range = first * size..(first + out.len()) * size;
        let Some(data) = self.data.get(range) else {
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

    /// The whole tensor as f64, which is exact for every type that is read.
    pub fn read_f64(&self) -> Result<Vec<f64>> {
        if self.dtype == DiskDtype::F64 {
            let (values, _) = self.data.as_chunks::<8>();
            return Ok(values.iter().map(|b| f64::from_le_bytes(*b)).collect());
        }
        Ok(self.read::<f32>()?.into_iter().map(f64::from).collect())
    }
}

/// Converts, or copies where the file holds the very type that is wanted.
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
    // Large enough to hide the cost of handing a piece to another thread.
    const PIECE: usize = 1 << 16;
    out.par_chunks_mut(PIECE).zip(data.par_chunks(PIECE * SIZE)).for_each(|(out, data)| {
        let (values, _) = data.as_chunks::<SIZE>();
        for (out, value) in out.iter_mut().zip(values) {
            *out = narrow(widen(*value));
        }
    });
}

/// A tensor to be written; an error names the tensor's shape where its length is another.
pub fn view<'v, D: Dtype>(shape: &[usize], values: &'v [D]) -> Result<TensorView<'v>> {
    let dtype = match D::DTYPE {
        DType::F32 => DiskDtype::F32,
        DType::F16 => DiskDtype::F16,
        DType::BF16 => DiskDtype::BF16,
    };
    raw_view(dtype, shape, bytemuck::cast_slice(values))
}

/// The same of ids, which are below 2^31 and so the same bits with a sign.
pub fn view_ids<'v>(shape: &[usize], values: &'v [u32]) -> Result<TensorView<'v>> {
    raw_view(DiskDtype::I32, shape, bytemuck::cast_slice(values))
}

fn raw_view<'v>(dtype: DiskDtype, shape: &[usize], bytes: &'v [u8]) -> Result<TensorView<'v>> {
    TensorView::new(dtype, shape.to_vec(), bytes).map_err(|error| Error::File {
        file: "a tensor to be written".into(),
        why: error.to_string(),
    })
}

/// Writes tensors and notes about them. The file appears whole or not at all.
pub fn write(
    path: &Path,
    tensors: Vec<(&str, TensorView<'_>)>,
    notes: Option<HashMap<String, String>>,
) -> Result<()> {
    replace(path, |neighbour| {
        safetensors::serialize_to_file(tensors, notes, neighbour).map_err(std::io::Error::other)
    })
}

/// Makes a file that appears whole or not at all: `write` fills a neighbour, which then takes the name.
pub fn replace(path: &Path, write: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    let neighbour = neighbour(path);
    let write = || -> std::io::Result<()> {
        write(&neighbour)?;
        File::open(&neighbour)?.sync_all()?;
        std::fs::rename(&neighbour, path)
    };
    write().map_err(|error| {
        // The first error is the one to tell; the neighbour may not even be there.
        let _ = std::fs::remove_file(&neighbour);
        io("write", path)(error)
    })
}

/// A name in the same folder, so that taking the final name is one step, and of this process alone.
/// The ending stays: it may say what kind of file is to be made.
fn neighbour(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(format!(".{}.part.", std::process::id()));
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}
