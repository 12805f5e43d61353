//! candle's sparse MoE block.
//!
//! The block of Qwen3-MoE in candle-transformers is private. `Block` has the same tensor
//! operations: softmax, sort, a copy of the ids to the host, and for each expert a selection of
//! rows, three linears with SiLU, and an addition by index.

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{Linear, ops};

use crate::input::Input;

pub struct Block {
    router_gate: Linear,
    experts: Vec<Expert>,
    top_k: usize,
    renormalize: bool,
}

struct Expert {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// The tokens of one expert and their routing weights.
#[derive(Default)]
pub struct Group {
    pub tokens: Vec<u32>,
    pub weights: Vec<f32>,
}

impl Module for Expert {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = x.apply(&self.gate_proj)?.silu()?;
        let up = x.apply(&self.up_proj)?;
        (gate * up)?.apply(&self.down_proj)
    }
}

impl Block {
    /// Copies the weights of `input` to `device`.
    pub fn new(input: &Input, device: &Device, dtype: DType) -> Result<Self> {
        let load = |tensor: &Tensor| tensor.to_dtype(dtype)?.to_device(device);
        let (gate_up, down) = (load(&input.gate_up)?, load(&input.down)?);
        let width = input.shape.intermediate;
        let linear = |weight| Linear::new(weight, None);
        let expert = |index| {
            let both = gate_up.get(index)?;
            Ok(Expert {
                gate_proj: linear(both.narrow(0, 0, width)?),
                up_proj: linear(both.narrow(0, width, width)?),
                down_proj: linear(down.get(index)?),
            })
        };
        let experts = (0..input.shape.experts).map(expert).collect::<Result<_>>()?;
        let router_gate = linear(load(&input.router_gate)?);
        let (top_k, renormalize) = (input.shape.top_k, input.renormalize);
        Ok(Self { router_gate, experts, top_k, renormalize })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.with_logits(x, &x.apply(&self.router_gate)?)
    }

    pub fn with_logits(&self, x: &Tensor, logits: &Tensor) -> Result<Tensor> {
        let mut y = x.zeros_like()?;
        for (expert, group) in self.experts.iter().zip(self.route(logits)?) {
            if group.tokens.is_empty() {
                continue;
            }
            let tokens = Tensor::new(group.tokens, x.device())?;
            let weights = Tensor::new(group.weights, x.device())?;
            let weights = weights.reshape(((), 1))?.to_dtype(x.dtype())?;
            let rows = x.index_select(&tokens, 0)?.apply(expert)?.broadcast_mul(&weights)?;
            y = y.index_add(&tokens, &rows, 0)?;
        }
        Ok(y)
    }

    /// Computes the rows of all experts in order; `tokens` has those of each expert with rows.
    pub fn products(&self, x: &Tensor, tokens: &[Option<Tensor>]) -> Result<Tensor> {
        let with_rows = self.experts.iter().zip(tokens);
        let rows = with_rows.filter_map(|(expert, tokens)| {
            tokens.as_ref().map(|tokens| x.index_select(tokens, 0)?.apply(expert))
        });
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
    }

    fn route(&self, logits: &Tensor) -> Result<Vec<Group>> {
        let scores = ops::softmax_last_dim(logits)?;
        let ids = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, self.top_k)?;
        let ids = ids.contiguous()?;
        let scores = scores.gather(&ids, D::Minus1)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let ids = ids.to_vec2::<u32>()?;
        let mut groups: Vec<Group> = self.experts.iter().map(|_| Group::default()).collect();
        for (token, (ids, scores)) in ids.iter().zip(&scores).enumerate() {
            let sum = if self.renormalize { scores.iter().sum() } else { 1f32 };
            for (&id, score) in ids.iter().zip(scores) {
                groups[id as usize].tokens.push(token as u32);
                groups[id as usize].weights.push(score / sum);
            }
        }
        Ok(groups)
    }
}
