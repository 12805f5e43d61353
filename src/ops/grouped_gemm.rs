//! Each expert's weights times the rows that are its own: `[R, K]` to `[R, N]`, or to `[R, I]` through SwiGLU.

use cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr,
};
use std::sync::Arc;

use crate::abi::{
    GEMM_BLOCK_M, GEMM_BLOCK_N, GEMM_THREADS_FMA, GEMM_THREADS_MMA, GEMM_TILE_GROUP,
    GROUPED_GEMM_SMEM_BYTES, GroupedGemmArgs,
};
use crate::device::{
    Argument, CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream,
    vector_rows,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int, product, width};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

/// What `x` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// A row per token, `[T, K]`: row `r` of the output reads that of its token. No `permute` is needed.
    Gathered,
    /// A row per row of the output, `[R, K]`, in expert order.
    Grouped,
}

/// Device addresses for [`grouped_gemm_fwd_raw`] and [`grouped_gemm_swiglu_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct GroupedGemmBuffers {
    /// `[R, N]`, for SwiGLU `[R, I]`; written whole.
    pub y: CUdeviceptr,
    /// `[T, K]` with `token_of_row`, else `[R, K]`.
    pub x: CUdeviceptr,
    /// `[E, N, K]`, for SwiGLU `[E, 2I, K]`: of each expert the gate's rows, then up's.
    pub w: CUdeviceptr,
    /// `[R]` `i32`, tokens below `T` for the rows in use; or 0 (null): `x` is in expert order.
    pub token_of_row: CUdeviceptr,
    /// `[E + 1]` `i32`; the last is the number of rows in use.
    pub expert_offsets: CUdeviceptr,
    /// Four `i32` a tile: expert, first row, number of rows (1 to 128), nothing.
    pub tiles: CUdeviceptr,
    /// One `i32`: how many tiles there are.
    pub num_tiles: CUdeviceptr,
}

/// One of the two products: what differs between them on the host.
#[derive(Clone, Copy)]
struct Variant {
    op: &'static str,
    kernel: Kernel,
    /// Rows of weights behind a column of the output.
    parts: usize,
    /// The names of the output, of its width and of the weights, for errors.
    y: &'static str,
    n: &'static str,
    w: &'static str,
}

const PLAIN: Variant = Variant {
    op: "grouped_gemm_fwd",
    kernel: Kernel::GroupedGemmFwd,
    parts: 1,
    y: "y",
    n: "n",
    w: "w",
};

const SWIGLU: Variant = Variant {
    op: "grouped_gemm_swiglu_fwd",
    kernel: Kernel::GroupedGemmFwdSwiglu,
    parts: 2,
    y: "act",
    n: "intermediate",
    w: "gate_up",
};

/// `y[r, :] = w[e] * row`, where `e` is the expert of row `r`, and `rows` says what its row of `x` is.
///
/// `w` is `[E, N, K]`, as checkpoints have it, and `y` is `[T * K, N]`; any `N` and `K` from 1. Sums
/// are f32, in the order of `K`; rows that no slot owns become zero. Rows of 16-byte multiples that
/// start at 16-byte boundaries move fastest. Asynchronous, ordered on `stream`.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit the plan's shape,
/// [`Error::Unsupported`](crate::Error::Unsupported) for a width out of range,
/// [`Error::Mismatch`](crate::Error::Mismatch) for a stream or plan of another context, and what a
/// launch can meet.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    n: usize,
    k: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    w: &CudaView<'_, D>,
    y: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    PLAIN.launch_into(device, stream, plan, n, k, rows, x, w, y)
}

/// [`grouped_gemm_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`grouped_gemm_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation fails.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_fwd<D: Dtype + DeviceRepr>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    n: usize,
    k: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    w: &CudaView<'_, D>,
) -> Result<CudaSlice<D>> {
    PLAIN.launch_new(device, stream, plan, n, k, rows, x, w)
}

/// [`grouped_gemm_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`GroupedGemmBuffers`] and `shape` give it, of `dtype` or `i32`,
/// in memory of `device`'s context that stays valid until the kernel has run; `token_of_row`,
/// `expert_offsets`, `tiles` and `num_tiles` are those of one plan for `shape`; `y` overlaps none of
/// the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape or a width out of range,
/// [`Error::Alignment`](crate::Error::Alignment), and what a launch can meet.
pub unsafe fn grouped_gemm_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    n: usize,
    k: usize,
    buffers: GroupedGemmBuffers,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { PLAIN.launch_raw(device, stream, dtype, shape, n, k, buffers) }
}

/// `act[r, i] = silu(gate) * up`, where `gate` is column `i` of row `r` times the expert's first `I`
/// rows of `gate_up`, `up` the same with its last `I`, and `silu(g) = g / (1 + exp(-g))`.
///
/// `gate_up` is `[E, 2I, K]` and `act` is `[T * K, I]`. Everything up to `act` is f32. See
/// [`grouped_gemm_fwd_into`] for the rest.
///
/// # Errors
/// Those of [`grouped_gemm_fwd_into`].
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_swiglu_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    intermediate: usize,
    k: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    gate_up: &CudaView<'_, D>,
    act: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    SWIGLU.launch_into(device, stream, plan, intermediate, k, rows, x, gate_up, act)
}

/// [`grouped_gemm_swiglu_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`grouped_gemm_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation fails.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_swiglu_fwd<D: Dtype + DeviceRepr>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    intermediate: usize,
    k: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    gate_up: &CudaView<'_, D>,
) -> Result<CudaSlice<D>> {
    SWIGLU.launch_new(device, stream, plan, intermediate, k, rows, x, gate_up)
}

/// [`grouped_gemm_swiglu_fwd_into`] on addresses.
///
/// # Safety
/// As for [`grouped_gemm_fwd_raw`].
///
/// # Errors
/// Those of [`grouped_gemm_fwd_raw`].
pub unsafe fn grouped_gemm_swiglu_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    intermediate: usize,
    k: usize,
    buffers: GroupedGemmBuffers,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { SWIGLU.launch_raw(device, stream, dtype, shape, intermediate, k, buffers) }
}

impl Variant {
    #[allow(clippy::too_many_arguments)]
    fn launch_into<D: Dtype>(
        self,
        device: &Device,
        stream: &CudaStream,
        plan: &RoutingPlan<'_>,
        n: usize,
        k: usize,
        rows: Rows,
        x: &CudaView<'_, D>,
        w: &CudaView<'_, D>,
        y: &mut CudaViewMut<'_, D>,
    ) -> Result<()> {
        let Self { op, parts, .. } = self;
        let shape = plan.shape();
        check_stream(op, device, stream)?;
        plan.check_stream(op, stream)?;
        let x_rows = match rows {
            Rows::Gathered => shape.num_tokens,
            Rows::Grouped => shape.slots(),
        };
        let matrix = product(op, "n * k", product(op, "parts * n", parts, n)?, k)?;
        check_len(op, "x", x.len(), product(op, "rows of x * k", x_rows, k)?)?;
        check_len(
            op,
            self.w,
            w.len(),
            product(op, "num_experts * n * k", shape.num_experts, matrix)?,
        )?;
        check_len(op, self.y, y.len(), product(op, "rows * n", shape.slots(), n)?)?;
        let (token_of_row, expert_offsets) = (plan.token_of_row(), plan.expert_offsets());
        let (tiles, num_tiles) = (plan.tiles(), plan.num_tiles());
        let (y, _y_guard) = y.device_ptr_mut(stream);
        let (x, _x_guard) = x.device_ptr(stream);
        let (w, _w_guard) = w.device_ptr(stream);
        let (token_of_row, _tokens_guard) = token_of_row.device_ptr(stream);
        let (expert_offsets, _offsets_guard) = expert_offsets.device_ptr(stream);
        let (tiles, _tiles_guard) = tiles.device_ptr(stream);
        let (num_tiles, _num_tiles_guard) = num_tiles.device_ptr(stream);
        let token_of_row = if rows == Rows::Gathered { token_of_row } else { 0 };
        let buffers =
            GroupedGemmBuffers { y, x, w, token_of_row, expert_offsets, tiles, num_tiles };
        // SAFETY: the lengths were checked above, and a RoutingPlan's parts are those of one plan for
        // its shape. The guards order the launch after earlier uses of the buffers and outlive it.
        unsafe { self.launch_raw(device, stream.cu_stream(), D::DTYPE, shape, n, k, buffers) }
    }

    #[allow(clippy::too_many_arguments)]
    fn launch_new<D: Dtype + DeviceRepr>(
        self,
        device: &Device,
        stream: &Arc<CudaStream>,
        plan: &RoutingPlan<'_>,
        n: usize,
        k: usize,
        rows: Rows,
        x: &CudaView<'_, D>,
        w: &CudaView<'_, D>,
    ) -> Result<CudaSlice<D>> {
        let len = product(self.op, "rows * n", plan.shape().slots(), n)?;
        // SAFETY: the operation writes every element.
        let mut y = unsafe { alloc::<D>(self.op, stream, len) }?;
        self.launch_into(device, stream, plan, n, k, rows, x, w, &mut y.as_view_mut())?;
        Ok(y)
    }

    /// # Safety
    /// As for [`grouped_gemm_fwd_raw`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn launch_raw(
        self,
        device: &Device,
        stream: CUstream,
        dtype: DType,
        shape: RoutingShape,
        n: usize,
        k: usize,
        buffers: GroupedGemmBuffers,
    ) -> Result<()> {
        let Self { op, .. } = self;
        shape.check(op)?;
        let GroupedGemmBuffers { y, x, w, token_of_row, expert_offsets, tiles, num_tiles } =
            buffers;
        for (name, address, bytes) in [
            (self.y, y, dtype.size()),
            ("x", x, dtype.size()),
            (self.w, w, dtype.size()),
            ("token_of_row", token_of_row, 4),
            ("expert_offsets", expert_offsets, 4),
            ("tiles", tiles, 4),
            ("num_tiles", num_tiles, 4),
        ] {
            check_aligned(op, name, address, bytes)?;
        }
        let args = GroupedGemmArgs {
            rows: int(op, "num_tokens * top_k", shape.slots())?,
            n: width(op, self.n, n)?,
            k: width(op, "k", k)?,
            num_experts: int(op, "num_experts", shape.num_experts)?,
            vector_load: vector_rows(k * dtype.size(), &[x, w]).into(),
            vector_store: vector_rows(n * dtype.size(), &[y]).into(),
        };
        if shape.num_tokens == 0 {
            return Ok(());
        }
        let launch = Launch {
            grid: [self.blocks(shape, n)?, 1, 1],
            threads: match dtype {
                DType::F32 => GEMM_THREADS_FMA,
                DType::F16 | DType::BF16 => GEMM_THREADS_MMA,
            } as u32,
            shared_bytes: GROUPED_GEMM_SMEM_BYTES as u32,
        };
        let arguments = [
            Argument::of(&y),
            Argument::of(&x),
            Argument::of(&w),
            Argument::of(&token_of_row),
            Argument::of(&expert_offsets),
            Argument::of(&tiles),
            Argument::of(&num_tiles),
            Argument::of(&args),
        ];
        // SAFETY: the arguments follow moe_grouped_gemm_fwd and moe_grouped_gemm_fwd_swiglu in
        // kernels/grouped_gemm.cu; the caller vouches for the buffers; shape and widths were checked.
        unsafe { device.launch(stream, self.kernel, dtype, launch, &arguments) }
    }

    /// Blocks for as many tiles as any routing can make, in whole groups. A tile has a row at least, and
    /// every expert at most one that is short.
    fn blocks(self, shape: RoutingShape, n: usize) -> Result<u32> {
        let slots = shape.slots();
        let tiles = slots.min(slots.div_ceil(GEMM_BLOCK_M as usize) + shape.num_experts);
        let columns = GEMM_BLOCK_N as usize / self.parts;
        let blocks = tiles.next_multiple_of(GEMM_TILE_GROUP as usize) * n.div_ceil(columns);
        Ok(int(self.op, "number of blocks", blocks)? as u32)
    }
}
