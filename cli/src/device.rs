//! Which device runs. A process has one driver, chosen before the first call to it.

use std::sync::Arc;

use clap::ValueEnum;
use cudarc::driver::{CudaContext, CudaStream, sys};

use crate::error::{Error, Result};

/// What the command line can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The reference, in f32, on all cores
    Cpu,
    /// The GPU
    Cuda,
    /// The software CUDA device: the same kernels, on the CPU
    Emulator,
    /// The GPU if there is one, else the emulator
    Auto,
}

/// Where a run takes place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Cpu,
    Cuda,
    Emulator,
}

impl Place {
    pub fn name(self) -> &'static str {
        match self {
            Place::Cpu => "cpu",
            Place::Cuda => "cuda",
            Place::Emulator => "emulator",
        }
    }
}

impl Choice {
    pub fn place(self) -> Place {
        match self {
            Choice::Cpu => Place::Cpu,
            Choice::Cuda => Place::Cuda,
            Choice::Emulator => Place::Emulator,
            Choice::Auto if probe().is_ok() => Place::Cuda,
            Choice::Auto => Place::Emulator,
        }
    }
}

/// All places where this machine and this binary can run a layer.
pub fn available() -> Vec<Place> {
    let mut places = vec![Place::Cpu];
    if cfg!(feature = "emulator") {
        places.push(Place::Emulator);
    }
    if probe().is_ok() {
        places.push(Place::Cuda);
    }
    places
}

/// How many GPUs the real driver has, or why there is none.
///
/// The driver is asked for as `libcuda.so.1`: `libcuda.so` is what the emulator is called once it is
/// installed, and what a toolkit's stub is called.
pub fn probe() -> std::result::Result<i32, String> {
    type Init = unsafe extern "C" fn(u32) -> i32;
    type GetCount = unsafe extern "C" fn(*mut i32) -> i32;
    // SAFETY: loading the driver runs its initialisers, as every CUDA program does.
    let library = unsafe { libloading::Library::new("libcuda.so.1") }
        .map_err(|_| "no CUDA driver on this machine (libcuda.so.1 does not load)".to_string())?;
    let missing = |error| format!("libcuda.so.1 is not a CUDA driver ({error})");
    // SAFETY: these are the driver's signatures of the two functions.
    let init = unsafe { library.get::<Init>(b"cuInit\0") }.map_err(missing)?;
    // SAFETY: as above.
    let get_count = unsafe { library.get::<GetCount>(b"cuDeviceGetCount\0") }.map_err(missing)?;
    // SAFETY: 0 is the only flag there is.
    let code = unsafe { init(0) };
    if code != 0 {
        return Err(format!("the CUDA driver does not initialise (cuInit answers {code})"));
    }
    let mut count = 0;
    // SAFETY: the pointer is to a live integer.
    let code = unsafe { get_count(&mut count) };
    match (code, count) {
        (0, 1..) => Ok(count),
        (0, _) => Err("the CUDA driver has no device".into()),
        _ => Err(format!(
            "the CUDA driver cannot count its devices (cuDeviceGetCount answers {code})"
        )),
    }
}

/// A device with a stream of its own.
pub struct Gpu {
    pub place: Place,
    pub device: moe_kernels::Device,
    pub stream: Arc<CudaStream>,
}

impl Gpu {
    /// Opens the GPU or the emulator; `place` is one of the two.
    pub fn open(place: Place) -> Result<Self> {
        Self::open_after(
            place,
            match place {
                Place::Emulator => install_emulator(),
                Place::Cuda | Place::Cpu => probe().map(|_| ()),
            },
        )
    }

    /// Opens the emulator in the variant that counts what kernels move.
    pub fn open_counting() -> Result<Self> {
        Self::open_after(Place::Emulator, install_counting_emulator())
    }

    /// Opens a device whose driver has been chosen.
    fn open_after(place: Place, chosen: std::result::Result<(), String>) -> Result<Self> {
        let failed = |why: String| Error::Device { device: place.name(), why };
        chosen.map_err(failed)?;
        let driver = |error: cudarc::driver::DriverError| failed(error.to_string());
        let context = CudaContext::new(0).map_err(driver)?;
        let device = moe_kernels::Device::new(&context)?;
        let stream = context.new_stream().map_err(driver)?;
        Ok(Self { place, device, stream })
    }

    /// The CUDA version of its driver, as in `13.0`.
    pub fn driver_version(&self) -> Result<String> {
        let mut version = 0;
        // SAFETY: the pointer is to a live integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(self.failed("ask for the version"))?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }

    /// Lets the emulator run the blocks of a launch on all cores. Results do not depend on it; the
    /// order in which things happen does, so that a seed no longer decides it.
    pub fn use_all_cores(&self) {
        #[cfg(feature = "emulator")]
        if self.place == Place::Emulator && std::env::var_os("MOE_EMULATOR_THREADS").is_none() {
            let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
            moe_emulator::set_os_threads(u32::try_from(threads).unwrap_or(1));
        }
    }

    /// Draws another order of everything that may happen in any order; a real GPU needs no telling.
    pub fn reschedule(&self, seed: u64) {
        #[cfg(feature = "emulator")]
        if self.place == Place::Emulator {
            moe_emulator::set_seed(seed);
        }
        #[cfg(not(feature = "emulator"))]
        let _ = seed;
    }

    /// For `map_err` on calls to cudarc.
    pub fn failed(&self, what: &'static str) -> impl Fn(cudarc::driver::DriverError) -> Error + '_ {
        move |error| Error::Device { device: self.place.name(), why: format!("{what}: {error}") }
    }
}

#[cfg(feature = "emulator")]
fn install_emulator() -> std::result::Result<(), String> {
    moe_emulator::install().map_err(|error| error.to_string())
}

#[cfg(feature = "emulator")]
fn install_counting_emulator() -> std::result::Result<(), String> {
    moe_emulator::install_counting().map_err(|error| match error {
        moe_emulator::InstallError::CountingNotBuilt => {
            "this binary does not count: `cargo moe bench` builds one that does (feature `counting`)".into()
        }
        error => error.to_string(),
    })
}

#[cfg(not(feature = "emulator"))]
fn install_emulator() -> std::result::Result<(), String> {
    Err("this binary was built without the feature `emulator`".into())
}

#[cfg(not(feature = "emulator"))]
fn install_counting_emulator() -> std::result::Result<(), String> {
    install_emulator()
}
