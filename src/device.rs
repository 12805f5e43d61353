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
use crate::images::{IMAGES, Image};

pub(crate) use crate::buffer::{alloc, check_aligned, optional, upload, vector_rows};
pub use cudarc::driver::sys::{CUdeviceptr, CUstream};

/// A kernel, by the name of its entry without the element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    RouteFwdPlainNarrow,
    RouteFwdPlainWide,
    RouteFwdNarrow,
    RouteFwdWide,
    RouteFwdSort,
    RouteFwdScores,
    PlanFwdCount,
    PlanFwdScan,
    PlanFwdPlace,
    PlanFwdSingle,
    CapacityFwdSelect,
    CapacityFwdAsk,
    CapacityFwdNormalize,
    ExpertChoiceFwd,
    NoiseFwd,
    JitterFwd,
    PermuteFwd,
    GroupedGemmFwd,
    GroupedGemmFwdInOut,
    GroupedGemmFwdWeighted,
    GroupedGemmFwdWeightedInOut,
    GroupedGemmFwdGateUp,
    GroupedGemmFwdGateUpInOut,
    CombineFwd,
    RmsNormFwd,
    ProjectFwdOne,
    ProjectFwdFew,
    ProjectFwdTile,
    ProjectFwdOneGate32,
    ProjectFwdFewGate32,
    ProjectFwdTileGate32,
}

/// Where a kernel is: the stem of its file, its symbol, and whether the symbol ends in an element type.
struct Entry {
    kernel: Kernel,
    image: &'static str,
    symbol: &'static str,
    typed: bool,
}

/// In the order of the variants of [`Kernel`].
#[rustfmt::skip]
const KERNELS: &[Entry] = &[
    Entry { kernel: Kernel::RouteFwdPlainNarrow, image: "route", symbol: "moe_route_fwd_plain_narrow", typed: true },
    Entry { kernel: Kernel::RouteFwdPlainWide, image: "route", symbol: "moe_route_fwd_plain_wide", typed: true },
    Entry { kernel: Kernel::RouteFwdNarrow, image: "route", symbol: "moe_route_fwd_narrow", typed: false },
    Entry { kernel: Kernel::RouteFwdWide, image: "route", symbol: "moe_route_fwd_wide", typed: false },
    Entry { kernel: Kernel::RouteFwdSort, image: "route", symbol: "moe_route_fwd_sort", typed: false },
    Entry { kernel: Kernel::RouteFwdScores, image: "route", symbol: "moe_route_fwd_scores", typed: false },
    Entry { kernel: Kernel::PlanFwdCount, image: "plan", symbol: "moe_plan_fwd_count", typed: false },
    Entry { kernel: Kernel::PlanFwdScan, image: "plan", symbol: "moe_plan_fwd_scan", typed: false },
    Entry { kernel: Kernel::PlanFwdPlace, image: "plan", symbol: "moe_plan_fwd_place", typed: false },
    Entry { kernel: Kernel::PlanFwdSingle, image: "plan", symbol: "moe_plan_fwd_single", typed: false },
    Entry { kernel: Kernel::CapacityFwdSelect, image: "capacity", symbol: "moe_capacity_fwd_select", typed: false },
    Entry { kernel: Kernel::CapacityFwdAsk, image: "capacity", symbol: "moe_capacity_fwd_ask", typed: false },
    Entry { kernel: Kernel::CapacityFwdNormalize, image: "capacity", symbol: "moe_capacity_fwd_normalize", typed: false },
    Entry { kernel: Kernel::ExpertChoiceFwd, image: "expert_choice", symbol: "moe_expert_choice_fwd", typed: true },
    Entry { kernel: Kernel::NoiseFwd, image: "noise", symbol: "moe_noise_fwd", typed: false },
    Entry { kernel: Kernel::JitterFwd, image: "jitter", symbol: "moe_jitter_fwd", typed: true },
    Entry { kernel: Kernel::PermuteFwd, image: "permute", symbol: "moe_permute_fwd", typed: true },
    Entry { kernel: Kernel::GroupedGemmFwd, image: "grouped_gemm", symbol: "moe_grouped_gemm_fwd", typed: true },
    Entry { kernel: Kernel::GroupedGemmFwdInOut, image: "grouped_gemm", symbol: "moe_grouped_gemm_fwd_in_out", typed: true },
    Entry {
        kernel: Kernel::GroupedGemmFwdWeighted, image: "grouped_gemm", symbol: "moe_grouped_gemm_fwd_weighted", typed: true,
    },
    Entry {
        kernel: Kernel::GroupedGemmFwdWeightedInOut, image: "grouped_gemm",
        symbol: "moe_grouped_gemm_fwd_weighted_in_out", typed: true,
    },
    Entry {
        kernel: Kernel::GroupedGemmFwdGateUp, image: "grouped_gemm", symbol: "moe_grouped_gemm_fwd_gate_up", typed: true,
    },
    Entry {
        kernel: Kernel::GroupedGemmFwdGateUpInOut, image: "grouped_gemm",
        symbol: "moe_grouped_gemm_fwd_gate_up_in_out", typed: true,
    },
    Entry { kernel: Kernel::CombineFwd, image: "combine", symbol: "moe_combine_fwd", typed: true },
    Entry { kernel: Kernel::RmsNormFwd, image: "rms_norm", symbol: "moe_rms_norm_fwd", typed: true },
    Entry { kernel: Kernel::ProjectFwdOne, image: "project", symbol: "moe_project_fwd_one", typed: true },
    Entry { kernel: Kernel::ProjectFwdFew, image: "project", symbol: "moe_project_fwd_few", typed: true },
    Entry { kernel: Kernel::ProjectFwdTile, image: "project", symbol: "moe_project_fwd_tile", typed: true },
    Entry { kernel: Kernel::ProjectFwdOneGate32, image: "project", symbol: "moe_project_fwd_one_gate32", typed: true },
    Entry { kernel: Kernel::ProjectFwdFewGate32, image: "project", symbol: "moe_project_fwd_few_gate32", typed: true },
    Entry { kernel: Kernel::ProjectFwdTileGate32, image: "project", symbol: "moe_project_fwd_tile_gate32", typed: true },
];

impl Entry {
    /// The element types that the symbol exists with.
    fn dtypes(&self) -> &'static [DType] {
        use Kernel::{GroupedGemmFwdWeighted, GroupedGemmFwdWeightedInOut};
        use Kernel::{ProjectFwdFewGate32, ProjectFwdOneGate32, ProjectFwdTileGate32};
        match self.kernel {
            // The other types hold an output before its weight multiplies it.
            GroupedGemmFwdWeighted | GroupedGemmFwdWeightedInOut => &[DType::F16],
            // With f32 tokens a gate of f32 is one of the tokens' type.
            ProjectFwdOneGate32 | ProjectFwdFewGate32 | ProjectFwdTileGate32 => &DType::ALL[1..],
            _ if self.typed => &DType::ALL,
            _ => &DType::ALL[..1],
        }
    }
}

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

    /// Loads every kernel for elements of `dtype`, so that later calls load nothing. Call it before
    /// a stream capture, in which nothing may be loaded.
    ///
    /// # Errors
    /// [`Error::KernelsNotBuilt`], [`Error::UnsupportedDevice`], or [`Error::Driver`].
    pub fn warm_up(&self, dtype: DType) -> Result<()> {
        let there = KERNELS.iter().filter(|entry| !entry.typed || entry.dtypes().contains(&dtype));
        there
            .map(|entry| entry.kernel)
            .try_for_each(|kernel| self.function(kernel, dtype).map(|_| ()))
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
        let symbol = || symbol(kernel, dtype);
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
        let entry = &KERNELS[kernel as usize];
        // Kernels without an element type have one function, kept in the first place.
        let column = if entry.typed { dtype as usize } else { 0 };
        let slot = &self.inner.functions[kernel as usize][column];
        if let Some(function) = slot.get() {
            return Ok(function);
        }
        self.inner.context.bind_to_thread().map_err(driver_error("Device"))?;
        let function = self.load_function(entry, dtype)?;
        Ok(slot.get_or_init(|| function))
    }

    fn load_function(&self, entry: &Entry, dtype: DType) -> Result<Function> {
        let name = symbol(entry.kernel, dtype);
        let missing = || Error::KernelsNotBuilt { kernel: name.clone() };
        let index =
            IMAGES.iter().position(|image| image.name == entry.image).ok_or_else(missing)?;
        let module = self.module(index)?;
        let c_name = CString::new(name.as_str()).map_err(|_| missing())?;
        // SAFETY: the module stays loaded.
        let handle = match unsafe { result::module::get_function(module, c_name) } {
            Ok(handle) => handle,
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => return Err(missing()),
            Err(error) => return Err(driver_error(&name)(error)),
        };
        self.allow_shared_memory(handle).map_err(driver_error(&name))?;
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

/// The symbols of all kernels of this crate.
pub fn kernel_symbols() -> impl Iterator<Item = String> {
    KERNELS.iter().flat_map(|entry| entry.dtypes().iter().map(|&dtype| symbol(entry.kernel, dtype)))
}

/// Holds the stream of a call against the device of the call.
///
/// Two `CudaContext`s of one GPU are two as well: cudarc orders work within each of them alone.
pub(crate) fn check_stream(op: &'static str, device: &Device, stream: &CudaStream) -> Result<()> {
    if Arc::ptr_eq(stream.context(), device.context()) {
        Ok(())
    } else {
        let why = "the stream belongs to another CudaContext than the device".into();
        Err(Error::Mismatch { op, why })
    }
}

/// Why an image did not load. A placeholder has nothing to load, whatever the driver makes of it.
fn load_error(image: &Image, (major, minor): (u32, u32), error: DriverError) -> Error {
    if image.architectures.is_empty() {
        return Error::KernelsNotBuilt { kernel: format!("{}.cu", image.name) };
    }
    match error.0 {
        sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            Error::UnsupportedDevice { image: image.name, major, minor, built: image.architectures }
        }
        _ => driver_error(image.name)(error),
    }
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

fn symbol(kernel: Kernel, dtype: DType) -> String {
    let entry = &KERNELS[kernel as usize];
    if entry.typed { format!("{}_{dtype}", entry.symbol) } else { entry.symbol.into() }
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
    fn the_table_is_in_the_order_of_the_kernels() {
        for (index, entry) in KERNELS.iter().enumerate() {
            assert_eq!(entry.kernel as usize, index, "{}", entry.symbol);
            assert!(entry.symbol.starts_with(&format!("moe_{}_", entry.image)), "{}", entry.symbol);
        }
    }

    #[test]
    fn an_image_that_does_not_load() {
        let image = |architectures| Image { name: "route", architectures, bytes: &[] };
        let error =
            |architectures, code| load_error(&image(architectures), (7, 5), DriverError(code));
        let no_binary = sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU;
        assert!(matches!(error("", no_binary), Error::KernelsNotBuilt { .. }));
        let old = error("sm_80 sm_90", no_binary);
        let told = old.to_string();
        assert!(matches!(old, Error::UnsupportedDevice { major: 7, minor: 5, .. }));
        assert!(told.contains("7.5") && told.contains("sm_80 sm_90"), "{told}");
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
