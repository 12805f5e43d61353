//! The bytes of a file: mapped, or part of the binary.

use std::fs::{File, Metadata, OpenOptions};
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result, io};

/// The bytes of a file.
pub(crate) enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    /// Maps a file. An empty file, which cannot be mapped, becomes an empty slice.
    ///
    /// Links are followed wherever they lead: the Hub's cache consists of links to files outside of
    /// the folder. Their target must be a regular file. A FIFO, a socket, a device or a folder is
    /// an error; no open blocks on one.
    pub(crate) fn map(path: &Path) -> Result<Self> {
        // Opening a device may have side effects: check the kind first.
        check_file(path, &std::fs::metadata(path).map_err(io("open", path))?)?;
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // The open must not block on a FIFO that has replaced the file since the check.
            options.custom_flags(libc::O_NONBLOCK);
        }
        let file: File = options.open(path).map_err(io("open", path))?;
        let metadata = file.metadata().map_err(io("read", path))?;
        check_file(path, &metadata)?;
        if metadata.len() == 0 {
            return Ok(Bytes::Static(&[]));
        }
        // SAFETY: the mapping is read-only and private to this process. Another process that
        // shortens the file while it is being read ends this one with SIGBUS, which no program that
        // maps checkpoints can rule out; this crate writes to no file.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
        Ok(Bytes::Mapped(map))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

fn check_file(path: &Path, metadata: &Metadata) -> Result<()> {
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
    "not a regular file"
}
