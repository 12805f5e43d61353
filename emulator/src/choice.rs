//! The choice of a process's driver: the GPU's, or the software device.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use crate::{InstallError, install, install_counting, is_installed};

/// The requested device: `cuda`, `emulator`, `counting`, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// A GPU; an error without one.
    Cuda,
    /// The software device, GPU or not.
    Emulator,
    /// The software device in the variant that [counts](crate::Traffic).
    Counting,
    /// A GPU if there is one, else the software device.
    Auto,
}

impl Choice {
    /// The value of the environment variable MOE_DEVICE; [`Choice::Auto`] if it is not set.
    ///
    /// # Errors
    /// Any other value, with a message that lists the allowed ones.
    pub fn from_env() -> Result<Self, String> {
        match std::env::var("MOE_DEVICE") {
            Ok(name) => name.parse().map_err(|why| format!("MOE_DEVICE: {why}")),
            Err(_) => Ok(Self::Auto),
        }
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cuda" => Ok(Self::Cuda),
            "emulator" => Ok(Self::Emulator),
            "counting" => Ok(Self::Counting),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("unknown device '{name}', expected cuda, emulator, counting or auto")),
        }
    }
}

/// The device on which a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// A GPU.
    Cuda,
    /// The software device.
    Emulator,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cuda => "cuda",
            Self::Emulator => "emulator",
        })
    }
}

/// The reason why a driver could not be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChooseError {
    /// A GPU was requested and there is none.
    NoGpu(String),
    /// A process has one driver, and a different one was chosen before.
    AlreadyChosen(Driver),
    /// The software device could not be installed.
    Install(InstallError),
}

impl fmt::Display for ChooseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGpu(why) => write!(f, "no GPU available: {why}"),
            Self::AlreadyChosen(driver) => {
                write!(
                    f,
                    "this process already runs on {driver}; start another process for another driver"
                )
            }
            Self::Install(why) => why.fmt(f),
        }
    }
}

impl std::error::Error for ChooseError {}

/// Chooses this process's driver, before cudarc's first call. Repeating the same choice has no
/// effect.
///
/// # Errors
/// [`ChooseError`] if there is no such driver, or if it was chosen differently before.
pub fn choose(choice: Choice) -> Result<Driver, ChooseError> {
    static CHOSEN: Mutex<Option<Driver>> = Mutex::new(None);
    let mut chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
    if is_installed() {
        *chosen = Some(Driver::Emulator);
    }
    let emulator = || install().map(|()| Driver::Emulator).map_err(ChooseError::Install);
    let counting = || install_counting().map(|()| Driver::Emulator).map_err(ChooseError::Install);
    let driver = match (*chosen, choice) {
        // The process has one of the two variants; the other one prevents its installation.
        (None | Some(Driver::Emulator), Choice::Counting) => counting()?,
        (Some(driver), _) => driver,
        (None, Choice::Emulator) => emulator()?,
        (None, Choice::Cuda) => probe_gpu().map(|()| Driver::Cuda).map_err(ChooseError::NoGpu)?,
        (None, Choice::Auto) if probe_gpu().is_ok() => Driver::Cuda,
        (None, Choice::Auto) => emulator()?,
    };
    *chosen = Some(driver);
    match (choice, driver) {
        (Choice::Cuda, Driver::Emulator) | (Choice::Emulator | Choice::Counting, Driver::Cuda) => {
            Err(ChooseError::AlreadyChosen(driver))
        }
        _ => Ok(driver),
    }
}

/// Checks that the real driver initialises and has a device. It is opened as `libcuda.so.1`, since
/// `libcuda.so` is the software device's name.
fn probe_gpu() -> Result<(), String> {
    type Init = unsafe extern "C" fn(c_uint) -> c_int;
    let library = Library::open(c"libcuda.so.1")?;
    let init = library.find(c"cuInit")?;
    // SAFETY: this is the signature of cuInit in every version of the driver; it takes 0.
    match unsafe { std::mem::transmute::<*mut c_void, Init>(init)(0) } {
        0 => count_devices(c"libcuda.so.1"),
        code => Err(format!("the driver failed to initialise (error {code})")),
    }
}

/// Checks that an initialised driver has a device.
pub(crate) fn count_devices(name: &CStr) -> Result<(), String> {
    type GetCount = unsafe extern "C" fn(*mut c_int) -> c_int;
    let library = Library::open(name)?;
    let get_count = library.find(c"cuDeviceGetCount")?;
    let mut count = 0;
    // SAFETY: this is the signature of cuDeviceGetCount in every version of the driver; `count` is
    // valid for the write.
    match unsafe { std::mem::transmute::<*mut c_void, GetCount>(get_count)(&mut count) } {
        0 if count > 0 => Ok(()),
        0 => Err("the driver has no device".into()),
        code => Err(format!("the driver failed to count its devices (error {code})")),
    }
}

/// A shared library, closed when it is dropped.
struct Library(*mut c_void);

impl Library {
    fn open(name: &CStr) -> Result<Self, String> {
        // SAFETY: the library's initialisers are the driver's own; the name is a C string.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(format!("{name:?} cannot be loaded")) } else { Ok(Self(handle)) }
    }

    fn find(&self, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: the handle is open and the name is a C string.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if symbol.is_null() { Err(format!("the driver has no {name:?}")) } else { Ok(symbol) }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle is open. Other handles to the library remain valid.
        unsafe { libc::dlclose(self.0) };
    }
}
