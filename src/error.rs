//! The one error type of the crate.

/// What can go wrong. Shapes and buffers are checked before anything is launched.
///
/// Every message names the operation, the argument, what was wanted and what came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer does not have the length that the shape asks for.
    #[error("{op}: `{argument}` has {got} elements, wanted {wanted}")]
    Length {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
        /// Elements that the shape asks for.
        wanted: usize,
        /// Elements that the buffer has.
        got: usize,
    },

    /// A dimension or an option is outside what the operation supports.
    #[error("{op}: `{argument}` is {got}, wanted {wanted}")]
    Unsupported {
        /// The operation, or the type that was being built.
        op: &'static str,
        /// The argument or field.
        argument: &'static str,
        /// What would have been accepted, in words.
        wanted: String,
        /// What came.
        got: String,
    },

    /// A buffer does not start at the boundary that its element type needs.
    #[error("{op}: `{argument}` starts at address {got:#x}, wanted a multiple of {wanted} bytes")]
    Alignment {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
        /// Bytes that the address must be a multiple of.
        wanted: usize,
        /// The address.
        got: u64,
    },

    /// A stream, a buffer or a plan is of another `CudaContext` than the device or the stream of the call. cudarc
    /// orders work within one `CudaContext` alone, so that two of the same GPU do not mix either.
    #[error("{op}: `{argument}` belongs to another CudaContext than the call's device and stream")]
    Context {
        /// The operation.
        op: &'static str,
        /// The argument of the operation.
        argument: &'static str,
    },

    /// Two arguments of one call belong together and do not.
    #[error("{op}: {why}")]
    Mismatch {
        /// The operation.
        op: &'static str,
        /// What does not fit, as a sentence.
        why: String,
    },

    /// The crate was built without nvcc, so a real GPU has no kernels to run.
    #[error(
        "kernel {kernel} is not in this binary: moe-kernels was built without nvcc; install the CUDA \
         toolkit (or run scripts/cuda-toolchain), or set NVCC, and build again"
    )]
    KernelsNotBuilt {
        /// The kernel's symbol.
        kernel: String,
    },

    /// The binary has kernels, but none for this GPU.
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
        /// The architectures that were built.
        built: &'static str,
    },

    /// The driver is for an older CUDA version than the toolkit that compiled the kernels of this binary.
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
        /// That of the toolkit.
        toolkit: (u32, u32),
    },

    /// The driver's kernel takes other arguments than this crate hands over: a binary and its images
    /// from different builds.
    #[error("kernel {kernel}: argument {index} has {got} bytes, the kernel takes {wanted}")]
    ArgumentSize {
        /// The kernel's symbol.
        kernel: String,
        /// Position of the argument.
        index: usize,
        /// Bytes that the kernel takes there, 0 for none.
        wanted: usize,
        /// Bytes that were to be handed over.
        got: usize,
    },

    /// The CUDA driver refused a call.
    #[error("{operation}: the CUDA driver says {name} ({code}): {message}")]
    Driver {
        /// What was being done.
        operation: String,
        /// The driver's number, a `CUresult`.
        code: u32,
        /// The driver's name for it, as in `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// The driver's description.
        message: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Holds a length against the one that the shape asks for.
pub(crate) fn check_len(
    op: &'static str,
    argument: &'static str,
    got: usize,
    wanted: usize,
) -> Result<()> {
    if got == wanted { Ok(()) } else { Err(Error::Length { op, argument, wanted, got }) }
}

/// A dimension as the `int` that kernels take.
pub(crate) fn int(op: &'static str, argument: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::Unsupported {
        op,
        argument,
        wanted: format!("at most {}", i32::MAX),
        got: value.to_string(),
    })
}

/// The most that a width may be: what is past the last tile of it still has to fit an `int`.
const MAX_WIDTH: usize = 1 << 30;

/// A width, of which there has to be some, as the `int` that kernels take.
pub(crate) fn width(op: &'static str, argument: &'static str, value: usize) -> Result<i32> {
    if (1..=MAX_WIDTH).contains(&value) {
        return int(op, argument, value);
    }
    let wanted = format!("1 to {MAX_WIDTH}");
    Err(Error::Unsupported { op, argument, wanted, got: value.to_string() })
}

/// The product of two dimensions, or an error where `usize` ends.
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
