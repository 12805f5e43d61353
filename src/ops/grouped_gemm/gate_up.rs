//! An expert's gate and up projections and the activation, in one kernel.

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use std::sync::Arc;

use crate::abi::{
    ACTIVATION_GELU, ACTIVATION_GELU_TANH, ACTIVATION_RELU, ACTIVATION_RELU_SQUARED,
    ACTIVATION_SILU, ActivationArgs, GEMM_BLOCK_N, GateUpArgs, GateUpParams,
};
use crate::config::{
    Activation, ActivationFunction, ExpertConfig, GateUpLayout, Limit, WeightOrder, WeightPosition,
};
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, alloc, check_aligned, check_stream, optional, reads,
    writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len, int, product, width};
use crate::ops::grouped_gemm::{Layout, Rows, check_rows, launch};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;
pub use crate::tensors::GateUpTensors;

const OP: &str = "grouped_gemm_gate_up_fwd";

/// The gate and up projections of all experts, in the checkpoint's order.
#[derive(Debug, Clone, Copy)]
pub struct GateUpWeights<'a, D> {
    /// The weights.
    pub tensors: GateUpTensors<&'a CudaView<'a, D>>,
    /// `[E, 2I]`, or `[E, I]` without a gate, in the order of the weights' features; for separate
    /// tensors gate's biases, then up's. Added to the f32 sums.
    pub bias: Option<&'a CudaView<'a, D>>,
}

impl<'a, D> GateUpWeights<'a, D> {
    /// One tensor, and no bias.
    pub fn fused(gate_up: &'a CudaView<'a, D>) -> Self {
        Self { tensors: GateUpTensors::Fused(gate_up), bias: None }
    }
}

/// Device addresses for [`grouped_gemm_gate_up_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct GateUpBuffers {
    /// `[R, I]`; every element is written.
    pub act: CUdeviceptr,
    /// `[T, in]` or `[R, in]`.
    pub x: CUdeviceptr,
    /// The fused tensor, or gate.
    pub gate_up: CUdeviceptr,
    /// Up for separate tensors, else 0 (null).
    pub up: CUdeviceptr,
    /// `[E, 2I]` or `[E, I]`, or 0 (null): no biases.
    pub bias: CUdeviceptr,
    /// `[T, K]` `f32` if the routing weights multiply the input or inside, else 0 (null).
    pub routing_weights: CUdeviceptr,
    /// `[T * K]` `i32` with `routing_weights`, else 0 (null).
    pub row_of_slot: CUdeviceptr,
    /// `[R]` `i32`, tokens below `T` for the rows in use; may be 0 (null) without a gather and
    /// `routing_weights`.
    pub token_of_row: CUdeviceptr,
    /// `[E + 1]` `i32`; the last is the number of rows in use.
    pub expert_offsets: CUdeviceptr,
    /// Four `i32` per tile: expert, first row, number of rows (1 to 128), unused.
    pub tiles: CUdeviceptr,
    /// One `i32`, the number of tiles.
    pub num_tiles: CUdeviceptr,
}

/// `act[r, i] = activation(gate, up)`, or `activation(up)` without a gate, where gate and up are
/// feature `i` of the row's expert times the row of `x`, plus their biases. Everything up to `act`
/// is f32.
///
/// Of `experts`, only the activation and the options of gate and up are read. `routing_weights` is
/// `[T, K]`, given if and only if the routing weights multiply the input (the kernel multiplies the
/// sums, which differs only by rounding) or `act`. `act` is `[T * K, I]`; any widths from 1. Unused
/// rows of `act` are zeroed. Everything else is as in
/// [`grouped_gemm_fwd_into`](crate::ops::grouped_gemm::grouped_gemm_fwd_into).
///
/// # Errors
/// [`Error::Length`] for a buffer that does not fit the plan's shape, [`Error::Unsupported`] for a
/// width or an option out of range, [`Error::Mismatch`] for weights, biases or tensors that are
/// given but not enabled in `experts`, or the reverse, [`Error::Context`] for an argument of
/// another context, and any launch error.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_gate_up_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    experts: &ExpertConfig,
    intermediate: usize,
    in_features: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    gate_up: GateUpWeights<'_, D>,
    routing_weights: Option<&CudaView<'_, f32>>,
    act: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    let shape = plan.shape();
    check_stream(OP, device, stream)?;
    plan.check_stream(OP, stream)?;
    check_rows(OP, shape, rows, in_features, x)?;
    let parts = if experts.gated { 2 } else { 1 };
    let features = product(OP, "num_experts * intermediate", shape.num_experts, intermediate)?;
    let matrices = product(OP, "num_experts * intermediate * in_features", features, in_features)?;
    let all = product(OP, "parts * num_experts * intermediate * in_features", parts, matrices)?;
    let (first_name, first, up) = match gate_up.tensors {
        GateUpTensors::Fused(gate_up) => {
            check_len(OP, "gate_up", gate_up.len(), all)?;
            ("gate_up", gate_up, None)
        }
        GateUpTensors::Separate { gate, up } => {
            check_len(OP, "gate", gate.len(), matrices)?;
            check_len(OP, "up", up.len(), matrices)?;
            ("gate", gate, Some(up))
        }
    };
    if let Some(bias) = gate_up.bias {
        let wanted = product(OP, "parts * num_experts * intermediate", parts, features)?;
        check_len(OP, "bias", bias.len(), wanted)?;
    }
    if let Some(routing_weights) = routing_weights {
        check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
    }
    check_len(
        OP,
        "act",
        act.len(),
        product(OP, "rows * intermediate", shape.slots(), intermediate)?,
    )?;

    let (row_of_slot, token_of_row) = (plan.row_of_slot(), plan.token_of_row());
    let (expert_offsets, tiles, num_tiles) =
        (plan.expert_offsets(), plan.tiles(), plan.num_tiles());
    let (act, _act_guard) = writes(OP, "act", act, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let (first, _first_guard) = reads(OP, first_name, first, stream)?;
    let (up, _up_guard) = optional(OP, "up", up, stream)?;
    let (bias, _bias_guard) = optional(OP, "bias", gate_up.bias, stream)?;
    let (routing_weights, _weights_guard) =
        optional(OP, "routing_weights", routing_weights, stream)?;
    let (row_of_slot, _slots_guard) = row_of_slot.device_ptr(stream);
    let (token_of_row, _tokens_guard) = token_of_row.device_ptr(stream);
    let (expert_offsets, _offsets_guard) = expert_offsets.device_ptr(stream);
    let (tiles, _tiles_guard) = tiles.device_ptr(stream);
    let (num_tiles, _num_tiles_guard) = num_tiles.device_ptr(stream);
    let buffers = GateUpBuffers {
        act,
        x,
        gate_up: first,
        up,
        bias,
        routing_weights,
        row_of_slot: if routing_weights == 0 { 0 } else { row_of_slot },
        token_of_row,
        expert_offsets,
        tiles,
        num_tiles,
    };
    let (stream, dtype) = (stream.cu_stream(), D::DTYPE);
    // SAFETY: the lengths were checked above, and kernels check the indices that they read from a
    // RoutingPlan, whose parts have the lengths of its shape. The guards order the launch after
    // earlier uses of the buffers and outlive it.
    unsafe {
        grouped_gemm_gate_up_fwd_raw(
            device,
            stream,
            dtype,
            shape,
            experts,
            intermediate,
            in_features,
            rows,
            buffers,
        )
    }
}

/// [`grouped_gemm_gate_up_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`grouped_gemm_gate_up_fwd_into`], and [`Error::Driver`] if the allocation fails.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_gate_up_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    experts: &ExpertConfig,
    intermediate: usize,
    in_features: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    gate_up: GateUpWeights<'_, D>,
    routing_weights: Option<&CudaView<'_, f32>>,
) -> Result<CudaSlice<D>> {
    let len = product(OP, "rows * intermediate", plan.shape().slots(), intermediate)?;
    // SAFETY: the operation writes every element.
    let mut act = unsafe { alloc::<D>(OP, stream, len) }?;
    let view = &mut act.as_view_mut();
    grouped_gemm_gate_up_fwd_into(
        device,
        stream,
        plan,
        experts,
        intermediate,
        in_features,
        rows,
        x,
        gate_up,
        routing_weights,
        view,
    )?;
    Ok(act)
}

/// [`grouped_gemm_gate_up_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`GateUpBuffers`], `experts` and `shape` state, of `dtype`,
/// `f32` or `i32`, in memory of `device`'s context that stays valid until the kernel has run;
/// `row_of_slot`, `token_of_row`, `expert_offsets`, `tiles` and `num_tiles` are those of one plan
/// for `shape`; `act` overlaps none of the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`] for a shape, a width or an option out of range, [`Error::Mismatch`] for
/// an address that must not be null, or must be, [`Error::Alignment`], and any launch error.
#[allow(clippy::too_many_arguments)]
pub unsafe fn grouped_gemm_gate_up_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    experts: &ExpertConfig,
    intermediate: usize,
    in_features: usize,
    rows: Rows,
    buffers: GateUpBuffers,
) -> Result<()> {
    shape.check_rows(OP)?;
    experts.check(OP)?;
    let GateUpBuffers {
        act, x, gate_up, up, bias, routing_weights, row_of_slot, token_of_row, ..
    } = buffers;
    let GateUpBuffers { expert_offsets, tiles, num_tiles, .. } = buffers;
    for (name, address, bytes) in [
        ("act", act, dtype.size()),
        ("x", x, dtype.size()),
        ("gate_up", gate_up, dtype.size()),
        ("up", up, dtype.size()),
        ("bias", bias, dtype.size()),
        ("routing_weights", routing_weights, 4),
        ("row_of_slot", row_of_slot, 4),
        ("token_of_row", token_of_row, 4),
        ("expert_offsets", expert_offsets, 4),
        ("tiles", tiles, 4),
        ("num_tiles", num_tiles, 4),
    ] {
        check_aligned(OP, name, address, bytes)?;
    }
    width(OP, "intermediate", intermediate)?;
    width(OP, "in_features", in_features)?;
    let weighted = experts.weight_position != WeightPosition::Output;
    let gather = rows == Rows::Gathered;
    require("a separate `up`", experts.gate_up == GateUpLayout::Separate, up)?;
    require("`bias`", experts.gate_up_bias, bias)?;
    // Without tokens, buffers with an element per token may be null.
    if shape.num_tokens > 0 {
        require("`routing_weights`", weighted, routing_weights)?;
        require("`row_of_slot`", weighted, row_of_slot)?;
        require("`token_of_row`", gather || weighted || token_of_row != 0, token_of_row)?;
    }

    let places = GateUpPlaces::new(experts, intermediate, in_features);
    let up = if experts.gate_up == GateUpLayout::Separate { up } else { places.up(gate_up, dtype) };
    let up_bias = if bias == 0 { 0 } else { places.up_bias(bias, dtype) };
    let layout = places.layout;
    // Interleaved pairs are loaded whole, so only their start must be aligned.
    let first_up = if layout.step == 2 { gate_up } else { up };
    let fast = layout.is_fast(dtype, in_features, &[x, gate_up, first_up]);
    let x_rows = if gather { shape.num_tokens } else { shape.slots() };
    let args = GateUpArgs {
        gemm: layout.args(OP, dtype, shape, x_rows, intermediate, in_features, act, fast)?,
        activation: activation_args(&experts.activation),
        gated: experts.gated.into(),
        gather: gather.into(),
        top_k: int(OP, "top_k", shape.top_k)?,
        num_tokens: int(OP, "num_tokens", shape.num_tokens)?,
        weight_inside: (experts.weight_position == WeightPosition::Inside).into(),
        bias_expert_stride: int(OP, "intermediate", places.bias_features)?,
        bias_out_stride: layout.step as i32,
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    let columns = GEMM_BLOCK_N as usize / if experts.gated { 2 } else { 1 };
    let launch = launch(OP, dtype, shape, intermediate, columns)?;
    let params = GateUpParams {
        act,
        x,
        gate: gate_up,
        up,
        gate_bias: bias,
        up_bias,
        routing_weights,
        row_of_slot,
        token_of_row,
        expert_offsets,
        tiles,
        num_tiles,
        args,
    };
    let kernel = match layout.order {
        WeightOrder::InOut if fast => Kernel::GroupedGemmFwdGateUpInOut,
        _ => Kernel::GroupedGemmFwdGateUp,
    };
    // SAFETY: moe_grouped_gemm_fwd_gate_up and moe_grouped_gemm_fwd_gate_up_in_out in
    // kernels/grouped_gemm.cu take GateUpParams; the caller guarantees the buffers; shape and
    // widths were checked.
    unsafe { device.launch(stream, kernel, dtype, launch, &params) }
}

/// Checks that an address is given if and only if the configuration enables its buffer.
fn require(what: &str, wanted: bool, address: CUdeviceptr) -> Result<()> {
    let why = match (wanted, address != 0) {
        (true, false) => format!("{what} is required by the configuration but not given"),
        (false, true) => format!("{what} is given but not enabled in the configuration"),
        _ => return Ok(()),
    };
    Err(Error::Mismatch { op: OP, why })
}

/// The places of gate and up in weights and biases.
struct GateUpPlaces {
    layout: Layout,
    /// Elements from the first feature of gate to the first of up, in a fused tensor.
    up: usize,
    /// The same for biases.
    up_bias: usize,
    /// Biases per expert.
    bias_features: usize,
}

impl GateUpPlaces {
    fn new(experts: &ExpertConfig, intermediate: usize, in_features: usize) -> Self {
        let bias_features = if experts.gated { 2 * intermediate } else { intermediate };
        let order = experts.gate_up_order;
        let input_distance = if order == WeightOrder::OutIn { in_features } else { 1 };
        let (out_features, step, features_to_up) = match experts.gate_up {
            _ if !experts.gated => (intermediate, 1, 0),
            GateUpLayout::Concatenated => (2 * intermediate, 1, intermediate),
            GateUpLayout::Interleaved => (2 * intermediate, 2, 1),
            GateUpLayout::Separate => (intermediate, 1, intermediate),
        };
        Self {
            layout: Layout { order, out_features, step },
            up: features_to_up * input_distance,
            up_bias: features_to_up,
            bias_features,
        }
    }

    fn up(&self, gate: CUdeviceptr, dtype: DType) -> CUdeviceptr {
        gate + (self.up * dtype.size()) as CUdeviceptr
    }

    fn up_bias(&self, gate: CUdeviceptr, dtype: DType) -> CUdeviceptr {
        gate + (self.up_bias * dtype.size()) as CUdeviceptr
    }
}

/// The kernel's arguments for an activation.
fn activation_args(activation: &Activation) -> ActivationArgs {
    let none = f32::INFINITY;
    let (mut limit_before, mut limit_after, mut limit_up) = (none, none, none);
    let (mut soft_cap, mut gate_cap, mut up_cap) = (false, none, none);
    let function = match activation.function {
        ActivationFunction::Silu => ACTIVATION_SILU,
        ActivationFunction::Gelu => ACTIVATION_GELU,
        ActivationFunction::GeluTanh => ACTIVATION_GELU_TANH,
        ActivationFunction::Relu => ACTIVATION_RELU,
        ActivationFunction::ReluSquared => ACTIVATION_RELU_SQUARED,
    };
    match activation.limit {
        Limit::None => {}
        Limit::Before { limit } => (limit_before, limit_up) = (limit, limit),
        Limit::After { limit } => (limit_after, limit_up) = (limit, limit),
        Limit::SoftCap { gate, up } => (soft_cap, gate_cap, up_cap) = (true, gate, up),
    }
    let Activation { alpha, up_offset, .. } = *activation;
    ActivationArgs {
        function,
        alpha,
        limit_before,
        limit_after,
        limit_up,
        up_offset,
        soft_cap: soft_cap.into(),
        gate_cap,
        up_cap,
    }
}
