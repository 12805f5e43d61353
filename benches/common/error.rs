//! What can go wrong while something is measured.

/// Each message says what was being done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library refused a call.
    #[error(transparent)]
    Library(#[from] moe_kernels::Error),
    /// The driver refused something that the benches ask of it themselves.
    #[error("cannot {doing}: {source}")]
    Driver {
        /// What was asked.
        doing: &'static str,
        /// The driver's answer.
        source: cudarc::driver::DriverError,
    },
    /// cuBLAS refused something.
    #[error("cuBLAS cannot {doing}: {source}")]
    Cublas {
        /// What was asked.
        doing: &'static str,
        /// The library's answer.
        source: cudarc::cublas::result::CublasError,
    },
}

/// `Result` with the benches' [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// For `map_err` on calls to cudarc's driver.
pub(crate) fn driver(doing: &'static str) -> impl Fn(cudarc::driver::DriverError) -> Error {
    move |source| Error::Driver { doing, source }
}

/// For `map_err` on calls to cuBLAS.
pub(crate) fn cublas(doing: &'static str) -> impl Fn(cudarc::cublas::result::CublasError) -> Error {
    move |source| Error::Cublas { doing, source }
}
