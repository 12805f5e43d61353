//! Check of the down product in f16, which multiplies rows by their routing weights before
//! rounding.

use moe_kernels::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_weighted_fwd_into};
use moe_kernels::reference::{self, bound};
use moe_kernels::{DType, Dtype, RoutingPlan};

use super::case::Case;
use super::worst::Worst;
use crate::device::Gpu;
use crate::error::Result;

pub fn grouped_gemm_weighted<D: Dtype>(
    gpu: &Gpu,
    case: &Case<D>,
    plan: &RoutingPlan<'_>,
) -> Result<Worst> {
    if D::DTYPE != DType::F16 {
        return Ok(Worst::none());
    }
    let (out_features, in_features) = (case.config.hidden, case.config.intermediate);
    let (down, act) = (gpu.upload(&case.down)?, gpu.upload(&case.act)?);
    let (down, act, weights) = (down.as_view(), act.as_view(), gpu.upload(&case.weights)?);
    let mut y = gpu.poisoned::<D>(case.shape.slots() * out_features)?;
    grouped_gemm_weighted_fwd_into(
        &gpu.device,
        &gpu.stream,
        plan,
        out_features,
        in_features,
        Rows::Grouped,
        &act,
        LinearWeights::new(&down),
        &weights.as_view(),
        &mut y.as_view_mut(),
    )?;
    let linear = reference::LinearWeights::new(&case.down[..]);
    let weights = bound::Bounded {
        value: case.weights.iter().map(|&weight| f64::from(weight)).collect(),
        bound: vec![0.0; case.weights.len()],
    };
    let wanted = bound::grouped_gemm_weighted(
        &case.plan,
        out_features,
        in_features,
        &case.act,
        linear,
        &weights,
        false,
        D::DTYPE,
    )?;
    Ok(Worst::of_bounded("y (weighted)", &gpu.download(&y.as_view())?, &wanted))
}
