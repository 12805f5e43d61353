//! Multiplies each row by the weights of its expert: `[R, in]` to `[R, out]`, or, for gate and up
//! with the activation, `[R, in]` to `[R, I]`.

mod gate_up;
mod weighted;

pub use gate_up::{
    GateUpBuffers, GateUpTensors, GateUpWeights, grouped_gemm_gate_up_fwd,
    grouped_gemm_gate_up_fwd_into, grouped_gemm_gate_up_fwd_raw,
};

pub use weighted::{
    WeightedGemmBuffers, grouped_gemm_weighted_fwd, grouped_gemm_weighted_fwd_into,
    grouped_gemm_weighted_fwd_raw,
};

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use std::sync::Arc;

use crate::abi::{
    GEMM_BLOCK_M, GEMM_BLOCK_N, GEMM_THREADS_FMA, GEMM_THREADS_MMA, GEMM_TILE_GROUP,
    GROUPED_GEMM_SMEM_BYTES, GroupedGemmArgs, GroupedGemmParams,
};
use crate::config::WeightOrder;
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    reads, vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int, product, width};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

const OP: &str = "grouped_gemm_fwd";

/// The rows of `x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// A row per token, `[T, in]`: row `r` of the output reads the row of its token. No `permute`
    /// is needed.
    Gathered,
    /// A row per row of the output, `[R, in]`, in expert order.
    Grouped,
}

/// The weights of all experts for one product, in the checkpoint's order.
#[derive(Debug, Clone, Copy)]
pub struct LinearWeights<'a, D> {
    /// `[E, out, in]` or `[E, in, out]`, by `order`.
    pub w: &'a CudaView<'a, D>,
    /// `[E, out]`, added to the f32 sums.
    pub bias: Option<&'a CudaView<'a, D>>,
    /// Which dimension of `w` is contiguous.
    pub order: WeightOrder,
}

impl<'a, D> LinearWeights<'a, D> {
    /// `w` `[E, out, in]`, and no bias.
    pub fn new(w: &'a CudaView<'a, D>) -> Self {
        Self { w, bias: None, order: WeightOrder::OutIn }
    }
}

/// Device addresses for [`grouped_gemm_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct GroupedGemmBuffers {
    /// `[R, out]`; every element is written.
    pub y: CUdeviceptr,
    /// `[T, in]` with `token_of_row`, else `[R, in]`.
    pub x: CUdeviceptr,
    /// `[E, out, in]` or `[E, in, out]`.
    pub w: CUdeviceptr,
    /// `[E, out]`, or 0 (null): no bias.
    pub bias: CUdeviceptr,
    /// `[R]` `i32`, tokens below `T` for the rows in use; or 0 (null): `x` is in expert order.
    pub token_of_row: CUdeviceptr,
    /// `[E + 1]` `i32`; the last is the number of rows in use.
    pub expert_offsets: CUdeviceptr,
    /// Four `i32` per tile: expert, first row, number of rows (1 to 128), unused.
    pub tiles: CUdeviceptr,
    /// One `i32`, the number of tiles.
    pub num_tiles: CUdeviceptr,
}

impl GroupedGemmBuffers {
    fn check_aligned(&self, op: &'static str, dtype: DType) -> Result<()> {
        let Self { y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles } = *self;
        for (name, address) in [("y", y), ("x", x), ("w", w), ("bias", bias)] {
            check_aligned(op, name, address, dtype.size())?;
        }
        for (name, address) in [
            ("token_of_row", token_of_row),
            ("expert_offsets", expert_offsets),
            ("tiles", tiles),
            ("num_tiles", num_tiles),
        ] {
            check_aligned(op, name, address, 4)?;
        }
        Ok(())
    }

    /// The kernel's parameters.
    fn params(self, args: GroupedGemmArgs) -> GroupedGemmParams {
        let Self { y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles } = self;
        GroupedGemmParams { y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles, args }
    }
}

/// `y[r, :] = w[e] * row + bias[e]`, where `e` is the expert of row `r`, and `rows` selects its row
/// of `x`.
///
/// `y` is `[T * K, out]`; any widths from 1. Sums are f32, in the order of the inputs, for any
/// order of the weights. Unused rows of `y` (from `expert_offsets[E]` on) are zeroed. Copies are
/// fastest if all rows, those of `[E, in, out]` too, start at 16-byte boundaries. Asynchronous,
/// ordered on `stream`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit the plan's shape,
/// [`Error::Unsupported`](crate::Error::Unsupported) for a width out of range,
/// [`Error::Context`](crate::Error::Context) for a stream, a buffer or a plan of another context,
/// and any launch error.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    out_features: usize,
    in_features: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    weights: LinearWeights<'_, D>,
    y: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    let shape = plan.shape();
    let LinearWeights { w, bias, order } = weights;
    check_stream(OP, device, stream)?;
    plan.check_stream(OP, stream)?;
    check_rows(OP, shape, rows, in_features, x)?;
    let features = product(OP, "num_experts * out_features", shape.num_experts, out_features)?;
    check_len(
        OP,
        "w",
        w.len(),
        product(OP, "num_experts * out_features * in_features", features, in_features)?,
    )?;
    if let Some(bias) = bias {
        check_len(OP, "bias", bias.len(), features)?;
    }
    check_len(OP, "y", y.len(), product(OP, "rows * out_features", shape.slots(), out_features)?)?;
    let (token_of_row, expert_offsets) = (plan.token_of_row(), plan.expert_offsets());
    let (tiles, num_tiles) = (plan.tiles(), plan.num_tiles());
    let (y, _y_guard) = writes(OP, "y", y, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let (w, _w_guard) = reads(OP, "w", w, stream)?;
    let (bias, _bias_guard) = optional(OP, "bias", bias, stream)?;
    let (token_of_row, _tokens_guard) = token_of_row.device_ptr(stream);
    let (expert_offsets, _offsets_guard) = expert_offsets.device_ptr(stream);
    let (tiles, _tiles_guard) = tiles.device_ptr(stream);
    let (num_tiles, _num_tiles_guard) = num_tiles.device_ptr(stream);
    let buffers = GroupedGemmBuffers {
        y,
        x,
        w,
        bias,
        token_of_row: if rows == Rows::Gathered { token_of_row } else { 0 },
        expert_offsets,
        tiles,
        num_tiles,
    };
    // SAFETY: the lengths were checked above, and kernels check the indices that they read from a
    // RoutingPlan, whose parts have the lengths of its shape. The guards order the launch after
    // earlier uses of the buffers and outlive it.
    unsafe {
        grouped_gemm_fwd_raw(
            device,
            stream.cu_stream(),
            D::DTYPE,
            shape,
            out_features,
            in_features,
            order,
            buffers,
        )
    }
}

/// [`grouped_gemm_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`grouped_gemm_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the
/// allocation fails.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    out_features: usize,
    in_features: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    weights: LinearWeights<'_, D>,
) -> Result<CudaSlice<D>> {
    let len = product(OP, "rows * out_features", plan.shape().slots(), out_features)?;
    // SAFETY: the operation writes every element.
    let mut y = unsafe { alloc::<D>(OP, stream, len) }?;
    grouped_gemm_fwd_into(
        device,
        stream,
        plan,
        out_features,
        in_features,
        rows,
        x,
        weights,
        &mut y.as_view_mut(),
    )?;
    Ok(y)
}

/// [`grouped_gemm_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`GroupedGemmBuffers`] and `shape` state, of `dtype` or `i32`,
/// in memory of `device`'s context that stays valid until the kernel has run; `token_of_row`,
/// `expert_offsets`, `tiles` and `num_tiles` are those of one plan for `shape`; `y` overlaps none
/// of the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape or a width out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
#[allow(clippy::too_many_arguments)]
pub unsafe fn grouped_gemm_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    out_features: usize,
    in_features: usize,
    order: WeightOrder,
    buffers: GroupedGemmBuffers,
) -> Result<()> {
    shape.check_rows(OP)?;
    buffers.check_aligned(OP, dtype)?;
    let GroupedGemmBuffers { y, x, w, token_of_row, .. } = buffers;
    width(OP, "out_features", out_features)?;
    width(OP, "in_features", in_features)?;
    let layout = Layout { order, out_features, step: 1 };
    let fast = layout.is_fast(dtype, in_features, &[x, w]);
    let x_rows = if token_of_row == 0 { shape.slots() } else { shape.num_tokens };
    let args = layout.args(OP, dtype, shape, x_rows, out_features, in_features, y, fast)?;
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let launch = launch(OP, dtype, shape, out_features, GEMM_BLOCK_N as usize)?;
    let params = buffers.params(args);
    let kernel = match order {
        WeightOrder::InOut if fast => Kernel::GroupedGemmFwdInOut,
        _ => Kernel::GroupedGemmFwd,
    };
    // SAFETY: moe_grouped_gemm_fwd and moe_grouped_gemm_fwd_in_out in kernels/grouped_gemm.cu take
    // GroupedGemmParams; the caller guarantees the buffers; shape and widths were checked.
    unsafe { device.launch(stream, kernel, dtype, launch, &params) }
}

// ---- Common to all products
// ----------------------------------------------------------------------

/// The layout of an expert's weights in their tensor.
#[derive(Debug, Clone, Copy)]
struct Layout {
    order: WeightOrder,
    /// Features of an expert in the tensor.
    out_features: usize,
    /// Features from one of gate (or up) to the next: 2 for interleaved ones, else 1.
    step: usize,
}

impl Layout {
    /// True if all rows of `x` and of the weights start at 16-byte boundaries.
    fn is_fast(self, dtype: DType, in_features: usize, addresses: &[CUdeviceptr]) -> bool {
        let pitch = match self.order {
            WeightOrder::OutIn => in_features,
            WeightOrder::InOut => self.out_features,
        };
        [in_features, pitch].iter().all(|width| vector_rows(width * dtype.size(), addresses))
    }

    /// The arguments of a product with `out_features` outputs; `fast` is
    /// [`is_fast`](Self::is_fast).
    #[allow(clippy::too_many_arguments, reason = "each is a field")]
    fn args(
        self,
        op: &'static str,
        dtype: DType,
        shape: RoutingShape,
        x_rows: usize,
        out_features: usize,
        in_features: usize,
        y: CUdeviceptr,
        fast: bool,
    ) -> Result<GroupedGemmArgs> {
        let Self { order, out_features: features, step } = self;
        let (out_stride, in_stride) = match order {
            WeightOrder::OutIn => (product(op, "in_features", step, in_features)?, 1),
            WeightOrder::InOut => (step, features),
        };
        Ok(GroupedGemmArgs {
            // Widths are at most 2^30, so twice their product fits.
            expert_stride: features as i64 * in_features as i64,
            out_stride: int(op, "in_features", out_stride)?,
            in_stride: int(op, "out_features", in_stride)?,
            rows: int(op, "num_tokens * top_k", shape.slots())?,
            x_rows: int(op, "rows of x", x_rows)?,
            max_tiles: int(op, "tiles", max_tiles(shape))?,
            out_features: int(op, "out_features", out_features)?,
            in_features: int(op, "in_features", in_features)?,
            num_experts: int(op, "num_experts", shape.num_experts)?,
            vector_load: fast.into(),
            vector_store: vector_rows(out_features * dtype.size(), &[y]).into(),
        })
    }
}

/// Checks the length of `x` for `rows`.
fn check_rows<D>(
    op: &'static str,
    shape: RoutingShape,
    rows: Rows,
    in_features: usize,
    x: &CudaView<'_, D>,
) -> Result<()> {
    let x_rows = match rows {
        Rows::Gathered => shape.num_tokens,
        Rows::Grouped => shape.slots(),
    };
    check_len(op, "x", x.len(), product(op, "rows of x * in_features", x_rows, in_features)?)
}

/// The bound on tiles for any routing: a tile has at least one row, and an expert at most one short
/// tile.
fn max_tiles(shape: RoutingShape) -> usize {
    let slots = shape.slots();
    slots.min(slots.div_ceil(GEMM_BLOCK_M as usize) + shape.num_experts)
}

/// The launch for at most [`max_tiles`], rounded up to whole groups, with `columns` outputs per
/// block.
fn launch(
    op: &'static str,
    dtype: DType,
    shape: RoutingShape,
    out_features: usize,
    columns: usize,
) -> Result<Launch> {
    let blocks = max_tiles(shape).next_multiple_of(GEMM_TILE_GROUP as usize)
        * out_features.div_ceil(columns);
    let threads = match dtype {
        DType::F32 => GEMM_THREADS_FMA,
        DType::F16 | DType::BF16 => GEMM_THREADS_MMA,
    };
    Ok(Launch {
        grid: [int(op, "number of blocks", blocks)? as u32, 1, 1],
        threads: threads as u32,
        shared_bytes: GROUPED_GEMM_SMEM_BYTES as u32,
    })
}
