//! A CUDA device in software.
//!
//! The crate carries a shared library that exports the CUDA driver API and executes the kernels of
//! `moe-kernels`, compiled from the same `.cu` sources, on the CPU. [`install`] loads it under the
//! name `libcuda.so`; cudarc, and everything above it, then works as on a GPU:
//!
//! ```
//! moe_emulator::install()?;
//! // From here on, cudarc::driver::CudaContext::new(0) is the software device.
//! # Ok::<(), moe_emulator::InstallError>(())
//! ```
//!
//! # Purpose
//!
//! It finds mistakes:
//!
//! - Launches, copies and allocations fail as the driver fails.
//! - Streams do their work late, in an order that a seed draws ([`set_seed`]).
//! - Device memory lies between guard pages and starts as NaN.
//! - A kernel that breaks a rule of the machine is stopped with a report ([`last_error`]), and so
//!   is a kernel that wrote just past an allocation to which it has a pointer.
//!
//! It does not model speed.
//!
//! A second variant, [`install_counting`], runs the same kernels more slowly and counts their
//! memory accesses: see [`Traffic`]. It needs the feature `counting`.
//!
//! Streams that tests create are independent, and their work runs on the thread that waits for it,
//! in parallel with other threads. The default stream is one queue for the whole process: tests
//! that use it wait for each other and run each other's work.
//!
//! # Environment
//!
//! | variable | values | meaning |
//! |---|---|---|
//! | `MOE_EMULATOR_CC` | `8.0`, `9.0` (default), `12.0` | compute capability and its limits |
//! | `MOE_EMULATOR_DRIVER` | `12040` (default 13000) | an older driver, which refuses newer PTX |
//! | `MOE_EMULATOR_SEED` | a number (default 0) | the seed that threads start with |
//! | `MOE_EMULATOR_THREADS` | a number (default 1) | OS threads for the blocks of one launch |
//! | `MOE_EMULATOR_LAUNCHES` | a file | kernels append their names after their first run |
//! | `MOE_EMULATOR_FAULT` | `flip:KERNEL`, `fail:KERNEL` | a wrong result bit, or a failed launch |
//!
//! # Differences from a GPU's driver
//!
//! - A failed kernel makes its stream fail, not the whole context. On the default streams, which
//!   all threads of a process share, only the failing thread's part fails. A context-wide
//!   synchronisation reports a failure only to the thread that submitted the work. [`clear_errors`]
//!   makes the streams usable again.
//! - A capture in thread-local or relaxed mode is not disturbed by another thread that synchronises
//!   the whole context. (On a GPU it is, and tests that share a process could not capture.)
//! - `cuMemAllocAsync` and `cuMemFreeAsync` are refused on a capturing stream, where the driver
//!   would create graph nodes.
//! - Clusters have at most 8 blocks; the attribute that allows 16 is refused.
//! - Not supported: graphs built node by node or updated, cooperative launches, managed memory,
//!   memory pools other than the default one, several devices. Such a call returns
//!   `CUDA_ERROR_NOT_SUPPORTED` and prints this once to the standard error, or its symbol is
//!   missing.
//! - A module's image must be a valid module and, for an older driver, of a PTX version that it
//!   reads; otherwise it is ignored: kernels are found by name among the compiled-in ones.
//! - For occupancy, each kernel uses 32 registers and no static shared memory.

mod choice;
mod traffic;

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::{Mutex, OnceLock};

pub use choice::{Choice, ChooseError, Driver, choose};
pub use traffic::{
    GlobalTraffic, SharedTraffic, Traffic, WarpOperations, install_counting, reset_traffic, traffic,
};

static PLAIN_LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libcuda.so"));
#[cfg(feature = "counting")]
static COUNTING_LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libcuda_counting.so"));
#[cfg(not(feature = "counting"))]
static COUNTING_LIBRARY: &[u8] = &[];

/// The reason why the software device could not be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InstallError {
    /// Another CUDA driver was opened in this process before: one of this name, or the other
    /// variant of the software device.
    DriverAlreadyLoaded(&'static str),
    /// [`install_counting`] in a build without the feature `counting`.
    CountingNotBuilt,
    /// The library could not be written to memory.
    Memory(String),
    /// The library could not be loaded.
    Load(String),
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DriverAlreadyLoaded(name) => write!(
                f,
                "the software CUDA device must be installed before a driver is used, but {name} is already loaded"
            ),
            Self::CountingNotBuilt => f.write_str(
                "this build has no counting software CUDA device: it needs the feature `counting`",
            ),
            Self::Memory(why) => {
                write!(f, "the software CUDA device could not be written to memory: {why}")
            }
            Self::Load(why) => write!(f, "the software CUDA device could not be loaded: {why}"),
        }
    }
}

impl std::error::Error for InstallError {}

/// The interface of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelInfo {
    /// Its exported name.
    pub symbol: String,
    /// The largest number of threads per block: its launch bound.
    pub max_threads: u32,
    /// Its parameters, in order.
    pub parameters: Vec<Parameter>,
}

/// Offset and size of an argument in a kernel's parameter buffer, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameter {
    /// The offset from the start of the buffer.
    pub offset: usize,
    /// The size of the argument.
    pub size: usize,
}

/// Operation counts and live allocations of the software device, over all threads.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Allocations of device memory that have not been freed. A stream-ordered free counts when the
    /// stream reaches it.
    pub live_allocations: u64,
    /// Their bytes.
    pub live_bytes: u64,
    /// Kernel launches, those of graphs included.
    pub launches: u64,
    /// Copies submitted.
    pub copies: u64,
    /// Fills submitted.
    pub memsets: u64,
    /// Operations that failed when they ran.
    pub failures: u64,
    /// Operations of this thread's current context that are queued and have not run.
    pub unfinished: u64,
}

/// The C struct of emulator/simt/runtime.h, without the members that are not read here.
#[repr(C)]
struct Kernel {
    symbol: *const c_char,
    max_threads: u32,
    num_parameters: u32,
    parameters: *const Parameter,
}

/// The functions of emulator/driver/control.cpp.
struct Control {
    set_seed: unsafe extern "C" fn(u64),
    set_os_threads: unsafe extern "C" fn(u32),
    leave_out_blocks: unsafe extern "C" fn(u64),
    last_error: unsafe extern "C" fn() -> *const c_char,
    carveout: unsafe extern "C" fn(*const c_char) -> i32,
    clear_errors: unsafe extern "C" fn(),
    kernel_count: unsafe extern "C" fn() -> usize,
    kernel: unsafe extern "C" fn(usize) -> *const Kernel,
    counters: unsafe extern "C" fn(*mut Counters),
    traffic: unsafe extern "C" fn(*const c_char, *mut traffic::Counts) -> bool,
    reset_traffic: unsafe extern "C" fn(),
}

static CONTROL: OnceLock<(Variant, Control)> = OnceLock::new();

/// The two libraries, one of which a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Plain,
    Counting,
}

/// Makes the software device this process's CUDA driver. Call it before cudarc's first call; a
/// second call has no effect.
///
/// # Errors
///
/// Fails if a CUDA driver is already loaded, including the [counting one](install_counting), or if
/// the library cannot be loaded.
pub fn install() -> Result<(), InstallError> {
    install_variant(Variant::Plain)
}

fn install_variant(variant: Variant) -> Result<(), InstallError> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if variant == Variant::Counting && !cfg!(feature = "counting") {
        return Err(InstallError::CountingNotBuilt);
    }
    match CONTROL.get() {
        Some((installed, _)) if *installed == variant => return Ok(()),
        Some((Variant::Plain, _)) => {
            return Err(InstallError::DriverAlreadyLoaded("the plain software device"));
        }
        Some((Variant::Counting, _)) => {
            return Err(InstallError::DriverAlreadyLoaded("the counting software device"));
        }
        None => {}
    }
    if is_loaded(c"libcuda.so") {
        return Err(InstallError::DriverAlreadyLoaded("libcuda.so"));
    }
    // A driver that was only probed for a GPU and has none is ignored.
    if is_loaded(c"libcuda.so.1") && choice::count_devices(c"libcuda.so.1").is_ok() {
        return Err(InstallError::DriverAlreadyLoaded("libcuda.so.1"));
    }
    let control = load(variant)?;
    CONTROL.get_or_init(|| (variant, control));
    Ok(())
}

/// Returns whether [`install`] or [`install_counting`] has succeeded in this process.
pub fn is_installed() -> bool {
    CONTROL.get().is_some()
}

fn is_loaded(name: &CStr) -> bool {
    // SAFETY: the name is a C string, and RTLD_NOLOAD runs no code of a library.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if handle.is_null() {
        return false;
    }
    // SAFETY: dlopen has just returned the handle; the library stays loaded by its first opener.
    unsafe { libc::dlclose(handle) };
    true
}

/// Writes the library to a file in memory and loads it from there; it is never unloaded.
fn load(variant: Variant) -> Result<Control, InstallError> {
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd};

    // SAFETY: the name is a C string.
    let descriptor = unsafe { libc::memfd_create(c"libcuda.so".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(InstallError::Memory(std::io::Error::last_os_error().to_string()));
    }
    // SAFETY: the descriptor is new and has no other owner.
    let mut file = unsafe { std::fs::File::from_raw_fd(descriptor) };
    let library = match variant {
        Variant::Plain => PLAIN_LIBRARY,
        Variant::Counting => COUNTING_LIBRARY,
    };
    file.write_all(library).map_err(|error| InstallError::Memory(error.to_string()))?;
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|error| InstallError::Memory(error.to_string()))?;
    // SAFETY: the path is a C string; the library's initialisers only register its kernels.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        return Err(InstallError::Load(load_error()));
    }
    // SAFETY: the types are those of the functions in emulator/driver/control.cpp.
    unsafe {
        Ok(Control {
            set_seed: symbol(handle, c"moe_emulator_set_seed")?,
            set_os_threads: symbol(handle, c"moe_emulator_set_os_threads")?,
            leave_out_blocks: symbol(handle, c"moe_emulator_leave_out_blocks")?,
            last_error: symbol(handle, c"moe_emulator_last_error")?,
            carveout: symbol(handle, c"moe_emulator_carveout")?,
            clear_errors: symbol(handle, c"moe_emulator_clear_errors")?,
            kernel_count: symbol(handle, c"moe_emulator_kernel_count")?,
            kernel: symbol(handle, c"moe_emulator_kernel")?,
            counters: symbol(handle, c"moe_emulator_counters")?,
            traffic: symbol(handle, c"moe_emulator_traffic")?,
            reset_traffic: symbol(handle, c"moe_emulator_reset_traffic")?,
        })
    }
}

fn load_error() -> String {
    // SAFETY: dlerror returns null or a C string that is valid until the thread's next dl call.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "unknown reason".to_owned()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// A function of the loaded library.
///
/// # Safety
///
/// `F` must be the type of the function of that name.
unsafe fn symbol<F: Copy>(handle: *mut c_void, name: &CStr) -> Result<F, InstallError> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the handle is a library's and the name is a C string.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if address.is_null() {
        return Err(InstallError::Load(load_error()));
    }
    // SAFETY: the caller guarantees that F is the function's type, and it is as large as a pointer.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

fn control() -> &'static Control {
    &CONTROL.get().expect("moe_emulator::install() was called").1
}

/// Seeds the schedule of the work that this OS thread submits from now on: the order of threads,
/// blocks and asynchronous copies within its kernels, and the order in which streams do their work.
/// Seed 0 is the plain schedule: everything in order, and as late as possible. The same seed gives
/// the same schedule, if the thread shares no stream with others and a launch runs on one OS
/// thread.
///
/// # Panics
///
/// Panics if the software device is not installed, as all functions below do.
pub fn set_seed(seed: u64) {
    // SAFETY: the function takes a number and changes only its thread's state.
    unsafe { (control().set_seed)(seed) }
}

/// Sets how many OS threads run the blocks of a launch that this OS thread submits from now on.
pub fn set_os_threads(count: u32) {
    // SAFETY: the function takes a number and changes only its thread's state.
    unsafe { (control().set_os_threads)(count) }
}

/// Leaves out the first `count` blocks (clusters, if any) of each launch that this OS thread
/// submits from now on; with 0 all blocks run. A launch without remaining blocks fails.
///
/// This is for addresses that only the last blocks of a large grid access, where the whole grid
/// would take minutes, and for kernels whose blocks are independent. The memory of the omitted
/// blocks is unchanged.
pub fn leave_out_blocks(count: u64) {
    // SAFETY: the function takes a number and changes only its thread's state.
    unsafe { (control().leave_out_blocks)(count) }
}

/// The full report of the last failure of this OS thread's work, if any. The driver's description
/// of the failure's code, as errors print it, ends with the same report.
pub fn last_error() -> Option<String> {
    // SAFETY: the result is null or a C string that is valid until this thread's next call.
    unsafe {
        let text = (control().last_error)();
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}

/// The last preferred carve-out of a kernel (`CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT`),
/// in percent of the largest shared memory; `None` if none was set.
pub fn preferred_carveout(symbol: &CStr) -> Option<u32> {
    // SAFETY: the symbol is a C string.
    u32::try_from(unsafe { (control().carveout)(symbol.as_ptr()) }).ok()
}

/// Clears the failures that stick to the streams this OS thread has used, and their report.
pub fn clear_errors() {
    // SAFETY: the function has no preconditions.
    unsafe { (control().clear_errors)() }
}

/// All compiled-in kernels, sorted by name.
pub fn kernels() -> Vec<KernelInfo> {
    // SAFETY: the function has no preconditions.
    let count = unsafe { (control().kernel_count)() };
    let mut kernels: Vec<KernelInfo> = (0..count)
        .map(|index| {
            // SAFETY: the index is below the count, so the result is a registered kernel, which
            // lives as long as the library, and the library is never closed.
            let kernel = unsafe { &*(control().kernel)(index) };
            let num_parameters = kernel.num_parameters as usize;
            let parameters = if num_parameters == 0 {
                Vec::new()
            } else {
                // SAFETY: a kernel's parameters are an array of that length.
                unsafe { std::slice::from_raw_parts(kernel.parameters, num_parameters) }.to_vec()
            };
            // SAFETY: the symbol is a C string that lives as long as the kernel.
            let symbol = unsafe { CStr::from_ptr(kernel.symbol) };
            KernelInfo {
                symbol: symbol.to_string_lossy().into_owned(),
                max_threads: kernel.max_threads,
                parameters,
            }
        })
        .collect();
    kernels.sort_by(|a, b| a.symbol.cmp(&b.symbol));
    kernels
}

/// The device's operation counts and live allocations.
pub fn counters() -> Counters {
    let mut counters = Counters::default();
    // SAFETY: the struct is the one that the function fills.
    unsafe { (control().counters)(&mut counters) };
    counters
}
