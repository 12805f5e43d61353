//! The down product of f16, which multiplies rows by the routing's weights before it rounds them.

use moe_kernels::ops::grouped_gemm::{LinearWeights, Rows, grouped_gemm_weighted_fwd_into};
use moe_kernels::reference::{self, bound};
use moe_kernels::{DType, RoutingPlan};

use super::case::Case;
use super::ops::Worst;
use crate::backend::Element;
use crate::device::Gpu;
use crate::error::Result;

pub fn product<D: Element>(gpu: &Gpu, case: &Case<D>, plan: &RoutingPlan<'_>) -> Result<Worst> {
    if D::DTYPE != DType::F16 {
        return Ok(Worst::nothing());
    }
    let (n, k) = (case.config.hidden, case.config.intermediate);
    let (down, act) = (gpu.upload(&case.down)?, gpu.upload(&case.act)?);
    let (down, act, weights) = (down.as_view(), act.as_view(), gpu.upload(&case.weights)?);
    let mut y = gpu.poisoned::<D>(case.shape.slots() * n)?;
    grouped_gemm_weighted_fwd_into(
        &gpu.device,
        &gpu.stream,
        plan,
        n,
        k,
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
        n,
        k,
        &case.act,
        linear,
        &weights,
        false,
        D::DTYPE,
    )?;
    Ok(Worst::of_bounded("y (weighted)", &gpu.download(&y.as_view())?, &wanted))
}
