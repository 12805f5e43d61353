//! A CUDA device: its context, the images loaded into it, and the one launch function.
//!
//! This file alone calls the driver; everything above works with views.

use std::ffi::{CStr, CString, c_void};
use std::mem::{size_of_val, transmute};
use std::ptr::{from_ref, null_mut};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::images::{IMAGES, Image, TOOLKIT};
use crate::kernels::{Entry, KERNELS};

pub(crate) use crate::buffer::{
    alloc, check_aligned, check_context, optional, reads, upload, vector_rows, writes,
};
pub(crate) use crate::kernels::Kernel;
pub use cudarc::driver::sys::{CUdeviceptr, CUstream};

/// More than any kernel takes.
const MAX_ARGUMENTS: usize = 16;

/// The shape of a launch: blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

/// One argument of a kernel: where the host has it, and its size.
#[derive(Clone, Copy)]
pub(crate) struct Argument {
    value: *const c_void,
    size: usize,
}

impl Argument {
    pub(crate) fn of<T: bytemuck::Pod>(value: &T) -> Self {
        Self { value: from_ref(value).cast(), size: size_of_val(value) }
    }
}

/// A function of a loaded image.
struct Function {
    handle: sys::CUfunction,
    /// Bytes of each parameter; `None` where the driver is too old to tell.
    parameters: Option<Vec<usize>>,
}

// SAFETY: a CUfunction is a handle that every thread may use, and modules are never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// An image as the driver has it.
struct Module(sys::CUmodule);

// SAFETY: a CUmodule is a handle that every thread may use, and modules are never unloaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

struct Inner {
    context: Arc<CudaContext>,
    capability: (u32, u32),
    /// Bytes of shared memory that a block may have when its kernel opts in.
    max_shared_bytes: u32,
    modules: Vec<OnceLock<Module>>,
    loading: Mutex<()>,
    functions: [[OnceLock<Function>; DType::ALL.len()]; KERNELS.len()],
}

/// A CUDA device with this crate's kernels.
///
/// Made from the caller's context; cheap to clone. Images load on first use of an operation, once
/// per `Device` and kernel file, and stay loaded as long as the context lives, so that a captured
/// graph stays good whatever is dropped. Make one `Device` per context and keep it. Streams and
/// buffers of a call belong to that same `CudaContext`: cudarc orders work within one alone.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

impl Device {
    /// The device of a context. Loads nothing yet.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver does not tell the device's attributes.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which: Attribute| -> Result<u32> {
            let value = context.attribute(which).map_err(driver_error("Device::new"))?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let max_shared_bytes =
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self {
            inner: Arc::new(Inner {
                context: context.clone(),
                capability: (major, minor),
                max_shared_bytes,
                modules: IMAGES.iter().map(|_| OnceLock::new()).collect(),
                loading: Mutex::new(()),
                functions: Default::default(),
            }),
        })
    }

    /// The context that this device was made from.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> (u32, u32) {
        self.inner.capability
    }

    /// Loads every kernel that a layer with elements of `dtype` may launch, those for its f32 logits among
    /// them, so that later calls load nothing. Call it before a stream capture, in which nothing may be loaded.
    /// Kernels for other compute capabilities than the device's are left out.
    ///
    /// # Errors
    /// [`Error::KernelsNotBuilt`], [`Error::UnsupportedDevice`], [`Error::DriverTooOld`], or [`Error::Driver`].
    pub fn warm_up(&self, dtype: DType) -> Result<()> {
        for entry in KERNELS.iter().filter(|entry| entry.is_for(self.inner.capability)) {
            for dtype in entry.of_layer(dtype) {
                match self.function(entry.kernel, dtype) {
                    Err(error) if !entry.may_be_missing(&error) => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Enqueues one kernel on `stream`; the only launch of this crate.
    ///
    /// # Safety
    /// `arguments` are the kernel's parameters in order, each of the type that its signature in
    /// kernels/ gives; the device memory they point to is valid for what the kernel does with it,
    /// until the kernel has run; `stream` is a stream of this device's context.
    pub(crate) unsafe fn launch(
        &self,
        stream: CUstream,
        kernel: Kernel,
        dtype: DType,
        launch: Launch,
        arguments: &[Argument],
    ) -> Result<()> {
        let symbol = || kernel.entry().symbol(dtype);
        // Any thread may call, with any context current. This also reports what cudarc has noted of
        // failed waits on this stream.
        self.inner.context.bind_to_thread().map_err(|error| driver_error(&symbol())(error))?;
        let function = self.function(kernel, dtype)?;
        check_arguments(&symbol, function.parameters.as_deref(), arguments)?;
        let mut values = [null_mut(); MAX_ARGUMENTS];
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = argument.value.cast_mut();
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream,
            attrs: null_mut(),
            numAttrs: 0,
        };
        // SAFETY: the handle is of a module that stays loaded; `values` has an entry for each
        // parameter, which the driver copies before it returns; the rest is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, function.handle, values.as_mut_ptr(), null_mut()) }
            .result()
            .map_err(|error| driver_error(&symbol())(error))
    }

    /// The driver's function for a kernel, loaded on first use.
    fn function(&self, kernel: Kernel, dtype: DType) -> Result<&Function> {
        let entry = kernel.entry();
        let slot = &self.inner.functions[kernel as usize][entry.column(dtype)];
        if let Some(function) = slot.get() {
            return Ok(function);
        }
        self.inner.context.bind_to_thread().map_err(driver_error("Device"))?;
        let function = self.load_function(entry, dtype)?;
        Ok(slot.get_or_init(|| function))
    }

    fn load_function(&self, entry: &Entry, dtype: DType) -> Result<Function> {
        let name = entry.symbol(dtype);
        let missing = || Error::KernelsNotBuilt { kernel: name.clone() };
        let index =
            IMAGES.iter().position(|image| image.name == entry.image).ok_or_else(missing)?;
        let module = self.module(index)?;
        let c_name = CString::new(name.as_str()).map_err(|_| missing())?;
        // SAFETY: the module stays loaded.
        let handle = match unsafe { result::module::get_function(module, c_name) } {
            Ok(handle) => handle,
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => return Err(missing()),
            // Where modules load lazily, this is what loads the image.
            Err(error) => return Err(load_error(&IMAGES[index], self.inner.capability, error)),
        };
        self.allow_shared_memory(handle).map_err(driver_error(&name))?;
        if entry.prefers_shared_memory() {
            prefer_shared_memory(handle).map_err(driver_error(&name))?;
        }
        Ok(Function { handle, parameters: parameter_sizes(handle) })
    }

    fn module(&self, index: usize) -> Result<sys::CUmodule> {
        let image: &Image = &IMAGES[index];
        let slot = &self.inner.modules[index];
        // One thread at a time, so that an image is loaded once.
        let _loading = self.inner.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = slot.get() {
            return Ok(module.0);
        }
        // SAFETY: the image is a fat binary or zero-terminated PTX, aligned and static.
        let module = unsafe { result::module::load_data(image.bytes.as_ptr().cast()) }
            .map_err(|error| load_error(image, self.inner.capability, error))?;
        Ok(slot.get_or_init(|| Module(module)).0)
    }

    /// Over 48 KiB of dynamic shared memory is for kernels that ask for it. Asking costs nothing, and
    /// asking here keeps launches free of it, as a capture needs.
    fn allow_shared_memory(
        &self,
        function: sys::CUfunction,
    ) -> std::result::Result<(), DriverError> {
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
        let dynamic_bytes =
            i32::try_from(self.inner.max_shared_bytes).unwrap_or(i32::MAX) - static_bytes;
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
}

/// Asks for as much of the multiprocessor's memory as it can share among blocks. The driver takes it as a hint.
fn prefer_shared_memory(function: sys::CUfunction) -> std::result::Result<(), DriverError> {
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

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.inner.capability;
        write!(
            f,
            "Device(ordinal {}, compute capability {major}.{minor})",
            self.inner.context.ordinal()
        )
    }
}

/// A kernel file of this binary, as [`kernel_files`] lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFile {
    /// The stem of the file in kernels/.
    pub name: &'static str,
    /// What it was compiled for, as in `sm_80 sm_90 compute_90`; empty without nvcc.
    pub architectures: &'static str,
    /// Bytes in this binary.
    pub bytes: usize,
}

/// What was compiled into this binary.
pub fn kernel_files() -> impl Iterator<Item = KernelFile> {
    IMAGES.iter().map(|image| KernelFile {
        name: image.name,
        architectures: image.architectures,
        bytes: image.bytes.len(),
    })
}

/// The CUDA toolkit that compiled the kernels of this binary, major and minor, as in (13, 0); `None` without kernels.
/// A driver for that major version at least can load them.
pub fn kernel_toolkit() -> Option<(u32, u32)> {
    TOOLKIT
}

/// The symbols of all kernels of this crate.
pub fn kernel_symbols() -> impl Iterator<Item = String> {
    KERNELS.iter().flat_map(|entry| entry.dtypes().iter().map(|&dtype| entry.symbol(dtype)))
}

/// Holds the stream of a call against the device of the call.
pub(crate) fn check_stream(op: &'static str, device: &Device, stream: &CudaStream) -> Result<()> {
    check_context(op, "stream", stream, device.context())
}

/// Why an image did not load.
fn load_error(image: &Image, capability: (u32, u32), error: DriverError) -> Error {
    if error.0 == sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED {
        let operation = format!("loading {}.cu, which Device::warm_up does before", image.name);
        return driver_error(&operation)(error);
    }
    refusal(image, TOOLKIT, driver_version(), capability, error.0)
        .unwrap_or_else(|| driver_error(image.name)(error))
}

/// What a driver's refusal of an image means, where it means something. A placeholder has nothing to load, whatever
/// the driver makes of it. A driver reads the machine code of its own major version's toolkits, and PTX of none that
/// is newer than itself; it says so with one of several codes.
fn refusal(
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
    let by_version = matches!(
        code,
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU
            | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | Code::CUDA_ERROR_INVALID_IMAGE
            | Code::CUDA_ERROR_INVALID_PTX
            | Code::CUDA_ERROR_INVALID_SOURCE
    );
    if let (true, Some(toolkit), Some(driver)) = (by_version, toolkit, driver) {
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

/// The CUDA version that the driver is for, major and minor.
fn driver_version() -> Option<(u32, u32)> {
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().ok()?;
    let version = u32::try_from(version).ok()?;
    Some((version / 1000, version % 1000 / 10))
}

/// Turns the driver's error into this crate's.
pub(crate) fn driver_error(operation: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| {
        let text = |answer: std::result::Result<&CStr, DriverError>| {
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

/// The sizes of a kernel's parameters, from a driver that can tell them (CUDA 12.4 and later).
fn parameter_sizes(function: sys::CUfunction) -> Option<Vec<usize>> {
    type GetParamInfo =
        unsafe extern "C" fn(sys::CUfunction, usize, *mut usize, *mut usize) -> sys::CUresult;
    let mut address = null_mut();
    // SAFETY: the name is a C string; an older driver answers that it has no such function.
    let answer = unsafe {
        sys::cuGetProcAddress_v2(c"cuFuncGetParamInfo".as_ptr(), &mut address, 12040, 0, null_mut())
    };
    if answer != sys::CUresult::CUDA_SUCCESS || address.is_null() {
        return None;
    }
    // SAFETY: this is the signature of cuFuncGetParamInfo since CUDA 12.4.
    let get = unsafe { transmute::<*mut c_void, GetParamInfo>(address) };
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the handle is of a module that stays loaded; past the last parameter it errs.
        if unsafe { get(function, sizes.len(), &mut offset, &mut size) }
            != sys::CUresult::CUDA_SUCCESS
        {
            return Some(sizes);
        }
        sizes.push(size);
    }
}

/// Holds arguments against what the driver says of the kernel, if it says anything.
fn check_arguments(
    symbol: &dyn Fn() -> String,
    parameters: Option<&[usize]>,
    arguments: &[Argument],
) -> Result<()> {
    let got = |index: usize| arguments.get(index).map_or(0, |argument| argument.size);
    if arguments.len() > MAX_ARGUMENTS {
        let (index, got) = (MAX_ARGUMENTS, got(MAX_ARGUMENTS));
        return Err(Error::ArgumentSize { kernel: symbol(), index, wanted: 0, got });
    }
    let Some(parameters) = parameters else { return Ok(()) };
    for index in 0..parameters.len().max(arguments.len()) {
        let (wanted, got) = (parameters.get(index).copied().unwrap_or(0), got(index));
        if wanted != got {
            return Err(Error::ArgumentSize { kernel: symbol(), index, wanted, got });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_does_not_load() {
        let image = |architectures| Image { name: "route", architectures, bytes: &[] };
        let current = Some((13, 0));
        let error =
            |architectures, code| refusal(&image(architectures), current, current, (7, 5), code);
        let no_binary = sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU;
        assert!(matches!(error("", no_binary), Some(Error::KernelsNotBuilt { .. })));
        let old = error("sm_80 sm_90", no_binary).unwrap();
        let told = old.to_string();
        assert!(matches!(old, Error::UnsupportedDevice { major: 7, minor: 5, .. }));
        assert!(told.contains("7.5") && told.contains("sm_80 sm_90"), "{told}");
        assert_eq!(error("sm_80 sm_90", sys::CUresult::CUDA_ERROR_INVALID_IMAGE), None);
    }

    #[test]
    fn a_driver_that_is_older_than_the_toolkit() {
        use sys::CUresult as Code;
        let image = Image { name: "route", architectures: "sm_90 compute_90", bytes: &[] };
        let error =
            |driver, toolkit, code| refusal(&image, Some(toolkit), Some(driver), (9, 0), code);
        for code in [
            Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
            Code::CUDA_ERROR_INVALID_IMAGE,
            Code::CUDA_ERROR_NO_BINARY_FOR_GPU,
        ] {
            let (driver, toolkit) = ((12, 4), (13, 0));
            let old = error(driver, toolkit, code).unwrap();
            assert_eq!(old, Error::DriverTooOld { image: "route", driver, toolkit });
            let told = old.to_string();
            assert!(told.contains("CUDA 12.4") && told.contains("nvcc 13.0"), "{told}");
        }
        // Machine code needs the major version alone, PTX the minor one too.
        let (driver, toolkit) = ((12, 2), (12, 8));
        let ptx = error(driver, toolkit, Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        assert!(matches!(ptx, Some(Error::DriverTooOld { .. })), "{ptx:?}");
        let code = error(driver, toolkit, Code::CUDA_ERROR_NO_BINARY_FOR_GPU);
        assert!(matches!(code, Some(Error::UnsupportedDevice { .. })), "{code:?}");
        assert_eq!(error((13, 0), (13, 0), Code::CUDA_ERROR_INVALID_IMAGE), None);
        assert_eq!(error((12, 4), (13, 0), Code::CUDA_ERROR_OUT_OF_MEMORY), None);
    }

    #[test]
    fn arguments_are_held_against_parameters() {
        let (pointer, number) = (0u64, 0i32);
        let arguments = [Argument::of(&pointer), Argument::of(&number)];
        let check =
            |parameters: &[usize]| check_arguments(&|| "k".into(), Some(parameters), &arguments);
        assert!(check(&[8, 4]).is_ok());
        assert!(matches!(
            check(&[8, 8]),
            Err(Error::ArgumentSize { index: 1, wanted: 8, got: 4, .. })
        ));
        assert!(matches!(check(&[8]), Err(Error::ArgumentSize { index: 1, wanted: 0, .. })));
        assert!(matches!(check(&[8, 4, 4]), Err(Error::ArgumentSize { index: 2, got: 0, .. })));
    }
}
