//! The device that a workload runs on: the CPU reference, or a CUDA device with its stream.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};
use moe_kernels::{Device, Dtype};

use crate::common::error::{Result, driver};
use crate::common::values;

/// An element type of tensors on the host and on a device.
pub trait Element: Dtype + ValidAsZeroBits {}
impl<D: Dtype + ValidAsZeroBits> Element for D {}

/// The device that is measured.
pub enum Target<'g> {
    /// The CPU reference in f32, on all cores.
    Cpu,
    /// A GPU or the software device.
    Gpu(&'g Gpu),
}

/// A CUDA device and the stream of all calls.
pub struct Gpu {
    pub(crate) device: Device,
    pub(crate) stream: Arc<CudaStream>,
}

impl Gpu {
    /// Opens the first device of the process's driver and loads all kernels.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn open() -> Result<Self> {
        let context = CudaContext::new(0).map_err(driver("open the device"))?;
        // SAFETY: all calls run on one stream, in the order in which they are enqueued. Tracking is
        // off because a capture must not wait for events that were recorded before it.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver("create a stream"))?;
        let device = Device::new(&context)?;
        for dtype in [moe_kernels::DType::F32, moe_kernels::DType::F16, moe_kernels::DType::BF16] {
            device.warm_up(dtype)?; // A capture must not load images.
        }
        Ok(Self { device, stream })
    }

    /// The device's context.
    pub fn context(&self) -> &Arc<CudaContext> {
        self.device.context()
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Waits for all enqueued work.
    ///
    /// # Errors
    /// Errors of that work or of the driver.
    pub fn wait(&self) -> Result<()> {
        self.stream.synchronize().map_err(driver("wait for the device"))
    }

    pub(crate) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        self.stream.clone_htod(values).map_err(driver("upload a tensor"))
    }

    pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        len: usize,
    ) -> Result<CudaSlice<T>> {
        self.stream.alloc_zeros(len).map_err(driver("allocate a tensor"))
    }

    /// Makes the values of [`values::normal`] on the device, by copies of one period.
    pub(crate) fn normal<D: Element>(
        &self,
        len: usize,
        deviation: f64,
        seed: u64,
    ) -> Result<CudaSlice<D>> {
        let period = values::period::<D>(len, deviation, seed);
        let mut tensor = self.zeros::<D>(len)?;
        for start in (0..len).step_by(period.len().max(1)) {
            let end = (start + period.len()).min(len);
            let mut part = tensor.slice_mut(start..end);
            self.stream
                .memcpy_htod(&period[..end - start], &mut part)
                .map_err(driver("upload a tensor"))?;
        }
        Ok(tensor)
    }
}
