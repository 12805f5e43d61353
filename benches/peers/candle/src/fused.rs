//! The fused layer of candle-transformers, for CUDA.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::fused_moe::{FusedMoe, MoeCfg};

use crate::input::Input;

/// Copies the weights of `input` to `device`, under the names of a checkpoint.
pub fn load(input: &Input, device: &Device, dtype: DType) -> Result<FusedMoe> {
    let shape = input.shape;
    let mut tensors = HashMap::from([("gate.weight".to_owned(), input.router_gate.clone())]);
    for expert in 0..shape.experts {
        let both = input.gate_up.get(expert)?;
        let parts = [
            ("gate_proj", both.narrow(0, 0, shape.intermediate)?),
            ("up_proj", both.narrow(0, shape.intermediate, shape.intermediate)?),
            ("down_proj", input.down.get(expert)?),
        ];
        let named = |(part, tensor)| (format!("experts.{expert}.{part}.weight"), tensor);
        tensors.extend(parts.map(named));
    }
    let config = MoeCfg {
        hidden_size: shape.hidden,
        num_experts: shape.experts,
        num_experts_per_tok: shape.top_k,
        moe_intermediate_size: shape.intermediate,
        norm_topk_prob: input.renormalize,
        act: Activation::Silu,
        decoder_sparse_step: None,
    };
    FusedMoe::new(&config, VarBuilder::from_tensors(tensors, dtype, device), dtype)
}

/// Runs the layer with its router. Several tokens are a prefill to candle.
pub fn from_x(layer: &FusedMoe, x: &Tensor) -> Result<Tensor> {
    let (tokens, _) = x.dims2()?;
    layer.forward(&x.unsqueeze(0)?, tokens > 1)?.squeeze(0)
}
