//! The layer in f64 for a few tokens, and the relative error of a result.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

use crate::input::Input;

/// The most tokens, or rows, that are compared with the truth.
const CHECKED: usize = 16;

/// Indices of rows of a result, and their truth.
pub type Rows = Vec<(usize, Vec<f64>)>;

/// Computes the rows of y for some tokens, routed by `logits [T,E]`.
pub fn layer_rows(input: &Input, logits: &[Vec<f64>]) -> Result<Rows> {
    // If two scores differ by a rounding, either order is right. Tokens with a clear choice are
    // taken; if there are none, all tokens are candidates.
    let epsilon = match input.x.dtype() {
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        _ => f32::EPSILON.into(),
    };
    let clear = |token: &usize| {
        let order = descending(&logits[*token]);
        let score = |rank: usize| logits[*token][order[rank]];
        let largest = logits[*token].iter().fold(0f64, |largest, score| largest.max(score.abs()));
        order.len() == input.shape.top_k
            || score(input.shape.top_k - 1) - score(input.shape.top_k) > 4.0 * epsilon * largest
    };
    let all: Vec<usize> = (0..input.shape.tokens).collect();
    let mut tokens: Vec<usize> = all.iter().copied().filter(clear).collect();
    if tokens.is_empty() {
        tokens = all;
    }
    let mut pairs = Vec::new();
    for token in spread(&tokens) {
        let order = descending(&logits[token]);
        let chosen = &order[..input.shape.top_k];
        let score = |expert: usize| (logits[token][expert] - logits[token][order[0]]).exp();
        // The weights over these experts sum to one.
        let among = if input.renormalize { chosen } else { &order };
        let sum: f64 = among.iter().map(|&e| score(e)).sum();
        pairs.extend(chosen.iter().map(|&e| (token, e, token, score(e) / sum)));
    }
    weighted_sums(input, &pairs)
}

/// Computes some rows of a result whose row `r` has the `(token, expert)` of `rows[r]`.
pub fn product_rows(input: &Input, rows: &[(usize, usize)]) -> Result<Rows> {
    let all: Vec<usize> = (0..rows.len()).collect();
    let pairs: Vec<_> =
        spread(&all).into_iter().map(|row| (row, rows[row].1, rows[row].0, 1.0)).collect();
    weighted_sums(input, &pairs)
}

/// Computes `x router_gate^T` in f64, for peers that compute the logits.
pub fn logits_from_x(input: &Input) -> Result<Vec<Vec<f64>>> {
    let (x, gate) = (doubles(&input.x)?, doubles(&input.router_gate)?);
    let width = input.shape.hidden;
    let row = |x: &[f64]| gate.chunks(width).map(|gate| dot(x, gate)).collect();
    Ok(x.chunks(width).map(row).collect())
}

/// Returns `||got - truth|| / ||truth||` over the rows. NaN and infinity are errors.
pub fn relative_error(got: &Tensor, rows: &Rows) -> Result<f64> {
    let got = got.to_device(&Device::Cpu)?;
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, truth) in rows {
        let got = doubles(&got.get(*row)?)?;
        ensure!(got.len() == truth.len(), "rows of {} numbers, not {}", got.len(), truth.len());
        error += got.iter().zip(truth).map(|(got, truth)| (got - truth).powi(2)).sum::<f64>();
        norm += truth.iter().map(|truth| truth.powi(2)).sum::<f64>();
    }
    ensure!(norm != 0.0, "the truth is all zeros");
    let relative = (error / norm).sqrt();
    ensure!(relative.is_finite(), "the result, or the truth, has NaN or infinity");
    Ok(relative)
}

/// Sums `weight * expert(x[token])` into rows, for each `(row, expert, token, weight)`.
fn weighted_sums(input: &Input, pairs: &[(usize, usize, usize, f64)]) -> Result<Rows> {
    let width = input.shape.hidden;
    let mut by_expert: BTreeMap<usize, Vec<(usize, usize, f64)>> = BTreeMap::new();
    for &(row, expert, token, weight) in pairs {
        by_expert.entry(expert).or_default().push((row, token, weight));
    }
    let mut rows: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for (expert, uses) in by_expert {
        let gate_up = doubles(&input.gate_up.get(expert)?)?;
        let down = doubles(&input.down.get(expert)?)?;
        let (gate, up) = gate_up.split_at(input.shape.intermediate * width);
        for (row, token, weight) in uses {
            let x = doubles(&input.x.get(token)?)?;
            let silu = |gate: f64| gate / (1.0 + (-gate).exp());
            let inner = gate.chunks(width).zip(up.chunks(width));
            let inner: Vec<f64> =
                inner.map(|(gate, up)| silu(dot(gate, &x)) * dot(up, &x)).collect();
            let sums = rows.entry(row).or_insert_with(|| vec![0.0; width]);
            for (sum, down) in sums.iter_mut().zip(down.chunks(inner.len())) {
                *sum += weight * dot(down, &inner);
            }
        }
    }
    Ok(rows.into_iter().collect())
}

fn spread(all: &[usize]) -> Vec<usize> {
    let taken = all.len().min(CHECKED);
    (0..taken).map(|index| all[index * (all.len() - 1) / (taken - 1).max(1)]).collect()
}

/// Returns the indices in order of descending score; ties by ascending index.
fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

fn doubles(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
