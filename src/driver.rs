//! Calls of the CUDA driver that cudarc's safe interface lacks, and the driver's errors.

use std::ffi::{CStr, c_void};
use std::mem::transmute;
use std::ptr::null_mut;

use cudarc::driver::{DriverError, sys};

use crate::error::Error;
use crate::images::{Image, TOOLKIT};

pub use cudarc::driver::sys::{CUdeviceptr, CUstream};

/// Converts an error of the driver to one of this crate.
pub(crate) fn driver_error(operation: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| {
        let text = |answer: Result<&CStr, DriverError>| {
            answer.map_or_else(|_| "unknown".into(), |text| text.to_string_lossy().into_owned())
        };
        Error::Driver {
            operation: operation.into(),
            code: error.0 as u32,
            name: text(error.error_name()),
            message: text(error.error_string()),
        }
    }
}

/// The error of an image that could not be loaded for a device of this compute capability.
pub(crate) fn load_error(image: &Image, capability: (u32, u32), error: DriverError) -> Error {
    if error.0 == sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED {
        let operation =
            format!("loading {}.cu during a capture: call Device::warm_up before it", image.name);
        return driver_error(&operation)(error);
    }
    classify(image, TOOLKIT, driver_version(), capability, error.0)
        .unwrap_or_else(|| driver_error(image.name)(error))
}

/// The specific error for an image that the driver rejected with `code`, or `None` if there is
/// none.
///
/// A placeholder contains no kernels, so the code is ignored. A driver loads machine code of
/// toolkits up to its own major version, and PTX of toolkits up to its own version; it reports a
/// newer one with any of several codes.
fn classify(
    image: &Image,
    toolkit: Option<(u32, u32)>,
    driver: Option<(u32, u32)>,
    (major, minor): (u32, u32),
    code: sys::CUresult,
) -> Option<Error> {
    use sys::CUresult as Code;
    if image.architectures.is_empty() {
        return Some(Error::KernelsNotBuilt { kernel: format!("{}.cu", image.name) });
    }
    let may_be_version = matches!(
        code,
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU
            | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | Code::CUDA_ERROR_INVALID_IMAGE
            | Code::CUDA_ERROR_INVALID_PTX
            | Code::CUDA_ERROR_INVALID_SOURCE
    );
    if let (true, Some(toolkit), Some(driver)) = (may_be_version, toolkit, driver) {
        let ptx_alone = code == Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
        if driver.0 < toolkit.0 || ptx_alone && driver < toolkit {
            return Some(Error::DriverTooOld { image: image.name, driver, toolkit });
        }
    }
    match code {
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            let built = image.architectures;
            Some(Error::UnsupportedDevice { image: image.name, major, minor, built })
        }
        _ => None,
    }
}

/// The CUDA version that the driver supports, major and minor.
fn driver_version() -> Option<(u32, u32)> {
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().ok()?;
    let version = u32::try_from(version).ok()?;
    Some((version / 1000, version % 1000 / 10))
}

/// The sizes of a kernel's parameters in bytes; `None` if the driver is older than CUDA 12.4, which
/// introduced the query.
pub(crate) fn parameter_sizes(function: sys::CUfunction) -> Option<Vec<usize>> {
    type GetParamInfo =
        unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> sys::CUresult;
    let mut address = null_mut();
    // SAFETY: the name is a C string; an older driver returns an error.
    let result = unsafe {
        sys::cuGetProcAddress_v2(c"cuFuncGetParamInfo".as_ptr(), &mut address, 12040, 0, null_mut())
    };
    if result != sys::CUresult::CUDA_SUCCESS || address.is_null() {
        return None;
    }
    // SAFETY: this is the signature of cuFuncGetParamInfo since CUDA 12.4.
    let get = unsafe { transmute::<*mut c_void, GetParamInfo>(address) };
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the handle is of a module that stays loaded; past the last parameter it returns
        // an error.
        if unsafe { get(function, sizes.len(), &mut offset, &mut size) }
            != sys::CUresult::CUDA_SUCCESS
        {
            return Some(sizes);
        }
        sizes.push(size);
    }
}

/// Allows a kernel the largest dynamic shared memory: that of the device less the kernel's static
/// shared memory. More than 48 KiB needs this opt-in; setting it at load time keeps it out of
/// launches, as a capture requires.
pub(crate) fn allow_shared_memory(
    function: sys::CUfunction,
    max_shared_bytes: u32,
) -> Result<(), DriverError> {
    use sys::CUfunction_attribute as Attribute;
    let mut static_bytes = 0;
    // SAFETY: the handle is of a module that stays loaded.
    unsafe {
        sys::cuFuncGetAttribute(
            &mut static_bytes,
            Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            function,
        )
    }
    .result()?;
    let dynamic_bytes = i32::try_from(max_shared_bytes).unwrap_or(i32::MAX) - static_bytes;
    // SAFETY: as above.
    unsafe {
        sys::cuFuncSetAttribute(
            function,
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            dynamic_bytes,
        )
    }
    .result()
}

/// Requests the largest shared memory carveout of the multiprocessor. The driver treats it as a
/// hint.
pub(crate) fn prefer_shared_memory(function: sys::CUfunction) -> Result<(), DriverError> {
    // SAFETY: the handle is of a module that stays loaded.
    unsafe {
        sys::cuFuncSetAttribute(
            function,
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
            sys::CUshared_carveout::CU_SHAREDMEM_CARVEOUT_MAX_SHARED as i32,
        )
    }
    .result()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unloadable_image_is_classified() {
        let image = |architectures| Image { name: "route", architectures, bytes: &[] };
        let current = Some((13, 0));
        let error =
            |architectures, code| classify(&image(architectures), current, current, (7, 5), code);
        let no_binary = sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU;
        assert!(matches!(error("", no_binary), Some(Error::KernelsNotBuilt { .. })));
        let old = error("sm_80 sm_90", no_binary).unwrap();
        let message = old.to_string();
        assert!(matches!(old, Error::UnsupportedDevice { major: 7, minor: 5, .. }));
        assert!(message.contains("7.5") && message.contains("sm_80 sm_90"), "{message}");
        assert_eq!(error("sm_80 sm_90", sys::CUresult::CUDA_ERROR_INVALID_IMAGE), None);
    }

    #[test]
    fn older_driver_is_reported() {
        use sys::CUresult as Code;
        let image = Image { name: "route", architectures: "sm_90 compute_90", bytes: &[] };
        let error =
            |driver, toolkit, code| classify(&image, Some(toolkit), Some(driver), (9, 0), code);
        for code in [
            Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
            Code::CUDA_ERROR_INVALID_IMAGE,
            Code::CUDA_ERROR_NO_BINARY_FOR_GPU,
        ] {
            let (driver, toolkit) = ((12, 4), (13, 0));
            let old = error(driver, toolkit, code).unwrap();
            assert_eq!(old, Error::DriverTooOld { image: "route", driver, toolkit });
            let message = old.to_string();
            assert!(message.contains("CUDA 12.4") && message.contains("nvcc 13.0"), "{message}");
        }
        // Machine code needs the same major version, PTX the same minor version as well.
        let (driver, toolkit) = ((12, 2), (12, 8));
        let ptx = error(driver, toolkit, Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        assert!(matches!(ptx, Some(Error::DriverTooOld { .. })), "{ptx:?}");
        let code = error(driver, toolkit, Code::CUDA_ERROR_NO_BINARY_FOR_GPU);
        assert!(matches!(code, Some(Error::UnsupportedDevice { .. })), "{code:?}");
        assert_eq!(error((13, 0), (13, 0), Code::CUDA_ERROR_INVALID_IMAGE), None);
        assert_eq!(error((12, 4), (13, 0), Code::CUDA_ERROR_OUT_OF_MEMORY), None);
    }
}
