//! One safetensors file: mapped into memory or part of this binary, its tensors converted on reading.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};
use moe_kernels::{DType, Dtype};
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype as DiskDtype, SafeTensors};

use crate::error::{Error, Result, io};
use crate::folder::{Bytes, check_file};

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

/// The types that numbers may have without a scale.
pub const FLOATS: &str = "f64, f32, bf16 or f16";

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

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dtype(&self) -> DiskDtype {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        self.shape
    }

    /// Whether the tensor holds numbers without scales.
    pub fn is_float(&self) -> bool {
        self.check_float().is_ok()
    }

    /// Whether the tensor holds exponents of E8M0, which some files call bytes.
    pub fn is_e8m0(&self) -> bool {
        matches!(self.dtype, DiskDtype::F8_E8M0 | DiskDtype::U8)
    }

    /// Fails unless the tensor holds scales: numbers, or exponents of E8M0.
    pub fn check_scales(&self) -> Result<()> {
        match self.is_e8m0() || self.is_float() {
            true => Ok(()),
            false => Err(self.error(self.dtype_name(), format!("{FLOATS}, or f8_e8m0"))),
        }
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
            _ => Err(self.error(self.dtype_name(), FLOATS.into())),
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

    /// The whole tensor as scales.
    pub fn read_scales(&self) -> Result<Vec<f32>> {
        match self.dtype {
            DiskDtype::F8_E8M0 | DiskDtype::U8 => {
                Ok(self.data.iter().map(|code| moe_kernels::format::e8m0_to_f32(*code)).collect())
            }
            _ => self.read(),
        }
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
    mut tensors: Vec<(&str, TensorView<'_>)>,
    notes: Option<HashMap<String, String>>,
) -> Result<()> {
    // As the format asks for: by type, the widest first, so that every tensor is aligned.
    tensors.sort_by(|(a, left), (b, right)| right.dtype().cmp(&left.dtype()).then(a.cmp(b)));
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let begin = end;
        end += tensor.data().len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.to_string(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let infos = infos.collect();
    let header = Metadata::new(notes, infos).map_err(std::io::Error::other);
    let header = header.and_then(|header| serde_json::to_vec(&header).map_err(Into::into));
    let mut header = header.map_err(io("write", path))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    replace(path, |_, file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (_, tensor) in &tensors {
            file.write_all(tensor.data())?;
        }
        file.flush()
    })
}

/// Makes a file that appears whole or not at all: `write` fills a neighbour, which then takes the name.
///
/// The neighbour is new, has a name that nothing can foresee, and is removed where anything fails. Its ending is that of
/// the file: it may say what kind of file is to be made.
///
/// # Errors
/// An existing path that is not a regular file, such as a device or a FIFO, is an error and stays unchanged.
pub fn replace(
    path: &Path,
    write: impl FnOnce(&Path, &mut std::fs::File) -> std::io::Result<()>,
) -> Result<()> {
    if let Ok(metadata) = std::fs::metadata(path) {
        check_file(path, &metadata)?;
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let ending = path.extension().map_or_else(Default::default, |ending| {
        let mut dotted = std::ffi::OsString::from(".");
        dotted.push(ending);
        dotted
    });
    let write = || -> std::io::Result<()> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".moe-kernels.part.").suffix(&ending);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Less what the user's mask takes away, as for any new file.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut neighbour = builder.tempfile_in(folder)?;
        let name = neighbour.path().to_path_buf();
        write(&name, neighbour.as_file_mut())?;
        neighbour.as_file().sync_all()?;
        neighbour.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that cannot be written whole leaves what was there, and nothing else.
    #[test]
    fn a_file_is_replaced_or_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("y.txt");
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        let mut neighbours = std::collections::BTreeSet::new();
        for text in ["one", "two"] {
            replace(&path, |name, file| {
                assert_eq!(name.parent(), Some(folder.path()));
                assert_eq!(name.extension(), path.extension());
                neighbours.insert(name.to_path_buf());
                file.write_all(text.as_bytes())
            })
            .unwrap();
            assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), names()), (text, 1));
        }
        assert_eq!(neighbours.len(), 2, "{neighbours:?}");
        let error = replace(&path, |_, file| {
            file.write_all(b"half of")?;
            Err(std::io::Error::other("the disk is full"))
        });
        let text = error.unwrap_err().to_string();
        assert!(text.contains("cannot write") && text.contains("the disk is full"), "{text}");
        assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), names()), ("two", 1));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
            let plain = folder.path().join("plain");
            std::fs::write(&plain, "").unwrap();
            assert_eq!(mode(&path), mode(&plain), "permissions are those of any new file");
        }
    }

    /// The program's own files are read back by the crate that the format comes from.
    #[test]
    fn written_tensors_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("y.safetensors");
        let (x, ids) = ([1.0f32, -2.0, f32::NAN], [7u32, 8]);
        let tensors = vec![
            ("ids", view_ids(&[2], &ids).unwrap()),
            ("half", view(&[1, 1], &[half::f16::ONE]).unwrap()),
            ("x", view(&[3, 1], &x).unwrap()),
        ];
        let notes = HashMap::from([("layer".to_string(), "3".to_string())]);
        write(&path, tensors, Some(notes)).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let read = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("x").unwrap().shape(), [3, 1]);
        assert_eq!(read.tensor("x").unwrap().data(), bytemuck::cast_slice::<f32, u8>(&x));
        assert_eq!(read.tensor("ids").unwrap().data(), bytemuck::cast_slice::<u32, u8>(&ids));
        assert_eq!(read.tensor("half").unwrap().dtype(), DiskDtype::F16);
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.note("layer"), Some("3"));
    }
}
