//! The experts' weights: the place of each element, in any layout of a checkpoint.

use std::ops::Range;

use super::accum::{Accum, Element, widened};
use super::plan::Plan;
use crate::config::{ExpertConfig, GateUpLayout, WeightOrder, WeightPosition};
use crate::dtype::Dtype;
use crate::error::{Error, Result, check_len, product};
pub use crate::tensors::GateUpTensors;

/// The weights of all experts for one product.
#[derive(Debug, Clone, Copy)]
pub struct LinearWeights<'a, D> {
    /// `[E, out, in]` or `[E, in, out]`, by `order`.
    pub w: &'a [D],
    /// `[E, out]`
    pub bias: Option<&'a [D]>,
    /// Which dimension of `w` is contiguous.
    pub order: WeightOrder,
}

/// The gate and up projections of all experts.
#[derive(Debug, Clone, Copy)]
pub struct GateUpWeights<'a, D> {
    /// The weights.
    pub tensors: GateUpTensors<&'a [D]>,
    /// `[E, 2I]`, or `[E, I]` without a gate, in the order of the weights' features; for separate
    /// tensors gate's biases, then up's.
    pub bias: Option<&'a [D]>,
}

impl<'a, D> LinearWeights<'a, D> {
    /// `w` `[E, out, in]`, and no bias.
    pub fn new(w: &'a [D]) -> Self {
        Self { w, bias: None, order: WeightOrder::OutIn }
    }
}

impl<'a, D> GateUpWeights<'a, D> {
    /// One tensor, and no bias.
    pub fn fused(gate_up: &'a [D]) -> Self {
        Self { tensors: GateUpTensors::Fused(gate_up), bias: None }
    }
}

/// The weights of one product: element `(expert, feature, i)` is at
/// `first + expert * strides[0] + feature * strides[1] + i * strides[2]`.
#[derive(Clone, Copy)]
pub(super) struct Part<'a, D> {
    w: &'a [D],
    first: usize,
    strides: [usize; 3],
    bias: Option<&'a [D]>,
    first_bias: usize,
    bias_strides: [usize; 2],
}

/// An element of an output.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) expert: usize,
    pub(super) row: usize,
    pub(super) column: usize,
}

impl<'a, D: Dtype> Part<'a, D> {
    pub(super) fn of_linear(
        op: &'static str,
        plan: &Plan,
        out_features: usize,
        in_features: usize,
        weights: LinearWeights<'a, D>,
    ) -> Result<Self> {
        plan.check(op)?;
        let LinearWeights { w, bias, order } = weights;
        let features = product(op, "E * out_features", plan.num_experts(), out_features)?;
        check_len(
            op,
            "w",
            w.len(),
            product(op, "E * out_features * in_features", features, in_features)?,
        )?;
        if let Some(bias) = bias {
            check_len(op, "bias", bias.len(), features)?;
        }
        let strides = strides(order, out_features, 1, in_features);
        Ok(Self { w, first: 0, strides, bias, first_bias: 0, bias_strides: [out_features, 1] })
    }

    /// Gate, if the experts have one, and up.
    pub(super) fn of_gate_up(
        op: &'static str,
        plan: &Plan,
        experts: &ExpertConfig,
        intermediate: usize,
        in_features: usize,
        gate_up: GateUpWeights<'a, D>,
    ) -> Result<(Option<Self>, Self)> {
        plan.check(op)?;
        experts.check(op)?;
        let GateUpWeights { tensors, bias } = gate_up;
        require(op, "biases of gate and up", experts.gate_up_bias, bias.is_some())?;
        let separate = matches!(tensors, GateUpTensors::Separate { .. });
        require(op, "separate tensors", experts.gate_up == GateUpLayout::Separate, separate)?;
        let parts = if experts.gated { 2 } else { 1 };
        let features = product(op, "E * I", plan.num_experts(), intermediate)?;
        let elements = product(op, "E * I * in_features", features, in_features)?;
        let (features, both) = (
            product(op, "2 * E * I", parts, features)?,
            product(op, "2 * E * I * in_features", parts, elements)?,
        );
        let (first, second) = match tensors {
            GateUpTensors::Fused(w) => {
                check_len(op, "gate_up", w.len(), both)?;
                (w, w)
            }
            GateUpTensors::Separate { gate, up } => {
                check_len(op, "gate", gate.len(), elements)?;
                check_len(op, "up", up.len(), elements)?;
                (gate, up)
            }
        };
        if let Some(bias) = bias {
            check_len(op, "bias", bias.len(), features)?;
        }

        // Features of an expert's tensor, from a feature of gate to the next, and to the same of
        // up.
        let (features, step, to_up) = match experts.gate_up {
            GateUpLayout::Concatenated => (parts * intermediate, 1, (parts - 1) * intermediate),
            GateUpLayout::Interleaved => (2 * intermediate, 2, 1),
            GateUpLayout::Separate => (intermediate, 1, 0),
        };
        let strides = strides(experts.gate_up_order, features, step, in_features);
        let bias_to_up = if separate { intermediate } else { to_up };
        let bias_strides = [parts * intermediate, step];
        let gate = Self { w: first, first: 0, strides, bias, first_bias: 0, bias_strides };
        let first = to_up * strides[1] / step;
        let up = Self { w: second, first, first_bias: bias_to_up, ..gate };
        Ok((experts.gated.then_some(gate), up))
    }

    pub(super) fn bias_at<A: Accum>(self, at: Place) -> A {
        let [expert, feature] = self.bias_strides;
        let index = self.first_bias + at.expert * expert + at.column * feature;
        self.bias.map_or(A::ZERO, |bias| A::from_dtype(bias[index]))
    }

    /// The bias of each output, `[R, width]`; 0 for unused rows.
    pub(super) fn biases(self, plan: &Plan, width: usize) -> Vec<f64> {
        let mut biases = vec![0.0; plan.rows() * width];
        for expert in 0..plan.num_experts() {
            for row in plan.rows_of(expert) {
                for column in 0..width {
                    biases[row * width + column] = self.bias_at(Place { expert, row, column });
                }
            }
        }
        biases
    }
}

/// Whether a product is of the values or of their magnitudes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Values {
    Signed,
    Absolute,
}

impl Values {
    /// The elements or their magnitudes as `A`, in place if possible, else in `buffer`.
    pub(super) fn read<'s, A: Accum, V: Element<A>>(
        self,
        values: &'s [V],
        buffer: &'s mut Vec<A>,
    ) -> &'s [A] {
        match self {
            Values::Signed => widened(values, buffer),
            Values::Absolute => {
                buffer.resize(values.len(), A::ZERO);
                V::widen_slice(values, buffer);
                self.apply(buffer);
                buffer
            }
        }
    }

    pub(super) fn apply<A: Accum>(self, values: &mut [A]) {
        if self == Values::Absolute {
            values.iter_mut().for_each(|value| *value = value.abs());
        }
    }
}

/// Weights of experts, of any type and layout, as `A`.
pub(super) trait Panels<A>: Sync {
    /// Some features of an expert, `[features, in]`, in place if possible, else in `buffer`.
    fn panel<'s>(
        &'s self,
        expert: usize,
        features: Range<usize>,
        in_features: usize,
        values: Values,
        buffer: &'s mut Vec<A>,
    ) -> &'s [A];
}

impl<A: Accum, D: Dtype> Panels<A> for Part<'_, D> {
    fn panel<'s>(
        &'s self,
        expert: usize,
        features: Range<usize>,
        in_features: usize,
        values: Values,
        buffer: &'s mut Vec<A>,
    ) -> &'s [A] {
        let [expert_stride, feature_stride, input_stride] = self.strides;
        let start = self.first + expert * expert_stride + features.start * feature_stride;
        if feature_stride == in_features && input_stride == 1 {
            return values.read(&self.w[start..][..features.len() * in_features], buffer);
        }
        buffer.resize(features.len() * in_features, A::ZERO);
        for (feature, wide) in buffer.chunks_exact_mut(in_features).enumerate() {
            let start = start + feature * feature_stride;
            for (i, wide) in wide.iter_mut().enumerate() {
                *wide = A::from_dtype(self.w[start + i * input_stride]);
            }
            values.apply(wide);
        }
        buffer
    }
}

/// The strides of a tensor with `features` per expert, of which every `step`-th is of the same
/// projection.
fn strides(order: WeightOrder, features: usize, step: usize, in_features: usize) -> [usize; 3] {
    match order {
        WeightOrder::OutIn => [features * in_features, step * in_features, 1],
        WeightOrder::InOut => [features * in_features, step, features],
    }
}

/// The routing weight of each row, `[R]`, if the weights multiply rows; 0 for unused rows.
///
/// # Errors
/// Weights of another length, and weights that are given but not used by `experts`, or the reverse.
pub(super) fn weights_of_rows<A: Accum>(
    op: &'static str,
    plan: &Plan,
    experts: &ExpertConfig,
    routing_weights: Option<&[impl Element<A>]>,
) -> Result<Option<Vec<A>>> {
    let wanted = experts.weight_position != WeightPosition::Output;
    require(op, "routing weights", wanted, routing_weights.is_some())?;
    routing_weights.map(|weights| row_weights(op, "routing_weights", plan, weights)).transpose()
}

/// Each row's element of `[T, K]`; 0 for unused rows.
pub(super) fn row_weights<A: Accum>(
    op: &'static str,
    argument: &'static str,
    plan: &Plan,
    weights: &[impl Element<A>],
) -> Result<Vec<A>> {
    check_len(op, argument, weights.len(), plan.row_of_slot.len())?;
    let mut weights_of_rows = vec![A::ZERO; plan.rows()];
    for (&row, weight) in plan.row_of_slot.iter().zip(weights) {
        if let Some(of_row) = usize::try_from(row).ok().and_then(|row| weights_of_rows.get_mut(row))
        {
            *of_row = weight.widen();
        }
    }
    Ok(weights_of_rows)
}

fn require(op: &'static str, what: &str, wanted: bool, given: bool) -> Result<()> {
    let why = match (wanted, given) {
        (true, false) => format!("{what} are required by the configuration but not given"),
        (false, true) => format!("{what} are given but not enabled in the configuration"),
        _ => return Ok(()),
    };
    Err(Error::Mismatch { op, why })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::grouped_gemm::grouped_gemm_gate_up_fwd;
    use super::super::plan::plan_fwd;
    use super::super::sample::Sampler;
    use super::*;
    use crate::config::Activation;
    use crate::shape::RoutingShape;

    /// Every layout, with biases and weights, as one sum per element.
    #[test]
    fn layouts_match_their_definition() {
        let (e, i, k) = (3usize, 5usize, 4usize);
        let shape = RoutingShape { num_tokens: 6, num_experts: e, top_k: 2 };
        let mut sampler = Sampler::new(8);
        let plan = sampler.plan(&shape);
        let x: Vec<bf16> = sampler.elements(shape.num_tokens * k);
        let weights: Vec<f32> = sampler.elements(shape.slots());
        let (w, bias): (Vec<bf16>, Vec<bf16>) =
            (sampler.elements(e * 2 * i * k), sampler.elements(e * 2 * i));
        let activation = Activation { up_offset: 0.5, ..Activation::default() };
        for (gate_up, order) in
            [GateUpLayout::Concatenated, GateUpLayout::Interleaved, GateUpLayout::Separate]
                .into_iter()
                .flat_map(|gate_up| [(gate_up, WeightOrder::OutIn), (gate_up, WeightOrder::InOut)])
        {
            for weight_position in
                [WeightPosition::Output, WeightPosition::Input, WeightPosition::Inside]
            {
                let experts = ExpertConfig {
                    activation,
                    gate_up,
                    gate_up_order: order,
                    gate_up_bias: true,
                    weight_position,
                    ..ExpertConfig::default()
                };
                // Element (expert, part, feature, input) of a tensor.
                let at =
                    |tensor: &[bf16], expert: usize, part: usize, feature: usize, input: usize| {
                        let (features, feature) = match gate_up {
                            GateUpLayout::Concatenated => (2 * i, part * i + feature),
                            GateUpLayout::Interleaved => (2 * i, 2 * feature + part),
                            GateUpLayout::Separate => (i, feature),
                        };
                        let index = match order {
                            WeightOrder::OutIn => (expert * features + feature) * k + input,
                            WeightOrder::InOut => (expert * k + input) * features + feature,
                        };
                        f64::from(tensor[index])
                    };
                let halves = w.split_at(e * i * k);
                let tensors = match gate_up {
                    GateUpLayout::Separate => {
                        GateUpTensors::Separate { gate: halves.0, up: halves.1 }
                    }
                    _ => GateUpTensors::Fused(&w[..]),
                };
                let given = (weight_position != WeightPosition::Output).then_some(&weights[..]);
                let gate_up_weights = GateUpWeights { tensors, bias: Some(&bias) };
                let got = grouped_gemm_gate_up_fwd::<f64, bf16>(
                    &plan,
                    &experts,
                    i,
                    k,
                    &x,
                    gate_up_weights,
                    given,
                    true,
                )
                .unwrap();
                for (slot, &row) in plan.row_of_slot.iter().enumerate().filter(|(_, r)| **r >= 0) {
                    let row = row as usize;
                    let expert =
                        plan.expert_offsets.iter().rposition(|&o| o <= row as i32).unwrap();
                    let x = &x[slot / 2 * k..][..k];
                    let p = f64::from(weights[slot]);
                    for feature in 0..i {
                        let sum = |part: usize| -> f64 {
                            let tensor = match (gate_up, part) {
                                (GateUpLayout::Separate, 0) => halves.0,
                                (GateUpLayout::Separate, _) => halves.1,
                                _ => &w[..],
                            };
                            let w = |input| at(tensor, expert, part, feature, input);
                            let dot: f64 = (0..k).map(|input| x[input].to_f64() * w(input)).sum();
                            let place = match gate_up {
                                GateUpLayout::Interleaved => 2 * feature + part,
                                _ => part * i + feature,
                            };
                            let p = if weight_position == WeightPosition::Input { p } else { 1.0 };
                            p * dot + bias[expert * 2 * i + place].to_f64()
                        };
                        let (gate, up) = (sum(0), sum(1));
                        let p = if weight_position == WeightPosition::Inside { p } else { 1.0 };
                        let want = p * (gate / (1.0 + (-gate).exp()) * (up + 0.5));
                        let got = got[row * i + feature];
                        assert!((got - want).abs() < 1e-13, "{experts}: {got} instead of {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn buffers_must_match_the_configuration() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
        let plan = plan_fwd(&shape, &[0, 1]).unwrap();
        let (x, w, weights) = ([0.0f32; 8], [0.0f32; 48], [1.0f32; 2]);
        let run = |experts: &ExpertConfig, bias: Option<&[f32]>, weights: Option<&[f32]>| {
            let gate_up = GateUpWeights { bias, ..GateUpWeights::fused(&w[..]) };
            grouped_gemm_gate_up_fwd::<f32, f32>(&plan, experts, 3, 4, &x, gate_up, weights, true)
        };
        let plain = ExpertConfig::default();
        let biased = ExpertConfig { gate_up_bias: true, ..plain };
        let weighted = ExpertConfig { weight_position: WeightPosition::Input, ..plain };
        assert!(run(&plain, None, None).is_ok());
        assert!(run(&biased, Some(&w[..12]), None).is_ok());
        assert!(run(&weighted, None, Some(&weights)).is_ok());
        assert!(run(&plain, Some(&w[..12]), None).is_err() && run(&biased, None, None).is_err());
        assert!(run(&biased, Some(&w[..11]), None).is_err());
        assert!(run(&plain, None, Some(&weights)).is_err() && run(&weighted, None, None).is_err());
        assert!(run(&weighted, None, Some(&weights[..1])).is_err());
        let separate = ExpertConfig { gate_up: GateUpLayout::Separate, ..plain };
        assert!(run(&separate, None, None).is_err());
        assert!(run(&ExpertConfig { gated: false, ..plain }, None, None).is_err());
    }
}
