//! A folder of files: on disk, or part of this binary.

use std::fs::{File, Metadata, OpenOptions};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result, io};
use crate::tensor_file::TensorFile;

/// The most bytes that config.json may have. Those of released models have less than 100 KB.
pub const MOST_CONFIG_BYTES: usize = 16 << 20;

/// The most bytes that an index may have: as many as the header of a safetensors file. That of a model of a trillion
/// parameters has about 20 MB.
pub const MOST_INDEX_BYTES: usize = 100_000_000;

/// The bytes of a file.
pub enum Bytes {
    Mapped(Mmap),
    Bundled(&'static [u8]),
}

impl Bytes {
    /// Maps a file; an empty one, which cannot be mapped, becomes no bytes.
    ///
    /// Links are followed wherever they lead: the Hub's cache is made of links out of the folder. What is at their end
    /// must be a file; a FIFO, a socket, a device or a folder is an error, and is not waited for.
    pub fn map(path: &Path) -> Result<Self> {
        // Opening a device may have effects of its own, so that it is looked at before.
        check_file(path, &std::fs::metadata(path).map_err(io("open", path))?)?;
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // A FIFO that took the file's place since then would be waited for.
            options.custom_flags(libc::O_NONBLOCK);
        }
        let file: File = options.open(path).map_err(io("open", path))?;
        let metadata = file.metadata().map_err(io("read", path))?;
        check_file(path, &metadata)?;
        if metadata.len() == 0 {
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

pub(crate) fn check_file(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let why = format!("is {}, wanted a file", kind(metadata));
    Err(Error::File { file: path.display().to_string(), why })
}

/// The kind of a directory entry that is not a regular file, for messages.
fn kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() {
        return "a folder";
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = metadata.file_type();
        if kind.is_fifo() {
            return "a FIFO";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    "no file"
}

/// Where the files of a checkpoint are.
#[derive(Clone)]
pub enum Folder {
    Disk(PathBuf),
    /// Part of this binary: a name for messages, and the files.
    Bundled(&'static str, &'static [(&'static str, &'static [u8])]),
}

impl Folder {
    /// The name of the folder, for messages.
    pub fn describe(&self) -> String {
        match self {
            Folder::Disk(folder) => folder.display().to_string(),
            Folder::Bundled(name, _) => format!("bundled {name}"),
        }
    }

    /// The name of a file of the folder, for messages.
    pub fn name(&self, file: &str) -> String {
        match self {
            Folder::Disk(folder) => folder.join(file).display().to_string(),
            Folder::Bundled(name, _) => format!("bundled {name}/{file}"),
        }
    }

    /// The bytes of a file, or nothing where there is no such file.
    pub fn find(&self, file: &str) -> Result<Option<Bytes>> {
        match self {
            Folder::Disk(folder) => {
                let path = folder.join(file);
                match path.try_exists() {
                    Ok(true) => Bytes::map(&path).map(Some),
                    Ok(false) => Ok(None),
                    Err(error) => Err(io("read", path)(error)),
                }
            }
            Folder::Bundled(_, files) => Ok(files
                .iter()
                .find(|(name, _)| *name == file)
                .map(|(_, bytes)| Bytes::Bundled(bytes))),
        }
    }

    /// The same of a text, which is read whole and so may have `most` bytes and no more.
    pub fn find_text(&self, file: &str, most: usize) -> Result<Option<Bytes>> {
        let found = self.find(file)?;
        let len = found.as_ref().map_or(0, |bytes| bytes.as_slice().len());
        if len > most {
            return Err(self.error(file, format!("has {len} bytes, wanted at most {most}")));
        }
        Ok(found)
    }

    pub fn tensors(&self, file: &str) -> Result<TensorFile> {
        let bytes = self.find(file)?.ok_or_else(|| self.error(file, "no such file".into()))?;
        TensorFile::new(self.name(file), bytes)
    }

    pub fn error(&self, file: &str, why: String) -> Error {
        Error::File { file: self.name(file), why }
    }

    /// The names of all that is in the folder, in alphabetical order; none where the folder cannot be listed.
    pub fn list(&self) -> Vec<String> {
        let mut names: Vec<String> = match self {
            Folder::Disk(folder) => std::fs::read_dir(folder)
                .into_iter()
                .flatten()
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
            Folder::Bundled(_, files) => files.iter().map(|(name, _)| name.to_string()).collect(),
        };
        names.sort_unstable();
        names
    }
}
