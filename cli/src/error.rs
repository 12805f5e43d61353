//! The error type of the program. A message names the file, tensor or option, the wanted value and
//! the given value. Names that come from files are escaped.

use std::path::PathBuf;

use crate::text::escaped;

/// Any of these ends the program with exit status 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", escaped(&path.display().to_string()))]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },

    /// A file has the wrong content.
    #[error("{}: {}", escaped(file), escaped(why))]
    File { file: String, why: String },

    /// A configuration or a checkpoint that cannot be read.
    #[error("{}", escaped(&.0.to_string()))]
    Model(#[from] moe_kernels_hf::Error),

    /// The requested device is not available, or failed.
    #[error("device {device}: {why}")]
    Device { device: &'static str, why: String },

    /// A program of peers failed.
    #[error("peers `{program}`: {why}")]
    Peers { program: String, why: String },

    /// A measurement failed.
    #[error(transparent)]
    Bench(moe_bench::Error),

    /// A picture could not be drawn.
    #[cfg(feature = "plots")]
    #[error("cannot draw {picture}: {why}")]
    Picture { picture: String, why: String },

    /// An option on the command line has an invalid value.
    #[error("{option}: {why}")]
    Option { option: &'static str, why: String },

    /// The library returned an error; its message names operation and argument.
    #[error(transparent)]
    Library(#[from] moe_kernels::Error),
}

impl From<moe_bench::Error> for Error {
    fn from(error: moe_bench::Error) -> Self {
        match error {
            moe_bench::Error::Library(error) => Error::Library(error),
            error => Error::Bench(error),
        }
    }
}

impl Error {
    /// Returns whether the device ran out of memory.
    pub fn is_out_of_memory(&self) -> bool {
        const OUT_OF_MEMORY: u32 = cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;
        match self {
            Error::Library(moe_kernels::Error::Driver { code, .. }) => *code == OUT_OF_MEMORY,
            Error::Bench(moe_bench::Error::Driver { source, .. }) => {
                source.0 as u32 == OUT_OF_MEMORY
            }
            _ => false,
        }
    }
}

/// `Result` with this program's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Makes an error of a failed system call on `path`, for `map_err`.
pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { action, path, source }
}
