//! The errors of the benches.

/// An error of the library, the driver or cuBLAS. Its message names the failed step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call of the library failed.
    #[error(transparent)]
    Library(#[from] moe_kernels::Error),
    /// A call of the driver by the benches failed.
    #[error("cannot {doing}: {source}")]
    Driver {
        /// The failed step.
        doing: &'static str,
        /// The driver's error.
        source: cudarc::driver::DriverError,
    },
    /// A call of cuBLAS failed.
    #[error("cuBLAS cannot {doing}: {source}")]
    Cublas {
        /// The failed step.
        doing: &'static str,
        /// The error of cuBLAS.
        source: cudarc::cublas::result::CublasError,
    },
}

/// `Result` with the benches' [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Converts errors of cudarc's driver, for `map_err`.
pub(crate) fn driver(doing: &'static str) -> impl Fn(cudarc::driver::DriverError) -> Error {
    move |source| Error::Driver { doing, source }
}

/// Converts errors of cuBLAS, for `map_err`.
pub(crate) fn cublas(doing: &'static str) -> impl Fn(cudarc::cublas::result::CublasError) -> Error {
    move |source| Error::Cublas { doing, source }
}
