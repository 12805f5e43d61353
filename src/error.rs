//! The error type of the crate, and the checks of lengths and dimensions that return it.

/// An error of this crate. Shapes and buffers are checked before any kernel is launched.
///
/// Each message names the operation and the argument, the value that was wanted and the one given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer does not have the length that the shape requires.
    #[error("{op}: `{argument}` has {got} elements, wanted {wanted}")]
    Length {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
        /// Elements that the shape requires.
        wanted: usize,
        /// Elements that the buffer has.
        got: usize,
    },

    /// A dimension or an option is outside the range that the operation supports.
    #[error("{op}: `{argument}` is {got}, wanted {wanted}")]
    Unsupported {
        /// The operation, or the type that was to be constructed.
        op: &'static str,
        /// The argument or field.
        argument: &'static str,
        /// The accepted values, in words.
        wanted: String,
        /// The given value.
        got: String,
    },

    /// The address of a buffer is not aligned for its element type.
    #[error("{op}: `{argument}` starts at address {got:#x}, wanted a multiple of {wanted} bytes")]
    Alignment {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
        /// The alignment in bytes.
        wanted: usize,
        /// The address.
        got: u64,
    },

    /// A stream, a buffer or a plan belongs to another `CudaContext` than the device or the stream
    /// of the call. cudarc orders work within one `CudaContext` only, so two contexts of the same
    /// GPU must not be mixed either.
    #[error("{op}: `{argument}` belongs to another CudaContext than the call's device and stream")]
    Context {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
    },

    /// Two arguments of one call contradict each other, or an argument contradicts the
    /// configuration.
    #[error("{op}: {why}")]
    Mismatch {
        /// The operation.
        op: &'static str,
        /// The contradiction, as a sentence.
        why: String,
    },

    /// An optional argument is given but not enabled in the configuration, or is missing but
    /// required by it.
    #[error("{op}: `{argument}` {}", presence(*given))]
    Presence {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
        /// Whether the argument is given.
        given: bool,
    },

    /// The crate was built without nvcc, so it has no kernels for a real GPU.
    #[error(
        "kernel {kernel} is not in this binary: moe-kernels was built without nvcc; install the CUDA \
         toolkit (or run scripts/cuda-toolchain), or set NVCC, and build again"
    )]
    KernelsNotBuilt {
        /// The kernel's symbol.
        kernel: String,
    },

    /// The binary has kernels, but none for the compute capability of this GPU.
    #[error(
        "{image}: no code for compute capability {major}.{minor} in this binary, which was built for {built}"
    )]
    UnsupportedDevice {
        /// The image, named after its kernel file.
        image: &'static str,
        /// Compute capability, major.
        major: u32,
        /// Compute capability, minor.
        minor: u32,
        /// The architectures that the binary was built for.
        built: &'static str,
    },

    /// The driver is for an older CUDA version than the toolkit that compiled the kernels.
    #[error(
        "{image}: the driver is for CUDA {}.{}, and nvcc {}.{} compiled the kernels of this binary: update the \
         driver to one for CUDA {}.{} or newer, or build with an older toolkit",
        driver.0, driver.1, toolkit.0, toolkit.1, toolkit.0, toolkit.1
    )]
    DriverTooOld {
        /// The image, named after its kernel file.
        image: &'static str,
        /// The CUDA version that the driver is for, major and minor.
        driver: (u32, u32),
        /// The CUDA version of the toolkit, major and minor.
        toolkit: (u32, u32),
    },

    /// A kernel takes other arguments than this crate passes: the binary and its images are from
    /// different builds.
    #[error("kernel {kernel}: argument {index} has {got} bytes, the kernel takes {wanted}")]
    ArgumentSize {
        /// The kernel's symbol.
        kernel: String,
        /// Position of the argument.
        index: usize,
        /// Bytes of the kernel's parameter; 0 if it has no such parameter.
        wanted: usize,
        /// Bytes of the argument; 0 if there is no such argument.
        got: usize,
    },

    /// A call of the CUDA driver failed.
    #[error("{operation}: the CUDA driver returned {name} ({code}): {message}")]
    Driver {
        /// The operation that called the driver.
        operation: String,
        /// The driver's error code, a `CUresult`.
        code: u32,
        /// The name of the code, such as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// The driver's description.
        message: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Checks the length of a buffer against the one that the shape requires.
pub(crate) fn check_len(
    op: &'static str,
    argument: &'static str,
    got: usize,
    wanted: usize,
) -> Result<()> {
    if got == wanted { Ok(()) } else { Err(Error::Length { op, argument, wanted, got }) }
}

/// Checks that an optional argument is given exactly if the configuration enables it.
///
/// # Errors
/// [`Error::Presence`]
pub(crate) fn check_presence(
    op: &'static str,
    argument: &'static str,
    given: bool,
    enabled: bool,
) -> Result<()> {
    if given == enabled { Ok(()) } else { Err(Error::Presence { op, argument, given }) }
}

/// The second half of the message of [`Error::Presence`].
fn presence(given: bool) -> &'static str {
    match given {
        true => "is given but not enabled in the configuration",
        false => "is missing but required by the configuration",
    }
}

/// Converts a dimension to the `int` that kernels take.
pub(crate) fn int(op: &'static str, argument: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Unsupported {
        op,
        argument,
        wanted: format!("at most {}", i32::MAX),
        got: value.to_string(),
    })
}

/// The largest width of a row: the end of its last tile must fit an `int` as well.
const MAX_WIDTH: usize = 1 << 30;

/// Converts a width, at least 1, to the `int` that kernels take.
pub(crate) fn width(op: &'static str, argument: &'static str, value: usize) -> Result<i32> {
    if (1..=MAX_WIDTH).contains(&value) {
        return int(op, argument, value);
    }
    let wanted = format!("1 to {MAX_WIDTH}");
    Err(Error::Unsupported { op, argument, wanted, got: value.to_string() })
}

/// Multiplies two dimensions; returns an error if the product overflows `usize`.
pub(crate) fn product(
    op: &'static str,
    argument: &'static str,
    a: usize,
    b: usize,
) -> Result<usize> {
    a.checked_mul(b).ok_or_else(|| Error::Unsupported {
        op,
        argument,
        wanted: format!("at most {} elements", usize::MAX),
        got: format!("{a} * {b}"),
    })
}
