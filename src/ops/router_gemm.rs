//! The router's logits: the product of tokens `x` `[T, H]` and `router_gate` `[E, H]`, `logits`
//! `[T, E]`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::abi::{
    ROUTER_GEMM_FEW_EXPERTS, ROUTER_GEMM_FEW_TOKENS, ROUTER_GEMM_LANES, ROUTER_GEMM_MAX_SEGMENTS,
    ROUTER_GEMM_MIN_SEGMENTS, ROUTER_GEMM_SEGMENT, ROUTER_GEMM_STAGES, ROUTER_GEMM_STEP,
    ROUTER_GEMM_TILE_EXPERTS, ROUTER_GEMM_TILE_THREADS, ROUTER_GEMM_TILE_TOKENS, RouterGemmArgs,
    RouterGemmParams,
};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    reads, vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len, int, product, width};
use crate::shape::MAX_EXPERTS;

const OP: &str = "router_gemm_fwd";

/// The operands. The gate is of the tokens' type or `f32`, and its bias of the gate's type, because
/// checkpoints store the two parameters of a linear layer in one type.
pub struct RouterGemmInputs<'a, D, G = D> {
    /// `[T, H]`
    pub x: &'a CudaView<'a, D>,
    /// `[E, H]`
    pub router_gate: &'a CudaView<'a, G>,
    /// `[E]`
    pub bias: Option<&'a CudaView<'a, G>>,
}

/// Device addresses for [`router_gemm_fwd_raw`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RouterGemmBuffers {
    /// `[T, E]`, written whole.
    pub logits: CUdeviceptr,
    /// `[T, H]`
    pub x: CUdeviceptr,
    /// `[E, H]`
    pub router_gate: CUdeviceptr,
    /// `[E]`, or 0.
    pub bias: CUdeviceptr,
}

/// The types of [`router_gemm_fwd_raw`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterGemmTypes {
    /// The type of the tokens.
    pub x: DType,
    /// The type of the gate and its bias: that of the tokens, or f32.
    pub router_gate: DType,
    /// The type of the logits: that of the tokens, or f32.
    pub logits: DType,
}

/// The dimensions of [`router_gemm_fwd_raw`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterGemmShape {
    /// `T`
    pub num_tokens: usize,
    /// `E`
    pub num_experts: usize,
    /// `H`
    pub hidden: usize,
}

/// A body of the kernel. All bodies compute the same bits.
///
/// For tests and measurements; the operation chooses one by the shape.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterGemmBody {
    /// A block per logit.
    One,
    /// A block per 8 tokens and 4 experts.
    Few,
    /// A block per 64 tokens and 32 experts.
    Tile,
}

impl RouterGemmBody {
    /// The fastest body for a shape.
    fn of(RouterGemmShape { num_tokens, num_experts, .. }: RouterGemmShape) -> Self {
        /// Up to this many tokens, reading the gate once per token, mostly from cache, is faster:
        /// more blocks load it sooner.
        const MAX_ONE_TOKENS: usize = 4;
        /// Fewer experts leave most of a tile idle, and fewer tiles most of a GPU.
        const MIN_TILE_EXPERTS: usize = ROUTER_GEMM_TILE_EXPERTS as usize / 2 + 1;
        const MIN_TILES: usize = 96;
        let tiles = num_tokens.div_ceil(ROUTER_GEMM_TILE_TOKENS as usize)
            * num_experts.div_ceil(ROUTER_GEMM_TILE_EXPERTS as usize);
        match () {
            () if num_tokens <= MAX_ONE_TOKENS => Self::One,
            () if num_experts >= MIN_TILE_EXPERTS && tiles >= MIN_TILES => Self::Tile,
            () => Self::Few,
        }
    }

    /// Tokens and experts of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::One => (1, 1),
            Self::Few => (ROUTER_GEMM_FEW_TOKENS as usize, ROUTER_GEMM_FEW_EXPERTS as usize),
            Self::Tile => (ROUTER_GEMM_TILE_TOKENS as usize, ROUTER_GEMM_TILE_EXPERTS as usize),
        }
    }

    fn kernel(self, wide_gate: bool) -> Kernel {
        match (self, wide_gate) {
            (Self::One, false) => Kernel::RouterGemmFwdOne,
            (Self::Few, false) => Kernel::RouterGemmFwdFew,
            (Self::Tile, false) => Kernel::RouterGemmFwdTile,
            (Self::One, true) => Kernel::RouterGemmFwdOneGate32,
            (Self::Few, true) => Kernel::RouterGemmFwdFewGate32,
            (Self::Tile, true) => Kernel::RouterGemmFwdTileGate32,
        }
    }
}

/// `logits[t, e] = sum over h of x[t, h] * router_gate[e, h]  (+ bias[e])`: products and sums in
/// f32, never TF32, in an order that depends on `H` alone, rounded to the logits' type once.
///
/// The bits of a token's logits depend neither on the number of tokens nor on its index. `x` is
/// `[T, H]`, `router_gate` `[E, H]` with up to 4096 rows, any `H`; gate and logits are of the
/// tokens' type or `f32`. A gate of one row computes a shared expert's gate. Fastest if rows start
/// at 16-byte boundaries and are multiples of 16 bytes. Asynchronous, ordered on `stream`.
///
/// # Errors
/// [`Error::Length`] for a buffer that does not fit, [`Error::Unsupported`] for a dimension out of
/// range or a combination of types without a kernel, [`Error::Context`] for a stream or a buffer of
/// another context, and any launch error.
pub fn router_gemm_fwd_into<D: Dtype, G: Dtype, L: Dtype>(
    device: &Device,
    stream: &CudaStream,
    num_experts: usize,
    hidden: usize,
    inputs: &RouterGemmInputs<'_, D, G>,
    logits: &mut CudaViewMut<'_, L>,
) -> Result<()> {
    let RouterGemmInputs { x, router_gate, bias } = *inputs;
    check_stream(OP, device, stream)?;
    width(OP, "hidden", hidden)?;
    let shape = RouterGemmShape { num_tokens: x.len() / hidden, num_experts, hidden };
    check_len(OP, "x", x.len(), shape.num_tokens * hidden)?;
    check_len(
        OP,
        "router_gate",
        router_gate.len(),
        product(OP, "num_experts * hidden", num_experts, hidden)?,
    )?;
    if let Some(bias) = bias {
        check_len(OP, "bias", bias.len(), num_experts)?;
    }
    let len = product(OP, "num_tokens * num_experts", shape.num_tokens, num_experts)?;
    check_len(OP, "logits", logits.len(), len)?;
    let types = RouterGemmTypes { x: D::DTYPE, router_gate: G::DTYPE, logits: L::DTYPE };
    let (logits, _logits_guard) = writes(OP, "logits", logits, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let (router_gate, _gate_guard) = reads(OP, "router_gate", router_gate, stream)?;
    let (bias, _bias_guard) = optional(OP, "bias", bias, stream)?;
    let buffers = RouterGemmBuffers { logits, x, router_gate, bias };
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { router_gemm_fwd_raw(device, stream.cu_stream(), types, shape, buffers) }
}

/// [`router_gemm_fwd_into`] that allocates its output.
///
/// # Errors
/// Those of [`router_gemm_fwd_into`], and [`Error::Driver`] if the allocation fails.
pub fn router_gemm_fwd<D: Dtype, G: Dtype, L: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    num_experts: usize,
    hidden: usize,
    inputs: &RouterGemmInputs<'_, D, G>,
) -> Result<CudaSlice<L>> {
    width(OP, "hidden", hidden)?;
    let num_tokens = inputs.x.len() / hidden;
    let len = product(OP, "num_tokens * num_experts", num_tokens, num_experts)?;
    // SAFETY: the operation writes every element.
    let mut logits = unsafe { alloc::<L>(OP, stream, len) }?;
    router_gemm_fwd_into(device, stream, num_experts, hidden, inputs, &mut logits.as_view_mut())?;
    Ok(logits)
}

/// [`router_gemm_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer that is not 0 has the elements that [`RouterGemmBuffers`] and `shape` give it, of
/// the type in `types`, in memory of `device`'s context that stays valid until the kernel has run;
/// `logits` overlaps none of the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`] for a dimension out of range or a combination of types without a kernel,
/// [`Error::Alignment`], and any launch error.
pub unsafe fn router_gemm_fwd_raw(
    device: &Device,
    stream: CUstream,
    types: RouterGemmTypes,
    shape: RouterGemmShape,
    buffers: RouterGemmBuffers,
) -> Result<()> {
    // SAFETY: the caller guarantees the same.
    unsafe {
        router_gemm_fwd_with(device, stream, RouterGemmBody::of(shape), types, shape, buffers)
    }
}

/// [`router_gemm_fwd_raw`] with the given body.
///
/// # Safety
/// That of [`router_gemm_fwd_raw`].
///
/// # Errors
/// Those of [`router_gemm_fwd_raw`].
#[doc(hidden)]
pub unsafe fn router_gemm_fwd_with(
    device: &Device,
    stream: CUstream,
    body: RouterGemmBody,
    types: RouterGemmTypes,
    shape: RouterGemmShape,
    buffers: RouterGemmBuffers,
) -> Result<()> {
    let RouterGemmShape { num_tokens, num_experts, hidden } = shape;
    let RouterGemmBuffers { logits, x, router_gate, bias } = buffers;
    let unsupported = |argument, wanted: String, got: String| {
        Err(Error::Unsupported { op: OP, argument, wanted, got })
    };
    for (argument, dtype) in [("router_gate", types.router_gate), ("logits", types.logits)] {
        if dtype != types.x && dtype != DType::F32 {
            return unsupported(argument, format!("{} or f32", types.x), dtype.to_string());
        }
    }
    if !(1..=MAX_EXPERTS).contains(&num_experts) {
        let wanted = format!("1 to {MAX_EXPERTS}");
        return unsupported("num_experts", wanted, num_experts.to_string());
    }
    check_aligned(OP, "logits", logits, types.logits.size())?;
    check_aligned(OP, "x", x, types.x.size())?;
    check_aligned(OP, "router_gate", router_gate, types.router_gate.size())?;
    check_aligned(OP, "bias", bias, types.router_gate.size())?;
    let rows_of = |dtype: DType, address| vector_rows(hidden * dtype.size(), &[address]);
    let args = RouterGemmArgs {
        num_tokens: int(OP, "num_tokens", num_tokens)?,
        num_experts: int(OP, "num_experts", num_experts)?,
        hidden: width(OP, "hidden", hidden)?,
        f32_logits: (types.logits == DType::F32).into(),
        vector: (rows_of(types.x, x) && rows_of(types.router_gate, router_gate)).into(),
    };
    let (tokens, experts) = body.block();
    let blocks = product(OP, "blocks", num_tokens.div_ceil(tokens), num_experts.div_ceil(experts))?;
    let grid = int(OP, "num_tokens * num_experts", blocks)? as u32;
    if num_tokens == 0 {
        return Ok(());
    }
    let launch = match body {
        RouterGemmBody::Tile => Launch {
            grid: [grid, 1, 1],
            threads: ROUTER_GEMM_TILE_THREADS as u32,
            shared_bytes: tile_bytes(types),
        },
        RouterGemmBody::One | RouterGemmBody::Few => {
            let segments = hidden.div_ceil(ROUTER_GEMM_SEGMENT as usize) as u32;
            let side_by_side = segments
                .next_power_of_two()
                .clamp(ROUTER_GEMM_MIN_SEGMENTS as u32, ROUTER_GEMM_MAX_SEGMENTS as u32);
            let threads = side_by_side * ROUTER_GEMM_LANES as u32;
            Launch { grid: [grid, 1, 1], threads, shared_bytes: 0 }
        }
    };
    let params = RouterGemmParams { logits, x, router_gate, bias, args, padding: 0 };
    let kernel = body.kernel(types.router_gate != types.x);
    // SAFETY: RouterGemmParams is the parameter of moe_router_gemm_fwd_* in kernels/router_gemm.cu;
    // the caller guarantees the buffers; the entry is that of the types, which were checked above.
    unsafe { device.launch(stream, kernel, types.x, launch, &params) }
}

/// Bytes of shared memory for the stages of body tile.
fn tile_bytes(types: RouterGemmTypes) -> u32 {
    let row = |dtype: DType| ROUTER_GEMM_STEP as usize * dtype.size();
    let stage = ROUTER_GEMM_TILE_TOKENS as usize * row(types.x)
        + ROUTER_GEMM_TILE_EXPERTS as usize * row(types.router_gate);
    (ROUTER_GEMM_STAGES as usize * stage) as u32
}
