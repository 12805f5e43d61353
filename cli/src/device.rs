//! The device of a process. A process has one driver, chosen before its first call.

use std::sync::Arc;

use clap::ValueEnum;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, DeviceRepr, sys};

use crate::error::{Error, Result};

/// The values of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// The CPU reference in f32, on all cores
    Cpu,
    /// The GPU
    Cuda,
    /// The software CUDA device: the same kernels, executed on the CPU
    Emulator,
    /// The GPU if there is one, otherwise the emulator
    Auto,
}

/// The device that executes a layer.
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

/// All devices that this machine and this binary have.
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

/// Returns the number of GPUs of the real driver, or the reason why there is none.
///
/// The driver is opened as `libcuda.so.1`: `libcuda.so` is the name of the emulator once it is
/// installed, and of a toolkit's stub.
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
    // SAFETY: the driver defines no flag but 0.
    let code = unsafe { init(0) };
    if code != 0 {
        return Err(format!("the CUDA driver does not initialise (cuInit returns {code})"));
    }
    let mut count = 0;
    // SAFETY: the pointer is to a live integer.
    let code = unsafe { get_count(&mut count) };
    match (code, count) {
        (0, 1..) => Ok(count),
        (0, _) => Err("the CUDA driver has no device".into()),
        _ => Err(format!(
            "the CUDA driver cannot count its devices (cuDeviceGetCount returns {code})"
        )),
    }
}

/// A CUDA device and a stream on it.
pub struct Gpu {
    pub place: Place,
    pub device: moe_kernels::Device,
    pub stream: Arc<CudaStream>,
}

impl Gpu {
    /// Opens the GPU or the emulator; `place` is not [`Place::Cpu`].
    pub fn open(place: Place) -> Result<Self> {
        Self::open_after(
            place,
            match place {
                Place::Emulator => install_emulator(),
                Place::Cuda | Place::Cpu => probe().map(|_| ()),
            },
        )
    }

    /// Opens the emulator that counts the memory traffic of kernels.
    pub fn open_counting() -> Result<Self> {
        Self::open_after(Place::Emulator, install_counting_emulator())
    }

    /// Opens device 0 of the driver that was chosen.
    fn open_after(place: Place, chosen: std::result::Result<(), String>) -> Result<Self> {
        let failed = |why: String| Error::Device { device: place.name(), why };
        chosen.map_err(failed)?;
        let driver = |error: cudarc::driver::DriverError| failed(error.to_string());
        let context = CudaContext::new(0).map_err(driver)?;
        let device = moe_kernels::Device::new(&context)?;
        let stream = context.new_stream().map_err(driver)?;
        Ok(Self { place, device, stream })
    }

    /// The CUDA version of the driver, as in `13.0`.
    pub fn driver_version(&self) -> Result<String> {
        let mut version = 0;
        // SAFETY: the pointer is to a live integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(self.failed("read the driver's version"))?;
        Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
    }

    /// Runs the blocks of a launch on all cores of the emulator's host. Results do not change; the
    /// order of execution is then no longer determined by the seed.
    pub fn use_all_cores(&self) {
        #[cfg(feature = "emulator")]
        if self.place == Place::Emulator && std::env::var_os("MOE_EMULATOR_THREADS").is_none() {
            let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
            moe_emulator::set_os_threads(u32::try_from(threads).unwrap_or(1));
        }
    }

    /// Sets the seed of the emulator's schedule; does nothing on a GPU.
    pub fn reschedule(&self, seed: u64) {
        #[cfg(feature = "emulator")]
        if self.place == Place::Emulator {
            moe_emulator::set_seed(seed);
        }
        #[cfg(not(feature = "emulator"))]
        let _ = seed;
    }

    pub fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        self.stream.clone_htod(values).map_err(self.failed("upload"))
    }

    pub fn download<T: DeviceRepr>(&self, values: &CudaView<'_, T>) -> Result<Vec<T>> {
        self.stream.clone_dtoh(values).map_err(self.failed("download"))
    }

    /// Memory in which every byte is 0xff: NaN in a float type, -1 in a signed integer type. An
    /// element that an operation does not write is then visible.
    pub fn poisoned<T: DeviceRepr + bytemuck::Pod>(&self, len: usize) -> Result<CudaSlice<T>> {
        let mut values = vec![T::zeroed(); len];
        bytemuck::cast_slice_mut::<T, u8>(&mut values).fill(0xff);
        self.upload(&values)
    }

    /// Makes an error of a failed call to cudarc, for `map_err`.
    pub fn failed(
        &self,
        action: &'static str,
    ) -> impl Fn(cudarc::driver::DriverError) -> Error + '_ {
        move |error| Error::Device { device: self.place.name(), why: format!("{action}: {error}") }
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
            "this binary was built without the feature `counting`; `cargo moe bench` builds it with the feature".into()
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
