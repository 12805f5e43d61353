//! Device memory as a kind of [`Memory`], and the conversions to it.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::result::Result;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceSlice};

use crate::buffer::upload;
use crate::dtype::{Dtype, Plain};
use crate::error::Error;
use crate::tensors::private::Sealed;
use crate::tensors::{Memory, MoeInputs, MoeWeights, Owned, Transfer};

/// Views `CudaView<'a, T>` of device memory, which [`MoeLayer`](crate::MoeLayer) reads.
#[derive(Debug, Clone, Copy)]
pub struct OnDevice<'a>(PhantomData<&'a ()>);

impl Sealed for OnDevice<'_> {}

impl<'a> Memory for OnDevice<'a> {
    type Of<T: 'static> = CudaView<'a, T>;

    fn len<T: 'static>(tensor: &CudaView<'a, T>) -> usize {
        DeviceSlice::len(tensor)
    }
}

/// Views `CudaViewMut<'a, T>` of device memory, which [`MoeLayer`](crate::MoeLayer) writes.
#[derive(Debug, Clone, Copy)]
pub struct OnDeviceMut<'a>(PhantomData<&'a ()>);

impl Sealed for OnDeviceMut<'_> {}

impl<'a> Memory for OnDeviceMut<'a> {
    type Of<T: 'static> = CudaViewMut<'a, T>;

    fn len<T: 'static>(tensor: &CudaViewMut<'a, T>) -> usize {
        DeviceSlice::len(tensor)
    }
}

/// Device allocations `CudaSlice<T>`, such as `upload` returns.
#[derive(Debug, Clone, Copy)]
pub struct OwnedOnDevice;

impl Sealed for OwnedOnDevice {}

impl Memory for OwnedOnDevice {
    type Of<T: 'static> = CudaSlice<T>;

    fn len<T: 'static>(tensor: &CudaSlice<T>) -> usize {
        DeviceSlice::len(tensor)
    }
}

/// Copies vectors to the device, on a stream.
struct Upload<'s>(&'s Arc<CudaStream>);

impl<'t, D: Dtype> Transfer<'t, Owned, OwnedOnDevice, D> for Upload<'_> {
    type Error = Error;

    fn elements(&mut self, tensor: &'t Vec<D>) -> Result<CudaSlice<D>, Error> {
        upload("upload", self.0, tensor)
    }

    fn fixed<T: Plain>(&mut self, tensor: &'t Vec<T>) -> Result<CudaSlice<T>, Error> {
        upload("upload", self.0, tensor)
    }
}

/// Borrows device slices as views.
struct View;

impl<'t, D: Dtype> Transfer<'t, OwnedOnDevice, OnDevice<'t>, D> for View {
    type Error = Infallible;

    fn elements(&mut self, tensor: &'t CudaSlice<D>) -> Result<CudaView<'t, D>, Infallible> {
        Ok(tensor.as_view())
    }

    fn fixed<T: Plain>(&mut self, tensor: &'t CudaSlice<T>) -> Result<CudaView<'t, T>, Infallible> {
        Ok(tensor.as_view())
    }
}

macro_rules! conversions_to_the_device {
    ($Tensors:ident) => {
        impl<D: Dtype> $Tensors<Owned, D> {
            /// Copies every tensor to newly allocated memory of the device, ordered on `stream`.
            /// The vectors may be dropped after the call.
            ///
            /// # Errors
            /// [`Error::Driver`] if an allocation or a copy fails.
            pub fn upload(
                &self,
                stream: &Arc<CudaStream>,
            ) -> Result<$Tensors<OwnedOnDevice, D>, Error> {
                self.transfer(&mut Upload(stream))
            }
        }

        impl<D: Dtype> $Tensors<OwnedOnDevice, D> {
            /// Borrows every tensor as a view, which [`MoeLayer`](crate::MoeLayer) reads.
            pub fn as_views(&self) -> $Tensors<OnDevice<'_>, D> {
                let Ok(views) = self.transfer(&mut View);
                views
            }
        }
    };
}

conversions_to_the_device!(MoeWeights);
conversions_to_the_device!(MoeInputs);
