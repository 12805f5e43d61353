//! Output files: safetensors, and any file that is written whole or not at all.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use moe_kernels::{DType, Dtype};
use safetensors::Dtype as DiskDtype;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};

use crate::error::{Error, Result, io};

/// A tensor to be written.
///
/// # Errors
/// A length other than the shape's.
pub fn view<'v, D: Dtype>(shape: &[usize], values: &'v [D]) -> Result<TensorView<'v>> {
    let dtype = match D::DTYPE {
        DType::F32 => DiskDtype::F32,
        DType::F16 => DiskDtype::F16,
        DType::BF16 => DiskDtype::BF16,
    };
    raw_view(dtype, shape, bytemuck::cast_slice(values))
}

/// Ids to be written as i32: they are below 2^31, so that the bits are the same.
pub fn view_ids<'v>(shape: &[usize], values: &'v [u32]) -> Result<TensorView<'v>> {
    raw_view(DiskDtype::I32, shape, bytemuck::cast_slice(values))
}

fn raw_view<'v>(dtype: DiskDtype, shape: &[usize], bytes: &'v [u8]) -> Result<TensorView<'v>> {
    TensorView::new(dtype, shape.to_vec(), bytes).map_err(|error| Error::File {
        file: "a tensor to be written".into(),
        why: error.to_string(),
    })
}

/// Writes tensors and the header's free-form table. The file is written whole or not at all.
pub fn write(
    path: &Path,
    mut tensors: Vec<(&str, TensorView<'_>)>,
    notes: Option<HashMap<String, String>>,
) -> Result<()> {
    // The format requires the widest type first, so that every tensor is aligned.
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

/// Writes a file whole or not at all: `write` fills a temporary file in the same folder, which is
/// then renamed.
///
/// The temporary file is new, has a random name and the extension of `path`, which may determine
/// the format, and is removed on any error.
///
/// # Errors
/// An existing path that is not a regular file, such as a device or a FIFO, is an error and stays
/// unchanged.
pub fn replace(
    path: &Path,
    write: impl FnOnce(&Path, &mut std::fs::File) -> std::io::Result<()>,
) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        let why = "is not a regular file, wanted a file".into();
        return Err(Error::File { file: path.display().to_string(), why });
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
            // Less the user's mask, as for any new file.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let mut temporary = builder.tempfile_in(folder)?;
        let name = temporary.path().to_path_buf();
        write(&name, temporary.as_file_mut())?;
        temporary.as_file().sync_all()?;
        temporary.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use moe_kernels_hf::TensorFile;
    use safetensors::SafeTensors;

    use super::*;

    /// A failed write leaves the old file and no other.
    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("y.txt");
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        let mut temporaries = std::collections::BTreeSet::new();
        for text in ["one", "two"] {
            replace(&path, |name, file| {
                assert_eq!(name.parent(), Some(folder.path()));
                assert_eq!(name.extension(), path.extension());
                temporaries.insert(name.to_path_buf());
                file.write_all(text.as_bytes())
            })
            .unwrap();
            assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), names()), (text, 1));
        }
        assert_eq!(temporaries.len(), 2, "{temporaries:?}");
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

    /// The safetensors crate and the loader read what `write` writes.
    #[test]
    fn written_tensors_are_read_back() {
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
