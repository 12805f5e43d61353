//! Chooses each token's experts and weighs them: `logits` `[T, E]` to `expert_ids` and `weights` `[T, K]`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use crate::abi::{
    ROUTE_NARROW_MAX_EXPERTS, ROUTE_PICK_MAX_TOP_K, ROUTE_PICK_THREADS, ROUTE_SORT_ENTRY_BYTES,
    ROUTE_SORT_THREADS, ROUTE_WIDE_MAX_EXPERTS, RouteArgs,
};
use crate::config::RouterConfig;
use crate::device::{
    Argument, CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream,
    vector_rows,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int};
use crate::shape::RoutingShape;

const OP: &str = "route_fwd";

/// Device addresses for [`route_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct RouteBuffers {
    /// `[T, K]` `u32`, written whole.
    pub expert_ids: CUdeviceptr,
    /// `[T, K]` `f32`, written whole.
    pub weights: CUdeviceptr,
    /// `[T, E]`
    pub logits: CUdeviceptr,
}

/// What [`route_fwd`] returns.
#[derive(Debug)]
pub struct Routing {
    /// `[T, K]`, the experts of each token, strongest first; the ids of a token are distinct.
    pub expert_ids: CudaSlice<u32>,
    /// `[T, K]`, their weights.
    pub weights: CudaSlice<f32>,
}

/// The `K` experts of largest logit for each token, strongest first and ties to the lower id, and their
/// weights in f32, as `router` says.
///
/// Any logits will do: NaN counts as `-inf`, and infinite maxima share equally. Ids agree with
/// [`reference::route_fwd`](crate::reference::route_fwd) bit for bit; weights are the same bits on every
/// device. Rows of 16-byte multiples that start at 16-byte boundaries are read fastest. Asynchronous,
/// ordered on `stream`.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range,
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit it,
/// [`Error::Mismatch`](crate::Error::Mismatch) for a stream of another context, and what a launch can meet.
pub fn route_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    router: &RouterConfig,
    logits: &CudaView<'_, D>,
    expert_ids: &mut CudaViewMut<'_, u32>,
    weights: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    shape.check(OP)?;
    check_stream(OP, device, stream)?;
    check_len(OP, "logits", logits.len(), shape.logits())?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(OP, "weights", weights.len(), shape.slots())?;
    let (expert_ids, _ids_guard) = expert_ids.device_ptr_mut(stream);
    let (weights, _weights_guard) = weights.device_ptr_mut(stream);
    let (logits, _logits_guard) = logits.device_ptr(stream);
    let buffers = RouteBuffers { expert_ids, weights, logits };
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { route_fwd_raw(device, stream.cu_stream(), D::DTYPE, shape, router, buffers) }
}

/// [`route_fwd_into`] new buffers.
///
/// # Errors
/// Those of [`route_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation fails.
pub fn route_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    shape: RoutingShape,
    router: &RouterConfig,
    logits: &CudaView<'_, D>,
) -> Result<Routing> {
    shape.check(OP)?;
    // SAFETY: the operation writes every element.
    let mut expert_ids = unsafe { alloc::<u32>(OP, stream, shape.slots()) }?;
    // SAFETY: as above.
    let mut weights = unsafe { alloc::<f32>(OP, stream, shape.slots()) }?;
    let (ids_view, weights_view) = (&mut expert_ids.as_view_mut(), &mut weights.as_view_mut());
    route_fwd_into(device, stream, shape, router, logits, ids_view, weights_view)?;
    Ok(Routing { expert_ids, weights })
}

/// [`route_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`RouteBuffers`] and `shape` give it, `logits` of `dtype`, in
/// memory of `device`'s context that stays valid until the kernel has run; no two overlap; `stream` is
/// a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and what a launch can meet.
pub unsafe fn route_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    router: &RouterConfig,
    buffers: RouteBuffers,
) -> Result<()> {
    shape.check(OP)?;
    let RouteBuffers { expert_ids, weights, logits } = buffers;
    check_aligned(OP, "expert_ids", expert_ids, 4)?;
    check_aligned(OP, "weights", weights, 4)?;
    check_aligned(OP, "logits", logits, dtype.size())?;
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let sort_length = shape.num_experts.next_power_of_two();
    let args = RouteArgs {
        num_tokens: int(OP, "num_tokens", shape.num_tokens)?,
        num_experts: int(OP, "num_experts", shape.num_experts)?,
        top_k: int(OP, "top_k", shape.top_k)?,
        sort_length: int(OP, "num_experts", sort_length)?,
        sum_all: (*router == RouterConfig::softmax_top_k(false)).into(),
        vector: vector_rows(shape.num_experts * dtype.size(), &[logits]).into(),
    };
    let (kernel, launch) = if args.top_k > ROUTE_PICK_MAX_TOP_K
        || args.num_experts > ROUTE_WIDE_MAX_EXPERTS
    {
        let shared_bytes = sort_length as u32 * ROUTE_SORT_ENTRY_BYTES as u32;
        let grid = [args.num_tokens as u32, 1, 1];
        (Kernel::RouteFwdSort, Launch { grid, threads: ROUTE_SORT_THREADS as u32, shared_bytes })
    } else {
        let narrow = args.num_experts <= ROUTE_NARROW_MAX_EXPERTS;
        let kernel = if narrow { Kernel::RouteFwdNarrow } else { Kernel::RouteFwdWide };
        let threads = ROUTE_PICK_THREADS as u32;
        let grid = [(args.num_tokens as u32).div_ceil(threads / 32), 1, 1];
        (kernel, Launch { grid, threads, shared_bytes: 0 })
    };
    let arguments = [
        Argument::of(&expert_ids),
        Argument::of(&weights),
        Argument::of(&logits),
        Argument::of(&args),
    ];
    // SAFETY: the arguments follow the entries of kernels/route.cu, whose limits on E and K chose the
    // kernel above; the caller vouches for the buffers.
    unsafe { device.launch(stream, kernel, dtype, launch, &arguments) }
}
