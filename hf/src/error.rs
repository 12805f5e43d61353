//! The error type of the crate.

use std::path::PathBuf;

/// Errors of reading a configuration or a checkpoint.
///
/// Names that come from files appear as they are. A program that prints to a terminal escapes
/// control characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key of config.json has an invalid value, or one that no layer of moe-kernels computes.
    #[error("`{key}` is {got}, wanted {wanted}")]
    Config {
        /// The key with its path: `text_config.num_experts`.
        key: String,
        /// Its value, or what is wrong with it.
        got: String,
        /// The accepted values.
        wanted: String,
    },

    /// The operating system refused an operation on a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation: open, read, map.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },

    /// A file is missing or invalid, or has too few or too many tensors.
    #[error("{file}: {why}")]
    File {
        /// The file or folder.
        file: String,
        /// The reason.
        why: String,
    },

    /// A tensor has another type, shape or value than the block needs.
    #[error("{file}: tensor `{tensor}` is {got}, wanted {wanted}")]
    Tensor {
        /// The file.
        file: String,
        /// The name of the tensor.
        tensor: String,
        /// Its type, shape or value.
        got: String,
        /// The accepted ones.
        wanted: String,
    },

    /// A slice does not have the length that the shape requires.
    #[error("{op}: `{argument}` has {got} elements, wanted {wanted}")]
    Length {
        /// The function.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its elements.
        got: usize,
        /// The elements that the shape requires.
        wanted: usize,
    },

    /// An argument is out of range.
    #[error("{op}: `{argument}` is {got}, wanted {wanted}")]
    Unsupported {
        /// The function.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its value.
        got: String,
        /// The accepted values.
        wanted: String,
    },

    /// moe-kernels rejects the configuration.
    #[error(transparent)]
    Library(#[from] moe_kernels::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// For `map_err`: the operation and the path.
pub(crate) fn io(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io { action, path, source }
}
