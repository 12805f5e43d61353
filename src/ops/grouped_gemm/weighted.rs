//! The product for f16 that multiplies rows by their routing weights before rounding.

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use std::sync::Arc;

use crate::abi::{GEMM_BLOCK_N, WeightedGemmParams};
use crate::config::WeightOrder;
use crate::device::{
    CUdeviceptr, CUstream, Device, Kernel, alloc, check_aligned, check_stream, optional, reads,
    writes,
};
use crate::dtype::{DType, Dtype};
use crate::error::{Error, Result, check_len, int, product, width};
use crate::ops::grouped_gemm::{
    GroupedGemmBuffers, Layout, LinearWeights, Rows, check_rows, launch,
};
use crate::routing_plan::RoutingPlan;
use crate::shape::RoutingShape;

const OP: &str = "grouped_gemm_weighted_fwd";

/// Device addresses for [`grouped_gemm_weighted_fwd_raw`].
#[derive(Debug, Clone, Copy)]
pub struct WeightedGemmBuffers {
    /// The buffers of the product; `token_of_row` must not be null.
    pub gemm: GroupedGemmBuffers,
    /// `[T, K]` `f32`
    pub routing_weights: CUdeviceptr,
    /// `[T * K]` `i32`: rows below `T * K`, or -1.
    pub row_of_slot: CUdeviceptr,
}

/// `y[r, :] = weight * (w[e] * row + bias[e])`, where `e` is the expert of row `r` and `weight` the
/// element of `routing_weights` `[T, K]` whose slot has that row.
///
/// For f16 only: an expert's output may exceed the range of f16 (65504) before its weight is
/// applied. The product with the weight is f32 and rounded once.
/// [`combine_fwd`](crate::ops::combine) sums such rows without weights; only identity experts still
/// have [weights](crate::ops::combine::Identity::routing_weights). Everything else is as in
/// [`grouped_gemm_fwd_into`](crate::ops::grouped_gemm::grouped_gemm_fwd_into).
///
/// # Errors
/// [`Error::Unsupported`] for another element type than f16, and those of
/// [`grouped_gemm_fwd_into`](crate::ops::grouped_gemm::grouped_gemm_fwd_into).
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_weighted_fwd_into<D: Dtype>(
    device: &Device,
    stream: &CudaStream,
    plan: &RoutingPlan<'_>,
    out_features: usize,
    in_features: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    weights: LinearWeights<'_, D>,
    routing_weights: &CudaView<'_, f32>,
    y: &mut CudaViewMut<'_, D>,
) -> Result<()> {
    let shape = plan.shape();
    let LinearWeights { w, bias, order } = weights;
    check_dtype(D::DTYPE)?;
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
    check_len(OP, "routing_weights", routing_weights.len(), shape.slots())?;
    check_len(OP, "y", y.len(), product(OP, "rows * out_features", shape.slots(), out_features)?)?;
    let (row_of_slot, token_of_row) = (plan.row_of_slot(), plan.token_of_row());
    let (expert_offsets, tiles) = (plan.expert_offsets(), plan.tiles());
    let num_tiles = plan.num_tiles();
    let (y, _y_guard) = writes(OP, "y", y, stream)?;
    let (x, _x_guard) = reads(OP, "x", x, stream)?;
    let (w, _w_guard) = reads(OP, "w", w, stream)?;
    let (bias, _bias_guard) = optional(OP, "bias", bias, stream)?;
    let (routing_weights, _weights_guard) = reads(OP, "routing_weights", routing_weights, stream)?;
    let (row_of_slot, _slots_guard) = row_of_slot.device_ptr(stream);
    let (token_of_row, _tokens_guard) = token_of_row.device_ptr(stream);
    let (expert_offsets, _offsets_guard) = expert_offsets.device_ptr(stream);
    let (tiles, _tiles_guard) = tiles.device_ptr(stream);
    let (num_tiles, _num_tiles_guard) = num_tiles.device_ptr(stream);
    let gemm = GroupedGemmBuffers { y, x, w, bias, token_of_row, expert_offsets, tiles, num_tiles };
    let buffers = WeightedGemmBuffers { gemm, routing_weights, row_of_slot };
    let (stream, dtype) = (stream.cu_stream(), D::DTYPE);
    // SAFETY: the lengths were checked above, and kernels check the indices that they read from a
    // RoutingPlan. The guards order the launch after earlier uses of the buffers and outlive it.
    unsafe {
        grouped_gemm_weighted_fwd_raw(
            device,
            stream,
            dtype,
            shape,
            out_features,
            in_features,
            rows,
            order,
            buffers,
        )
    }
}

/// [`grouped_gemm_weighted_fwd_into`] a new buffer.
///
/// # Errors
/// Those of [`grouped_gemm_weighted_fwd_into`], and [`Error::Driver`] if the allocation fails.
#[allow(clippy::too_many_arguments)]
pub fn grouped_gemm_weighted_fwd<D: Dtype>(
    device: &Device,
    stream: &Arc<CudaStream>,
    plan: &RoutingPlan<'_>,
    out_features: usize,
    in_features: usize,
    rows: Rows,
    x: &CudaView<'_, D>,
    weights: LinearWeights<'_, D>,
    routing_weights: &CudaView<'_, f32>,
) -> Result<CudaSlice<D>> {
    let len = product(OP, "rows * out_features", plan.shape().slots(), out_features)?;
    // SAFETY: the operation writes every element.
    let mut y = unsafe { alloc::<D>(OP, stream, len) }?;
    let to = &mut y.as_view_mut();
    grouped_gemm_weighted_fwd_into(
        device,
        stream,
        plan,
        out_features,
        in_features,
        rows,
        x,
        weights,
        routing_weights,
        to,
    )?;
    Ok(y)
}

/// [`grouped_gemm_weighted_fwd_into`] on addresses.
///
/// # Safety
/// Each buffer has the elements that [`WeightedGemmBuffers`] and `shape` state, of `dtype`, `f32`
/// or `i32`, in memory of `device`'s context that stays valid until the kernel has run;
/// `row_of_slot`, `token_of_row`, `expert_offsets`, `tiles` and `num_tiles` are those of one plan
/// for `shape`; `y` overlaps none of the others; `stream` is a stream of that context.
///
/// # Errors
/// [`Error::Unsupported`] for another type than f16, and for a shape or a width out of range,
/// [`Error::Mismatch`] for an address that must not be null, [`Error::Alignment`], and any launch
/// error.
#[allow(clippy::too_many_arguments)]
pub unsafe fn grouped_gemm_weighted_fwd_raw(
    device: &Device,
    stream: CUstream,
    dtype: DType,
    shape: RoutingShape,
    out_features: usize,
    in_features: usize,
    rows: Rows,
    order: WeightOrder,
    buffers: WeightedGemmBuffers,
) -> Result<()> {
    check_dtype(dtype)?;
    shape.check_rows(OP)?;
    let WeightedGemmBuffers { gemm, routing_weights, row_of_slot } = buffers;
    let GroupedGemmBuffers { y, x, w, token_of_row, .. } = gemm;
    gemm.check_aligned(OP, dtype)?;
    check_aligned(OP, "routing_weights", routing_weights, 4)?;
    check_aligned(OP, "row_of_slot", row_of_slot, 4)?;
    width(OP, "out_features", out_features)?;
    width(OP, "in_features", in_features)?;
    let layout = Layout { order, out_features, step: 1 };
    let fast = layout.is_fast(dtype, in_features, &[x, w]);
    let x_rows = if rows == Rows::Gathered { shape.num_tokens } else { shape.slots() };
    let args = layout.args(OP, dtype, shape, x_rows, out_features, in_features, y, fast)?;
    let product = GroupedGemmBuffers {
        token_of_row: if rows == Rows::Gathered { token_of_row } else { 0 },
        ..gemm
    };
    let params = WeightedGemmParams {
        gemm: product.params(args),
        routing_weights,
        row_of_slot,
        token_of_row,
        top_k: int(OP, "top_k", shape.top_k)?,
        num_tokens: int(OP, "num_tokens", shape.num_tokens)?,
    };
    if shape.num_tokens == 0 {
        return Ok(());
    }
    if [routing_weights, row_of_slot, token_of_row].contains(&0) {
        let why = "`routing_weights`, `row_of_slot` or `token_of_row` is null".into();
        return Err(Error::Mismatch { op: OP, why });
    }
    let launch = launch(OP, dtype, shape, out_features, GEMM_BLOCK_N as usize)?;
    let kernel = match order {
        WeightOrder::InOut if fast => Kernel::GroupedGemmFwdWeightedInOut,
        _ => Kernel::GroupedGemmFwdWeighted,
    };
    // SAFETY: moe_grouped_gemm_fwd_weighted_f16 and moe_grouped_gemm_fwd_weighted_in_out_f16 in
    // kernels/grouped_gemm.cu take WeightedGemmParams; the caller guarantees the buffers; shape and
    // widths were checked.
    unsafe { device.launch(stream, kernel, dtype, launch, &params) }
}

fn check_dtype(dtype: DType) -> Result<()> {
    if dtype == DType::F16 {
        return Ok(());
    }
    Err(Error::Unsupported {
        op: OP,
        argument: "dtype",
        wanted: "f16; the range of other types suffices until `combine` applies the weights".into(),
        got: dtype.to_string(),
    })
}
