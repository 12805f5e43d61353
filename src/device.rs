//! A CUDA device: its context, the images loaded into it, and the one launch function.
//!
//! Only this file and driver.rs call the driver; the others work with views.

use std::ffi::{CString, c_void};
use std::ptr::{from_ref, null_mut};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::driver::{
    allow_shared_memory, driver_error, load_error, parameter_sizes, prefer_shared_memory,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::images::{IMAGES, Image};
use crate::kernels::{Entry, KERNELS};

pub(crate) use crate::buffer::{
    alloc, check_aligned, check_context, optional, reads, vector_rows, writes,
};
pub(crate) use crate::driver::{CUdeviceptr, CUstream};
pub(crate) use crate::kernels::Kernel;

/// The geometry of a launch: blocks, threads per block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

/// A function of a loaded image.
struct Function {
    handle: sys::CUfunction,
    /// Bytes of each parameter; `None` if the driver is too old for the query.
    parameters: Option<Vec<usize>>,
}

// SAFETY: a CUfunction is a handle that every thread may use, and modules are never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// The driver's handle of a loaded image.
struct Module(sys::CUmodule);

// SAFETY: a CUmodule is a handle that every thread may use, and modules are never unloaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

struct Inner {
    context: Arc<CudaContext>,
    capability: (u32, u32),
    /// The largest shared memory of a block, in bytes, for kernels that opt in.
    max_shared_bytes: u32,
    modules: Vec<OnceLock<Module>>,
    loading: Mutex<()>,
    functions: [[OnceLock<Function>; DType::ALL.len()]; KERNELS.len()],
}

/// A CUDA device with this crate's kernels.
///
/// It is created from the caller's context and cheap to clone. Images load on the first use of an
/// operation, once per `Device` and kernel file, and stay loaded until the context is destroyed, so
/// captured graphs stay valid after the `Device` is dropped. Create one `Device` per context and
/// keep it. The streams and buffers of a call must belong to the same `CudaContext`: cudarc orders
/// work within one context only.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

impl Device {
    /// Creates the device of a context, without loading any image.
    ///
    /// # Errors
    /// [`Error::Driver`] if a query of the device's attributes fails.
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

    /// The context that this device was created from.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// The compute capability, major and minor.
    pub fn capability(&self) -> (u32, u32) {
        self.inner.capability
    }

    /// Loads every kernel that a layer with elements of `dtype` may launch, including those for f32
    /// logits, so that later calls load nothing. Call it before a stream capture, during which
    /// loading is not allowed. Kernels for other compute capabilities than the device's are
    /// skipped.
    ///
    /// # Errors
    /// [`Error::KernelsNotBuilt`], [`Error::UnsupportedDevice`], [`Error::DriverTooOld`] or
    /// [`Error::Driver`].
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

    /// Enqueues one kernel on `stream`. Every launch of this crate goes through this function.
    ///
    /// # Safety
    /// `params` is the struct of abi.h that the kernel takes as its one parameter. The device
    /// memory at its addresses is valid for the kernel's reads and writes until the kernel has
    /// finished. `stream` belongs to this device's context.
    pub(crate) unsafe fn launch<P: bytemuck::Pod>(
        &self,
        stream: CUstream,
        kernel: Kernel,
        dtype: DType,
        launch: Launch,
        params: &P,
    ) -> Result<()> {
        let symbol = || kernel.entry().symbol(dtype);
        // The calling thread may have any context current. This also returns an error that cudarc
        // has recorded for this context, such as a failed wait.
        self.inner.context.bind_to_thread().map_err(|error| driver_error(&symbol())(error))?;
        let function = self.function(kernel, dtype)?;
        check_parameters(&symbol, function.parameters.as_deref(), size_of::<P>())?;
        let mut values = [from_ref(params).cast_mut().cast::<c_void>()];
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
        // SAFETY: the handle is of a module that stays loaded; `values` has the address of the one
        // parameter, which the driver copies before it returns; the caller guarantees the rest.
        unsafe { sys::cuLaunchKernelEx(&config, function.handle, values.as_mut_ptr(), null_mut()) }
            .result()
            .map_err(|error| driver_error(&symbol())(error))
    }

    /// The driver's handle of a kernel, loaded on first use.
    fn function(&self, kernel: Kernel, dtype: DType) -> Result<&Function> {
        let entry = kernel.entry();
        let cell = &self.inner.functions[kernel as usize][entry.column(dtype)];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        self.inner.context.bind_to_thread().map_err(driver_error("Device"))?;
        let function = self.load_function(entry, dtype)?;
        Ok(cell.get_or_init(|| function))
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
            // With lazy loading, this call loads the image.
            Err(error) => return Err(load_error(&IMAGES[index], self.inner.capability, error)),
        };
        let max_shared_bytes = self.inner.max_shared_bytes;
        allow_shared_memory(handle, max_shared_bytes).map_err(driver_error(&name))?;
        if entry.prefers_shared_memory() {
            prefer_shared_memory(handle).map_err(driver_error(&name))?;
        }
        Ok(Function { handle, parameters: parameter_sizes(handle) })
    }

    fn module(&self, index: usize) -> Result<sys::CUmodule> {
        let image: &Image = &IMAGES[index];
        let cell = &self.inner.modules[index];
        // One thread at a time, so that each image is loaded once.
        let _loading = self.inner.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = cell.get() {
            return Ok(module.0);
        }
        // SAFETY: the image is a fat binary or zero-terminated PTX, aligned and static.
        let module = unsafe { result::module::load_data(image.bytes.as_ptr().cast()) }
            .map_err(|error| load_error(image, self.inner.capability, error))?;
        Ok(cell.get_or_init(|| Module(module)).0)
    }
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

/// The symbols of all kernels of this crate.
pub fn kernel_symbols() -> impl Iterator<Item = String> {
    KERNELS.iter().flat_map(|entry| entry.dtypes().iter().map(|&dtype| entry.symbol(dtype)))
}

/// Checks that a stream belongs to the context of the device.
pub(crate) fn check_stream(op: &'static str, device: &Device, stream: &CudaStream) -> Result<()> {
    check_context(op, "stream", stream, device.context())
}

/// Checks that a kernel has one parameter, of `size` bytes, if the driver knows its parameters.
fn check_parameters(
    symbol: &dyn Fn() -> String,
    parameters: Option<&[usize]>,
    size: usize,
) -> Result<()> {
    let Some(parameters) = parameters else { return Ok(()) };
    for index in 0..parameters.len().max(1) {
        let wanted = parameters.get(index).copied().unwrap_or(0);
        let got = if index == 0 { size } else { 0 };
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
    fn the_size_of_the_parameter_is_checked() {
        let check = |parameters: Option<&[usize]>| check_parameters(&|| "k".into(), parameters, 24);
        assert_eq!((check(Some(&[24])), check(None)), (Ok(()), Ok(())));
        let wrong = |parameters: &[usize]| match check(Some(parameters)) {
            Err(Error::ArgumentSize { index, wanted, got, .. }) => (index, wanted, got),
            other => panic!("{other:?}"),
        };
        assert_eq!(wrong(&[32]), (0, 32, 24));
        assert_eq!(wrong(&[]), (0, 0, 24));
        assert_eq!(wrong(&[24, 4]), (1, 4, 0));
    }
}
