//! The layer's tensors in the memory of a device.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::result::Result;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, DeviceSlice};

use crate::device::upload;
use crate::dtype::Dtype;
use crate::error::Error;
use crate::tensors::private::Sealed;
use crate::tensors::{Memory, MoeInputs, MoeWeights, Owned, Transfer};

/// Views `CudaView<'a, T>` of memory on a device: what [`MoeLayer`](crate::MoeLayer) reads.
#[derive(Debug, Clone, Copy)]
pub struct OnDevice<'a>(PhantomData<&'a ()>);

impl Sealed for OnDevice<'_> {}

impl<'a> Memory for OnDevice<'a> {
    type Of<T: 'static> = CudaView<'a, T>;

    fn len<T: 'static>(tensor: &CudaView<'a, T>) -> usize {
        DeviceSlice::len(tensor)
    }
}

/// Views `CudaViewMut<'a, T>` of memory on a device that is written to.
#[derive(Debug, Clone, Copy)]
pub struct OnDeviceMut<'a>(PhantomData<&'a ()>);

impl Sealed for OnDeviceMut<'_> {}

impl<'a> Memory for OnDeviceMut<'a> {
    type Of<T: 'static> = CudaViewMut<'a, T>;

    fn len<T: 'static>(tensor: &CudaViewMut<'a, T>) -> usize {
        DeviceSlice::len(tensor)
    }
}

/// Slices `CudaSlice<T>` on a device, which hold what was uploaded.
#[derive(Debug, Clone, Copy)]
pub struct OwnedOnDevice;

impl Sealed for OwnedOnDevice {}

impl Memory for OwnedOnDevice {
    type Of<T: 'static> = CudaSlice<T>;

    fn len<T: 'static>(tensor: &CudaSlice<T>) -> usize {
        DeviceSlice::len(tensor)
    }
}

/// From a loader's vectors to the device.
struct Upload<'s>(&'s Arc<CudaStream>);

impl<'t, D: Dtype + DeviceRepr> Transfer<'t, Owned, OwnedOnDevice, D> for Upload<'_> {
    type Error = Error;

    fn elements(&mut self, tensor: &'t Vec<D>) -> Result<CudaSlice<D>, Error> {
        upload("upload", self.0, tensor)
    }

    fn floats(&mut self, tensor: &'t Vec<f32>) -> Result<CudaSlice<f32>, Error> {
        upload("upload", self.0, tensor)
    }

    fn ids(&mut self, tensor: &'t Vec<u32>) -> Result<CudaSlice<u32>, Error> {
        upload("upload", self.0, tensor)
    }

    fn flags(&mut self, tensor: &'t Vec<u8>) -> Result<CudaSlice<u8>, Error> {
        upload("upload", self.0, tensor)
    }
}

/// From slices to views of them.
struct View;

impl<'t, D: Dtype> Transfer<'t, OwnedOnDevice, OnDevice<'t>, D> for View {
    type Error = Infallible;

    fn elements(&mut self, tensor: &'t CudaSlice<D>) -> Result<CudaView<'t, D>, Infallible> {
        Ok(tensor.as_view())
    }

    fn floats(&mut self, tensor: &'t CudaSlice<f32>) -> Result<CudaView<'t, f32>, Infallible> {
        Ok(tensor.as_view())
    }

    fn ids(&mut self, tensor: &'t CudaSlice<u32>) -> Result<CudaView<'t, u32>, Infallible> {
        Ok(tensor.as_view())
    }

    fn flags(&mut self, tensor: &'t CudaSlice<u8>) -> Result<CudaView<'t, u8>, Infallible> {
        Ok(tensor.as_view())
    }
}

macro_rules! from_host_to_device {
    ($Tensors:ident) => {
        impl<D: Dtype + DeviceRepr> $Tensors<Owned, D> {
            /// The same on the device of `stream`, copied in its order. The vectors may go when this returns.
            ///
            /// # Errors
            /// [`Error::Driver`] if the driver has no such memory.
            pub fn upload(
                &self,
                stream: &Arc<CudaStream>,
            ) -> Result<$Tensors<OwnedOnDevice, D>, Error> {
                self.transfer(&mut Upload(stream))
            }
        }

        impl<D: Dtype> $Tensors<OwnedOnDevice, D> {
            /// The same as views.
            pub fn as_views(&self) -> $Tensors<OnDevice<'_>, D> {
                let Ok(views) = self.transfer(&mut View);
                views
            }
        }
    };
}

from_host_to_device!(MoeWeights);
from_host_to_device!(MoeInputs);
