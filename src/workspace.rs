//! Scratch memory of a layer: one arena that the caller owns.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut, DevicePtr, DeviceSlice};

use crate::device::{self, check_aligned};
use crate::error::{Error, Result};

/// Sections of an arena start at multiples of this, which is what device allocations start at.
const SECTION_ALIGNMENT: usize = 256;

/// Scratch memory for [`MoeLayer`](crate::MoeLayer), of at least
/// [`workspace_bytes`](crate::MoeLayer::workspace_bytes) bytes.
///
/// What it holds between calls means nothing; one may serve many layers, one after the other on one
/// stream. Its address does not change, as a captured graph needs.
pub struct Workspace<'a> {
    memory: Memory<'a>,
}

enum Memory<'a> {
    Owned(CudaSlice<u8>),
    Borrowed(CudaViewMut<'a, u8>),
}

impl Workspace<'static> {
    /// Allocates `bytes` on `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver has no such memory.
    pub fn alloc(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        // SAFETY: every operation writes what a later one reads.
        let memory = unsafe { device::alloc("Workspace::alloc", stream, bytes) }?;
        Ok(Self { memory: Memory::Owned(memory) })
    }
}

impl<'a> Workspace<'a> {
    /// Uses memory of the caller's, which starts at a multiple of 256 bytes.
    pub fn borrow(memory: CudaViewMut<'a, u8>) -> Self {
        Self { memory: Memory::Borrowed(memory) }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        match &self.memory {
            Memory::Owned(memory) => memory.len(),
            Memory::Borrowed(memory) => memory.len(),
        }
    }

    /// The stream that it was allocated on.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        match &self.memory {
            Memory::Owned(memory) => memory.stream(),
            Memory::Borrowed(memory) => memory.stream(),
        }
    }

    /// All of it, if it has `wanted` bytes.
    pub(crate) fn view_mut(
        &mut self,
        op: &'static str,
        wanted: usize,
    ) -> Result<CudaViewMut<'_, u8>> {
        let got = self.bytes();
        let view = match &mut self.memory {
            Memory::Owned(memory) => memory.try_slice_mut(..wanted),
            Memory::Borrowed(memory) => memory.try_slice_mut(..wanted),
        };
        let view = view.ok_or(Error::Length { op, argument: "workspace", wanted, got })?;
        let (address, guard) = view.device_ptr(view.stream());
        check_aligned(op, "workspace", address, SECTION_ALIGNMENT)?;
        drop(guard);
        Ok(view)
    }
}

/// A section of an arena: where elements of one type lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section {
    /// Elements.
    len: usize,
    /// Bytes, with the padding that lets the next section start at a boundary.
    bytes: usize,
}

impl Section {
    /// Room for `len` elements of `size` bytes, or an error where `usize` ends.
    pub(crate) fn new(op: &'static str, len: usize, size: usize) -> Result<Self> {
        len.checked_mul(size)
            .and_then(|bytes| bytes.checked_next_multiple_of(SECTION_ALIGNMENT))
            .map(|bytes| Self { len, bytes })
            .ok_or_else(|| too_large(op))
    }

    /// The bytes of all of `sections`, or an error where `usize` ends.
    pub(crate) fn total(op: &'static str, sections: &[Section]) -> Result<usize> {
        let sum = |total: usize, section: &Section| total.checked_add(section.bytes);
        sections.iter().try_fold(0, sum).ok_or_else(|| too_large(op))
    }
}

/// Hands out the sections of a workspace one after the other, in the order in which their bytes were added up.
pub(crate) struct Arena<'a> {
    op: &'static str,
    memory: CudaViewMut<'a, u8>,
    used: usize,
}

impl<'a> Arena<'a> {
    /// All of `workspace`, if it has room for `sections`.
    pub(crate) fn new(
        op: &'static str,
        workspace: &'a mut Workspace<'_>,
        sections: &[Section],
    ) -> Result<Self> {
        let wanted = Section::total(op, sections)?;
        Ok(Self { op, memory: workspace.view_mut(op, wanted)?, used: 0 })
    }

    /// The next section.
    pub(crate) fn take<T: Pod>(&mut self, section: Section) -> Result<CudaViewMut<'a, T>> {
        let (got, start) = (self.memory.len(), self.used);
        let wanted = start.saturating_add(section.bytes);
        let short = || Error::Length { op: self.op, argument: "workspace", wanted, got };
        let mut bytes = self.memory.try_slice_mut(start..wanted).ok_or_else(short)?;
        // SAFETY: every pattern of bytes is a `Pod` value; operations hold the address against the
        // alignment of `T` before they launch.
        let elements = unsafe { bytes.transmute_mut::<T>(section.len) }.ok_or_else(short)?;
        // SAFETY: `used` only grows, so no two sections share a byte, and none is reached through
        // `memory` again, which is borrowed for all of 'a.
        let elements =
            unsafe { std::mem::transmute::<CudaViewMut<'_, T>, CudaViewMut<'a, T>>(elements) };
        self.used = wanted;
        Ok(elements)
    }
}

fn too_large(op: &'static str) -> Error {
    let wanted = format!("at most {} bytes", usize::MAX);
    Error::Unsupported { op, argument: "workspace", wanted, got: "more".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_add_up() {
        let sections = [Section::new("t", 0, 4), Section::new("t", 1, 4), Section::new("t", 65, 4)];
        let sections = sections.map(Result::unwrap);
        assert_eq!(Section::total("t", &sections), Ok(256 + 512));
        assert!(Section::new("t", usize::MAX, 2).is_err());
        let most = Section::new("t", usize::MAX / 2, 1).unwrap();
        assert!(Section::total("t", &[most, most, most]).is_err());
    }
}
