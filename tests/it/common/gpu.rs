//! The device of the tests, selected once per process.

use std::io::Write as _;
use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};
use moe_kernels::Device;
use proptest::test_runner::Config;

struct Selected {
    device: Device,
    name: String,
    emulated: bool,
}

/// The device and a stream of the test.
pub struct Gpu {
    pub device: Device,
    pub stream: Arc<CudaStream>,
    pub emulated: bool,
}

/// The device that MOE_DEVICE selects. Prints it with the name of the test. There is always one, so
/// no test is skipped.
pub fn gpu() -> Gpu {
    static SELECTED: OnceLock<Selected> = OnceLock::new();
    let selected = SELECTED.get_or_init(|| {
        let wanted = moe_emulator::Choice::from_env().unwrap_or_else(|why| panic!("{why}"));
        let driver = moe_emulator::choose(wanted).unwrap_or_else(|why| panic!("{why}"));
        let context = CudaContext::new(0).unwrap();
        let device = Device::new(&context).unwrap();
        let (major, minor) = device.capability();
        let name = format!("{} ({driver}, {major}.{minor})", context.name().unwrap());
        Selected { device, name, emulated: driver == moe_emulator::Driver::Emulator }
    });
    let thread = std::thread::current();
    // Written directly to stderr, since the test harness captures other output.
    let line = format!("{} runs on {}\n", thread.name().unwrap_or("a test"), selected.name);
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    let stream = selected.device.context().new_stream().unwrap();
    Gpu { device: selected.device.clone(), stream, emulated: selected.emulated }
}

impl Gpu {
    /// Selects another schedule of the software device for the later launches of this thread. No
    /// effect on a GPU.
    pub fn reschedule(&self, seed: u64) {
        if self.emulated {
            moe_emulator::set_seed(seed);
        }
    }

    /// Copies host data to the device.
    pub fn upload<T: DeviceRepr + bytemuck::Pod>(&self, data: &[T]) -> Buffer<T> {
        let padding = [T::zeroed()];
        let host = if data.is_empty() { &padding[..] } else { data };
        let slice = self.stream.clone_htod(host).unwrap();
        Buffer { slice, len: data.len() }
    }

    /// A buffer of NaNs, or of -1, which an operation must overwrite.
    pub fn poisoned<T: DeviceRepr + bytemuck::Pod>(&self, len: usize) -> Buffer<T> {
        let mut host = vec![T::zeroed(); len];
        bytemuck::cast_slice_mut::<T, u8>(&mut host).fill(0xff);
        self.upload(&host)
    }

    /// Copies device data to the host.
    pub fn download<T: DeviceRepr + bytemuck::Pod>(&self, data: &CudaView<'_, T>) -> Vec<T> {
        if data.is_empty() {
            return Vec::new();
        }
        let host = self.stream.clone_dtoh(data).unwrap();
        self.stream.synchronize().unwrap();
        host
    }
}

/// Device memory of any length, including 0, which the driver does not allocate.
pub struct Buffer<T> {
    slice: CudaSlice<T>,
    len: usize,
}

impl<T> Buffer<T> {
    pub fn view(&self) -> CudaView<'_, T> {
        self.slice.slice(..self.len)
    }

    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.slice.slice_mut(..self.len)
    }
}

/// The number of random cases: PROPTEST_CASES, or else `cases`.
fn cases(cases: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases)
}

/// A proptest configuration with [`cases`].
pub fn config(count: u32) -> Config {
    Config {
        cases: cases(count),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    }
}
