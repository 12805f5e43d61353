//! The files of a checkpoint: in a folder on disk, or in memory.

use std::path::{Path, PathBuf};

use crate::bytes::Bytes;
use crate::error::{Error, Result, io};
use crate::tensor_file::TensorFile;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The largest config.json that is read. Those of released models have less than 100 KB.
pub(crate) const MAX_CONFIG_BYTES: usize = 16 << 20;

/// The largest index that is read: as long as the longest header of a safetensors file. The index
/// of a model of a trillion parameters has about 20 MB.
pub(crate) const MAX_INDEX_BYTES: usize = 100_000_000;

/// The folder of a checkpoint.
#[derive(Debug, Clone)]
pub enum Folder {
    /// On disk.
    Disk(PathBuf),
    /// In memory, as for files that are part of a binary.
    Memory {
        /// The name of the folder in messages.
        name: String,
        /// The names of the files and their bytes.
        files: &'static [(&'static str, &'static [u8])],
    },
}

impl From<&Path> for Folder {
    fn from(path: &Path) -> Self {
        Folder::Disk(path.into())
    }
}

impl From<PathBuf> for Folder {
    fn from(path: PathBuf) -> Self {
        Folder::Disk(path)
    }
}

impl From<&str> for Folder {
    fn from(path: &str) -> Self {
        Folder::Disk(path.into())
    }
}

impl Folder {
    /// Opens a safetensors file of the folder.
    ///
    /// # Errors
    /// Those of [`TensorFile::open`]; [`Error::File`] for a missing file.
    pub fn tensors(&self, file: &str) -> Result<TensorFile> {
        let bytes = self.find(file)?.ok_or_else(|| self.error(file, "no such file".into()))?;
        TensorFile::new(self.name(file), bytes)
    }

    /// The name of the folder, for messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Folder::Disk(folder) => folder.display().to_string(),
            Folder::Memory { name, .. } => name.clone(),
        }
    }

    /// The name of a file of the folder, for messages.
    pub(crate) fn name(&self, file: &str) -> String {
        match self {
            Folder::Disk(folder) => folder.join(file).display().to_string(),
            Folder::Memory { name, .. } => format!("{name}/{file}"),
        }
    }

    /// The bytes of a file; `None` if there is no such file.
    pub(crate) fn find(&self, file: &str) -> Result<Option<Bytes>> {
        match self {
            Folder::Disk(folder) => {
                let path = folder.join(file);
                match path.try_exists() {
                    Ok(true) => Bytes::map(&path).map(Some),
                    Ok(false) => Ok(None),
                    Err(error) => Err(io("read", path)(error)),
                }
            }
            Folder::Memory { files, .. } => Ok(files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, bytes)| Bytes::Static(bytes))),
        }
    }

    /// The bytes of a text file of at most `max` bytes: texts are parsed whole.
    pub(crate) fn find_text(&self, file: &str, max: usize) -> Result<Option<Bytes>> {
        let found = self.find(file)?;
        let len = found.as_ref().map_or(0, |bytes| bytes.as_slice().len());
        if len > max {
            return Err(self.error(file, format!("has {len} bytes, wanted at most {max}")));
        }
        Ok(found)
    }

    pub(crate) fn error(&self, file: &str, why: String) -> Error {
        Error::File { file: self.name(file), why }
    }

    /// The names of all entries of the folder, sorted; empty if the folder cannot be listed.
    pub(crate) fn list(&self) -> Vec<String> {
        let mut names: Vec<String> = match self {
            Folder::Disk(folder) => std::fs::read_dir(folder)
                .into_iter()
                .flatten()
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
            Folder::Memory { files, .. } => {
                files.iter().map(|(name, _)| name.to_string()).collect()
            }
        };
        names.sort_unstable();
        names
    }
}
