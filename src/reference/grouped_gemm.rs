//! Each row times the weights of its expert: `y[r, :] = x_row * transpose(w[e]) + bias[e]` for the
//! rows `r` of expert `e`; and gate and up: two such products and the activation.
//!
//! The readable form is the triple loop in this file's tests. This file computes the same in
//! blocks: some rows of one expert times some columns. The weights of a panel of columns are
//! converted to `A` in `[columns, in]` order if necessary, so no whole copy is made; the product is
//! a call of the GEMM crate. Blocks depend on the shape alone and each output element belongs to
//! one of them, so results do not depend on the number of threads.

use super::accum::{Accum, Element};
use super::activation::activate;
use super::expert_weights::{
    GateUpWeights, LinearWeights, Panels, Part, Place, Values, row_weights, weights_of_rows,
};
use super::matmul::matmul_transposed;
use super::parallel::{Scratch, for_each};
use super::plan::Plan;
use crate::config::{ExpertConfig, WeightPosition};
use crate::dtype::Dtype;
use crate::error::{Error, Result, check_len, product};

/// Rows of `x` times the weights of their expert, plus its bias: `y` `[R, out]`. With `gather`, `x`
/// is `[T, in]` and row `r` reads `x[token_of_row[r]]`; without, it is `[R, in]`. Unused rows are
/// zero.
///
/// # Errors
/// A length that does not fit the shape, a width of 0, or a plan of other tokens.
pub fn grouped_gemm_fwd<A: Accum, D: Dtype>(
    plan: &Plan,
    out_features: usize,
    in_features: usize,
    x: &[impl Element<A>],
    weights: LinearWeights<'_, D>,
    gather: bool,
) -> Result<Vec<A>> {
    let op = "grouped_gemm_fwd";
    let part = Part::of_linear(op, plan, out_features, in_features, weights)?;
    let operands = Operands { op, plan, in_features, x, gather, values: Values::Signed };
    operands.multiply([part], out_features, |at, [y]| y + part.bias_at(at))
}

/// [`grouped_gemm_fwd`] with each row multiplied by its routing weight, the element of
/// `routing_weights` `[T, K]` whose slot has that row.
///
/// # Errors
/// Those of [`grouped_gemm_fwd`].
pub fn grouped_gemm_weighted_fwd<A: Accum, D: Dtype>(
    plan: &Plan,
    out_features: usize,
    in_features: usize,
    x: &[impl Element<A>],
    weights: LinearWeights<'_, D>,
    routing_weights: &[impl Element<A>],
    gather: bool,
) -> Result<Vec<A>> {
    let op = "grouped_gemm_weighted_fwd";
    let part = Part::of_linear(op, plan, out_features, in_features, weights)?;
    let row_weight: Vec<A> = row_weights(op, "routing_weights", plan, routing_weights)?;
    let operands = Operands { op, plan, in_features, x, gather, values: Values::Signed };
    operands.multiply([part], out_features, |at, [y]| row_weight[at.row] * (y + part.bias_at(at)))
}

/// `act` `[R, I]` = `activate(gate, up)`, where both are products as in [`grouped_gemm_fwd`];
/// without a gate, `activate(up)`. `routing_weights` `[T, K]` are given if they multiply the input
/// (here: the sums) or the activation's result.
///
/// # Errors
/// A configuration out of range, a length that does not fit the shape, a width of 0, a plan of
/// other tokens, and routing weights, biases or tensors that do not match the configuration.
#[allow(clippy::too_many_arguments, reason = "those of the operation")]
pub fn grouped_gemm_gate_up_fwd<A: Accum, D: Dtype>(
    plan: &Plan,
    experts: &ExpertConfig,
    intermediate: usize,
    in_features: usize,
    x: &[impl Element<A>],
    gate_up: GateUpWeights<'_, D>,
    routing_weights: Option<&[impl Element<A>]>,
    gather: bool,
) -> Result<Vec<A>> {
    let op = "grouped_gemm_gate_up_fwd";
    let (gate, up) = Part::of_gate_up(op, plan, experts, intermediate, in_features, gate_up)?;
    let weights = weights_of_rows(op, plan, experts, routing_weights)?;
    let (before, after) = match experts.weight_position {
        WeightPosition::Inside => (None, weights.as_deref()),
        WeightPosition::Output | WeightPosition::Input => (weights.as_deref(), None),
    };
    let times = |weights: Option<&[A]>, row: usize, value: A| match weights {
        Some(weights) => weights[row] * value,
        None => value,
    };
    let finish = |at: Place, gate: Option<A>, up: A| {
        times(after, at.row, activate(&experts.activation, gate, up))
    };
    let operands = Operands { op, plan, in_features, x, gather, values: Values::Signed };
    let sum =
        |part: Part<'_, D>, at: Place, sum| times(before, at.row, sum) + part.bias_at::<A>(at);
    match gate {
        Some(gate) => operands.multiply([gate, up], intermediate, |at, [g, u]| {
            finish(at, Some(sum(gate, at, g)), sum(up, at, u))
        }),
        None => operands.multiply([up], intermediate, |at, [u]| finish(at, None, sum(up, at, u))),
    }
}

/// The sums of one part without bias, or their magnitudes `sum over i of |x_i * w_i|`.
pub(super) fn sums<D: Dtype>(
    plan: &Plan,
    width: usize,
    in_features: usize,
    x: &[impl Element<f64>],
    part: Part<'_, D>,
    gather: bool,
    values: Values,
) -> Result<Vec<f64>> {
    let operands = Operands { op: "grouped_gemm", plan, in_features, x, gather, values };
    operands.multiply([part], width, |_, [y]| y)
}

/// The operands of a grouped GEMM besides its weights.
struct Operands<'a, X> {
    op: &'static str,
    plan: &'a Plan,
    in_features: usize,
    x: &'a [X],
    gather: bool,
    values: Values,
}

impl<X> Operands<'_, X> {
    /// `y[r, j] = epilogue` of the products of row `r` with feature `j` of each part.
    fn multiply<A: Accum, D: Dtype, const PARTS: usize>(
        &self,
        parts: [Part<'_, D>; PARTS],
        width: usize,
        epilogue: impl Fn(Place, [A; PARTS]) -> A + Sync,
    ) -> Result<Vec<A>>
    where
        X: Element<A>,
    {
        self.check(width)?;
        let Self { op, plan, in_features, values, .. } = *self;
        let mut y = vec![A::ZERO; product(op, "rows * width", plan.rows(), width)?];
        let blocks = blocks(plan, width, &mut y);
        let parts = parts.each_ref().map(|part| part as &dyn Panels<A>);
        let epilogue = |first: Place, sums: Sums<'_, A>, y: &mut [A]| {
            for (i, y) in y.iter_mut().enumerate() {
                let at = Place { column: first.column + i, ..first };
                *y = epilogue(at, std::array::from_fn(|part| sums.get(part, i)));
            }
        };
        Product { in_features, x: self, parts: &parts, values, width, epilogue: &epilogue }
            .write(blocks)?;
        Ok(y)
    }

    /// Checks `x` and the widths; `Part` has checked the weights and the plan.
    fn check(&self, width: usize) -> Result<()> {
        let Self { op, plan, in_features, .. } = *self;
        for (argument, value) in [("width", width), ("in_features", in_features)] {
            if value == 0 {
                let wanted = "at least 1".to_string();
                return Err(Error::Unsupported { op, argument, wanted, got: value.to_string() });
            }
        }
        if !self.gather {
            return check_len(
                op,
                "x",
                self.x.len(),
                product(op, "R * in_features", plan.rows(), in_features)?,
            );
        }
        let tokens = self.x.len() / in_features;
        check_len(op, "x", self.x.len(), tokens * in_features)?;
        match plan.token_of_row.iter().max() {
            Some(&last) if i64::from(last) >= tokens as i64 => {
                let why = format!(
                    "the plan has a token {last}, but `x` has {tokens} rows of {in_features}"
                );
                Err(Error::Mismatch { op, why })
            }
            _ => Ok(()),
        }
    }
}

/// Rows of `x`, of any type, as `A`.
trait WideRows<A>: Sync {
    /// Rows `first..first + count` of `x`, in place if possible, else in `buffer`.
    fn rows<'s>(&'s self, first: usize, count: usize, buffer: &'s mut Vec<A>) -> &'s [A];
}

impl<A: Accum, X: Element<A>> WideRows<A> for Operands<'_, X> {
    fn rows<'s>(&'s self, first: usize, count: usize, buffer: &'s mut Vec<A>) -> &'s [A] {
        let in_features = self.in_features;
        if !self.gather {
            return self.values.read(&self.x[first * in_features..][..count * in_features], buffer);
        }
        buffer.resize(count * in_features, A::ZERO);
        let tokens = &self.plan.token_of_row[first..][..count];
        for (row, &token) in buffer.chunks_exact_mut(in_features).zip(tokens) {
            X::widen_slice(&self.x[token as usize * in_features..][..in_features], row);
            self.values.apply(row);
        }
        buffer
    }
}

/// The most rows of a block: enough to amortize the conversion of the weights, once per block.
const BLOCK_ROWS: usize = 512;

/// Some rows of one expert, and their part of the output.
struct Block<'a, A> {
    expert: usize,
    first_row: usize,
    y: &'a mut [A],
}

/// Cuts the output into the rows of each block, without unused rows.
fn blocks<'y, A>(plan: &Plan, width: usize, mut y: &'y mut [A]) -> Vec<Block<'y, A>> {
    let mut blocks = Vec::new();
    for expert in 0..plan.num_experts() {
        let rows = plan.rows_of(expert);
        for first_row in rows.clone().step_by(BLOCK_ROWS) {
            let num_rows = BLOCK_ROWS.min(rows.end - first_row);
            let (block, rest) = y.split_at_mut(num_rows * width);
            blocks.push(Block { expert, first_row, y: block });
            y = rest;
        }
    }
    blocks
}

/// Sums of one row with some features of each part.
#[derive(Clone, Copy)]
struct Sums<'a, A> {
    /// `[parts, features, rows]`
    products: &'a [A],
    /// Elements of a part.
    part_len: usize,
    num_rows: usize,
    row: usize,
}

impl<A: Copy> Sums<'_, A> {
    fn get(&self, part: usize, feature: usize) -> A {
        self.products[part * self.part_len + feature * self.num_rows + self.row]
    }
}

/// Writes elements of a row, from the one at the place.
type Epilogue<'a, A> = dyn Fn(Place, Sums<'_, A>, &mut [A]) + Sync + 'a;

/// A product with operands of any element types behind references: its loops are compiled once for
/// each `A`, not for each combination.
struct Product<'a, A> {
    in_features: usize,
    x: &'a dyn WideRows<A>,
    parts: &'a [&'a dyn Panels<A>],
    values: Values,
    width: usize,
    epilogue: &'a Epilogue<'a, A>,
}

impl<A: Accum> Product<'_, A> {
    fn write(&self, blocks: Vec<Block<'_, A>>) -> Result<()> {
        for_each(blocks, |block| self.write_block(block))
    }

    fn write_block(&self, block: Block<'_, A>) -> Result<()> {
        let Self { in_features, width, .. } = *self;
        let Block { expert, first_row, y } = block;
        let num_rows = y.len() / width;
        let mut buffer = Vec::new();
        let x = self.x.rows(first_row, num_rows, &mut buffer);

        let columns = panel_columns(num_rows);
        let new_panel = || Vec::with_capacity(num_rows);
        let mut panels: Vec<Vec<&mut [A]>> =
            (0..width.div_ceil(columns)).map(|_| new_panel()).collect();
        for row in y.chunks_mut(width) {
            for (panel, piece) in panels.iter_mut().zip(row.chunks_mut(columns)) {
                panel.push(piece);
            }
        }

        let scratch = Scratch::<[Vec<A>; 2]>::new();
        for_each(panels.into_iter().enumerate(), |(panel, pieces)| {
            scratch.with(|[weights, products]| {
                let first = panel * columns;
                let columns = columns.min(width - first);
                let tile = num_rows * columns;
                products.resize(self.parts.len() * tile, A::ZERO);
                for (part, products) in self.parts.iter().zip(products.chunks_mut(tile)) {
                    let features = first..first + columns;
                    let w = part.panel(expert, features, in_features, self.values, weights);
                    // Weights times `x`, hence [columns, rows]: the crate is faster in this order.
                    matmul_transposed([columns, num_rows, in_features], w, x, products)?;
                }
                let products = &products[..];
                for (row, piece) in pieces.into_iter().enumerate() {
                    let place = Place { expert, row: first_row + row, column: first };
                    let sums = Sums { products, part_len: tile, num_rows, row };
                    (self.epilogue)(place, sums, piece);
                }
                Ok(())
            })
        })
    }
}

/// The columns of the output, and rows of the weights, of a panel.
fn panel_columns(num_rows: usize) -> usize {
    // Up to 8 rows the GEMM crate reads narrow panels in place; above, it packs both operands, and
    // packs the rows of `x` once per panel.
    if num_rows <= 8 { 32 } else { 128 }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::permute::permute_fwd;
    use super::super::plan::plan_fwd;
    use super::super::sample::Sampler;
    use super::*;
    use crate::shape::RoutingShape;

    /// The definition of the product, in f64.
    fn triple_loop<D: Dtype>(plan: &Plan, n: usize, k: usize, xp: &[D], w: &[D]) -> Vec<f64> {
        let mut y = vec![0.0; plan.rows() * n];
        for expert in 0..plan.num_experts() {
            for row in plan.rows_of(expert) {
                for column in 0..n {
                    for i in 0..k {
                        let weight = w[(expert * n + column) * k + i].to_f64();
                        y[row * n + column] += xp[row * k + i].to_f64() * weight;
                    }
                }
            }
        }
        y
    }

    fn assert_close<A: Accum>(got: &[A], want: &[f64], tolerance: f64) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got.to_f64() - want).abs() <= tolerance, "{got} instead of {want}");
        }
    }

    /// Blocks, panels, gathering and widening against the triple loop.
    fn check<D: Dtype>(
        num_tokens: usize,
        num_experts: usize,
        top_k: usize,
        half_n: usize,
        k: usize,
    ) {
        let shape = RoutingShape { num_tokens, num_experts, top_k };
        let (mut sampler, n) = (Sampler::new(num_tokens as u64), 2 * half_n);
        let plan = sampler.plan(&shape);
        let x: Vec<D> = sampler.elements(num_tokens * k);
        let w: Vec<D> = sampler.elements(num_experts * n * k);
        let xp = permute_fwd(&shape, &plan, k, &x).unwrap();
        let want = triple_loop(&plan, n, k, &xp, &w);
        let (double, single) = (1e-14 * k as f64, 1e-6 * k as f64);

        let linear = LinearWeights::new(&w[..]);
        let gathered = grouped_gemm_fwd::<f64, D>(&plan, n, k, &x, linear, true).unwrap();
        assert_close(&gathered, &want, double);
        let permuted = grouped_gemm_fwd::<f64, D>(&plan, n, k, &xp, linear, false).unwrap();
        assert_eq!(gathered, permuted);
        let got = grouped_gemm_fwd::<f32, D>(&plan, n, k, &x, linear, true).unwrap();
        assert_close(&got, &want, single);
        assert_eq!(grouped_gemm_fwd::<f32, D>(&plan, n, k, &xp, linear, false).unwrap(), got);
        // Rows of the accumulation type, as in the layer's second product.
        let wide: Vec<f64> = xp.iter().map(|x| x.to_f64()).collect();
        let got = grouped_gemm_fwd::<f64, D>(&plan, n, k, &wide, linear, false).unwrap();
        assert_eq!(got, permuted);

        let swiglu = |y: &[f64]| -> Vec<f64> {
            let silu = |gate: f64| gate / (1.0 + (-gate).exp());
            (0..half_n).map(|i| silu(y[i]) * y[half_n + i]).collect()
        };
        let act: Vec<f64> = want.chunks(n).flat_map(swiglu).collect();
        let (experts, gate_up) = (ExpertConfig::default(), GateUpWeights::fused(&w[..]));
        let none = None::<&[f64]>;
        let got: Vec<f64> =
            grouped_gemm_gate_up_fwd(&plan, &experts, half_n, k, &x, gate_up, none, true).unwrap();
        assert_close(&got, &act, 10.0 * k as f64 * double);
        let none = None::<&[f32]>;
        let got: Vec<f32> =
            grouped_gemm_gate_up_fwd(&plan, &experts, half_n, k, &xp, gate_up, none, false)
                .unwrap();
        assert_close(&got, &act, 10.0 * k as f64 * single);

        let part = Part::of_linear("test", &plan, n, k, linear).unwrap();
        let magnitude = sums(&plan, n, k, &x, part, true, Values::Absolute).unwrap();
        let positive = |values: &[D]| -> Vec<D> {
            values.iter().map(|value| D::from_f64(value.to_f64().abs())).collect()
        };
        assert_close(&magnitude, &triple_loop(&plan, n, k, &positive(&xp), &positive(&w)), double);
    }

    #[test]
    fn blocks_agree_with_the_triple_loop() {
        check::<bf16>(0, 2, 1, 3, 5);
        check::<bf16>(1, 1, 1, 1, 1);
        check::<f16>(5, 4, 2, 17, 33);
        check::<f32>(40, 3, 2, 70, 65);
        check::<bf16>(40, 3, 2, 139, 130);
        check::<f32>(50, 20, 8, 10, 24);
    }

    #[test]
    fn rows_of_several_blocks() {
        check::<f32>(2 * BLOCK_ROWS + 100, 1, 1, 3, 7);
        check::<bf16>(BLOCK_ROWS + 3, 3, 3, 2, 4);
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let shape = RoutingShape { num_tokens: 90, num_experts: 5, top_k: 2 };
        let mut sampler = Sampler::new(5);
        let plan = sampler.plan(&shape);
        let (n, k) = (300, 200);
        let x: Vec<bf16> = sampler.elements(shape.num_tokens * k);
        let w: Vec<bf16> = sampler.elements(shape.num_experts * n * k);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let w = LinearWeights::new(&w[..]);
            pool.install(|| grouped_gemm_fwd::<f32, bf16>(&plan, n, k, &x, w, true).unwrap())
        };
        let bits = |y: Vec<f32>| -> Vec<u32> { y.into_iter().map(f32::to_bits).collect() };
        let one = bits(run(1));
        assert!([2, 3, 7].into_iter().all(|threads| bits(run(threads)) == one));
    }

    #[test]
    fn unused_rows_are_not_read() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 1, top_k: 1 };
        let plan = plan_fwd(&shape, &[7, 0]).unwrap();
        let run = |x: [f32; 2], gather| {
            grouped_gemm_fwd::<f32, f32>(&plan, 1, 1, &x, LinearWeights::new(&[2.0]), gather)
        };
        assert_eq!(run([f32::NAN, 3.0], true).unwrap(), [6.0, 0.0]);
        assert_eq!(run([3.0, f32::NAN], false).unwrap(), [6.0, 0.0]);
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let shape = RoutingShape { num_tokens: 2, num_experts: 2, top_k: 1 };
        let plan = plan_fwd(&shape, &[0, 1]).unwrap();
        let run = |n, k, x: usize, w: usize, gather| {
            let (x, w) = (vec![0.0f32; x], vec![0.0f32; w]);
            grouped_gemm_fwd::<f32, f32>(&plan, n, k, &x, LinearWeights::new(&w), gather).is_ok()
        };
        assert!(run(3, 4, 8, 24, true) && run(3, 4, 8, 24, false));
        assert!(!run(3, 4, 8, 23, true) && !run(3, 4, 9, 24, true) && !run(3, 4, 4, 24, true));
        assert!(!run(3, 4, 7, 24, false) && !run(0, 4, 8, 0, true) && !run(3, 0, 0, 0, true));
        assert!(!run(usize::MAX, 4, 8, 24, true));
    }
}
