//! Random numbers `[len]`, each of which depends on the seed and its index alone.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaViewMut};

use crate::abi::{
    NOISE_GUMBEL, NOISE_NORMAL, NOISE_THREADS, NOISE_UNIFORM, NoiseArgs, NoiseParams,
};
use crate::config::NoiseDistribution;
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, vector_rows,
    writes,
};
use crate::dtype::DType;
use crate::error::{Result, int};

const OP: &str = "noise_fwd";

/// Elements of one counter of the generator.
const GROUP: usize = 4;

/// Fills `noise` with elements `offset`, `offset + 1`, ... (modulo 2^64) of the sequence that
/// belongs to `seed`.
///
/// An element depends on the seed and its index alone: separate calls for parts of a sequence give
/// the same elements as one call. Sequences of different distributions with one seed are not
/// independent of each other. The generator is Philox4x32-10. Asynchronous, ordered on `stream`;
/// the same bits on every device.
///
/// # Errors
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
pub fn noise_fwd_into(
    device: &Device,
    stream: &CudaStream,
    distribution: NoiseDistribution,
    seed: u64,
    offset: u64,
    noise: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    check_stream(OP, device, stream)?;
    let len = noise.len();
    let (noise, _guard) = writes(OP, "noise", noise, stream)?;
    // SAFETY: the view has `len` elements. The guard orders the launch after earlier uses and
    // outlives it.
    unsafe { noise_fwd_raw(device, stream.cu_stream(), distribution, seed, offset, len, noise) }
}

/// [`noise_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`noise_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation
/// fails.
pub fn noise_fwd(
    device: &Device,
    stream: &Arc<CudaStream>,
    distribution: NoiseDistribution,
    seed: u64,
    offset: u64,
    len: usize,
) -> Result<CudaSlice<f32>> {
    // SAFETY: the operation writes every element.
    let mut noise = unsafe { alloc::<f32>(OP, stream, len) }?;
    noise_fwd_into(device, stream, distribution, seed, offset, &mut noise.as_view_mut())?;
    Ok(noise)
}

/// [`noise_fwd_into`] on an address.
///
/// # Safety
/// `noise` has `len` `f32` in memory of `device`'s context that stays valid until the kernel has
/// run; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a `len` that exceeds the largest grid,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn noise_fwd_raw(
    device: &Device,
    stream: CUstream,
    distribution: NoiseDistribution,
    seed: u64,
    offset: u64,
    len: usize,
    noise: CUdeviceptr,
) -> Result<()> {
    check_aligned(OP, "noise", noise, 4)?;
    let skipped = (offset % GROUP as u64) as usize;
    // A thread per group of four elements, the skipped ones included.
    let threads = len.saturating_add(skipped).div_ceil(GROUP);
    let blocks = int(OP, "blocks of 1024 elements", threads.div_ceil(NOISE_THREADS as usize))?;
    let args = NoiseArgs {
        seed,
        offset,
        len: len as i64,
        distribution: match distribution {
            NoiseDistribution::Uniform => NOISE_UNIFORM,
            NoiseDistribution::Normal => NOISE_NORMAL,
            NoiseDistribution::Gumbel => NOISE_GUMBEL,
        },
        vector: (skipped == 0 && vector_rows(0, &[noise])).into(),
    };
    if len == 0 {
        return Ok(());
    }
    let launch =
        Launch { grid: [blocks as u32, 1, 1], threads: NOISE_THREADS as u32, shared_bytes: 0 };
    let params = NoiseParams { noise, args };
    // SAFETY: the parameter is that of kernels/noise.cu; the caller guarantees the buffer.
    unsafe { device.launch(stream, Kernel::NoiseFwd, DType::F32, launch, &params) }
}
