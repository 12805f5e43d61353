//! Which driver a process uses: the GPU's, or the software device.

use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use crate::{InstallError, install};

/// What is asked for: `cuda`, `emulator`, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// A GPU; without one it is an error.
    Cuda,
    /// The software device, GPU or not.
    Emulator,
    /// A GPU if there is one, else the software device.
    Auto,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cuda" => Ok(Self::Cuda),
            "emulator" => Ok(Self::Emulator),
            "auto" => Ok(Self::Auto),
            _ => Err(format!("'{name}' is no device; cuda, emulator and auto are")),
        }
    }
}

/// What a process runs on.
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

/// Why there is no such driver.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChooseError {
    /// A GPU was asked for, and there is none.
    NoGpu(String),
    /// One process has one driver, and it was another.
    AlreadyChosen(Driver),
    /// The software device could not be installed.
    Install(InstallError),
}

impl fmt::Display for ChooseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGpu(why) => write!(f, "no GPU to run on: {why}"),
            Self::AlreadyChosen(driver) => {
                write!(
                    f,
                    "this process runs on {driver} already; start another one for another driver"
                )
            }
            Self::Install(why) => why.fmt(f),
        }
    }
}

impl std::error::Error for ChooseError {}

/// Chooses this process's driver, before cudarc's first call. The same choice again does nothing.
///
/// # Errors
/// [`ChooseError`] if there is no such driver, or if it was chosen differently before.
pub fn choose(choice: Choice) -> Result<Driver, ChooseError> {
    static CHOSEN: OnceLock<Result<Driver, ChooseError>> = OnceLock::new();
    let driver = CHOSEN
        .get_or_init(|| {
            let emulator = || install().map(|()| Driver::Emulator).map_err(ChooseError::Install);
            match choice {
                Choice::Emulator => emulator(),
                Choice::Cuda => probe_gpu().map(|()| Driver::Cuda).map_err(ChooseError::NoGpu),
                Choice::Auto => probe_gpu().map_or_else(|_| emulator(), |()| Ok(Driver::Cuda)),
            }
        })
        .clone()?;
    match (choice, driver) {
        (Choice::Cuda, Driver::Emulator) | (Choice::Emulator, Driver::Cuda) => {
            Err(ChooseError::AlreadyChosen(driver))
        }
        _ => Ok(driver),
    }
}

/// Whether the real driver initialises and has a device. It is asked as `libcuda.so.1`, for
/// `libcuda.so` is the software device's name.
fn probe_gpu() -> Result<(), String> {
    // SAFETY: the library's initialisers are the driver's own; the name is a C string.
    let library =
        unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err("the driver's library libcuda.so.1 cannot be loaded".into());
    }
    let answer = count_devices(library);
    if answer.is_err() {
        // SAFETY: the handle is open, and nothing of the library is used any more. The software
        // device wants to be the only driver of the process.
        unsafe { libc::dlclose(library) };
    }
    answer
}

fn count_devices(library: *mut c_void) -> Result<(), String> {
    let find = |name: &std::ffi::CStr| -> Result<*mut c_void, String> {
        // SAFETY: the handle is open and the name is a C string.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
        if symbol.is_null() { Err(format!("libcuda.so.1 has no {name:?}")) } else { Ok(symbol) }
    };
    let (init, count) = (find(c"cuInit")?, find(c"cuDeviceGetCount")?);
    // SAFETY: this is the signature of cuInit in every version of the driver.
    let init =
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_uint) -> c_int>(init) };
    // SAFETY: this is the signature of cuDeviceGetCount in every version of the driver.
    let count = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> c_int>(count)
    };
    let mut devices = 0;
    // SAFETY: cuInit takes 0, and the count has a place to go.
    let answers = unsafe { (init(0), count(&mut devices)) };
    match (answers, devices) {
        ((0, 0), 1..) => Ok(()),
        ((0, 0), _) => Err("the driver has no device".into()),
        ((0, code), _) | ((code, _), _) => Err(format!("the driver answers with error {code}")),
    }
}
