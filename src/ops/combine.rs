//! Computes each token's output `y` `[T, H]`: the sum of its experts' rows `yp` `[R, H]` weighted
//! by `routing_weights` `[T, K]`, plus identity experts, an output bias and a shared expert.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};

use crate::abi::{COMBINE_THREADS, CombineArgs, CombineParams};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    reads, vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len, int, product, width};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

const OP: &str = "combine_fwd";

/// Bytes of a row that each thread handles.
const VECTOR_BYTES: usize = 16;

/// The largest second dimension of a grid.
const MAX_GRID_Y: usize = 65535;

/// The terms of the sum.
pub struct CombineInputs<'a, D> {
    /// `[R, H]`, the experts' outputs.
    pub yp: &'a CudaView<'a, D>,
    /// `[T, K]`. Without them each weight is 1, for experts whose inputs or rows are already
    /// weighted.
    pub routing_weights: Option<&'a CudaView<'a, f32>>,
    /// Experts that return the token itself.
    pub identity: Option<Identity<'a, D>>,
    /// `[H]`, added without a weight.
    pub output_bias: Option<&'a CudaView<'a, D>>,
    /// The shared expert's output, added to every token.
    pub shared: Option<Shared<'a, D>>,
}

/// Experts without weights that return the token.
pub struct Identity<'a, D> {
    /// The ids of the identity experts.
    pub experts: Range<u32>,
    /// `[T, K]`, read for slots without a row.
    pub expert_ids: &'a CudaView<'a, u32>,
    /// `[T, H]`
    pub x: &'a CudaView<'a, D>,
    /// `[T, K]`: the weights of identity experts, for rows that are already weighted. Only for f16,
    /// and only without [`CombineInputs::routing_weights`].
    pub routing_weights: Option<&'a CudaView<'a, f32>>,
}

/// The output of a shared expert.
pub struct Shared<'a, D> {
    /// `[T, H]`
    pub y: &'a CudaView<'a, D>,
    /// `[T]`: `y` is multiplied by the sigmoid of these.
    /// [`router_gemm_fwd`](crate::ops::router_gemm) with a gate of one row computes them.
    pub gate: Option<&'a CudaView<'a, f32>>,
    /// The result is the mean of the routed and the shared part, not their sum.
    pub average: bool,
}

impl<'a, D> CombineInputs<'a, D> {
    /// Rows and weights only.
    pub fn new(yp: &'a CudaView<'a, D>, routing_weights: &'a CudaView<'a, f32>) -> Self {
        Self {
            yp,
            routing_weights: Some(routing_weights),
            identity: None,
            output_bias: None,
            shared: None,
        }
    }
}

/// Device addresses for [`combine_fwd_raw`]; 0 for an absent operand.
#[derive(Debug, Clone, Copy, Default)]
pub struct CombineBuffers {
    /// `[T, H]`, written whole.
    pub y: CUdeviceptr,
    /// `[R, H]`
    pub yp: CUdeviceptr,
    /// `[T * K]` `i32`: rows below `T * K`, or -1.
    pub row_of_slot: CUdeviceptr,
    /// `[T, K]` `f32`, or 0.
    pub routing_weights: CUdeviceptr,
    /// `[T, K]` `u32`, or 0 without identity experts.
    pub expert_ids: CUdeviceptr,
    /// `[T, H]`, or 0 without identity experts.
    pub x: CUdeviceptr,
    /// `[H]`, or 0.
    pub output_bias: CUdeviceptr,
    /// `[T, H]`, or 0.
    pub shared: CUdeviceptr,
    /// `[T]` `f32`, or 0; requires `shared`.
    pub shared_gate: CUdeviceptr,
}

/// The options of [`combine_fwd_raw`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CombineOptions {
    /// Ids of experts that return the token itself.
    pub identity: Range<u32>,
    /// The result is halved: the mean of the routed and the shared part. Requires `shared`.
    pub average: bool,
    /// The rows are already weighted, and `routing_weights` apply to identity experts only. Only
    /// for f16.
    pub rows_weighted: bool,
}

/// `y[t, :] = sum over k of routing_weights[t, k] * yp[row_of_slot[t * K + k], :]`, plus the
/// optional terms of [`CombineInputs`]: in f32, in the order of `k`, then the bias, then the shared
/// row, rounded once.
///
/// `yp` is `[T * K, H]` and `y` is `[T, H]`, any `H`. A slot without a row adds its weight times
/// `x` if its id is an identity expert's; otherwise it is skipped, and neither its weight nor any
/// row is read. A token without any term becomes 0. Fastest if rows start at 16-byte boundaries and
/// are multiples of 16 bytes. Asynchronous, ordered on `stream`.
///
/// # Errors
/// [`Error::Length`] for a buffer that does not fit the plan's shape, [`Error::Unsupported`] for an
/// `H` past a grid's limit and for `identity.routing_weights` of another type than f16,
/// [`Error::Mismatch`] for those together with `routing_weights`, [`Error::Context`] for a stream
/// or a buffer of another context, and any launch error.
pub fn combine_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    hidden: usize,
    inputs: &CombineInputs<'_, D>,
    y: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    let shape = plan.shape();
    check_stream(OP, device, stream)?;
    plan.check_stream(OP, stream)?;
    let slots = shape.slots();
    let tokens = product(OP, "num_tokens * hidden", shape.num_tokens, hidden)?;
    let CombineInputs { yp, routing_weights, identity, output_bias, shared } = inputs;
    check_len(OP, "yp", yp.len(), product(OP, "rows * hidden", slots, hidden)?)?;
    let check = |argument, got: Option<usize>, wanted| {
        got.map_or(Ok(()), |got| check_len(OP, argument, got, wanted))
    };
    check("routing_weights", routing_weights.map(CudaView::len), slots)?;
    check("expert_ids", identity.as_ref().map(|identity| identity.expert_ids.len()), slots)?;
    check("x", identity.as_ref().map(|identity| identity.x.len()), tokens)?;
    let of_identities = identity.as_ref().and_then(|identity| identity.routing_weights);
    check("identity.routing_weights", of_identities.map(CudaView::len), slots)?;
    if routing_weights.is_some() && of_identities.is_some() {
        let why = "`identity.routing_weights` are given together with `routing_weights`".into();
        return Err(Error::Mismatch { op: OP, why });
    }
    check("output_bias", output_bias.map(CudaView::len), hidden)?;
    let gate = shared.as_ref().and_then(|shared| shared.gate);
    check("shared.y", shared.as_ref().map(|shared| shared.y.len()), tokens)?;
    check("shared.gate", gate.map(CudaView::len), shape.num_tokens)?;
    check_len(OP, "y", y.len(), tokens)?;

    let row_of_slot = plan.row_of_slot();
    let (y, _y_guard) = writes(OP, "y", y, stream)?;
    let (yp, _yp_guard) = reads(OP, "yp", yp, stream)?;
    let (row_of_slot, _rows_guard) = row_of_slot.device_ptr(stream);
    let name = if of_identities.is_some() { "identity.routing_weights" } else { "routing_weights" };
    let (routing_weights, _weights_guard) =
        optional(OP, name, routing_weights.or(of_identities), stream)?;
    let (ids, x) = identity.as_ref().map(|identity| (identity.expert_ids, identity.x)).unzip();
    let (expert_ids, _ids_guard) = optional(OP, "expert_ids", ids, stream)?;
    let (x, _x_guard) = optional(OP, "x", x, stream)?;
    let (output_bias, _bias_guard) = optional(OP, "output_bias", *output_bias, stream)?;
    let (shared_gate, _gate_guard) = optional(OP, "shared.gate", gate, stream)?;
    let shared_y = shared.as_ref().map(|shared| shared.y);
    let (shared_y, _shared_guard) = optional(OP, "shared.y", shared_y, stream)?;
    let buffers = CombineBuffers {
        y,
        yp,
        row_of_slot,
        routing_weights,
        expert_ids,
        x,
        output_bias,
        shared: shared_y,
        shared_gate,
    };
    let options = CombineOptions {
        identity: identity.as_ref().map_or(0..0, |identity| identity.experts.clone()),
        average: shared.as_ref().is_some_and(|shared| shared.average),
        rows_weighted: of_identities.is_some(),
    };
    // SAFETY: the lengths were checked above, and kernels check the indices that they read from a
    // RoutingPlan. The guards order the launch after earlier uses of the buffers and outlive it.
    unsafe {
        combine_fwd_raw(device, stream.cu_stream(), D::DTYPE, shape, hidden, &options, buffers)
    }
}

/// [`combine_fwd_into`] that allocates its output.
///
/// # Errors
/// Those of [`combine_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn combine_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    hidden: usize,
    inputs: &CombineInputs<'_, D>,
) -> Result<CudaSlice<D>> {
    let len = product(OP, "num_tokens * hidden", plan.shape().num_tokens, hidden)?;
    // SAFETY: the operation writes every element.
    let mut y = unsafe { alloc::<D>(OP, stream, len) }?;
    combine_fwd_into(device, stream, plan, hidden, inputs, &mut y.as_view_mut())?;
    Ok(y)
}

/// [`combine_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer that is not 0 has the elements that [`CombineBuffers`] and `shape` give it, of
/// `dtype` or the type stated there, in memory of `device`'s context that stays valid until the
/// kernel has run; `row_of_slot` contains values below `shape.slots()`, or -1; `y` overlaps none of
/// the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`] for a shape or an `H` out of range, [`Error::Alignment`],
/// [`Error::Mismatch`] for an option without its buffer, and any launch error.
pub unsafe fn combine_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    hidden: usize,
    options: &CombineOptions,
    buffers: CombineBuffers,
) -> Result<()> {
    shape.check_rows(OP)?;
    let CombineBuffers {
        y,
        yp,
        row_of_slot,
        routing_weights,
        expert_ids,
        x,
        output_bias,
        shared,
        shared_gate,
    } = buffers;
    let elements =
        [("y", y), ("yp", yp), ("x", x), ("output_bias", output_bias), ("shared", shared)];
    for (argument, address) in elements {
        check_aligned(OP, argument, address, dtype.size())?;
    }
    let words = [
        ("row_of_slot", row_of_slot),
        ("routing_weights", routing_weights),
        ("expert_ids", expert_ids),
        ("shared_gate", shared_gate),
    ];
    for (argument, address) in words {
        check_aligned(OP, argument, address, 4)?;
    }
    let needs = |good: bool, why: &str| {
        if good { Ok(()) } else { Err(Error::Mismatch { op: OP, why: why.into() }) }
    };
    let identity = &options.identity;
    let some = identity.is_empty() || expert_ids != 0 && x != 0;
    needs(some, "identity experts need expert_ids and x")?;
    needs(shared_gate == 0 || shared != 0, "shared_gate needs shared")?;
    needs(!options.average || shared != 0, "average needs shared")?;
    if options.rows_weighted && dtype != DType::F16 {
        return Err(Error::Unsupported {
            op: OP,
            argument: "identity.routing_weights",
            wanted: "rows of f16".into(),
            got: dtype.to_string(),
        });
    }

    // Whole warps, and no more of them than a row needs.
    let columns = VECTOR_BYTES / dtype.size();
    let threads = hidden.div_ceil(columns).next_multiple_of(32).min(COMBINE_THREADS as usize);
    let blocks = hidden.div_ceil(columns * threads.max(1));
    if blocks > MAX_GRID_Y {
        let wanted = format!("at most {}", MAX_GRID_Y * columns * threads);
        return Err(Error::Unsupported {
            op: OP,
            argument: "hidden",
            wanted,
            got: hidden.to_string(),
        });
    }
    let args = CombineArgs {
        hidden: width(OP, "hidden", hidden)?,
        top_k: int(OP, "top_k", shape.top_k)?,
        first_identity: int(OP, "identity", identity.start as usize)?,
        num_identity: int(OP, "identity", identity.len())?,
        average: options.average.into(),
        rows_weighted: options.rows_weighted.into(),
        vector: vector_rows(hidden * dtype.size(), &elements.map(|(_, address)| address)).into(),
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let launch = Launch {
        grid: [shape.num_tokens as u32, blocks as u32, 1],
        threads: threads as u32,
        shared_bytes: 0,
    };
    let params = CombineParams {
        y,
        yp,
        routing_weights,
        x,
        output_bias,
        shared,
        shared_gate,
        row_of_slot,
        expert_ids,
        args,
        padding: 0,
    };
    // SAFETY: CombineParams is the parameter of moe_combine_fwd in kernels/combine.cu; the caller
    // guarantees the buffers; the shape was checked above, so that num_tokens fits a grid.
    unsafe { device.launch(stream, Kernel::CombineFwd, dtype, launch, &params) }
}
