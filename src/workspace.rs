//! The workspace of a layer: one arena of scratch memory that the caller owns.

use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut, DevicePtr, DeviceSlice};

use crate::buffer::{self, check_aligned};
use crate::error::{Error, Result};

/// The alignment of sections in bytes: that of device allocations.
const SECTION_ALIGNMENT: usize = 256;

/// Scratch memory of a [`MoeLayer`](crate::MoeLayer), of at least
/// [`workspace_bytes`](crate::MoeLayer::workspace_bytes) bytes.
///
/// Its contents do not persist between calls, so one workspace can serve many layers in turn on one
/// stream. Its address is fixed, as a captured graph requires.
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
    /// [`Error::Driver`] if the driver cannot allocate the memory.
    pub fn alloc(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        // SAFETY: every operation writes what a later one reads.
        let memory = unsafe { buffer::alloc("Workspace::alloc", stream, bytes) }?;
        Ok(Self { memory: Memory::Owned(memory) })
    }
}

impl<'a> Workspace<'a> {
    /// Uses memory of the caller. Its address must be a multiple of 256 bytes, which each call
    /// checks.
    pub fn borrow(memory: CudaViewMut<'a, u8>) -> Self {
        Self { memory: Memory::Borrowed(memory) }
    }

    /// The size in bytes.
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

    /// The first `wanted` bytes, after checking size and alignment.
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

/// The size of one section of an arena.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section {
    /// The number of elements.
    len: usize,
    /// The size in bytes, padded to [`SECTION_ALIGNMENT`].
    bytes: usize,
}

impl Section {
    /// A section of `len` elements of `size` bytes; returns an error if the size overflows `usize`.
    pub(crate) fn new(op: &'static str, len: usize, size: usize) -> Result<Self> {
        len.checked_mul(size)
            .and_then(|bytes| bytes.checked_next_multiple_of(SECTION_ALIGNMENT))
            .map(|bytes| Self { len, bytes })
            .ok_or_else(|| too_large(op))
    }

    /// The size of all `sections` in bytes; returns an error if it overflows `usize`.
    pub(crate) fn total(op: &'static str, sections: &[Section]) -> Result<usize> {
        let sum = |total: usize, section: &Section| total.checked_add(section.bytes);
        sections.iter().try_fold(0, sum).ok_or_else(|| too_large(op))
    }
}

/// Hands out the sections of a workspace, one after another.
pub(crate) struct Arena<'a> {
    op: &'static str,
    memory: CudaViewMut<'a, u8>,
    used: usize,
}

impl<'a> Arena<'a> {
    /// Checks that `workspace` has room for `sections`, of which none has been taken yet.
    pub(crate) fn new(
        op: &'static str,
        workspace: &'a mut Workspace<'_>,
        sections: &[Section],
    ) -> Result<Self> {
        let wanted = Section::total(op, sections)?;
        Ok(Self { op, memory: workspace.view_mut(op, wanted)?, used: 0 })
    }

    /// Returns the next section.
    pub(crate) fn take<T: Pod>(&mut self, section: Section) -> Result<CudaViewMut<'a, T>> {
        let (got, start) = (self.memory.len(), self.used);
        let wanted = start.saturating_add(section.bytes);
        let short = || Error::Length { op: self.op, argument: "workspace", wanted, got };
        let mut bytes = self.memory.try_slice_mut(start..wanted).ok_or_else(short)?;
        // SAFETY: every pattern of bytes is a `Pod` value; operations check the address against the
        // alignment of `T` before they launch.
        let elements = unsafe { bytes.transmute_mut::<T>(section.len) }.ok_or_else(short)?;
        // SAFETY: `used` only grows, so sections do not overlap, and no section is accessed through
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
    fn sizes_of_sections_are_padded_and_checked() {
        let sections = [Section::new("t", 0, 4), Section::new("t", 1, 4), Section::new("t", 65, 4)];
        let sections = sections.map(Result::unwrap);
        assert_eq!(Section::total("t", &sections), Ok(256 + 512));
        assert!(Section::new("t", usize::MAX, 2).is_err());
        let most = Section::new("t", usize::MAX / 2, 1).unwrap();
        assert!(Section::total("t", &[most, most, most]).is_err());
    }
}
