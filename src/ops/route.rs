//! Selects each token's experts and computes their weights: `logits` `[T, E]` to `expert_ids` and
//! `routing_weights` `[T, K]`.

mod scores;

pub use scores::{route_scores_fwd, route_scores_fwd_into, route_scores_fwd_raw};

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};

use crate::abi;
use crate::abi::{RouteArgs, RouteParams, RoutePlainParams};
use crate::config::{
    GroupScore, Masked, Normalization, RouteLengths, RouterConfig, Score, Scoring,
};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, Launch, alloc, check_aligned, check_stream, optional,
    reads, vector_rows, writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Result, check_len, int};
use crate::shape::RoutingShape;

const OP: &str = "route_fwd";

/// The inputs of a router: the logits, and the optional buffers that its configuration needs or the
/// caller gives.
///
/// [`RouteInputs::new`] sets the logits alone; struct update syntax adds the rest.
#[derive(Debug)]
pub struct RouteInputs<'a, D> {
    /// `[T, E]`
    pub logits: &'a CudaView<'a, D>,
    /// `[E - num_sinks]`, if the router has a selection bias and selects the experts itself.
    pub selection_bias: Option<&'a CudaView<'a, f32>>,
    /// `[E]`, if the router scales by expert.
    pub expert_scale: Option<&'a CudaView<'a, f32>>,
    /// `[T, E]`, added to the logits.
    pub noise: Option<&'a CudaView<'a, f32>>,
    /// `[T, E]`: noise is multiplied by `softplus` of these first.
    pub noise_logits: Option<&'a CudaView<'a, D>>,
    /// `[T, K, E]`, for [`Scoring::Sparsemixer`] in training: standard Gumbel noise, a row for each
    /// choice, added to `z` for the selection alone.
    pub selection_noise: Option<&'a CudaView<'a, f32>>,
    /// `[T, K]`, given together with `selection_noise`: uniform in `[0, 1)`.
    pub midpoint_draws: Option<&'a CudaView<'a, f32>>,
    /// `[V, K]`, if ids are given; without `token_ids` a row for each token.
    pub given_ids: Option<&'a CudaView<'a, u32>>,
    /// `[T]`, each token's row of `given_ids`.
    pub token_ids: Option<&'a CudaView<'a, u32>>,
    /// `[T]`: tokens with a 0 have no experts.
    pub active: Option<&'a CudaView<'a, u8>>,
}

impl<D> Clone for RouteInputs<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for RouteInputs<'_, D> {}

impl<'a, D: Dtype> RouteInputs<'a, D> {
    /// The logits `[T, E]` alone.
    pub const fn new(logits: &'a CudaView<'a, D>) -> Self {
        Self {
            logits,
            selection_bias: None,
            expert_scale: None,
            noise: None,
            noise_logits: None,
            selection_noise: None,
            midpoint_draws: None,
            given_ids: None,
            token_ids: None,
            active: None,
        }
    }

    fn lengths(&self) -> RouteLengths {
        RouteLengths {
            logits: self.logits.len(),
            selection_bias: self.selection_bias.map(CudaView::len),
            expert_scale: self.expert_scale.map(CudaView::len),
            noise: self.noise.map(CudaView::len),
            noise_logits: self.noise_logits.map(CudaView::len),
            selection_noise: self.selection_noise.map(CudaView::len),
            midpoint_draws: self.midpoint_draws.map(CudaView::len),
            given_ids: self.given_ids.map(CudaView::len),
            token_ids: self.token_ids.map(CudaView::len),
            active: self.active.map(CudaView::len),
        }
    }
}

/// Device addresses for [`route_fwd_raw`]; 0 for a buffer that is not given.
#[derive(Debug, Clone, Copy, Default)]
pub struct RouteBuffers {
    /// `[T, K]` `u32`, written whole.
    pub expert_ids: CUdeviceptr,
    /// `[T, K]` `f32`, written whole.
    pub routing_weights: CUdeviceptr,
    /// `[T, E]` of the call's dtype. Rows that start at 16-byte boundaries are read in 16-byte
    /// pieces.
    pub logits: CUdeviceptr,
    /// `[E - num_sinks]` `f32`
    pub selection_bias: CUdeviceptr,
    /// `[E]` `f32`
    pub expert_scale: CUdeviceptr,
    /// `[T, E]` `f32`
    pub noise: CUdeviceptr,
    /// `[T, E]` of the call's dtype
    pub noise_logits: CUdeviceptr,
    /// `[T, K, E]` `f32`
    pub selection_noise: CUdeviceptr,
    /// `[T, K]` `f32`
    pub midpoint_draws: CUdeviceptr,
    /// `[V, K]` `u32`
    pub given_ids: CUdeviceptr,
    /// `V`, the rows of `given_ids`
    pub given_rows: usize,
    /// `[T]` `u32`
    pub token_ids: CUdeviceptr,
    /// `[T]` `u8`
    pub active: CUdeviceptr,
}

/// The result of [`route_fwd`], on the device.
#[derive(Debug)]
pub struct Routing {
    /// `[T, K]`: the experts of each token, strongest first; `u32::MAX` for a slot without an
    /// expert.
    pub expert_ids: CudaSlice<u32>,
    /// `[T, K]`: the weights of those experts.
    pub routing_weights: CudaSlice<f32>,
}

/// Writes the `K` experts of each token and their weights in f32, as `router` defines them; by
/// default those of the largest logits, strongest first and ties to the lower id.
///
/// Logits, biases, scales, noise and draws may have any bits: the selected ids are distinct
/// experts, and no weight is NaN. Ids and weights agree with
/// [`reference::route_fwd`](crate::reference::route_fwd) in f32 bit for bit, on every device. Rows
/// of 16-byte multiples that start at 16-byte boundaries are read fastest. Asynchronous, ordered on
/// `stream`; one launch.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape or a router out of range, and for
/// a buffer that the router needs and that is not given or the reverse,
/// [`Error::Length`](crate::Error::Length) for a buffer that does not fit,
/// [`Error::Context`](crate::Error::Context) for a stream or a buffer of another context, and any
/// launch error.
pub fn route_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    shape: RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
    expert_ids: &mut CudaViewMut<'_, u32>,
    routing_weights: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    inputs.lengths().check(OP, &shape, router)?;
    check_stream(OP, device, stream)?;
    check_len(OP, "expert_ids", expert_ids.len(), shape.slots())?;
    check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
    let (expert_ids, _ids_guard) = writes(OP, "expert_ids", expert_ids, stream)?;
    let (routing_weights, _weights_guard) = writes(OP, "routing_weights", routing_weights, stream)?;
    let (logits, _logits_guard) = reads(OP, "logits", inputs.logits, stream)?;
    let (selection_bias, _selection_bias) =
        optional(OP, "selection_bias", inputs.selection_bias, stream)?;
    let (expert_scale, _expert_scale) = optional(OP, "expert_scale", inputs.expert_scale, stream)?;
    let (noise, _noise) = optional(OP, "noise", inputs.noise, stream)?;
    let (noise_logits, _noise_logits) = optional(OP, "noise_logits", inputs.noise_logits, stream)?;
    let (selection_noise, _selection_noise) =
        optional(OP, "selection_noise", inputs.selection_noise, stream)?;
    let (midpoint_draws, _midpoint_draws) =
        optional(OP, "midpoint_draws", inputs.midpoint_draws, stream)?;
    let (given_ids, _given_ids) = optional(OP, "given_ids", inputs.given_ids, stream)?;
    let (token_ids, _token_ids) = optional(OP, "token_ids", inputs.token_ids, stream)?;
    let (active, _active) = optional(OP, "active", inputs.active, stream)?;
    let buffers = RouteBuffers {
        expert_ids,
        routing_weights,
        logits,
        selection_bias,
        expert_scale,
        noise,
        noise_logits,
        selection_noise,
        midpoint_draws,
        given_ids,
        given_rows: inputs.given_ids.map_or(0, |view| view.len() / shape.top_k),
        token_ids,
        active,
    };
    // SAFETY: the lengths were checked above. The guards order the launch after earlier uses of the
    // buffers and outlive it.
    unsafe { route_fwd_raw(device, stream.cu_stream(), D::DTYPE, shape, router, buffers) }
}

/// [`route_fwd_into`] new buffers.
///
/// # Errors
/// Those of [`route_fwd_into`], and [`Error::Driver`](crate::Error::Driver) if the allocation
/// fails.
pub fn route_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    shape: RoutingShape,
    router: &RouterConfig,
    inputs: &RouteInputs<'_, D>,
) -> Result<Routing> {
    shape.check(OP)?;
    // SAFETY: the operation writes every element.
    let mut expert_ids = unsafe { alloc::<u32>(OP, stream, shape.slots()) }?;
    // SAFETY: as above.
    let mut routing_weights = unsafe { alloc::<f32>(OP, stream, shape.slots()) }?;
    let (ids_view, weights_view) =
        (&mut expert_ids.as_view_mut(), &mut routing_weights.as_view_mut());
    route_fwd_into(device, stream, shape, router, inputs, ids_view, weights_view)?;
    Ok(Routing { expert_ids, routing_weights })
}

/// [`route_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer that is not 0 has the elements that [`RouteBuffers`] and `shape` give it, `logits`
/// and `noise_logits` of `dtype`, in memory of `device`'s context that stays valid until the kernel
/// has run; outputs overlap no other buffer; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported) for a shape or a router out of range, and for
/// a buffer that the router needs and that is not given or the reverse,
/// [`Error::Alignment`](crate::Error::Alignment), and any launch error.
pub unsafe fn route_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    router: &RouterConfig,
    buffers: RouteBuffers,
) -> Result<()> {
    buffers.check(dtype, &shape, router)?;
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let args = arguments(dtype, &shape, router, &buffers)?;
    let (kernel, launch) = choose_kernel(router, &buffers, &args);
    let plain = matches!(kernel, Kernel::RouteFwdPlainNarrow | Kernel::RouteFwdPlainWide);
    if plain {
        let params = buffers.plain_params(args);
        // SAFETY: the parameter is that of kernels/route.cu, whose limits on E and K chose the
        // kernel above; the caller guarantees the buffers.
        return unsafe { device.launch(stream, kernel, dtype, launch, &params) };
    }
    let params = buffers.params(args);
    // SAFETY: as above, with the parameter of kernels/router.cuh.
    unsafe { device.launch(stream, kernel, dtype, launch, &params) }
}

impl RouteBuffers {
    /// Checks which buffers are given, and their alignment.
    fn check(&self, dtype: DType, shape: &RoutingShape, router: &RouterConfig) -> Result<()> {
        shape.check(OP)?;
        let (logits, tokens) = (shape.logits(), shape.num_tokens);
        let choices = shape.num_experts.saturating_sub(router.num_sinks);
        let given = self.given_rows.saturating_mul(shape.top_k);
        let given_len = |address: CUdeviceptr, len: usize| (address != 0).then_some(len);
        let lengths = RouteLengths {
            logits,
            selection_bias: given_len(self.selection_bias, choices),
            expert_scale: given_len(self.expert_scale, shape.num_experts),
            noise: given_len(self.noise, logits),
            noise_logits: given_len(self.noise_logits, logits),
            selection_noise: given_len(self.selection_noise, shape.by_slot().logits()),
            midpoint_draws: given_len(self.midpoint_draws, shape.slots()),
            given_ids: given_len(self.given_ids, given),
            token_ids: given_len(self.token_ids, tokens),
            active: given_len(self.active, tokens),
        };
        lengths.check(OP, shape, router)?;
        for (argument, address, bytes) in [
            ("expert_ids", self.expert_ids, 4),
            ("routing_weights", self.routing_weights, 4),
            ("logits", self.logits, dtype.size()),
            ("selection_bias", self.selection_bias, 4),
            ("expert_scale", self.expert_scale, 4),
            ("noise", self.noise, 4),
            ("noise_logits", self.noise_logits, dtype.size()),
            ("selection_noise", self.selection_noise, 4),
            ("midpoint_draws", self.midpoint_draws, 4),
            ("given_ids", self.given_ids, 4),
            ("token_ids", self.token_ids, 4),
        ] {
            check_aligned(OP, argument, address, bytes)?;
        }
        Ok(())
    }

    fn plain_params(&self, args: RouteArgs) -> RoutePlainParams {
        RoutePlainParams {
            expert_ids: self.expert_ids,
            routing_weights: self.routing_weights,
            logits: self.logits,
            args,
            padding: 0,
        }
    }

    fn params(&self, args: RouteArgs) -> RouteParams {
        RouteParams {
            expert_ids: self.expert_ids,
            routing_weights: self.routing_weights,
            scores: 0,
            logits: self.logits,
            selection_bias: self.selection_bias,
            expert_scale: self.expert_scale,
            noise: self.noise,
            noise_logits: self.noise_logits,
            selection_noise: self.selection_noise,
            midpoint_draws: self.midpoint_draws,
            given_ids: self.given_ids,
            token_ids: self.token_ids,
            active: self.active,
            args,
            padding: 0,
        }
    }
}

/// The kernel for a router and a shape, and its launch.
fn choose_kernel(
    router: &RouterConfig,
    buffers: &RouteBuffers,
    args: &RouteArgs,
) -> (Kernel, Launch) {
    let tokens = args.num_tokens as u32;
    let words = 2 * args.row_words as u32;
    if args.top_k > abi::ROUTE_PICK_MAX_TOP_K || args.num_experts > abi::ROUTE_WIDE_MAX_EXPERTS {
        let shared_bytes = args.sort_length as u32 * abi::ROUTE_SORT_ENTRY_BYTES as u32 + words * 4;
        let threads = abi::ROUTE_SORT_THREADS as u32;
        return (Kernel::RouteFwdSort, Launch { grid: [tokens, 1, 1], threads, shared_bytes });
    }
    let narrow = args.num_experts <= abi::ROUTE_NARROW_MAX_EXPERTS;
    let plain = router.is_plain() && buffers.noise == 0 && buffers.active == 0;
    let kernel = match (narrow, plain) {
        (true, true) => Kernel::RouteFwdPlainNarrow,
        (false, true) => Kernel::RouteFwdPlainWide,
        (true, false) => Kernel::RouteFwdNarrow,
        (false, false) => Kernel::RouteFwdWide,
    };
    let threads = abi::ROUTE_PICK_THREADS as u32;
    let warps = threads / 32;
    let shared_bytes = if plain { 0 } else { warps * (words + args.top_k as u32) * 4 };
    (kernel, Launch { grid: [tokens.div_ceil(warps), 1, 1], threads, shared_bytes })
}

/// The kernel's arguments for a shape and a router that have been checked.
fn arguments(
    dtype: DType,
    shape: &RoutingShape,
    router: &RouterConfig,
    buffers: &RouteBuffers,
) -> Result<RouteArgs> {
    let RoutingShape { num_tokens, num_experts, top_k } = *shape;
    let (divisor, divisor_number) = match router.divisor() {
        Normalization::None => (abi::ROUTE_BY_NOTHING, 0.0),
        Normalization::Sum { epsilon } => (abi::ROUTE_BY_SUM, epsilon),
        Normalization::SumAtLeast { min } => (abi::ROUTE_BY_SUM_AT_LEAST, min),
        Normalization::PNorm { p } => (abi::ROUTE_BY_NORM, p),
    };
    let mut args = RouteArgs {
        num_tokens: int(OP, "num_tokens", num_tokens)?,
        num_experts: int(OP, "num_experts", num_experts)?,
        top_k: int(OP, "top_k", top_k)?,
        num_sinks: int(OP, "num_sinks", router.num_sinks)?,
        sort_length: int(OP, "num_experts", num_experts.next_power_of_two())?,
        vector: vector_rows(num_experts * dtype.size(), &[buffers.logits]).into(),
        elem: match dtype {
            DType::F32 => abi::ELEM_F32,
            DType::F16 => abi::ELEM_F16,
            DType::BF16 => abi::ELEM_BF16,
        },
        row_words: int(OP, "num_experts", num_experts + num_experts.div_ceil(32))?,
        multiplier: router.logit_multiplier,
        softcap: router.logit_softcap.unwrap_or(0.0),
        value: kind(router.value()),
        given_rows: int(OP, "given_ids", buffers.given_rows)?,
        score: kind(router.score()),
        jitter: match router.scoring {
            Scoring::Sparsemixer { jitter, .. } => jitter,
            _ => 0.0,
        },
        divisor,
        divisor_number,
        scale: router.scale,
        noise_deviation: router.noise_deviation,
        ..RouteArgs::default()
    };
    if let Some(groups) = router.groups {
        let size = (num_experts - router.num_sinks) / groups.num_groups;
        args.num_groups = int(OP, "num_groups", groups.num_groups)?;
        args.top_groups = int(OP, "top_groups", groups.top_groups)?;
        args.group_size = int(OP, "num_experts", size)?;
        args.group_magic = (1u32 << 31).div_ceil(size as u32);
        args.group_part_bits = (32 / groups.num_groups).ilog2() as i32;
        args.group_sum = (groups.score == GroupScore::TopTwoSum).into();
        args.masked_zero = (groups.masked == Masked::Zero).into();
    }
    Ok(args)
}

fn kind(score: Score) -> i32 {
    match score {
        Score::Logit => abi::ROUTE_LOGIT,
        Score::Softmax => abi::ROUTE_SOFTMAX,
        Score::Sigmoid => abi::ROUTE_SIGMOID,
        Score::SqrtSoftplus => abi::ROUTE_SQRT_SOFTPLUS,
        Score::SoftmaxChosen => abi::ROUTE_SOFTMAX_CHOSEN,
        Score::Sparsemixer { .. } => abi::ROUTE_SPARSEMIXER,
    }
}
